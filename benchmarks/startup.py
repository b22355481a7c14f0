"""Time from the command to the first window, and of only importing torch, torchvision and timm.

    python benchmarks/startup.py --dataset-path data/CAMO [--rounds N] [-- more flags of train]

Each round starts three processes, one after the other: ``--help``; a Python that imports torch, torchvision and timm;
and ``train``, which is killed once its first window is in metrics.jsonl. Medians are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "train_ultimate.py"


def seconds_of(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def first_window(flags: list[str]) -> tuple[float, float]:
    """Return the seconds to the run_start event (imports, data, network, state) and to the first window's event."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.time()
        command = [sys.executable, str(SCRIPT), "train", *flags, "--checkpoint-dir", f"{directory}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log, events = Path(directory) / "run" / "metrics.jsonl", list[dict[str, Any]]()
        while not any(event["event"] == "window" for event in events):
            if process.poll() is not None:
                assert process.stderr is not None
                raise SystemExit(process.stderr.read())
            time.sleep(0.02)
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("\n")]
        process.kill()
        process.wait()
        times = {event["event"]: event["time"] for event in reversed(events)}
        return times["run_start"] - start, times["window"] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("more", nargs="*", help="after --: more flags of train")
    options = parser.parse_args()
    flags = ["--dataset-path", options.dataset_path, "--no-pretrained", *options.more]
    helps, imports, ready, windows = [], [], [], []
    for _ in range(options.rounds):
        helps.append(seconds_of(sys.executable, str(SCRIPT), "--help"))
        imports.append(seconds_of(sys.executable, "-c", "import torch, torchvision.transforms.v2, timm"))
        prepared, window = first_window(flags)
        ready.append(prepared)
        windows.append(window)
    names = {
        "--help": helps,
        "only imports": imports,
        "train, ready": ready,
        "train, first window": windows,
    }
    for name, values in names.items():
        print(f"{name:20} {statistics.median(values):6.2f} s")
    print(f"first window / only imports: {statistics.median(windows) / statistics.median(imports):.2f}")


if __name__ == "__main__":
    main()
