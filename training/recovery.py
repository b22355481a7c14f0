"""Recovery: acts on what the ladder decides about a window, and records it as an incident."""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint import HostCopy
from runtime.log import RunLog
from runtime.machine import Machine, ScalerSettings
from runtime.sharding import load_local_state, local_state, whole_on_first, whole_weights
from training.batchnorm import BufferGuard, running_statistics, statistics_kept
from training.diagnosis import Diagnosis, diagnose, find_culprits, name_cause, stand_out
from training.gate import StepVerdict, WindowOutcome
from training.incidents import DIVERGED, NONFINITE_WEIGHTS, IncidentRecord, IncidentStore
from training.ladder import AFTER_QUARANTINE, LEAST_LR_FACTOR, Action, LossHistory
from training.optim import all_finite, fresh_moments
from training.runner import WindowRunner
from training.settings import Settings
from training.state import TrainState
from training.window import Window, window_to_payload

logger = logging.getLogger("train_ultimate")

SNAPSHOT_EVERY = 50  # applied windows
_HOW_APPLIED = {  # attempt -> action, and the cause it suggests
    1: ("run again, and applied", "not reproduced"),
    2: ("run again in fp32, and applied", "precision"),
    AFTER_QUARANTINE: ("window applied without", "data"),
}


class RecoverySpentError(Exception):
    """Every rung of the ladder has been tried. The state is fit to be saved and resumed."""


@dataclass(frozen=True)
class Snapshot:
    """Weights to return to, in host memory; this rank's part of them if they are sharded.

    The optimizer's moments are not in it: a rollback resets them.
    """

    global_window: int
    stage: int
    taken_at: float  # time.perf_counter()
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    num_averaged: int  # number of updates in the average
    detector: dict[str, Any]
    losses: LossHistory


