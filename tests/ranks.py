"""``train_ultimate.py`` as one of several ranks, for tests that start them with PyTorch's launcher.

Environment:
    TEST_SAMPLES: a folder. Each rank writes a line of JSON there for every window that recovery has answered.
    TEST_SIGNAL: RANK:WINDOW:SIGNAL. That rank sends itself the signal after that window, once: restarted processes find
        a file that says so.
    TEST_FAULT: RANK:NAME, or several, with commas. What is special about that rank's machine: names of ``FAULTS``.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from train_ultimate import ScriptParts, main
from training.batchnorm import BufferGuard
from training.gate import WindowOutcome
from training.recovery import Recovery
from training.window import Window

RANK = int(os.environ.get("RANK", "0"))


class RecordingRecovery(Recovery):
    """Recovery that writes down this rank's part of each window, and then sends the signal of TEST_SIGNAL."""

    def answer(self, window: Window, outcome: WindowOutcome, guard: BufferGuard) -> list[Window] | None:
        again = super().answer(window, outcome, guard)
        line = {
            "epoch": self.state.progress.epoch,
            "window": window.global_number,
            "samples": window.sample_indices,
            "again": again is not None,
            "ranks": self.ranks.size,
        }
        folder = Path(os.environ["TEST_SAMPLES"])
        with (folder / f"{RANK}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        struck, number, name = os.environ.get("TEST_SIGNAL", "-1:0:").split(":")
        done = folder / "signalled"
        if (int(struck), int(number)) == (RANK, window.global_number) and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.Signals[name])
        return again


def computes_in_bf16() -> None:
    torch.cpu._is_avx512_bf16_supported = lambda: True


def computes_in_fp32_only() -> None:
    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


def has_another_disk() -> None:
    os.chdir("another-disk")


def has_no_compiler() -> None:
    def compile_(*_: Any, **__: Any) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("no compiler here")

        return fail

    torch.compile = compile_  # type: ignore[assignment]


def has_a_slow_disk() -> None:
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(8)
        fsync(descriptor)

    os.fsync = slow_fsync


FAULTS: dict[str, Callable[[], None]] = {
    "bf16": computes_in_bf16,
    "no-bf16": computes_in_fp32_only,
    "another-disk": has_another_disk,
    "no-compiler": has_no_compiler,
    "slow-disk": has_a_slow_disk,
}

if __name__ == "__main__":
    for entry in filter(None, os.environ.get("TEST_FAULT", "").split(",")):
        faulty, name = entry.split(":")
        if int(faulty) == RANK:
            FAULTS[name]()
    sys.exit(main(parts=ScriptParts(recovery=RecordingRecovery)))
