"""The queue of an epoch's windows: their order, when verdicts are read, and what an exception leaves behind."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Argv, prepare_run
from torch import Tensor
from torch.utils.data import DataLoader
from windows import TinyNetwork

from data.dataset import Batch, Sample, collate
from data.loading import training_loader
from runtime.checkpoint import read_checkpoint
from runtime.ranks import Ranks
from training.batchnorm import BufferGuard
from training.drill import Drill
from training.feed import WindowQueue
from training.gate import DeviceVerdict, StepGate, WindowOutcome
from training.recovery import Recovery, RecoverySpentError
from training.run import Run
from training.window import Window, accumulate_gradients

Reruns = Mapping[tuple[int, int], int]  # (window, attempt) -> how many windows recovery then puts back
Seen = list[tuple[int, int]]  # (window, attempt) of each pass


class ScriptedRecovery(Recovery):
    """Recovery that reruns windows by a script: a window that it reruns n times at once has n further attempts."""

    def __init__(self, reruns: Reruns) -> None:
        self.reruns = reruns

    def without_quarantined(self, window: Window, least_batch: int) -> Window:
        return window

    def answer(self, window: Window, outcome: WindowOutcome, guard: BufferGuard) -> list[Window] | None:
        number = self.reruns.get((window.number, window.attempt), 0)
        return [replace(window, attempt=window.attempt + n) for n in range(1, number + 1)] or None


@pytest.fixture
def run(tiny_argv: Argv) -> Run:
    """A new run with 4 windows of 6, 6, 6 and 2 samples an epoch; the whole network learns, statistics too."""
    run = prepare_run(tiny_argv("--stage1-epochs", "0"))
    run.state.model.train()
    return replace(run, recovery=ScriptedRecovery({}))


def with_reruns(run: Run, reruns: Reruns) -> Run:
    return replace(run, recovery=ScriptedRecovery(reruns))


def verdict(loss: float = 1.0, spike: float = 0.0) -> DeviceVerdict:
    """Return a verdict in fp32: applied, or a spike, or a loss that is not finite."""
    loss_, one, zero = torch.tensor(loss), torch.ones(()), torch.zeros(())
    skip = torch.tensor(float(spike or loss != loss))
    return DeviceVerdict(loss_, one, zero, torch.tensor(spike), one, one, one, skip, requests=None)


def loader_of(run: Run, window_size: int = 6) -> DataLoader[Batch]:
    return training_loader(
        run.data.train_pairs, 64, 2, 42, num_workers=0, pin_memory=False, window_size=window_size, share=run.share
    )


def drive(
    run: Run,
    on_pass: Callable[[Window], None] = lambda window: None,
    verdict_of: Callable[[Window], DeviceVerdict] = lambda window: verdict(),
    loader: DataLoader[Batch] | None = None,
) -> Seen:
    """Run the rest of an epoch without computing anything, and return its passes in order.

    Args:
        run: the run.
        on_pass: called instead of each forward and backward pass.
        verdict_of: returns the verdict on a window.
        loader: another loader than the run's own.
    """
    seen: Seen = []
    gate = StepGate(run.state.model, run.state.detector, 0.5, run.machine.ranks, run.signals.received)
    with WindowQueue(run, run.stages[0], loader or loader_of(run), gate) as queue:
        for window in queue:
            gate.begin_window()
            seen.append((window.number, window.attempt))
            on_pass(window)
            if queue.settle_previous():
                queue.put_back(window)
                continue
            window.strike([])
            found = verdict_of(window)
            gate.end_window(found.skip)
            queue.stepped(window, found)
    return seen


# Order


def test_an_undisturbed_epoch_is_every_window_once(run: Run) -> None:
    assert drive(run) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert (run.state.progress.window, run.state.epoch_stats.num_applied) == (4, 4)
    assert run.state.epoch_stats.num_samples == 20


@pytest.mark.parametrize(
    ("reruns", "expected"),
    [
        ({(1, 0): 1}, [(0, 0), (1, 0), (2, 0), (1, 1), (2, 0), (3, 0)]),
        ({(1, 0): 1, (1, 1): 1}, [(0, 0), (1, 0), (2, 0), (1, 1), (2, 0), (1, 2), (2, 0), (3, 0)]),
        ({(1, 0): 2}, [(0, 0), (1, 0), (2, 0), (1, 1), (1, 2), (2, 0), (3, 0)]),
        ({(3, 0): 1}, [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1)]),
    ],
)
def test_windows_that_recovery_reruns_come_first_and_the_interrupted_one_behind_them(
    run: Run, reruns: Reruns, expected: Seen
) -> None:
    assert drive(with_reruns(run, reruns)) == expected
    assert run.state.progress.window == 4


def test_each_verdict_is_read_once_after_the_next_windows_pass(run: Run) -> None:
    """On a GPU, reading a verdict waits for the device."""
    events: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__ in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__"):
                events.append("read")
            return super().__torch_function__(func, types, args, kwargs or {})

    def watched(_: Window) -> DeviceVerdict:
        return replace(verdict(), loss=torch.ones(()).as_subclass(Watched))

    drive(run, on_pass=lambda window: events.append(f"pass {window.number}"), verdict_of=watched)
    assert events == ["pass 0", "pass 1", "read", "pass 2", "read", "pass 3", "read", "read"]


# Saving and stopping


def test_before_a_stop_reruns_are_finished_and_no_new_window_begins(run: Run) -> None:
    def stop_at_window_2(window: Window) -> None:
        if window.number == 2:
            run.signals.signal_number = signal.SIGTERM

    run = with_reruns(run, {(1, 0): 1})
    assert drive(run, stop_at_window_2) == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 0)]
    assert run.state.progress.window == 3
    assert not run.state.mid_step


@pytest.mark.parametrize("reruns", [{}, {(1, 0): 1}])
def test_a_save_waits_for_the_verdict_and_for_reruns_and_training_goes_on(run: Run, reruns: Reruns) -> None:
    def save_at_window_1(window: Window) -> None:
        run.signals.save |= (window.number, window.attempt) == (1, 0)

    again = [(1, 1)] if reruns else []
    assert drive(with_reruns(run, reruns), save_at_window_1) == [(0, 0), (1, 0), *again, (2, 0), (3, 0)]
    run.folder.store.wait()
    (saved,) = run.folder.path.glob("step_*.pth")
    assert saved.name == "step_00000002.pth"
    state = read_checkpoint(saved)
    assert state["progress"]["window"] == 2
    assert state["ema"]["num_updates"] == 2 + len(again)  # the script reruns windows that were applied


# Fire drills


def test_drill_strikes_attempts_from_its_window_on_while_its_count_lasts(run: Run) -> None:
    run.state.drills = [Drill.parse("nan-loss@2x2")]
    struck: list[str] = []

    def watch(window: Window) -> None:
        struck.append(window.rehearses)
        assert accumulate_gradients(TinyNetwork(), window).isnan() == bool(window.rehearses)

    assert drive(with_reruns(run, {(1, 0): 1}), watch) == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 0), (3, 0)]
    assert struck == ["", "nan-loss", "nan-loss", "nan-loss", "", ""]  # the first pass of window 2 took no step


def test_bad_sample_is_not_finite_in_that_window_and_in_no_other(run: Run) -> None:
    run.state.drills = [Drill.parse("bad-sample@2")]

    def watch(window: Window) -> None:
        assert window.rehearses == ("bad-sample" if window.number == 1 else "")
        assert accumulate_gradients(TinyNetwork(), window).isnan() == (window.number == 1)
        assert accumulate_gradients(TinyNetwork(), window.only(range(1, window.num_samples))).isfinite()

    drive(run, watch)


def test_kill_strikes_a_rank_without_samples_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _process, number: kills.append(number))
    run = replace(run, machine=replace(run.machine, ranks=Ranks(rank=1, size=2)))
    run.state.drills = [Drill.parse("kill@2")]
    gate = StepGate(run.state.model, run.state.detector, 0.5, run.machine.ranks, run.signals.received)
    windows = iter(WindowQueue(run, run.stages[0], loader_of(run, window_size=19), gate))
    assert next(windows).num_samples == 9
    assert kills == []
    assert not run.share.of(1)  # the 20th sample is rank 0's
    assert next(windows).num_samples_everywhere == 1
    assert kills == [signal.SIGKILL]


# Exceptions


class FaultError(Exception):
    """A fault, anywhere in the program."""


def fault_at(number: int, attempt: int = 0) -> Callable[[Window], None]:
    """Return a pass that fails at a window."""

    def on_pass(window: Window) -> None:
        if (window.number, window.attempt) == (number, attempt):
            raise FaultError

    return on_pass


def test_after_an_exception_a_pending_window_that_was_applied_is_counted(run: Run) -> None:
    with pytest.raises(FaultError):
        drive(run, fault_at(2))
    state = run.state
    assert (state.progress.window, state.progress.global_window) == (2, 2)
    assert (state.epoch_stats.num_applied, state.ladder.num_applied) == (2, 1)  # the first was the script's to count
    assert state.ema is not None
    assert state.ema.num_updates == 2
    assert not state.mid_step


def test_after_an_exception_a_pending_window_that_was_not_finite_is_left_for_the_resumed_run(run: Run) -> None:
    with pytest.raises(FaultError):
        drive(run, fault_at(2), lambda window: verdict(float("nan") if window.number == 1 else 1.0))
    state = run.state
    assert (state.progress.window, state.progress.global_window) == (1, 1)
    assert (state.epoch_stats.num_applied, state.epoch_stats.num_skipped, state.ladder.skipped) == (1, 0, {})


def test_after_an_exception_a_pending_spike_is_counted_as_skipped(run: Run) -> None:
    with pytest.raises(FaultError):
        drive(run, fault_at(2), lambda window: verdict(spike=float(window.number == 1)))
    state = run.state
    assert (state.progress.window, state.progress.global_window) == (2, 2)
    assert (state.epoch_stats.num_applied, state.epoch_stats.num_skipped) == (1, 1)
    assert state.ladder.skipped == {"spike": 1}


@pytest.mark.parametrize(("number", "attempt"), [(1, 1), (2, 0)])
def test_after_an_exception_during_reruns_the_resumed_run_begins_at_the_first_that_was_not_applied(
    run: Run, number: int, attempt: int
) -> None:
    passes = 0

    def on_pass(window: Window) -> None:
        nonlocal passes
        passes += 1
        if passes > 3 and (window.number, window.attempt) == (number, attempt):
            raise FaultError

    with pytest.raises(FaultError):
        drive(with_reruns(run, {(1, 0): 1}), on_pass)
    assert run.state.progress.window == (1 if attempt else 2)


def statistic(run: Run) -> Tensor:
    return next(buffer for name, buffer in run.state.model.named_buffers() if name.endswith("running_mean"))


def mark(window: Window, run: Run) -> None:
    """Change the statistics as a forward pass does: to the window's number."""
    statistic(run).fill_(window.number)


