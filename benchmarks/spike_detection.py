"""Spike detectors on simulated gradient norms: the share of spikes that each finds, and its rate of false alarms.

    python benchmarks/spike_detection.py [--windows 20000] [--spikes 60] [--seeds 3]

Norms are log-normal; their logarithm falls by 0, 1 or 2 over the run, and spikes multiply a norm by 20. All detectors
see the same norms. Ours is the one that training uses; the others are written here after their descriptions: a window
of the last 128 raw norms with a threshold of 6 deviations (OLMo), and ZClip (Kumar et al., 2025), an exponential mean
and deviation of raw norms with a threshold of 2.5, which clips and does not skip.
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.gate import SpikeDetector

WARMUP = 200  # windows without spikes at the start


def ours() -> Callable[[float], bool]:
    detector, one, zero = SpikeDetector("skip", torch.device("cpu")), torch.ones(()), torch.zeros(())
    return lambda norm: bool(detector.examine(one, torch.tensor(norm), zero)[0])


def raw_window(size: int = 128, sigmas: float = 6.0) -> Callable[[float], bool]:
    history: deque[float] = deque(maxlen=size)

    def judge(norm: float) -> bool:
        spike = False
        if len(history) == size:
            mean = sum(history) / size
            deviation = math.sqrt(sum((value - mean) ** 2 for value in history) / (size - 1))
            spike = norm > mean + sigmas * deviation
        history.append(norm)
        return spike

    return judge


def zclip(decay: float = 0.97, sigmas: float = 2.5, warmup: int = 25) -> Callable[[float], bool]:
    first: list[float] = []
    mean = variance = 0.0

    def judge(norm: float) -> bool:
        nonlocal mean, variance
        if len(first) < warmup:
            first.append(norm)
            mean = sum(first) / len(first)
            variance = sum((value - mean) ** 2 for value in first) / len(first)
            return False
        z = (norm - mean) / (math.sqrt(variance) + 1e-6)
        clipped = mean + sigmas * math.sqrt(variance) * sigmas / z if z > sigmas else norm
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        return z > sigmas

    return judge


def simulate(sigma: float, drift: float, windows: int, spikes: int, seed: int) -> tuple[list[float], set[int]]:
    """Return norms with this deviation and drift of their logarithm, and the windows of the spikes among them."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.randn(windows, generator=generator) * sigma - torch.linspace(0, drift, windows)
    where = torch.randperm(windows - WARMUP, generator=generator)[:spikes] + WARMUP
    logs[where] += math.log(20)
    return logs.exp().tolist(), set(where.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=20_000)
    parser.add_argument("--spikes", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    detectors = {"ours": ours, "raw window, 6 sigma": raw_window, "ZClip": zclip}
    print(f"{'sigma':>5} {'drift':>5}" + "".join(f"{name:>30}" for name in detectors))
    for sigma in (0.2, 0.4, 0.7):
        for drift in (0.0, 1.0, 2.0):
            cells = []
            for build in detectors.values():
                caught = false = 0
                for seed in range(args.seeds):
                    norms, spikes = simulate(sigma, drift, args.windows, args.spikes, seed)
                    judge = build()
                    found = {index for index, norm in enumerate(norms) if judge(norm)}
                    caught += len(found & spikes)
                    false += len(found - spikes)
                share, rate = caught / (args.spikes * args.seeds), false / (args.windows * args.seeds)
                cells.append(f"{share:.1%} caught, {rate:.4%} false")
            print(f"{sigma:>5} {drift:>5}" + "".join(f"{cell:>30}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
