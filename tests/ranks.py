"""``train_ultimate.py`` with what each process did written down, for tests that start several with PyTorch's launcher.

Environment: TEST_SAMPLES, a folder that gets a file a process, one JSON line a window that was settled: its samples, by
number. TEST_SIGNAL, RANK:WINDOW:SIGNAL, what a process is to send itself after a window, once in all (a restarted
process finds the file that says so). TEST_FAULT, RANK:NAME, what is different on one of them: a name of ``FAULTS``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train_ultimate
from runtime import checkpoint
from runtime.machine import Precision
from training import setup as builders

settle_window = train_ultimate.settle_window
write_checkpoint = checkpoint.write_checkpoint
folder = Path(os.environ["TEST_SAMPLES"])
rank = int(os.environ.get("RANK", "0"))


def settle_and_write(run: Any, stage: Any, window: Any, *others: Any) -> Any:
    again = settle_window(run, stage, window, *others)
    line = {
        "epoch": run.state.progress.epoch,
        "window": window.global_number,
        "samples": window.sample_indices,
        "again": again is not None,
        "ranks": run.ranks.size,
    }
    with (folder / f"{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    if "TEST_SIGNAL" in os.environ:
        struck, number, name = os.environ["TEST_SIGNAL"].split(":")
        done = folder / "signalled"
        if (int(struck), int(number)) == (rank, window.global_number) and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.Signals[name])
    return again


def write_slowly(*args: Any) -> None:
    time.sleep(12)
    write_checkpoint(*args)


def no_compiler(*_: Any, **__: Any) -> None:
    raise RuntimeError("no compiler here")


FAULTS = {
    "other-precision": (builders, "resolve_precision", lambda _name, device: Precision("bf16", device.type)),
    "other-data": (builders, "fingerprint", lambda *_: "0123456789abcdef"),
    "no-compiler": (torch, "compile", lambda *_, **__: no_compiler),
    "slow-disk": (checkpoint, "write_checkpoint", write_slowly),
}
struck, _, fault = os.environ.get("TEST_FAULT", "-1:").partition(":")
if int(struck) == rank:
    setattr(*FAULTS[fault])
train_ultimate.settle_window = settle_and_write
if __name__ == "__main__":
    sys.exit(train_ultimate.main())
