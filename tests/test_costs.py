"""What training costs: the forecast's arithmetic, and a real trial."""

from dataclasses import replace

import pytest
from conftest import Argv, prepare_run

from data.sampler import drawn
from training.costs import Costs, Meter, forecast
from training.settings import Settings

COSTS = Costs(5.0, {1: 0.5, 2: 1.0}, epoch=2.0, validation=0.1, precision="fp32", memory=2e9, checkpoint=50e6)
COSTS = replace(COSTS, decoding=0.01)
SETTINGS = Settings(dataset_path="x", epochs=10, stage1_epochs=4, batch_size=8, accumulation_steps=1, img_size=64)


def test_a_run_costs_its_windows_validations_and_saves() -> None:
    cost = forecast(SETTINGS, num_images=78, num_validated=10, costs=COSTS)  # 10 windows
    assert cost.stages == pytest.approx({1: 4 * (10 * 0.5 + 2 + 1), 2: 6 * (10 * 1.0 + 2 + 1)})
    assert cost.seconds == pytest.approx(7 + 5 + 32 + 78)
    assert (cost.memory, cost.disk) == (2e9, 5 * 50e6)


def test_a_cache_costs_decoding_and_disk() -> None:
    plain, cached = (forecast(replace(SETTINGS, cache=cache), 78, 10, COSTS) for cache in (False, True))
    assert cached.seconds - plain.seconds == pytest.approx(88 * 0.01)
    assert cached.disk - plain.disk == 88 * 4 * 64**2


def test_ranks_share_images() -> None:
    alone, together = (forecast(SETTINGS, 800, 16, COSTS, num_ranks) for num_ranks in (1, 4))
    assert 2.5 < alone.seconds / together.seconds < 4


def test_the_meter_measures_windows_at_their_scale_and_ends_the_trial(tiny_argv: Argv) -> None:
    run = prepare_run(tiny_argv("--multi-scale", "0.5", "2", "--stage1-epochs", "0", "--seed", "1"))
    now = 100.0
    meter = Meter(run, began=97.0, seconds=0.0, clock=lambda: now)
    for epoch in (1, 2, 3, 4):
        for window in range(1, 5):  # of 20 images, six in each but the last
            number = 4 * (epoch - 1) + window
            scale = drawn(run.settings.multi_scale, run.settings.seed, number)
            now += (20.0 if number < 3 else 1.0) * (1 + scale**2) + (1.5 if epoch > 1 == window else 0.0)
            now -= 0.9 if window == 4 else 0.0
            meter.event("window", {"stage": 2, "window": window, "global_window": number})
            assert run.signals.time_is_up == (number >= 6)
        now += 0.5 * len(run.data.validation)
        meter.event("epoch", {})
    costs = meter.costs(decoding=0.0, checkpoint=1e6)
    assert costs.windows[2] == pytest.approx(1 + (0.25 + 4) / 2)
    assert (costs.start, costs.validation) == (pytest.approx(3.0), pytest.approx(0.5))


def test_a_trial_without_windows_is_refused(tiny_argv: Argv) -> None:
    meter = Meter(prepare_run(tiny_argv()), began=0.0, seconds=1.0)
    with pytest.raises(ValueError, match="too slow"):
        meter.costs(0.0, 0.0)
