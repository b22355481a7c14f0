"""The spike detector's numbers, and its limits recomputed from a run's log. No torch: reports do without it."""

import math
from collections.abc import Iterable

CLIP_SIGMAS, SKIP_SIGMAS, LIMIT_SIGMAS = 2.5, 3.8, 3.0
DECAY = 0.99
WARMUP_WINDOWS = 64  # before this, the comparison with the largest norm so far
LEAST_WINDOWS = 4  # before this, nothing is a spike
LEAST_DEVIATION = 0.05
FACTOR_OVER_LARGEST = 10.0


def spike_limits(windows: Iterable[tuple[int, float]]) -> list[float]:
    """The gradient norm above which each window was a spike, by those before it: ``SpikeDetector``, on the host.

    Args:
        windows: (stage, gradient norm) of each in order; a norm that is not finite is NaN and leaves no trace.

    Returns:
        one limit a window; infinite where nothing would have been a spike yet.
    """
    limits: list[float] = []
    stage_before, count, mean, variance, largest = 0, 0, 0.0, 0.0, 0.0
    for stage, norm in windows:
        if stage != stage_before:  # the norm becomes that of other parameters
            stage_before, count, mean, variance, largest = stage, 0, 0.0, 0.0, 0.0
        deviation, warm = max(math.sqrt(variance), LEAST_DEVIATION), count >= WARMUP_WINDOWS
        if warm:
            limit = mean + SKIP_SIGMAS * deviation
        else:
            limit = largest + math.log(FACTOR_OVER_LARGEST) if count >= LEAST_WINDOWS else math.inf
        limits.append(math.exp(limit))
        if not math.isfinite(norm):
            continue
        value = math.log(max(norm, 1e-20))
        reach = LIMIT_SIGMAS * deviation
        if warm:
            limited = min(max(value, mean - reach), mean + reach)
        else:
            limited = largest + math.log(2) if value > limit else value
        decay = min(1 - 1 / (count + 1), DECAY)
        step = limited - mean
        mean += (1 - decay) * step
        variance = decay * (variance + (1 - decay) * step**2)
        largest = max(largest, limited) if count else limited
        count += 1
    return limits
