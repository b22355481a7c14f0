import math

import pytest
import torch
from training.spikes import spike_limits

from training.gate import SpikeDetector


def test_recomputed_limits_judge_every_window_as_the_detector_did() -> None:
    generator = torch.Generator().manual_seed(3)
    norms = torch.randn(400, generator=generator).mul(0.5).exp()
    norms[[20, 90, 200, 201, 300]] *= 60
    norms[[2, 50, 150]] = math.nan
    windows = [(1 if index < 170 else 2, float(norm)) for index, norm in enumerate(norms)]
    limits = spike_limits(windows)
    detector, told = SpikeDetector("skip", torch.device("cpu")), []
    for index, (_, norm) in enumerate(windows):
        if index == 170:
            detector.reset(torch.device("cpu"))
        spike, _ = detector.examine(torch.tensor(1.0), torch.tensor(norm), torch.tensor(0.0))
        told.append(bool(spike))
    assert [norm > limit for (_, norm), limit in zip(windows, limits, strict=True)] == told
    assert sum(told) >= 4


def test_nothing_is_a_spike_without_a_history_and_the_first_limit_is_ten_times_the_largest() -> None:
    limits = spike_limits([(1, 1.0), (1, 2.0), (1, 1.0), (1, 1.0), (1, 1.0)])
    assert limits[:4] == [math.inf] * 4
    assert limits[4] == pytest.approx(20)
