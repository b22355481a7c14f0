"""BatchNorm's running statistics while a window is judged or examined."""

import math

import pytest
import torch
from torch import nn

from training.batchnorm import BufferGuard, running_statistics, statistics_kept


class Norms(nn.Sequential):
    """A network with two BatchNorm layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))


def test_statistics_of_a_skipped_window_are_restored_bitwise_even_from_nan() -> None:
    model = Norms().train()
    guard = BufferGuard(model)
    guard.begin_window()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.full((8, 4), math.nan))
    assert not torch.isfinite(model.get_buffer("1.running_mean")).all()
    guard.end_window(skip=torch.ones(()))
    assert len(before) == 6
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_statistics_of_an_applied_window_stay_and_are_the_next_ones_start() -> None:
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


def test_statistics_of_a_window_that_breaks_off_are_restored() -> None:
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


def test_examining_a_window_keeps_the_statistics() -> None:
    model = nn.BatchNorm1d(4).train()
    before = [buffer.clone() for buffer in model.buffers()]
    with statistics_kept(model):
        model(torch.randn(8, 4) + 3)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


def test_a_single_sample_can_be_examined_though_batchnorm_would_refuse_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()).train()
    model[2].eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 4))
    with running_statistics(model):
        model(torch.randn(1, 4))
    assert [module.training for module in model] == [True, True, False]


def test_batches_of_a_single_sample_are_too_small_only_while_statistics_learn() -> None:
    assert BufferGuard(Norms().train()).least_batch == 2
    assert BufferGuard(Norms().eval()).least_batch == 1
