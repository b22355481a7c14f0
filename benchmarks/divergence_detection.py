"""Detectors of a loss that runs away, on simulated losses: what each finds, how late, and its false alarms.

    python benchmarks/divergence_detection.py [--windows 100000] [--runs 40]

Losses are log-normal about a level. Ours is the one that training uses. The other is a plain rule, as it is often
written and as this program had it: an exponential mean over 50 windows; five losses in a row above twice the mean, or a
mean a fifth above its lowest and by more than one standard deviation.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.ladder import LossHistory

SETTLED = 1000  # windows before a divergence begins
SCATTER = 0.3  # standard deviation of the logarithm, where a row does not say otherwise


class PlainRule:
    """Exponential mean with fixed factors."""

    def __init__(self) -> None:
        self.mean = self.variance = 0.0
        self.lowest, self.count, self.high = math.inf, 0, 0

    def add(self, loss: float) -> bool:
        known = self.count >= 50
        if known and loss > 2 * self.mean:
            self.high += 1
            return self.high >= 5
        self.high, self.count = 0, self.count + 1
        share, step = 1 / min(self.count, 50), loss - self.mean
        self.mean += share * step
        self.variance = (1 - share) * (self.variance + share * step**2)
        if known:
            self.lowest = min(self.mean, self.lowest * 1.0002)
        rise = self.mean - self.lowest
        return known and rise > max(0.2 * self.lowest, math.sqrt(self.variance))


DETECTORS: dict[str, Callable[[], PlainRule | LossHistory]] = {"ours": LossHistory, "plain rule": PlainRule}
DIVERGENCES: dict[str, Callable[[int], float]] = {  # window since it began -> level
    "doubles in 20 windows": lambda window: min(2 ** (window / 20), 100.0),
    "collapse: a third higher at once": lambda _: 1.35,
    "x 3.3 over 600 windows": lambda window: 3.3 ** (window / 600),
    "x 3.3 over 6,000 windows": lambda window: 3.3 ** (window / 6000),
}
HEALTHY: dict[str, tuple[float, Callable[[int], float]]] = {  # scatter, and window -> level
    "steady, scatter 0.3": (0.3, lambda _: 1.0),
    "steady, heavy tails, scatter 1": (1.0, lambda _: 1.0),
    "falls by half over 5,000 windows": (0.3, lambda window: 0.5 ** min(1, window / 5000)),
    "a third more over 10,000 windows": (0.1, lambda window: 1 + min(1 / 3, window / 30000)),
}


def losses(level: Callable[[int], float], scatter: float, rng: random.Random) -> Iterator[float]:
    window = 0
    while True:
        yield level(window) * math.exp(rng.gauss(0, scatter))
        window += 1


def delay(new: Callable[[], PlainRule | LossHistory], level: Callable[[int], float], seed: int) -> int | None:
    """Return the number of windows from a divergence's beginning to its alarm; None: an alarm before it, or none."""
    history = new()
    for window, loss in enumerate(losses(lambda n: level(max(0, n - SETTLED)), SCATTER, random.Random(seed))):
        if history.add(loss if window >= SETTLED else loss / level(0)):
            return window - SETTLED if window >= SETTLED else None
        if window > SETTLED + 8000:
            return None
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100_000, help="healthy ones, in each row")
    parser.add_argument("--runs", type=int, default=40, help="that diverge, in each row")
    args = parser.parse_args()
    print("| the loss | " + " | ".join(DETECTORS) + " |\n|---|" + "---|" * len(DETECTORS))
    for name, level in DIVERGENCES.items():
        cells = []
        for new in DETECTORS.values():
            found = [late for seed in range(args.runs) if (late := delay(new, level, seed)) is not None]
            after = f", after {statistics.median(found):.0f} windows" if found else ""
            cells.append(f"found in {len(found)} of {args.runs}{after}")
        print(f"| {name} | {' | '.join(cells)} |")
    for name, (scatter, level) in HEALTHY.items():
        cells = []
        for new in DETECTORS.values():
            history, alarms = new(), 0
            for _, loss in zip(range(args.windows), losses(level, scatter, random.Random(0)), strict=False):
                if history.add(loss):
                    alarms, history = alarms + 1, new()  # as after a rollback
            cells.append(f"{alarms} false alarms")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
