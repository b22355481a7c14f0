"""``validate``: whose weights are scored, on which images, and what a network that is not finite scores."""

import math
from pathlib import Path

import pytest
import torch
from conftest import prepare_again
from torch.utils.data import DataLoader

from data.dataset import Batch
from data.loading import to_device, validation_loader
from train_ultimate import run_stage, validate
from training.run import Run


def test_validation_uses_the_averaged_weights_and_images_that_are_not_trained_on(finished: Path) -> None:
    run = prepare_again(finished)
    assert not {pair.image for pair in run.data.train_pairs} & {pair.image for pair in run.data.val_pairs}
    seen: list[int] = []
    assert run.state.ema is not None
    run.state.ema.module.register_forward_hook(lambda *_: seen.append(1))
    run.state.model.register_forward_hook(lambda *_: seen.append(2))
    loader = validation_loader(run.data.val_pairs, 64, 2, num_workers=0, pin_memory=False)
    scores = validate(run, loader)
    assert set(seen) == {1}
    with torch.no_grad():
        images, masks = to_device(next(iter(loader)), run.machine.device, run.machine.memory_format)
        probabilities = run.state.ema.module.eval()(images)[-1].sigmoid()
    assert scores["mae"] == pytest.approx((probabilities - masks).abs().mean().item(), abs=1 / 510)  # 8 bits


def test_a_network_whose_output_is_not_finite_has_no_score(finished: Path) -> None:
    run = prepare_again(finished, ema_decay=0)
    run.state.model.register_forward_hook(lambda _module, _inputs, outputs: [outputs[-1] * torch.nan])
    loader = validation_loader(run.data.val_pairs, 64, 2, num_workers=0, pin_memory=False)
    assert all(math.isnan(score) for score in validate(run, loader).values())


def test_each_epoch_is_validated_on_the_validation_pairs(finished: Path) -> None:
    run = prepare_again(finished)
    validated: list[bool] = []

    def record(_: Run, loader: DataLoader[Batch]) -> dict[str, float]:
        validated.append(loader.dataset.pairs == run.data.val_pairs)  # type: ignore[attr-defined]
        return dict.fromkeys(("iou", "dice", "mae", "s_measure"), 0.5)

    run_stage(run, run.stages[0], record)
    assert validated == [True, True]
