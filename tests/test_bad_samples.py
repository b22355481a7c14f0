"""Samples whose gradient is huge but finite: found, quarantined, and their windows applied without them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Argv, train
from launching import read_events
from PIL import Image
from torch import Tensor

from losses import deep_supervision_loss
from training.ladder import Ladder

BAD = "scene_00013"  # after the first windows of the run, in which nothing is a spike yet


def with_a_full_mask(tiny_dataset: Path, root: Path) -> Path:
    """Copy the dataset; one image's object fills it, by which the loss below knows it."""
    shutil.copytree(tiny_dataset / "TrainDataset", root / "TrainDataset")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(root / "TrainDataset" / "GT" / f"{BAD}.png")
    return root


def huge_for_full_masks(side_logits: Sequence[Tensor], masks: Tensor, uncertainty_weight: Tensor) -> Tensor:
    loss = deep_supervision_loss(side_logits, masks, uncertainty_weight)
    full = masks.flatten(1).mean(dim=1) > 0.9  # augmentation may have turned it, and left black corners
    if full.any():
        chosen = [logits[full] for logits in side_logits]
        loss = loss + 1e4 * full.sum() / len(full) * deep_supervision_loss(chosen, masks[full], uncertainty_weight)
    return loss


def test_a_sample_of_huge_finite_loss_is_quarantined_and_its_neighbours_are_trained_on(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    root = with_a_full_mask(tiny_dataset, tmp_path / "data")
    flags = ("--dataset-path", str(root), "--accumulation-steps", "2", "--stage1-epochs", "0", "--epochs", "6")
    assert train(tiny_argv(*flags), loss=huge_for_full_masks) == 0
    spikes = [event for event in read_events(tmp_path / "run", "incident") if event["verdict"] == "spike"]
    assert spikes
    for spike in spikes:
        assert spike["cause"] == "data"
        assert spike["culprits"] == [f"TrainDataset/Imgs/{BAD}.jpg"]
        assert spike["action"].startswith("quarantined until epoch")
        assert [attempt["verdict"] for attempt in spike["attempts"]] == ["spike", "applied"]
    recovery = read_events(tmp_path / "run", "run_end")[0]["recovery"]
    assert recovery["skipped"] == {}
    assert recovery["rollbacks"] == 0


def test_an_image_in_spike_after_spike_is_at_fault_and_its_neighbours_are_not() -> None:
    ladder = Ladder()
    for number in range(2):
        assert ladder.suspect(["bad", f"a{number}", f"b{number}"]) == set()
    assert ladder.suspect(["c", "bad", "d"]) == {"bad"}
    assert "bad" not in ladder.suspects


def test_images_of_a_small_dataset_that_meet_again_and_again_are_not_at_fault() -> None:
    ladder = Ladder()
    for _ in range(10):
        assert ladder.suspect(["a", "b"]) == set()
        assert ladder.suspect(["c", "d"]) == set()


@pytest.mark.parametrize("drill", ["spike@9"])
def test_a_spike_without_a_sample_at_fault_is_skipped_as_before(tiny_argv: Argv, tmp_path: Path, drill: str) -> None:
    assert train(tiny_argv("--drill", drill, "--stage1-epochs", "0")) == 0
    (incident,) = read_events(tmp_path / "run", "incident")
    assert (incident["verdict"], incident["action"], incident["culprits"]) == ("spike", "skipped", [])
    assert torch.isfinite(torch.tensor(incident["loss"]))
