import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.stages import Stage, cosine_ramp, learning_rate


def stage(lr: float = 0.01) -> Stage:
    return Stage(1, 0, 10, batch_size=2, accumulation_steps=4, lr=lr, backbone_lr_scale=0.1, freeze_backbone=True)


@given(num_windows=st.integers(2, 5000))
def test_rises_to_the_peak_once_and_falls_to_exactly_zero(num_windows: int) -> None:
    rates = [learning_rate(stage(), window, num_windows) for window in range(num_windows)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(0.01)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0
    assert all(rate > 0 for rate in rates[:-1])


def test_starts_near_zero() -> None:
    assert learning_rate(stage(), 0, 1000) == pytest.approx(0.01 / 100)


def test_a_stage_of_one_window_trains() -> None:
    assert learning_rate(stage(), 0, 1) == 0.01


def test_ramp_runs_from_zero_to_one_and_is_clamped() -> None:
    assert [cosine_ramp(x) for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.5, 1, 1])
