import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.stability import BufferGuard, PendingWindow, StepVerdict, gated_step, should_skip


class Norms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))


def test_statistics_of_a_skipped_window_are_put_back_bitwise_also_from_nan() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.full((8, 4), math.nan))
    assert not torch.isfinite(model.get_buffer("1.running_mean")).all()
    guard.end_window(skip=torch.ones(()))
    assert len(before) == 6
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_statistics_of_an_applied_window_stay_and_become_the_next_ones_start() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    model(torch.randn(8, 4) + 5)
    moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guard.end_window(skip=torch.zeros(()))
    guard.begin_window()
    model(torch.randn(8, 4) + 5)
    assert guard.at_start.keys() == moved.keys()
    assert all(torch.equal(value, moved[name]) for name, value in guard.at_start.items())


def test_layers_in_evaluation_mode_are_not_copied() -> None:
    model = Norms().train()
    model[2].eval()
    assert {name.split(".")[0] for name in BufferGuard(model).at_start} == {"1"}


numbers = st.sampled_from([0.0, 1.5, 1e30, math.inf, -math.inf, math.nan])


def trained_model() -> tuple[nn.Linear, torch.optim.AdamW]:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@settings(deadline=None)
@given(poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]), seed=st.integers(0, 1000))
def test_skipped_step_leaves_weights_moments_and_step_count_bitwise_unchanged(poison: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, optimizer = trained_model()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    gated_step(optimizer, skip=torch.ones(()))
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for index, moments in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][index][name]) for name, value in moments.items())


def test_applied_step_is_the_optimizers_own() -> None:
    torch.manual_seed(0)
    model, optimizer = trained_model()
    reference = copy.deepcopy(model)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, fused=True)
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module in (model, reference):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    gated_step(optimizer, skip=torch.zeros(()))
    reference_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@given(loss=numbers, grad_norm=numbers, found_inf=st.sampled_from([0.0, 1.0]), scale=st.sampled_from([1.0, 1024.0]))
def test_a_window_is_applied_on_the_device_exactly_when_the_host_calls_it_applied(
    loss: float, grad_norm: float, found_inf: float, scale: float
) -> None:
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, scale)]
    verdict = PendingWindow(*values, number=1, lr=0.1, sample_indices=[]).read().verdict
    assert (should_skip(*values[:3]).item() == 0) == (verdict is StepVerdict.APPLIED)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "found_inf", "scale", "verdict"),
    [
        (1.0, 2.0, 0.0, 1024.0, StepVerdict.APPLIED),
        (1.0, math.inf, 1.0, 1024.0, StepVerdict.OVERFLOW),
        (1.0, math.nan, 1.0, 2.0, StepVerdict.OVERFLOW),
        (1.0, math.inf, 1.0, 1.0, StepVerdict.NONFINITE_GRAD),  # the scale is at its floor
        (1.0, math.inf, 0.0, 1024.0, StepVerdict.NONFINITE_GRAD),  # finite gradients of infinite norm
        (math.nan, math.nan, 1.0, 1024.0, StepVerdict.NONFINITE_LOSS),
        (math.inf, 2.0, 0.0, 1.0, StepVerdict.NONFINITE_LOSS),
    ],
)
def test_verdicts(loss: float, grad_norm: float, found_inf: float, scale: float, verdict: StepVerdict) -> None:
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, scale)]
    outcome = PendingWindow(*values, number=1, lr=0.1, sample_indices=[]).read()
    assert outcome.verdict is verdict
    assert outcome.loss_scale == scale
