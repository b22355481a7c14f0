"""Runs of minutes: the demo, and a pretrained backbone on photographs."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, needs_shared
from launching import read_events
from PIL import Image
from test_metrics import assert_equals_reference

import train_ultimate


@pytest.mark.slow
def test_demo_learns_in_minutes(tmp_path: Path) -> None:
    start_time = time.monotonic()
    command = [sys.executable, train_ultimate.__file__, "demo"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start_time < 240
    match = re.search(r"Done: validation IoU (0\.\d+)", result.stdout)
    assert match is not None
    assert float(match[1]) >= 0.60
    assert "1 skipped (1 spike); 0 rollbacks, 1 sample quarantined" in result.stdout  # the two fire drills
    (report,) = tmp_path.glob("demo-runs/*/report.html")
    assert f"Report: {report.relative_to(tmp_path)}" in result.stdout


@pytest.mark.slow
@needs_shared
def test_photographs_are_learnt_with_a_pretrained_backbone_and_scored_as_the_field_does(tmp_path: Path) -> None:
    """Two epochs of CAMO, one in each stage: nothing non-finite, and an IoU that no untrained decoder reaches.

    Then the predictions for the 124 test images, each score and curve against pysodmetrics.
    """
    camo, weights = SHARED / "data" / "CAMO", SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
    argv = [
        *("train", "--dataset-path", str(camo), "--checkpoint-dir", str(tmp_path / "run")),
        *("--backbone", "tf_efficientnet_lite0", "--backbone-weights", str(weights), "--img-size", "224"),
        *("--batch-size", "8", "--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "1"),
    ]
    assert train_ultimate.main(argv) == 0
    assert {window["verdict"] for window in read_events(tmp_path / "run", "window")} == {"applied"}
    assert read_events(tmp_path / "run", "epoch")[-1]["iou"] > 0.45
    best, saved = str(tmp_path / "run" / "best_model.pth"), tmp_path / "predictions"
    evaluate = ["evaluate", "--checkpoint", best, "--dataset-path", str(camo), "--save-predictions", str(saved)]
    assert train_ultimate.main(evaluate) == 0
    masks = sorted((camo / "TestDataset" / "GT").iterdir())
    assert len(masks) == 124
    for path in masks:
        with Image.open(path) as mask, Image.open(saved / "CAMO" / path.name) as prediction:
            assert_equals_reference(np.array(prediction), np.array(mask) > 128)
