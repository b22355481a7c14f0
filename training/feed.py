"""The order in which an epoch's windows are trained: new ones, and those that recovery puts back."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import TracebackType
from typing import Self

from torch.utils.data import DataLoader

from data.dataset import Batch
from data.loading import sampler_of, windows
from data.sampler import derive_seed, drawn
from runtime import console
from training.gate import DeviceVerdict, PendingOutcome, StepGate, StepVerdict, WindowOutcome
from training.ladder import Action
from training.recovery import RecoverySpentError
from training.run import Run
from training.stages import Stage, cosine_ramp, learning_rate
from training.window import Window


class WindowQueue:
    """The rest of an epoch's windows, in order; windows that recovery put back come first.

    The queue owns the pending window: its step has been queued on the device, and the host has not read its verdict.
    Use the queue as a context: when an exception leaves it, it settles what is pending, so that the state can be saved.

    Args:
        run: the run.
        stage: its current stage.
        loader: the stage's training loader.
        gate: judge of the windows.
    """

    def __init__(self, run: Run, stage: Stage, loader: DataLoader[Batch], gate: StepGate) -> None:
        self._run = run
        self._stage = stage
        self._gate = gate
        self._windows = epoch_windows(run, stage, loader, gate)
        self._again: deque[Window] = deque()  # put back by recovery
        self._num_reruns = 0  # of them, how many the last answer of recovery added
        self._current: Window | None = None
        self._pending: tuple[Window, PendingOutcome] | None = None
        progress = run.state.progress
        self._bar = console.progress_bar(
            desc=f"Epoch {progress.epoch + 1}/{run.settings.epochs}", total=sampler_of(loader).num_windows,
            initial=progress.window, unit="window",
        )  # fmt: skip
        self._seconds_counted = self._window_began = time.perf_counter()

    def __iter__(self) -> Iterator[Window]:
        """Yield windows until the epoch ends or a signal asks to stop; save between windows if a save is due."""
        while True:
            self._window_began = time.perf_counter()
            self._current = self._next()
            if self._current is not None:
                yield self._current
                continue
            self._gate.begin_window()
            if self._settle():
                continue
            if self._run.signals.stop or not self._run.save_is_due:
                return  # a run that is stopped is saved when it stops
            self._count_seconds()
            self._run.save_step()

    def settle_previous(self) -> bool:
        """Read the pending window's verdict and act on it, before the current window's step changes the weights.

        This is the only host sync of a window. It waits for numbers that are one window old.

        Returns:
            whether recovery intervened. It has then discarded the current gradient: put the current window back.

        Raises:
            RecoverySpentError: recovery has nothing left to try.
        """
        intervened = self._settle()
        self._run.state.mid_step = not intervened
        return intervened

    def put_back(self, window: Window) -> None:
        """Queue a window whose gradient was discarded, right behind those that recovery reruns."""
        self._again.insert(self._num_reruns, window)

    def stepped(self, window: Window, verdict: DeviceVerdict) -> None:
        """Make a window pending: its step, applied or skipped, has been queued on the device."""
        state = self._run.state
        self._current, self._pending = None, (window, PendingOutcome(verdict))
        state.mid_step = False
        if window.attempt:
            state.ladder.seconds_lost += time.perf_counter() - self._window_began
            return
        state.progress.count(window.number, window.global_number)
        state.epoch_stats.num_samples += window.num_samples_everywhere
        self._bar.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()
        self._count_seconds()
        spent = isinstance(error, RecoverySpentError)  # recovery has left a state that is fit to be saved
        if isinstance(error, Exception) and not spent and not self._run.state.mid_step:
            self._settle_without_recovery()

    def _next(self) -> Window | None:
        """Return the next window; None at the epoch's end, and before a save or a stop."""
        if self._again:
            window = self._again.popleft()
        else:
            holds = self._run.save_is_due or self._run.signals.stop
            if holds or (window := next(self._windows, None)) is None:
                return None
            window = self._spoilt(window)
        strikes = (drill for drill in self._run.state.drills if drill.strikes_attempts(window.global_number))
        return replace(window, drill=next(strikes, None))

    def _spoilt(self, window: Window) -> Window:
        """Apply drills that change a window's samples."""
        for drill in self._run.state.drills:
            if drill.strikes_window(window.global_number) and (window.batches or drill.kind == "kill"):
                first, *others = window.batches or [window.blank]
                assert first is not None, "a rank without samples has a blank batch to run"
                spoilt = first._replace(images=drill.spoil_images(first.images))
                window = replace(window, batches=[spoilt, *others], spoilt_by=drill.kind)
        return window

    def _settle(self) -> bool:
        """Settle the pending window, if there is one; return whether recovery intervened."""
        if self._pending is None:
            return False
        run, (window, pending), self._pending = self._run, self._pending, None
        outcome = self._take_in(window, pending)
        run.signals.hear(pending.requests)
        run.folder.store.report()
        run.state.mid_step = True  # recovery changes weights, moments and ladder one after the other
        try:
            again = run.recovery.answer(window, outcome, self._gate.guard)
        except RecoverySpentError:
            run.state.mid_step = False
            raise
        self._count(outcome, rerun=any(other.number == window.number for other in again or ()))
        run.state.mid_step = False
        if again is None:
            return False
        self._again.extendleft(reversed(again))
        self._num_reruns = len(again)
        run.state.ladder.seconds_lost += time.perf_counter() - self._window_began
        return True

    def _settle_without_recovery(self) -> None:
        """Make the state fit to be saved after an exception.

        A pending window that was applied, or skipped for good, is counted. Windows that recovery would rerun are left
        for the resumed run, which reruns everything from the first of them on.
        """
        state = self._run.state
        self._gate.guard.restore()
        self._gate.begin_window()  # so that the average gets the statistics that the pending window's step left
        owed = [window for window in (self._current, *self._again) if window is not None and window.attempt]
        if self._pending is not None:
            (window, pending), self._pending = self._pending, None
            outcome = self._take_in(window, pending)
            action = state.ladder.next_action(outcome, window.attempt, window.precision.name)
            if action in (Action.GO_ON, Action.ROLL_BACK):
                self._count(outcome, rerun=False)
            else:
                owed.append(window)
        if owed:
            first = min(owed, key=lambda window: window.number)
            state.progress.return_to(first.number, first.global_number)

    def _take_in(self, window: Window, pending: PendingOutcome) -> WindowOutcome:
        """Read and log a window's outcome, and update the average with the weights it left."""
        state, outcome = self._run.state, pending.read()
        state.epoch_stats.lr = window.lr * state.ladder.lr_factor
        if outcome.verdict is StepVerdict.APPLIED and state.ema is not None:
            state.ema.update(state.model, self._gate.guard.at_start)
        self._run.folder.log.event(
            "window",
            stage=self._stage.number,
            epoch=state.progress.epoch + 1,
            window=window.number + 1,
            attempt=window.attempt + 1,
            precision=window.precision.name,
            lr=state.epoch_stats.lr,
            global_window=window.global_number,
            **asdict(outcome),
        )
        return outcome

    def _count(self, outcome: WindowOutcome, rerun: bool) -> None:
        stats = self._run.state.epoch_stats
        stats.add(outcome, rerun, large_norm=5 * self._run.settings.grad_clip)
        shown = {"loss": f"{outcome.loss:.2f}", "grad": f"{outcome.grad_norm:.3f}"}
        overflows = {"overflows": stats.num_overflows} if stats.num_overflows else {}
        self._bar.set_postfix(shown | overflows, refresh=False)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._run.state.epoch_stats.seconds += now - self._seconds_counted
        self._seconds_counted = now