class Recovery:
    """Recovery from faults within the process, without restarting anything.

    All ranks act alike: what only one rank can see is exchanged first.

    Args:
        state: the run's state; its ladder decides.
        images: names of the training images, by sample index, for records.
        settings: the run's settings; incidents hold them for ``replay``. ``max_rollbacks`` limits rollbacks in a row;
            at 0, neither a diverging loss nor windows skipped in a row cause one, and weights that are not finite
            end the run at once.
        machine: what the run computes on.
        runner: reruns windows for diagnosis.
        directory: folder of the incident folders.
        log: the run's log.
    """

    def __init__(
        self, state: TrainState, images: Sequence[str], settings: Settings, machine: Machine, runner: WindowRunner,
        directory: Path, log: RunLog,
    ) -> None:  # fmt: skip
        self.state = state
        self.ranks = machine.ranks
        self.images = images
        self.settings = settings
        self.incidents = IncidentStore(directory)
        self.log = log
        self.precision = machine.precision
        self.max_rollbacks = settings.max_rollbacks
        self._runner = runner
        self._snapshots: deque[Snapshot] = deque(maxlen=2)
        self._memory = deque([HostCopy(pinned=False), HostCopy(pinned=False)])  # theirs, that of the next one first
        self._windows_since_snapshot = 0
        self._last_rollback_at = 0.0  # time.perf_counter()
        self._last_applied: Window | None = None
        self._record: IncidentRecord | None = None  # of the current incident
        self._folder = directory

    def begin_stage(self) -> None:
        self._take_snapshot({})

    def without_quarantined(self, window: Window, least_batch: int) -> Window:
        """Return the window without quarantined samples, and without batches that this leaves below ``least_batch``."""
        ladder, epoch = self.state.ladder, self.state.progress.epoch
        if not ladder.quarantine:
            return window
        names = [self.images[index] for index in window.sample_indices]
        rest = window.only([n for n, name in enumerate(names) if not ladder.is_quarantined(name, epoch)], least_batch)
        return self._counted(rest)

    def _counted(self, window: Window) -> Window:
        """Return the window with its number of samples over all ranks counted. Waits for all ranks."""
        return replace(window, total=int(self.ranks.total([window.num_samples])[0]))

    def answer(self, window: Window, outcome: WindowOutcome, guard: BufferGuard) -> list[Window] | None:
        """Act on a window's verdict, before the next step.

        Returns:
            None to go on. Otherwise the current gradient has been discarded, and these windows are next, before the
            window it belonged to.

        Raises:
            RecoverySpentError: Nothing is left to try.
        """
        ladder, verdict = self.state.ladder, outcome.verdict
        if verdict is StepVerdict.SPIKE and window.attempt == 0:
            self.state.optimizer.zero_grad(set_to_none=True)
            guard.restore()
            if culprits := self._spike_culprits(window, outcome):
                self._open(window, outcome, verdict.value)
                assert self._record is not None
                self._record.attempts.append(_attempt(window, outcome))
                self._record.cause = "data"
                if (rest := self._rest_without(window, culprits, guard.least_batch)) is not None:
                    return [rest]
                self._skip_or_roll_back(ladder.skip(verdict), self._record.action)
                return []
        action = ladder.next_action(outcome, window.attempt, window.precision.name)
        if action is Action.ROLL_BACK and verdict is StepVerdict.APPLIED and not self.max_rollbacks:
            action = Action.GO_ON
        if action is Action.GO_ON and verdict in (StepVerdict.APPLIED, StepVerdict.OVERFLOW):
            if self._record is not None:
                self._record.attempts.append(_attempt(window, outcome))
                done, cause = _HOW_APPLIED[window.attempt]
                overflow = self._record.verdict == StepVerdict.OVERFLOW
                self._conclude(done, "precision" if overflow else cause)
            if verdict is StepVerdict.APPLIED:
                self._last_applied = window
                self._windows_since_snapshot += 1
                if self._windows_since_snapshot >= SNAPSHOT_EVERY and ladder.is_healthy:
                    self._take_snapshot(guard.at_start)
            return None

        self.state.optimizer.zero_grad(set_to_none=True)
        guard.restore()
        if self._record is None:
            diverged = verdict is StepVerdict.APPLIED
            self._open(window, outcome, DIVERGED if diverged else verdict.value)
        assert self._record is not None
        self._record.attempts.append(_attempt(window, outcome))
        if verdict is StepVerdict.APPLIED:
            mean, lowest = ladder.losses.mean, min(ladder.losses.mean, ladder.losses.lowest_mean)
            reason = f"the loss diverged to {outcome.loss:.3g}: its mean is {mean:.3g} and was {lowest:.3g}"
            self._roll_back(reason, diverged=True)
        elif not self._weights_finite():
            if action not in (Action.GO_ON, Action.ROLL_BACK):  # else the ladder has counted it
                ladder.skip(verdict)
            self._roll_back("weights are not finite")
        elif action is Action.RETRY:
            return [replace(window, attempt=1)]
        elif action is Action.RETRY_FULL_PRECISION:
            return [replace(window.in_full_precision(halve=not guard.batch_matters), attempt=2)]
        elif action is Action.LOCALISE:
            return self._localise(window, verdict, guard.least_batch)
        else:
            self._skip_or_roll_back(action, "skipped")
        return []

    def require_finite_weights(self) -> None:
        """Roll back if a weight is not finite: at an epoch's end, before validation and saving. A host sync.

        Raises:
            RecoverySpentError: Nothing is left to try.
        """
        if self._weights_finite():
            return
        window = self._last_applied
        assert window is not None, "weights were finite when the run began, and only applied windows change them"
        self._open(window, WindowOutcome(StepVerdict.APPLIED, float("nan"), float("nan"), 1.0), NONFINITE_WEIGHTS)
        self._roll_back("weights are not finite")

    def _localise(self, window: Window, verdict: StepVerdict, least_batch: int) -> list[Window]:
        """Find the samples, or the weights, at fault for a window that is not finite in fp32 either."""
        assert self._record is not None
        ladder, model = self.state.ladder, self.state.model
        clean, culprits, healthy_otherwise = replace(window, drill=None), list[int](), None
        with whole_weights(model):
            found = self.ranks.gather(self._diagnose(clean))
        mine, diagnoses = found[self.ranks.rank], [diagnosis for diagnosis in found if diagnosis is not None]
        if mine is None or len(diagnoses) < len(found):
            self._skip_or_roll_back(ladder.skip(verdict), "skipped; there was not enough memory to examine it")
            return []
        diagnosis = next((other for other in diagnoses if not other.finite), mine)
        if not diagnosis.finite:
            with whole_weights(model), running_statistics(model):
                if not mine.finite:
                    culprits = find_culprits(window.num_samples, lambda few: not self._is_finite(clean.only(few)))
                if self._last_applied is not None:
                    healthy_otherwise = self._is_finite(self._last_applied.in_full_precision(halve=True))
                    healthy_otherwise = self.ranks.all(healthy_otherwise)
        names = self._names(window, culprits)
        self._record.healthy_otherwise = healthy_otherwise
        self._record.cause = name_cause(diagnosis, diagnosis, names, window.num_samples_everywhere, healthy_otherwise)
        if self._record.cause == "model":
            ladder.skip(verdict)
            self._roll_back("these weights are not finite on other data either")
        elif self._record.cause == "not reproduced":
            self._skip_or_roll_back(ladder.skip(verdict), "skipped; looked into, it was finite")
        elif not names:
            self._skip_or_roll_back(ladder.skip(verdict), "skipped; its samples are finite one by one, not together")
        elif (rest := self._rest_without(window, culprits, least_batch)) is not None:
            return [rest]
        else:
            self._skip_or_roll_back(ladder.skip(verdict), self._record.action)
        return []

    def _spike_culprits(self, window: Window, outcome: WindowOutcome) -> list[int]:
        """Return the positions of this rank's samples that made a gradient norm spike; no rank has any if none has.

        A sample is at fault if its gradient alone explains the spike, or if it was in spike after spike, more often
        than any other sample. Costs a forward and backward pass per sample.
        """
        clean, ladder = replace(window, drill=None), self.state.ladder
        with whole_weights(self.state.model), running_statistics(self.state.model):
            found = [
                self._diagnose(clean.only([position]), outcome.loss_scale) for position in range(window.num_samples)
            ]
        mine = [math.nan if diagnosis is None else diagnosis.grad_norm for diagnosis in found]
        per_rank = self.ranks.gather((mine, [self.images[index] for index in window.sample_indices]))
        norms = [norm for part, _ in per_rank for norm in part]
        names = [name for _, part in per_rank for name in part]
        at_fault = {names[position] for position in stand_out(norms, outcome.spike_limit)}
        if not at_fault:
            at_fault = ladder.suspect(names)
        if 2 * len(at_fault) > len(names):
            return []
        return [position for position, name in enumerate(per_rank[self.ranks.rank][1]) if name in at_fault]

    def _names(self, window: Window, positions: Sequence[int]) -> list[str]:
        """Return the names of samples by position, of all ranks."""
        found = self.ranks.gather([self.images[window.sample_indices[position]] for position in positions])
        return [name for names in found for name in names]

    def _rest_without(self, window: Window, culprits: Sequence[int], least_batch: int) -> Window | None:
        """Quarantine samples and return their window without them; None if nothing is left of it."""
        self._quarantine(self._names(window, culprits))
        rest = self._counted(window.only(set(range(window.num_samples)) - set(culprits), least_batch))
        return replace(rest, attempt=AFTER_QUARANTINE) if rest.num_samples_everywhere else None

    def _diagnose(self, window: Window, loss_scale: float = 1.0) -> Diagnosis | None:
        """Rerun a window under hooks. Return None if memory runs out."""
        model = self.state.model
        try:
            with statistics_kept(model):
                return diagnose(model, lambda: self._runner.examine(model, window), loss_scale)
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
            return None

    def _is_finite(self, window: Window) -> bool:
        diagnosis = self._diagnose(replace(window, drill=None))
        return diagnosis is None or diagnosis.finite

    def _quarantine(self, images: Sequence[str]) -> None:
        assert self._record is not None
        epochs = {self.state.ladder.put_in_quarantine(image, self.state.progress.epoch) for image in images}
        self._record.culprits = list(images)
        self._record.action = f"quarantined until epoch {max(epochs) + 1}: {', '.join(images)}"

    def _skip_or_roll_back(self, action: Action, done: str) -> None:
        recent = self.state.ladder.recent
        if action is Action.ROLL_BACK and self.max_rollbacks:
            self._roll_back(f"{sum(recent)} of the last {len(recent)} windows had to be skipped")
        else:
            self._conclude(done)

    def _roll_back(self, reason: str, diverged: bool = False) -> None:
        """Return to a snapshot. The windows since then are not trained on again.

        The second rollback in a row returns to the older of the two snapshots: the newer one may have been taken when
        training was already going wrong.

        Raises:
            RecoverySpentError: Rollbacks have not helped. The state is fit to be saved.
        """
        assert self._record is not None
        self._record.cause = self._record.cause or "model"
        ladder, spent = self.state.ladder, self.state.ladder.rollbacks_in_a_row >= self.max_rollbacks
        more_precision = self.max_rollbacks > 0 and self.precision.name != "fp32" and not ladder.full_precision
        is_spent = (spent and not more_precision) or ladder.lr_factor <= LEAST_LR_FACTOR
        snapshot = self._snapshots[-1 if ladder.rollbacks_in_a_row == 0 else 0]
        if not is_spent or diverged or not self._weights_finite():
            self._restore(snapshot, diverged)
        if is_spent:
            # A resumed run, with other settings, starts at the bottom of the ladder.
            ladder.recent.clear()
            ladder.rollbacks_in_a_row, ladder.losses, ladder.spent = 0, LossHistory(), True
            self._conclude(f"stopped: {reason}")
            raise RecoverySpentError(reason)
        now = time.perf_counter()
        ladder.rolled_back(now - max(snapshot.taken_at, self._last_rollback_at))
        self._last_rollback_at = now
        ladder.full_precision |= spent
        self._conclude(
            f"rolled back by {self.state.progress.global_window - snapshot.global_window} windows ({reason}); learning "
            f"rate now x {ladder.lr_factor:g}{', from here on in fp32' if ladder.full_precision else ''}"
        )

    def _restore(self, snapshot: Snapshot, diverged: bool) -> None:
        load_local_state(self.state.model, snapshot.model)
        if self.state.ema is not None and snapshot.ema is not None:
            load_local_state(self.state.ema.module, snapshot.ema)
            self.state.ema.num_updates = snapshot.num_averaged
        if diverged and snapshot.stage == self.state.progress.stage:  # forget the norms of the divergence
            self.state.detector.load_state_dict(snapshot.detector)
        elif diverged:
            self.state.detector.reset(torch.device(self.precision.device_type))
        self.state.ladder.losses = replace(self._snapshots[-1].losses)  # the newest: the longest history of good losses
        fresh_moments(self.state.optimizer, everywhere=True)
        self._windows_since_snapshot = 0

    def _take_snapshot(self, buffers: Mapping[str, Tensor]) -> None:
        """Keep the current weights, if they are finite: a copy to host memory, and two host syncs.

        Args:
            buffers: name -> BatchNorm statistics to keep instead of the model's, which the next window has changed.
        """
        self._windows_since_snapshot = 0
        if not self._weights_finite():
            assert self._snapshots, "a run begins with finite weights"
            return  # the next window will not be finite, and recovery acts then
        state = self.state
        on_device = {
            "model": {**local_state(state.model), **buffers},
            "ema": None if state.ema is None else local_state(state.ema.module),
            "detector": state.detector.state_dict(),
        }
        on_host = self._memory[0].take(on_device)()
        self._memory.rotate()
        self._snapshots.append(
            Snapshot(
                global_window=state.progress.global_window,
                stage=state.progress.stage,
                taken_at=time.perf_counter(),
                num_averaged=0 if state.ema is None else state.ema.num_updates,
                losses=replace(state.ladder.losses),
                **on_host,
            )
        )

    def _weights_finite(self) -> bool:
        """Check the weights, the averaged weights and BatchNorm's statistics of all ranks."""
        modules = [self.state.model] if self.state.ema is None else [self.state.model, self.state.ema.module]
        return self.ranks.all(all_finite([tensor for module in modules for tensor in module.state_dict().values()]))

    def _open(self, window: Window, outcome: WindowOutcome, verdict: str) -> None:
        """Begin an incident: rerun the window under hooks, and save what ``replay`` needs."""
        progress, model = self.state.progress, self.state.model
        scaler = window.precision.new_scaler(ScalerSettings(init_scale=outcome.loss_scale))
        as_it_was = replace(window, drill=None, scaler=scaler)
        with whole_weights(model):
            diagnosis = self._diagnose(as_it_was, outcome.loss_scale)
        self._record = IncidentRecord(
            verdict=verdict,
            stage=progress.stage,
            epoch=progress.epoch + 1,
            window=window.number + 1,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            loss_scale=outcome.loss_scale,
            precision=window.precision.name,
            samples=[self.images[index] for index in window.sample_indices],
            drill=window.rehearses,
            first_nonfinite="" if diagnosis is None else diagnosis.first_nonfinite,
            worst_parameters={} if diagnosis is None else diagnosis.worst_parameters,
        )
        # The lowest rank that saw the fault records it. The weights are the same on all ranks.
        happened = self.ranks.gather(bool(self._record.first_nonfinite))
        witness = happened.index(True) if True in happened else 0
        found = self._record, window_to_payload(as_it_was, outcome.loss_scale)
        self._record, ran = self.ranks.from_rank(witness, found)
        weights = whole_on_first(model.state_dict(), self.ranks.is_first)
        if self.ranks.is_first:
            frozen = any(not parameter.requires_grad for parameter in model.parameters())
            weights = HostCopy(pinned=False).take(weights)()
            payload = {"settings": self.settings.to_dict(), "backbone_frozen": frozen, "window": ran, "model": weights}
            self._folder = self.incidents.open(self._record, payload)

    def _conclude(self, action: str, cause: str = "") -> None:
        """End the incident: update its record, and log it."""
        record = self._record
        assert record is not None
        record.action = f"{record.action}; {action}" if record.culprits and action != record.action else action
        record.cause = record.cause or cause
        if self.ranks.is_first:
            self.incidents.update(self._folder, record)
        self.log.event("incident", **asdict(record), folder=self._folder.name)
        logger.warning(f"{record.describe()}. See {self._folder}")
        self._record = None


def _attempt(window: Window, outcome: WindowOutcome) -> dict[str, Any]:
    return {**asdict(outcome), "precision": window.precision.name}
