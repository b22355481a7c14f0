import copy
import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training.batchnorm import BufferGuard
from training.gate import PendingOutcome, SpikeDetector, StepVerdict, gated_step, should_skip


class Norms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))


def test_statistics_of_a_skipped_window_are_put_back_bitwise_also_from_nan() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    guard.begin_window()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.full((8, 4), math.nan))
    assert not torch.isfinite(model.get_buffer("1.running_mean")).all()
    guard.end_window(skip=torch.ones(()))
    assert len(before) == 6
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_statistics_of_an_applied_window_stay_and_become_the_next_ones_start() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    guard.begin_window()
    model(torch.randn(8, 4) + 5)
    moved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guard.end_window(skip=torch.zeros(()))
    guard.begin_window()
    model(torch.randn(8, 4) + 5)
    assert guard.at_start.keys() == moved.keys()
    assert all(torch.equal(value, moved[name]) for name, value in guard.at_start.items())


def test_statistics_of_a_window_that_is_broken_off_are_put_back() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    guard.begin_window()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(8, 4) + 5)
    guard.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_layers_in_evaluation_mode_are_not_copied() -> None:
    model = Norms().train()
    model[2].eval()
    guard = BufferGuard(model)
    guard.begin_window()
    assert {name.split(".")[0] for name in guard.at_start} == {"1"}


numbers = st.sampled_from([0.0, 1.5, 1e30, math.inf, -math.inf, math.nan])


FORMS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single tensor": {"foreach": False},
}


def trained_model(kind: str) -> tuple[nn.Linear, torch.optim.AdamW]:
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **FORMS[kind])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@settings(deadline=None)
@given(
    poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(list(FORMS)),
)
def test_skipped_step_leaves_weights_moments_and_step_count_bitwise_unchanged(
    poison: float, seed: int, kind: str
) -> None:
    torch.manual_seed(seed)
    model, optimizer = trained_model(kind)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, poison)
    gated_step(optimizer, skip=torch.ones(()))
    after = (model.state_dict(), optimizer.state_dict())
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for index, moments in before[1]["state"].items():
        assert all(torch.equal(value, after[1]["state"][index][name]) for name, value in moments.items())


@pytest.mark.parametrize("kind", ["fused", "foreach", "single tensor"])
def test_applied_step_is_the_optimizers_own(kind: str) -> None:
    torch.manual_seed(0)
    model, optimizer = trained_model(kind)
    reference = copy.deepcopy(model)
    reference_optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, **FORMS[kind])
    reference_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module in (model, reference):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    gated_step(optimizer, skip=torch.zeros(()))
    reference_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


flags = st.sampled_from([0.0, 1.0])


@given(loss=numbers, grad_norm=numbers, found_inf=flags, spike=flags, scale=st.sampled_from([1.0, 1024.0]))
def test_a_window_is_applied_on_the_device_exactly_when_the_host_calls_it_applied(
    loss: float, grad_norm: float, found_inf: float, spike: float, scale: float
) -> None:
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, spike, scale)]
    verdict = PendingOutcome(*values).read().verdict
    assert (should_skip(*values[:4]).item() == 0) == (verdict is StepVerdict.APPLIED)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "found_inf", "spike", "scale", "verdict"),
    [
        (1.0, 2.0, 0.0, 0.0, 1024.0, StepVerdict.APPLIED),
        (1.0, 2.0, 0.0, 1.0, 1024.0, StepVerdict.SPIKE),
        (1.0, math.inf, 1.0, 0.0, 1024.0, StepVerdict.OVERFLOW),
        (1.0, math.nan, 1.0, 0.0, 2.0, StepVerdict.OVERFLOW),
        (1.0, math.inf, 1.0, 0.0, 1.0, StepVerdict.NONFINITE_GRAD),  # the scale is at its floor
        (1.0, math.inf, 0.0, 0.0, 1024.0, StepVerdict.NONFINITE_GRAD),  # finite gradients of infinite norm
        (math.nan, math.nan, 1.0, 0.0, 1024.0, StepVerdict.NONFINITE_LOSS),
        (math.inf, 2.0, 0.0, 0.0, 1.0, StepVerdict.NONFINITE_LOSS),
    ],
)
def test_verdicts(
    loss: float, grad_norm: float, found_inf: float, spike: float, scale: float, verdict: StepVerdict
) -> None:
    values = [torch.tensor(value) for value in (loss, grad_norm, found_inf, spike, scale)]
    outcome = PendingOutcome(*values).read()
    assert outcome.verdict is verdict
    assert outcome.loss_scale == scale


