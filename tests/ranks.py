"""``train_ultimate.py`` with what each process did written down, for tests that start several with PyTorch's launcher.

Environment: TEST_SAMPLES, a folder that gets a file a process, one JSON line a window that was settled: its samples, by
number. TEST_SIGNAL, RANK:WINDOW:SIGNAL, what a process is to send itself after a window, once in all (a restarted
process finds the file that says so).
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_ultimate

settle_window = train_ultimate.settle_window
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


train_ultimate.settle_window = settle_and_write
if __name__ == "__main__":
    sys.exit(train_ultimate.main())
