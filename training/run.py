"""A training run: what it needs, what it changes, and where that is kept."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from data.cache import DecodedCache
from data.layouts import OUTSIDE, Pair
from data.masks import MaskReading
from data.sampler import Share
from data.unreadable import UnreadablePairs
from runtime.checkpoint import CheckpointStore
from runtime.files import remove_leftovers, write_json
from runtime.folder import CONFIG, LEASE, LOG, FolderLock
from runtime.log import RunLog
from runtime.machine import Machine, Precision
from runtime.ranks import Ranks
from runtime.sharding import whole_on_first
from runtime.signals import Signals
from training.recovery import Recovery
from training.runner import WindowRunner
from training.settings import Settings
from training.stages import Stage, build_stages
from training.state import TrainState

logger = logging.getLogger("train_ultimate")


@dataclass
class TrainingData:
    """The pairs of image and mask that a run trains on and validates on."""

    root: Path
    train_pairs: Sequence[Pair]
    val_pairs: Sequence[Pair]
    images: list[str]  # names of the training images, by sample index: paths below the root
    validation: list[str]  # names of the validation images
    excluded: list[str]  # names that --exclude leaves out
    fingerprint: str
    window_size: int  # samples per optimizer step, over all ranks
    cache: DecodedCache | None
    masks: MaskReading
    unreadable: UnreadablePairs

    @property
    def num_own_validation(self) -> int:
        """Number of validation images that are not of ``--rehearse``; they come first."""
        return sum(not name.startswith(OUTSIDE) for name in self.validation)

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint remembers of the data."""
        return {
            "window_size": self.window_size,
            "data": self.fingerprint,
            "excluded": self.excluded,
            "validation": self.validation,
            "masks": self.masks.to_dict(),
        }


@dataclass
class RunFolder:
    """The folder of a run: checkpoints, log and lock. Rank 0 writes; the other ranks only keep count."""

    path: Path
    store: CheckpointStore
    log: RunLog
    had_best: bool  # it held the best weights of the run so far
    lock: FolderLock | None  # on rank 0
    config: dict[str, Any] = field(default_factory=dict)  # content of config.json

    @classmethod
    def claim(cls, store: CheckpointStore, ranks: Ranks, resumed_at: int | None, json_logs: Any = None) -> Self:
        """Make the folder this run's own: the first write to it.

        Args:
            store: the checkpoints in it.
            ranks: the processes that train together.
            resumed_at: windows done in the checkpoint being resumed; later checkpoints are set aside. None: a new run.
            json_logs: stream that gets the log's lines too, for ``--json-logs``.

        Raises:
            ValueError: Another run is writing there, or the folder cannot be written to.
        """
        locks: list[FolderLock] = []  # only rank 0's, which takes it

        def take() -> bool:
            try:
                store.directory.mkdir(parents=True, exist_ok=True)
                (store.directory / LOG).touch()
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(
                    f"--checkpoint-dir {store.directory}: cannot be written to ({reason}); choose another"
                ) from error
            locks.append(FolderLock(store.directory))
            if locks[0].is_lease:
                logger.warning(f"{store.directory}: no locks on its file system; the file {LEASE} keeps other runs out")
            remove_leftovers(store.directory)
            for path in store.set_aside_after(resumed_at) if resumed_at is not None else ():
                logger.warning(f"set aside as {path}: further on than the checkpoint being resumed")
            return store.best_path.exists()

        had_best = ranks.from_first(take)
        store.last_window = resumed_at or 0
        log = RunLog(store.directory if ranks.is_first else None, echo=json_logs)
        store.on_saved = lambda name: log.event("checkpoint", file=name)
        return cls(store.directory, store, log, had_best, locks[0] if locks else None)

    def mend(self) -> None:
        """Make anew what somebody has removed: the folder, ``config.json``, the log. Costs three stats, on rank 0.

        Raises:
            FolderLostError: Another run has the folder now.
        """
        if self.lock is None:
            return
        try:
            if not self.lock.still_there:
                logger.warning(
                    f"{self.path}: was removed or replaced, and is made anew; what it held before is not in it"
                )
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock = self.lock.renewed()
            if not (self.path / CONFIG).exists():
                write_json(self.path / CONFIG, self.config)
            self.log.reopen()
        except OSError as error:
            logger.warning(f"{self.path}: cannot be made anew ({error}); tried again with the next checkpoint")

    def release(self) -> None:
        """Let another run have the folder."""
        if self.lock is not None:
            self.lock.release()


@dataclass
class Run:
    """A training run. Training changes ``state``, and a checkpoint holds it; the rest stays as prepared."""

    settings: Settings
    machine: Machine
    data: TrainingData
    state: TrainState
    folder: RunFolder
    runner: WindowRunner
    recovery: Recovery
    signals: Signals

    @property
    def stages(self) -> list[Stage]:
        return build_stages(self.settings)

    @property
    def share(self) -> Share:
        """Part of every window and of the validation images that this rank has."""
        return Share(self.machine.ranks.rank, self.machine.ranks.size)

    @property
    def precision_in_use(self) -> Precision:
        return self.state.precision_in_use(self.machine.precision)

    @property
    def config(self) -> dict[str, Any]:
        """What a checkpoint tells of the run beside its state."""
        return {
            "settings": self.settings.to_dict(),
            "working_directory": str(Path.cwd()),  # what relative paths in the settings start from
            "precision": self.machine.precision.name,
            "batches": [self.runner.batch_size, self.runner.num_parts],
            **self.data.identity(),
        }

    def checkpoint(self) -> dict[str, Any]:
        """Return the content of a checkpoint file. Call on all ranks: rank 0 gathers sharded tensors."""
        return {"config": self.config, **whole_on_first(self.state.state_dict(), self.machine.ranks.is_first)}

    @property
    def save_is_due(self) -> bool:
        windows = self.state.progress.global_window - self.folder.store.last_window
        return self.signals.save or 0 < self.settings.checkpoint_every <= windows

    def mend_folder(self) -> None:
        """Make anew what somebody has removed from the folder. Without its best weights, the next ones are the best.

        Call on all ranks.

        Raises:
            FolderLostError: Another run has the folder now.
        """
        store, progress = self.folder.store, self.state.progress

        def best_has_gone() -> bool:
            self.folder.mend()
            store.wait()
            return store.failure is None and not store.best_path.exists()

        if self.machine.ranks.from_first(best_has_gone):
            progress.best_iou = -1.0

    def save_step(self) -> Path:
        """Begin a mid-epoch checkpoint and return its path. Training waits for a copy of the state only.

        Raises:
            FolderLostError: Another run has the folder now.
        """
        self.folder.mend()
        self.signals.saved()
        return self.folder.store.save_step(self.state.progress.global_window, self.checkpoint())