def examine(detector: SpikeDetector, norm: float, loss: float = 1.0, found_inf: float = 0.0) -> tuple[bool, float]:
    spike, highest = detector.examine(torch.tensor(loss), torch.tensor(norm), torch.tensor(found_inf))
    return bool(spike), highest.item()


def detector_with_history(windows: int = 200, policy: Literal["skip", "clip", "off"] = "skip") -> SpikeDetector:
    """Log-normal norms around 1, deviation 0.3."""
    generator = torch.Generator().manual_seed(0)
    detector = SpikeDetector(policy, torch.device("cpu"))
    for value in torch.randn(windows, generator=generator).mul(0.3).exp().tolist():
        examine(detector, value)
    return detector


def test_spike_is_found_and_an_ordinary_norm_is_not() -> None:
    detector = detector_with_history()
    assert examine(detector, 2.0)[0] is False
    assert examine(detector, 20.0)[0] is True
    assert examine(detector, 1.0)[0] is False


def test_height_of_the_clip_tier_lies_between_ordinary_norms_and_spikes() -> None:
    highest = examine(detector_with_history(), 1.0)[1]
    assert 1.7 < highest < 2.7  # exp(2.5 x 0.3) = 2.1
    assert examine(detector_with_history(windows=10), 1.0)[1] == math.inf


def test_without_a_history_ten_times_the_largest_so_far_is_a_spike() -> None:
    detector = SpikeDetector("skip", torch.device("cpu"))
    assert [examine(detector, norm)[0] for norm in (1.0, 2.0, 1.5, 1.0, 19.0)] == [False] * 5
    assert examine(detector, 200.0)[0] is True
    assert examine(SpikeDetector("skip", torch.device("cpu")), 1e6)[0] is False


@given(bad=st.sampled_from([math.nan, math.inf]), windows=st.sampled_from([0, 3, 100]))
def test_one_bad_number_does_not_enter_the_statistics(bad: float, windows: int) -> None:
    detector = detector_with_history(windows)
    before = detector.state_dict()["statistics"].tolist()
    for arguments in ({"norm": bad}, {"norm": 1.0, "loss": bad}, {"norm": 1.0, "found_inf": 1.0}):
        assert examine(detector, **arguments)[0] is False
        assert detector.state_dict()["statistics"].tolist() == before
    assert all(math.isfinite(value) for value in before)


def test_a_level_that_rises_for_good_is_accepted_in_the_end() -> None:
    detector = detector_with_history()
    verdicts = [examine(detector, 20.0)[0] for _ in range(100)]
    assert verdicts[0] is True
    assert 3 < sum(verdicts) < 60
    assert not any(verdicts[60:])


def test_policy_clip_skips_nothing_and_off_takes_no_notice() -> None:
    clip, off = detector_with_history(policy="clip"), detector_with_history(policy="off")
    spike, highest = examine(clip, 50.0)
    assert (spike, highest < 3) == (False, True)
    assert examine(off, 50.0) == (False, math.inf)


def test_detector_survives_a_round_trip() -> None:
    first, second = detector_with_history(), SpikeDetector("skip", torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    for norm in (1.0, 3.0, 30.0, 0.5):
        assert examine(first, norm) == examine(second, norm)
    assert torch.equal(first.state_dict()["statistics"], second.state_dict()["statistics"])


@pytest.mark.parametrize(("sigma", "least_caught"), [(0.2, 0.95), (0.4, 0.95), (0.7, 0.60)])
def test_spikes_of_twenty_times_are_caught_and_false_alarms_are_rare(sigma: float, least_caught: float) -> None:
    generator = torch.Generator().manual_seed(1)
    norms = torch.randn(20_000, generator=generator).mul(sigma)
    where = torch.randperm(19_800, generator=generator)[:60] + 200
    norms[where] += math.log(20)
    detector = SpikeDetector("skip", torch.device("cpu"))
    found = {index for index, norm in enumerate(norms.exp().tolist()) if examine(detector, norm)[0]}
    spikes = set(where.tolist())
    assert len(found & spikes) / 60 >= least_caught
    assert len(found - spikes) / 20_000 <= 0.0005
