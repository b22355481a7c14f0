"""The recovery ladder's policy, without a run."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.machine import PrecisionName
from training.gate import StepVerdict, WindowOutcome
from training.ladder import AFTER_QUARANTINE, BAD_AMONG, Action, Ladder, LossHistory


def outcome(verdict: StepVerdict, loss: float = 1.0) -> WindowOutcome:
    return WindowOutcome(verdict, loss, 1.0, 1.0)


def climb(ladder: Ladder, verdict: StepVerdict, precision: PrecisionName) -> list[Action]:
    """Return the actions for a window that fails in every attempt."""
    actions: list[Action] = []
    attempt = 0
    while not actions or actions[-1] not in (Action.GO_ON, Action.LOCALISE, Action.ROLL_BACK):
        actions.append(ladder.next_action(outcome(verdict), attempt, precision))
        attempt = {Action.RETRY: 1, Action.RETRY_FULL_PRECISION: 2}.get(actions[-1], attempt)
        if actions[-1] is Action.RETRY_FULL_PRECISION:
            precision = "fp32"
    return actions


@pytest.mark.parametrize("verdict", [StepVerdict.NONFINITE_LOSS, StepVerdict.NONFINITE_GRAD])
def test_rungs_of_a_window_that_is_never_finite(verdict: StepVerdict) -> None:
    assert climb(Ladder(), verdict, "fp32") == [Action.RETRY, Action.LOCALISE]
    for precision in ("bf16", "fp16"):
        expected = [Action.RETRY, Action.RETRY_FULL_PRECISION, Action.LOCALISE]
        assert climb(Ladder(), verdict, precision) == expected  # type: ignore[arg-type]  # a literal


def test_four_overflows_in_a_row_are_routine_and_the_fifth_is_rerun() -> None:
    ladder = Ladder()
    assert [climb(ladder, StepVerdict.OVERFLOW, "fp16")[0] for _ in range(4)] == [Action.GO_ON] * 4
    assert ladder.recent == []
    assert ladder.next_action(outcome(StepVerdict.OVERFLOW), 0, "fp16") is Action.RETRY
    assert ladder.next_action(outcome(StepVerdict.OVERFLOW), 1, "fp16") is Action.RETRY_FULL_PRECISION
    ladder.next_action(outcome(StepVerdict.APPLIED), 2, "fp32")  # says nothing about the scale
    assert ladder.next_action(outcome(StepVerdict.OVERFLOW), 0, "fp16") is Action.RETRY
    ladder.next_action(outcome(StepVerdict.APPLIED), 1, "fp16")
    assert ladder.next_action(outcome(StepVerdict.OVERFLOW), 0, "fp16") is Action.GO_ON


def test_spike_is_skipped_and_eight_of_fifty_are_too_many() -> None:
    ladder = Ladder()
    for _ in range(7):
        assert ladder.next_action(outcome(StepVerdict.SPIKE), 0, "fp32") is Action.GO_ON
    for _ in range(42):
        assert ladder.next_action(outcome(StepVerdict.APPLIED), 0, "fp32") is Action.GO_ON
    assert ladder.next_action(outcome(StepVerdict.SPIKE), 0, "fp32") is Action.ROLL_BACK
    assert len(ladder.recent) == 50


def test_old_spikes_are_forgotten() -> None:
    ladder = Ladder()
    for _ in range(200):
        for _ in range(7):  # one in eight: never eight of fifty
            assert ladder.next_action(outcome(StepVerdict.APPLIED), 0, "fp32") is Action.GO_ON
        assert ladder.next_action(outcome(StepVerdict.SPIKE), 0, "fp32") is Action.GO_ON


def test_window_that_fails_without_its_quarantined_samples_is_skipped() -> None:
    ladder = Ladder()
    action = ladder.next_action(outcome(StepVerdict.NONFINITE_LOSS), AFTER_QUARANTINE, "fp32")
    assert action is Action.GO_ON
    assert ladder.skipped == {"nonfinite_loss": 1}


def feed(ladder: Ladder, *losses: float) -> list[Action]:
    """Return the actions after applied windows with these losses."""
    return [ladder.next_action(outcome(StepVerdict.APPLIED, loss), 0, "fp32") for loss in losses]


def test_loss_at_twice_its_mean_for_five_windows_rolls_back() -> None:
    ladder = Ladder()
    assert set(feed(ladder, *[2.0] * 100)) == {Action.GO_ON}
    assert feed(ladder, *[5.0] * 4, 2.0, *[5.0] * 4) == [Action.GO_ON] * 9
    assert not ladder.is_healthy
    assert feed(ladder, 5.0) == [Action.ROLL_BACK]


def test_weights_are_not_kept_until_five_windows_after_a_skipped_one() -> None:
    ladder = Ladder()
    feed(ladder, *[2.0] * 60)
    assert ladder.is_healthy
    ladder.skip(StepVerdict.NONFINITE_LOSS)
    for _ in range(4):
        feed(ladder, 2.0)
        assert not ladder.is_healthy
    feed(ladder, 2.0)
    assert ladder.is_healthy


def test_loss_that_has_risen_for_long_rolls_back_although_no_window_stands_out() -> None:
    ladder = Ladder()
    feed(ladder, *[2.0] * 100)
    actions = feed(ladder, *[2.6] * 100)
    assert 15 < actions.index(Action.ROLL_BACK) < 100
    assert not ladder.is_healthy


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_loss_that_scatters_and_falls_as_losses_do_is_left_alone(seed: int) -> None:
    """Losses fall from 5 to 1 over 2,000 windows and scatter by a quarter; on photographs, by half of that."""
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(seed)).mul(0.25).exp().tolist()
    losses = [value * (5 - 4 * i / 2000) for i, value in enumerate(noise)]
    assert set(feed(Ladder(), *losses)) == {Action.GO_ON}


def scattered(levels: Sequence[float], deviation: float, seed: int = 0) -> list[float]:
    """Return log-normal losses around these levels."""
    noise = torch.randn(len(levels), generator=torch.Generator().manual_seed(seed)).mul(deviation).exp().tolist()
    return [level * factor for level, factor in zip(levels, noise, strict=True)]


def first_rollback(losses: Sequence[float]) -> int | None:
    """Return the number of losses before the one at which the ladder orders a rollback; None if it orders none."""
    ladder = Ladder()
    return next((number for number, loss in enumerate(losses) if feed(ladder, loss) == [Action.ROLL_BACK]), None)


def test_a_rise_that_goes_on_as_before_is_no_jump() -> None:
    """It is found by its height: 1.22 times as high every 40 windows."""
    found = first_rollback([1.0] * 200 + [1.005**number for number in range(300)])
    assert found is not None
    assert found > 300


def test_a_slow_upward_drift_is_no_divergence() -> None:
    losses = [1.00015**i for i in range(5000)]
    assert losses[-1] > 2
    assert set(feed(Ladder(), *losses)) == {Action.GO_ON}


@pytest.mark.parametrize("deviation", [0.0, 0.12, 0.25])
def test_slow_divergence_is_found_before_the_loss_is_two_and_a_half_times_as_high(deviation: float) -> None:
    levels = [1.0] * 300 + [3.3 ** (number / 6000) for number in range(6000)]
    found = first_rollback(scattered(levels, deviation))
    assert found is not None
    assert 1.4 < levels[found] < 2.5


def test_during_slow_divergence_weights_are_not_kept_for_long() -> None:
    """A rollback must return to weights from before it."""
    ladder, levels = Ladder(), [1.0] * 300 + [3.3 ** (number / 6000) for number in range(6000)]
    healthy = []
    for loss in scattered(levels, 0.12):
        if feed(ladder, loss) == [Action.ROLL_BACK]:
            break
        healthy.append(ladder.is_healthy)
    assert sum(healthy[:300]) > 290
    assert not any(healthy[-1000:])


@pytest.mark.parametrize(("factor", "deviation"), [(1.3, 0.0), (1.3, 0.12), (1.5, 0.25), (2.0, 0.47)])
def test_a_loss_that_jumps_is_found_within_sixty_windows(factor: float, deviation: float) -> None:
    for seed in range(3):
        found = first_rollback(scattered([1.0] * 300 + [factor] * 60, deviation, seed))
        assert found is not None
        assert found >= 300


@pytest.mark.parametrize("variation", [0.5, 0.7, 1.0])
def test_heavy_tails_are_no_divergence(variation: float) -> None:
    """Single losses scatter by as much as their mean, as with one image a window."""
    deviation = math.sqrt(math.log(1 + variation**2))
    assert first_rollback(scattered([1.0] * 15_000, deviation)) is None


def test_losses_of_two_kinds_of_images_are_no_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3, 0.5):
        hard = torch.rand(5000, generator=generator) < share
        assert first_rollback(torch.where(hard, 3.0, 1.0).tolist()) is None


def test_one_enormous_loss_neither_is_a_divergence_nor_hides_one() -> None:
    for window in (20, 90):
        losses = scattered([1.0] * 100 + [3.0] * 50, 0.12)
        losses[window] = 1000.0
        assert first_rollback(losses) == 104


@pytest.mark.parametrize(("factor", "windows"), [(1.36, 160), (1.30, 240), (1.26, 264), (1.36, 400)])
@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.15])
def test_the_growing_weight_of_the_uncertainty_loss_is_no_divergence(
    factor: float, windows: int, deviation: float
) -> None:
    """Nothing is learnt here: the loss rises by that weight's cosine ramp only."""
    ramp = [1 + (factor - 1) * (1 - math.cos(math.pi * number / windows)) / 2 for number in range(windows)]
    assert [first_rollback(scattered(ramp, deviation, seed)) for seed in range(8)] == [None] * 8


