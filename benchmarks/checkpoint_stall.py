"""Cost of a checkpoint to training: written in the background, against a synchronous torch.save of the same state.

    python benchmarks/checkpoint_stall.py [--parameters 25e6] [--rounds N] [--directory DIR]

The state is that of a network of ``--parameters`` parameters with its average and AdamW's moments. "Wait" is the time
that the loop spends in ``CheckpointStore.save_step``; "slower" is the extra time of all windows during the write, which
shares the machine with them. Rounds alternate between the two ways; medians are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.checkpoint import CheckpointStore
from training.optim import Ema, fresh_moments

WINDOWS_BETWEEN = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="folder to write to (default: a temporary one)")
    options = parser.parse_args()
    layers = max(1, round(options.parameters / 1024**2))
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    fresh_moments(optimizer, everywhere=True)
    ema = Ema(model, 0.999)
    inputs = torch.randn(512, 1024)

    def window() -> float:
        start = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def state(number: int) -> dict[str, Any]:
        moments = optimizer.state_dict()
        return {
            **{"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": moments},
            "progress": {"global_window": number},
        }

    waits: list[float] = []
    slowdowns: list[float] = []
    synchronous: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        store = CheckpointStore(Path(folder), keep=1)
        store.save_step(0, state(0))
        store.wait()
        for number in range(1, options.rounds + 1):
            usual = statistics.median(window() for _ in range(WINDOWS_BETWEEN))
            start = time.perf_counter()
            store.save_step(number, state(number))
            waits.append(time.perf_counter() - start)
            during: list[float] = []
            while store.is_writing:
                during.append(window())
            slowdowns.append(sum(during) - usual * len(during))
            store.wait()
            for _ in range(5):
                window()
            start = time.perf_counter()
            torch.save(state(number), Path(folder) / "synchronous.pt")
            synchronous.append(time.perf_counter() - start)
    megabytes = 4 * sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    wait, slower, save = (statistics.median(values) for values in (waits, slowdowns, synchronous))
    print(f"{layers} x 1024 x 1024 parameters, state of {megabytes:.0f} MB, {options.rounds} rounds, medians")
    print(f"wait {1000 * wait:.0f} ms; windows during the write slower by {1000 * slower:.0f} ms in all")
    print(f"synchronous torch.save {1000 * save:.0f} ms")
    print(f"ratio of the wait {wait / save:.3f}; with the slower windows {(wait + slower) / save:.3f}")


if __name__ == "__main__":
    main()
