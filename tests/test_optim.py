"""Optimizer groups and moments, the gradient norm, the average of weights, and the search for numbers not finite."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.optim import (
    Ema,
    all_finite,
    build_optimizer,
    fresh_moments,
    gradient_norm,
    load_optimizer_state,
    set_learning_rates,
)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


def test_every_parameter_is_in_one_group_and_vectors_are_not_decayed() -> None:
    decoder, backbone = small_model(), small_model()
    optimizer = build_optimizer(decoder, backbone, weight_decay=0.1)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for m in (decoder, backbone) for p in m.parameters()}
    assert len(grouped) == 12
    for group in optimizer.param_groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_backbone_gets_its_share_of_the_learning_rate() -> None:
    optimizer = build_optimizer(small_model(), small_model(), weight_decay=0.1)
    set_learning_rates(optimizer, 0.02, backbone_lr_scale=0.1)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"decoder": 0.02, "backbone": 0.002}
    )


def test_loading_restores_moments_and_keeps_this_runs_hyperparameters() -> None:
    decoder, backbone = small_model(), small_model()
    first = build_optimizer(decoder, backbone, weight_decay=0.1)
    set_learning_rates(first, 0.02, 0.1)
    train_step(decoder, first)
    second = build_optimizer(decoder, backbone, weight_decay=0.3)
    load_optimizer_state(second, copy.deepcopy(first.state_dict()))
    weight = next(decoder.parameters())
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])
    assert {group["weight_decay"] for group in second.param_groups} == {0.3, 0.0}


def test_moments_saved_in_another_memory_format_act_on_their_own_weights() -> None:
    """The fused kernel walks memory: loaded as they lie, moments of a transposed layout would hit other weights."""
    torch.manual_seed(0)
    model = nn.Conv2d(8, 6, 3)
    first = build_optimizer(model, nn.Module(), weight_decay=0.0)
    set_learning_rates(first, 0.1, 0.1)
    for _ in range(2):
        first.zero_grad()
        model(torch.randn(2, 8, 9, 9)).square().mean().backward()
        first.step()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    second = build_optimizer(other, nn.Module(), weight_decay=0.0)
    set_learning_rates(second, 0.1, 0.1)
    load_optimizer_state(second, copy.deepcopy(first.state_dict()))
    gradient = torch.randn(6, 8, 3, 3)
    for module, optimizer in ((model, first), (other, second)):
        module.weight.grad = torch.empty_like(module.weight).copy_(gradient)
        module.bias.grad = torch.zeros(6)  # type: ignore[union-attr]
        optimizer.step()
    torch.testing.assert_close(other.weight, model.weight)


def test_gradient_norm_is_the_norm_of_all_gradients_together() -> None:
    model = small_model()
    model(torch.randn(8, 4)).square().mean().backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradient_norm(model.parameters()), gradients.norm())


def test_average_equals_torchs_own_once_the_decay_has_risen() -> None:
    model = small_model()
    ema = Ema(model, decay=0.1)  # (1 + 0) / (10 + 0) = 0.1: risen from the first update on
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    reference.n_averaged += 1  # AveragedModel's first update copies; ours starts from a copy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        train_step(model, optimizer)
        ema.update(model, buffers(model))
        reference.update_parameters(model)
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), reference.module.parameters(), strict=True))


def test_decay_rises_from_a_tenth_so_that_early_averages_follow_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.999)
    (average,) = ema.module.parameters()
    nn.init.ones_(model.weight)
    ema.update(model, {})
    assert average.item() == pytest.approx(0.9)
    for _ in range(20):
        ema.update(model, {})
    assert average.item() > 0.999


def test_average_takes_in_buffers_and_copies_counters() -> None:
    model = small_model().train()
    ema = Ema(model, decay=0.5)
    model(torch.randn(64, 4) + 3)
    ema.update(model, buffers(model))
    current, averaged = buffers(model), buffers(ema.module)
    assert torch.equal(averaged["1.num_batches_tracked"], current["1.num_batches_tracked"])
    # From 0, with a first decay of 0.1:
    torch.testing.assert_close(averaged["1.running_mean"], 0.9 * current["1.running_mean"])


def test_average_survives_a_round_trip() -> None:
    model = small_model()
    ema = Ema(model, decay=0.9)
    for _ in range(3):
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        ema.update(model, buffers(model))
    other = Ema(small_model(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert other.num_updates == 3
    assert all(torch.equal(a, b) for a, b in zip(other.module.parameters(), ema.module.parameters(), strict=True))


def test_moments_made_ahead_are_those_that_torch_makes_in_the_first_step() -> None:
    torch.manual_seed(0)
    ahead, lazily = small_model(), small_model()
    lazily.load_state_dict(ahead.state_dict())
    optimizers = [build_optimizer(model, nn.Sequential(), weight_decay=0.1) for model in (ahead, lazily)]
    fresh_moments(optimizers[0], everywhere=False)
    inputs = torch.randn(8, 4)
    for model, optimizer in zip((ahead, lazily), optimizers, strict=True):
        set_learning_rates(optimizer, 0.1, 1.0)
        model(inputs).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ahead.parameters(), lazily.parameters(), strict=True))
    for a, b in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_moments_are_made_for_trainable_parameters_and_kept_unless_all_are_asked_for() -> None:
    decoder, backbone = small_model(), small_model()
    backbone.requires_grad_(False)
    optimizer = build_optimizer(decoder, backbone, weight_decay=0.1)
    train_step(decoder, optimizer)
    fresh_moments(optimizer, everywhere=False)
    assert len(optimizer.state) == 6
    assert all(entry["step"] == 1 for entry in optimizer.state.values())
    fresh_moments(optimizer, everywhere=True)
    assert all(entry["step"] == 0 and not entry["exp_avg_sq"].any() for entry in optimizer.state.values())


def test_a_part_that_was_frozen_when_saved_gets_its_moments_ahead_after_loading_too() -> None:
    decoder, backbone = small_model(), small_model()
    backbone.requires_grad_(False)
    optimizer = build_optimizer(decoder, backbone, weight_decay=0.1)
    train_step(decoder, optimizer)
    load_optimizer_state(optimizer, optimizer.state_dict())
    assert len(optimizer.state) == 6
    backbone.requires_grad_(True)
    fresh_moments(optimizer, everywhere=False)
    assert all(entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for entry in optimizer.state.values())
    assert len(optimizer.state) == 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(bad: float) -> None:
    tensors = [torch.ones(3, 3), torch.arange(4), torch.zeros(2)]
    assert all_finite(tensors)
    tensors[2][1] = bad
    assert not all_finite(tensors)