def epoch_windows(run: Run, stage: Stage, loader: DataLoader[Batch], gate: StepGate) -> Iterator[Window]:
    """Yield the epoch's remaining windows without quarantined samples. Skip windows that this leaves empty.

    Raises:
        UnreadableDataError: too many images or masks cannot be decoded.
    """
    settings, state, ranks = run.settings, run.state, run.machine.ranks
    progress, sampler, least_batch = state.progress, sampler_of(loader), gate.guard.least_batch
    first_global, num_windows = progress.global_window - progress.window, sampler.num_windows
    first_of_stage = (progress.epoch - stage.first_epoch) * num_windows
    for number, batches in enumerate(windows(loader, progress.epoch, progress.window), start=progress.window):
        for batch in batches:
            run.data.unreadable.meet({run.data.images[index]: reason for index, reason in batch.errors.items()})
        seed = settings.seed, first_global + number + 1
        window = Window(
            number=number,
            global_number=first_global + number + 1,
            batches=batches if sampler.share.of(sampler.samples_in(number)) else [],
            total=sampler.samples_in(number),
            blank=batches[0].blank(least_batch) if ranks.size > 1 else None,
            rounds=sampler.most_batches_in(number) if ranks.shards else 0,
            lr=learning_rate(stage, first_of_stage + number, stage.num_epochs * num_windows),
            uncertainty_weight=cosine_ramp((progress.epoch + number / num_windows) / settings.epochs),
            precision=run.machine.precision,
            scaler=state.scaler,
            memory_format=run.machine.memory_format,
            scale=drawn(settings.multi_scale, *seed),
            seed=derive_seed(*seed, *([ranks.rank] if ranks.rank else [])),
        )
        window = run.recovery.without_quarantined(window, least_batch)
        window = window.in_parts(run.runner.num_parts, least_batch)
        if window.num_samples_everywhere:
            full = state.ladder.full_precision
            yield window.in_full_precision(halve=not gate.guard.batch_matters) if full else window