def test_losses_of_nothing_are_no_divergence() -> None:
    assert first_rollback([0.0] * 200 + [1e-8] * 200 + [1e-4] * 200) is None


def test_histories_of_older_programs_begin_again() -> None:
    older = {"mean": 2.0, "variance": 0.1, "lowest_mean": 1.9, "num_losses": 300, "high_in_a_row": 2}
    assert LossHistory.restored(older) == LossHistory()
    ladder = Ladder()
    feed(ladder, *scattered([1.0] * 100, 0.12))
    assert LossHistory.restored(asdict(ladder.losses)) == ladder.losses


def test_rollbacks_count_as_in_a_row_until_there_is_progress() -> None:
    ladder = Ladder()
    ladder.rolled_back(10.0)
    ladder.rolled_back(5.0)
    assert (ladder.rollbacks_in_a_row, ladder.lr_factor, ladder.seconds_lost) == (2, 0.25, 15.0)
    feed(ladder, *[1.0] * 199)
    assert ladder.rollbacks_in_a_row == 2
    feed(ladder, 1.0)
    assert (ladder.rollbacks_in_a_row, ladder.num_rollbacks, ladder.lr_factor) == (0, 2, 0.25)


def test_quarantine_expires_and_doubles_with_each_offence() -> None:
    ladder = Ladder()
    assert ladder.put_in_quarantine("a.jpg", epoch=4) == 7
    assert [ladder.is_quarantined("a.jpg", epoch) for epoch in (4, 5, 6, 7)] == [True, True, True, False]
    assert ladder.put_in_quarantine("a.jpg", epoch=7) == 12
    assert not ladder.is_quarantined("b.jpg", 5)