def test_an_exception_during_a_pass_restores_the_statistics_that_the_last_step_left(run: Run) -> None:
    def on_pass(window: Window) -> None:
        mark(window, run)
        fault_at(2)(window)

    with pytest.raises(FaultError):
        drive(run, on_pass)
    assert statistic(run).eq(1).all()


@pytest.mark.parametrize("num_windows", [0, 1, 2])
def test_an_exception_while_a_window_is_read_keeps_the_statistics_that_the_last_step_left(
    run: Run, num_windows: int
) -> None:
    loader, calls, before = loader_of(run), 0, statistic(run).clone()

    def failing(samples: Sequence[Sample]) -> Batch:
        nonlocal calls
        calls += 1
        if calls > 3 * num_windows:  # three batches a window
            raise FaultError
        return collate(samples)

    loader.collate_fn = failing
    with pytest.raises(FaultError):
        drive(run, lambda window: mark(window, run), loader=loader)
    assert run.state.progress.window == num_windows
    expected = torch.full_like(before, num_windows - 1) if num_windows else before
    assert torch.equal(statistic(run), expected)
    assert run.state.ema is not None
    average = dict(run.state.ema.module.named_buffers())
    marked = next(name for name, buffer in run.state.model.named_buffers() if buffer is statistic(run))
    assert average[marked].any() == (num_windows == 2)  # what window 0 left is zero


def test_when_recovery_is_spent_the_weights_it_restored_keep_their_statistics(run: Run) -> None:
    class Spent(ScriptedRecovery):
        def answer(self, window: Window, outcome: WindowOutcome, guard: BufferGuard) -> list[Window] | None:
            if window.number < 1:
                return None
            guard.restore()
            statistic(run).fill_(7)  # a snapshot's
            raise RecoverySpentError("spent")

    with pytest.raises(RecoverySpentError):
        drive(replace(run, recovery=Spent({})), lambda window: mark(window, run))
    assert statistic(run).eq(7).all()
    assert not run.state.mid_step


def test_an_exception_during_a_step_leaves_the_state_marked_as_half_done(run: Run) -> None:
    def failing(window: Window) -> DeviceVerdict:
        if window.number == 2:
            raise FaultError
        return verdict()

    with pytest.raises(FaultError):
        drive(run, verdict_of=failing)
    assert run.state.mid_step
