"""The order in which an epoch's windows are trained."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import NoReturn

from torch.utils.data import DataLoader
from tqdm import tqdm

from data.dataset import Batch
from data.loading import sampler_of, windows
from data.sampler import derive_seed, drawn
from training.batchnorm import BufferGuard
from training.drill import Drill
from training.gate import PendingOutcome, StepVerdict, WindowOutcome
from training.recovery import RecoverySpentError
from training.run import Run
from training.stages import Stage, cosine_ramp, learning_rate
from training.window import Window


class WindowFeed:
    """Hands out an epoch's windows in order, and before they go on, those that were put back."""

    def __init__(self, windows: Iterator[Window], drills: Sequence[Drill] = ()) -> None:
        self._windows = windows
        self._drills = drills
        self._again: deque[Window] = deque()

    def take(self, hold: bool) -> Window | None:
        """The next window; None at the end of the epoch, or where ``hold`` is set and nothing has been put back."""
        if self._again:
            window = self._again.popleft()
        elif hold or (window := next(self._windows, None)) is None:
            return None
        else:
            window = self._spoilt(window)
        drill = next((drill for drill in self._drills if drill.strikes_attempts(window.global_number)), None)
        return replace(window, drill=drill)

    def put_back(self, windows: Sequence[Window]) -> None:
        """Hand these out next, in this order."""
        self._again.extendleft(reversed(windows))

    def _spoilt(self, window: Window) -> Window:
        for drill in self._drills:
            if drill.strikes_window(window.global_number) and (window.batches or drill.kind == "kill"):
                first, *others = window.batches or [window.blank]
                assert first is not None, "a rank without samples has something blank to run"
                spoilt = first._replace(images=drill.spoil_images(first.images))
                window = replace(window, batches=[spoilt, *others], spoilt_by=drill.kind)
        return window


def epoch_windows(
    run: Run, stage: Stage, loader: DataLoader[Batch], num_windows: int, guard: BufferGuard
) -> Iterator[Window]:
    """The windows left in the epoch under way, without quarantined samples; one that has nothing else is left out.

    Raises:
        UnreadableDataError: too many images or masks cannot be decoded.
    """
    progress, first_global = run.state.progress, run.state.progress.global_window - run.state.progress.window
    first_of_stage = (progress.epoch - stage.first_epoch) * num_windows
    sampler = sampler_of(loader)
    for number, batches in enumerate(windows(loader, progress.epoch, progress.window), start=progress.window):
        for batch in batches:
            run.unreadable.meet({run.recovery.images[index]: reason for index, reason in batch.errors.items()})
        window = Window(
            number=number,
            global_number=first_global + number + 1,
            batches=batches if run.share.of(sampler.samples_in(number)) else [],
            total=sampler.samples_in(number),
            blank=batches[0].blank(guard.least_batch) if run.ranks.size > 1 else None,
            rounds=sampler.most_batches_in(number) if run.ranks.shards else 0,
            lr=learning_rate(stage, first_of_stage + number, stage.num_epochs * num_windows),
            uncertainty_weight=cosine_ramp((progress.epoch + number / num_windows) / run.args.epochs),
            precision=run.precision,
            scaler=run.state.scaler,
            memory_format=run.memory_format,
            scale=drawn(run.args.multi_scale, run.args.seed, first_global + number + 1),
            seed=derive_seed(run.args.seed, first_global + number + 1, *([run.ranks.rank] if run.ranks.rank else [])),
        )
        window = run.recovery.without_quarantined(window, guard.least_batch)
        window = window.in_parts(run.runner.num_parts, guard.least_batch)
        if window.num_samples_everywhere:
            full = run.state.ladder.full_precision
            yield window.in_full_precision(halve=not guard.batch_matters) if full else window


def take_in(run: Run, stage: Stage, window: Window, pending: PendingOutcome, guard: BufferGuard) -> WindowOutcome:
    """Read and log a window's outcome, and have the average take in the weights it left: a state fit to be saved."""
    state, outcome = run.state, pending.read()
    state.epoch_stats.lr = window.lr * state.ladder.lr_factor
    if outcome.verdict is StepVerdict.APPLIED and state.ema is not None:
        state.ema.update(state.model, guard.at_start)
    where = {"stage": stage.number, "epoch": state.progress.epoch + 1, "window": window.number + 1}
    tried = {"attempt": window.attempt + 1, "precision": window.precision.name, "lr": state.epoch_stats.lr}
    run.log.event("window", **where, **tried, global_window=window.global_number, **asdict(outcome))
    run.consistent = True
    return outcome


def settle_window(
    run: Run, stage: Stage, window: Window, pending: PendingOutcome, guard: BufferGuard, bar: "tqdm[NoReturn]"
) -> list[Window] | None:
    """Act on a window's verdict: update the weight average, recover, count and log.

    Returns:
        None to go on; else what is to be run before anything else. The gradient under way has been dropped then.
    """
    stats, outcome = run.state.epoch_stats, take_in(run, stage, window, pending, guard)
    run.stop.hear(pending.requests)
    run.store.tell()
    run.consistent = False
    try:
        again = run.recovery.answer(window, outcome, guard)
    except RecoverySpentError:
        run.consistent = True
        bar.close()
        raise
    run_again = any(other.number == window.number for other in again or ())
    stats.add(outcome, run_again, large_norm=5 * run.args.grad_clip)
    run.consistent = True
    shown = {"loss": f"{outcome.loss:.2f}", "grad": f"{outcome.grad_norm:.3f}"}
    bar.set_postfix(shown | ({"overflows": stats.num_overflows} if stats.num_overflows else {}), refresh=False)
    return again
