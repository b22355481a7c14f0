"""The time that a run still takes."""

import re
import time

import pytest

from reporting.forecast import WHOLE_NETWORK, Forecast, describe, duration
from training.settings import Settings
from training.stages import build_stages


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def forecast(clock: Clock, epochs: int = 10, stage1_epochs: int = 4) -> Forecast:
    settings = Settings(dataset_path="x", epochs=epochs, stage1_epochs=stage1_epochs)
    return Forecast(build_stages(settings), num_windows=20, clock=clock)


def run_epoch(told: Forecast, clock: Clock, epoch: int, stage: int, window: float, rest: float) -> float | None:
    """Let an epoch pass whose windows take ``window`` seconds, and validation and save ``rest``."""
    for number in range(1, 21):
        fields = {"stage": stage, "epoch": epoch, "window": number, "global_window": 20 * (epoch - 1) + number}
        told.window(fields)
        clock.now += window
    clock.now += rest
    return told.epoch({"epoch": epoch})


def test_epochs_that_are_left_take_as_long_as_those_before() -> None:
    clock = Clock()
    told = forecast(clock, stage1_epochs=0)
    assert run_epoch(told, clock, 1, 2, window=2.0, rest=10.0) == pytest.approx(9 * 50)
    assert run_epoch(told, clock, 2, 2, window=2.0, rest=10.0) == pytest.approx(8 * 50)
    assert run_epoch(told, clock, 10, 2, window=2.0, rest=10.0) == 0


def test_the_second_stage_takes_longer_until_it_has_been_seen() -> None:
    clock = Clock()
    told = forecast(clock)
    first = run_epoch(told, clock, 1, 1, window=1.0, rest=0.0)
    assert first == pytest.approx(3 * 20 + 6 * 20 * WHOLE_NETWORK)
    for epoch in (2, 3, 4):
        run_epoch(told, clock, epoch, 1, window=1.0, rest=0.0)
    assert run_epoch(told, clock, 5, 2, window=4.0, rest=0.0) == pytest.approx(5 * 80)


def test_windows_tell_once_a_stage_before_an_epoch_has_ended() -> None:
    clock = Clock()
    told, answers = forecast(clock, stage1_epochs=0), []
    for number in range(1, 20):
        fields = {"stage": 2, "epoch": 1, "window": number, "global_window": number}
        answers.append(told.window(fields))
        clock.now += 3.0
    (answer,) = [value for value in answers if value is not None]
    assert answers.index(answer) == 10
    assert answer == pytest.approx((10 - 11 / 20) * 60 * 1.1)


def test_a_resumed_epoch_is_no_measure_of_a_whole_one() -> None:
    clock = Clock()
    told = forecast(clock, stage1_epochs=0)
    told.window({"stage": 2, "epoch": 1, "window": 19, "global_window": 19})
    clock.now += 5
    assert told.epoch({"epoch": 1}) is None
    assert run_epoch(told, clock, 2, 2, window=2.0, rest=0.0) == pytest.approx(8 * 40)


@pytest.mark.parametrize(
    ("seconds", "text"), [(50, "50 s"), (45 * 60, "45 min"), (3.1 * 3600, "3.1 h"), (2.3 * 86400, "2.3 days")]
)
def test_durations_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_line_names_the_end_and_the_memory() -> None:
    noon = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    assert re.fullmatch(r"about 2\.0 h left, until 14:00, peak [\d.]+ GB( of the GPU)?", describe(7200, noon))
    assert "until Thu 18:00" in describe(30 * 3600, noon)
    assert "until 14 Mar 12:00" in describe(10 * 86400, noon)
