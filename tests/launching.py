"""Runs of several processes, started by PyTorch's launcher as a user starts them, over gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROGRAM = Path(__file__).with_name("ranks.py")
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def read_events(directory: Path, event: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


class Launch:
    """A run of one process or several, and the samples that each has trained on."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.dataset, self.directory, self.samples = dataset, folder / "run", folder / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)

    def command(self, ranks: int, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
        start = [*LAUNCHER, f"--nproc-per-node={ranks}", *launcher] if ranks > 1 else [sys.executable]
        return [
            *(*start, str(PROGRAM), "train", "--dataset-path", str(self.dataset)),
            *("--checkpoint-dir", str(self.directory), "--val-fraction", "0.3", "--img-size", "64", "--device", "cpu"),
            *("--backbone", "test_convnext", "--no-pretrained", "--decoder-channels", "16", "--precision", "fp32"),
            *("--epochs", "2", "--stage1-epochs", "1", "--lr", "0.002", "--num-workers", "0", "--batch-size", "1"),
            *flags,
        ]

    def environment(self, signal_at: str = "", fault: str = "") -> dict[str, str]:
        orders = {"TEST_SIGNAL": signal_at, "TEST_FAULT": fault}
        given = {name: value for name, value in orders.items() if value}
        return {**os.environ, "OMP_NUM_THREADS": "1", "TEST_SAMPLES": str(self.samples), **given}

    def start(
        self, ranks: int, *flags: str, launcher: tuple[str, ...] = (), signal_at: str = "", fault: str = "",
        output: int = subprocess.PIPE,
    ) -> Any:  # fmt: skip
        command = self.command(ranks, *flags, launcher=launcher)
        pipes: Any = {"stdout": output, "stderr": output, "text": True}
        return subprocess.Popen(command, env=self.environment(signal_at, fault), start_new_session=True, **pipes)

    def run(
        self, ranks: int, *flags: str, launcher: tuple[str, ...] = (), signal_at: str = "", fault: str = ""
    ) -> tuple[int, str, str]:
        with self.start(ranks, *flags, launcher=launcher, signal_at=signal_at, fault=fault) as process:
            try:
                out, err = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            return process.returncode, out, err

    def applied(self) -> dict[int, float]:
        """Return the loss of each window of the run, by number; the last one if a window was run twice."""
        losses = {(event["epoch"], event["window"]): event["loss"] for event in read_events(self.directory, "window")}
        return {number: losses[key] for number, key in enumerate(sorted(losses), start=1)}

    def samples_of_epochs(self) -> dict[int, list[int]]:
        lines = [json.loads(line) for path in self.samples.glob("*.jsonl") for line in path.read_text().splitlines()]
        epochs: dict[int, list[int]] = {}
        for line in lines:
            epochs.setdefault(line["epoch"], []).extend(line["samples"])
        return epochs

    def final(self, epoch: int = 2) -> dict[str, Any]:
        return load(self.directory / f"epoch_{epoch:04d}.pth")


def load(path: Path) -> dict[str, Any]:
    """Return what a run has computed: a checkpoint without settings, times and epoch sums."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"], checkpoint["epoch_stats"]
    checkpoint["ladder"].pop("seconds_lost")
    return checkpoint