def test_summary_and_last_lines_name_what_happened() -> None:
    ladder = Ladder()
    feed(ladder, 1.0, 1.0)
    ladder.next_action(outcome(StepVerdict.SPIKE), 0, "fp32")
    ladder.rolled_back(2.0)
    ladder.put_in_quarantine("Imgs/a.jpg", epoch=0)
    first, second = ladder.describe()
    assert first == (
        "Windows: 2 applied, 1 skipped (1 spike); 1 rollback (learning rates now x 0.5), 1 sample quarantined, "
        "2.0 s lost to recovery"
    )
    assert second == "   Quarantined until epoch 4: Imgs/a.jpg"
    summary = ladder.summary()
    assert summary["skipped"] == {"spike": 1}
    assert summary["rollbacks"] == 1


verdicts = st.sampled_from(list(StepVerdict))
precisions = st.sampled_from(["fp32", "bf16", "fp16"])
losses = st.sampled_from([0.0, 1.0, 3.0, 1e30])


@given(st.lists(st.tuples(verdicts, st.integers(0, 3), precisions, losses), max_size=300))
def test_the_ladder_stays_plain_finite_numbers_of_bounded_size(events: list) -> None:
    ladder = Ladder()
    for verdict, attempt, precision, loss in events:
        ladder.next_action(WindowOutcome(verdict, loss, 1.0, 1.0), attempt, precision)
    assert len(ladder.recent) <= BAD_AMONG
    assert math.isfinite(ladder.losses.mean)
    restored = Ladder(**{**asdict(ladder), "losses": LossHistory(**asdict(ladder.losses))})
    assert restored == ladder
