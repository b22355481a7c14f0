"""Whole runs on a CUDA device: drills end as they do on a CPU, and what is trained there can be used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nullcuda
import pytest
import torch
from conftest import Argv, train
from launching import read_events
from nullcuda.emulate import Emulation

from runtime.machine import resolve_precision

pytestmark = [pytest.mark.rehearsal, pytest.mark.gpu]

DRILLS = {
    "nan-loss@3": "nan-loss@3",
    "nan loss until the sample is left out": "nan-loss@3x4",
    "inf-grad": "inf-grad@3x2",
    "spike": "spike@7",
    "overflow": "overflow@3x5",
    "bad-sample": "bad-sample@3",
    "nan-weight": "nan-weight@6",
}


def story(folder: Path) -> list[tuple[Any, ...]]:
    """Return what a run's log tells of faults: verdicts by window and attempt, incidents and their ends."""
    windows = [
        (event["epoch"], event["window"], event["attempt"], event["verdict"], event["precision"])
        for event in read_events(folder, "window")
    ]
    incidents = [
        (event["verdict"], event["cause"], event["action"], sorted(event["culprits"]))
        for event in read_events(folder, "incident")
    ]
    return [*windows, *incidents]


@pytest.mark.parametrize("drill", DRILLS.values(), ids=DRILLS)
def test_drill_ends_as_on_a_cpu(drill: str, tiny_argv: Argv, tmp_path: Path, arithmetic: Emulation | None) -> None:
    """Loss scaling is on, on both devices. Spikes are known from the seventh window on."""
    shape = "--batch-size", "6", "--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "1"
    flags = *shape, "--precision", "fp16", "--drill", drill
    for device in ("cpu", "cuda"):
        assert train(tiny_argv(*flags, "--device", device, checkpoint_dir=tmp_path / device)) == 0
    assert story(tmp_path / "cuda") == story(tmp_path / "cpu")


def test_checkpoint_of_a_gpu_is_evaluated_predicted_with_exported_and_its_incidents_replayed(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, arithmetic: Emulation | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, device = tmp_path / "run", ("--device", "cuda")
    short = "--epochs", "2", "--stage1-epochs", "1", "--precision", "fp16", "--drill", "bad-sample@3"
    assert train(tiny_argv(*device, *short)) == 0
    best = ("--checkpoint", str(run / "best_model.pth"))
    evaluate = "evaluate", *best, "--dataset-path", str(tiny_dataset), "--num-workers", "0", "--precision", "fp32"
    scores = {}
    for name in ("cuda", "cpu"):
        assert train([*evaluate, "--device", name, "--json", str(tmp_path / f"{name}.json")]) == 0
        (report,) = json.loads((tmp_path / f"{name}.json").read_text())["sets"].values()
        scores[name] = report["scores"]
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=2e-3)  # one grey level in a few pixels

    predict = "predict", str(tiny_dataset / "TestDataset/Imgs"), *best, "--num-workers", "0", *device
    assert train([*predict, "--output", str(tmp_path / "masks")]) == 0
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 3

    assert train(["export", *best, "--format", "safetensors", "--output", str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights").exists()

    assert train(["replay", str(run / "incidents/000001"), *device]) == 0
    assert "this sample does it" in capsys.readouterr().out


@pytest.mark.skipif(not nullcuda.is_active(), reason="needs devices of several kinds: -m rehearsal")
@pytest.mark.parametrize(("capability", "precision"), [("75", "fp16"), ("80", "bf16"), ("90", "bf16")])
def test_precision_is_what_the_device_computes_in(capability: str, precision: str) -> None:
    code = (
        "import torch, runtime.machine as m; print(m.resolve_precision('auto', torch.device('cuda')).name, "
        "torch.cuda.get_device_capability())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "NULLCUDA_CC": capability}, check=True,
    )  # fmt: skip
    assert found.stdout.split(maxsplit=1) == [precision, f"({capability[0]}, {capability[1]})\n"]


def test_precision_of_this_device_is_not_fp32() -> None:
    assert resolve_precision("auto", torch.device("cuda")).name in ("fp16", "bf16")
