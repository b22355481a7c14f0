"""What a run has told of itself: ``metrics.jsonl``, ``config.json`` and its incidents, read for a report.

Of a run still going as of one that has ended. No torch.
"""

import bisect
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.folder import BEST, CONFIG, INCIDENTS, LOG, read_json
from training.spikes import spike_limits

_NOT_FACTS = ("event", "time", "progress")  # of run_start and resume; the rest is what config.json has
_STATES = {
    0: "finished",
    1: "ended by an error in the program, or with a last state that could not be saved",
    2: "ended by its data or its command",
    3: "diverged, every recovery spent",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}


@dataclass(frozen=True, slots=True)
class WindowPoint:
    """A window, as its last attempt left it."""

    number: int  # in the run, from 1; 0 in logs of older programs, until it is counted
    stage: int
    epoch: int  # from 1
    window: int  # in its epoch, from 1
    loss: float
    grad_norm: float
    loss_scale: float
    lr: float  # the decoder's
    verdict: str

    @property
    def applied(self) -> bool:
        return self.verdict == "applied"

    @classmethod
    def of(cls, event: dict[str, Any]) -> "WindowPoint":
        return cls(
            number=whole(event, "global_window"),
            stage=whole(event, "stage"),
            epoch=whole(event, "epoch"),
            window=whole(event, "window"),
            loss=number(event, "loss"),
            grad_norm=number(event, "grad_norm"),
            loss_scale=number(event, "loss_scale"),
            lr=number(event, "lr"),
            verdict=sys.intern(str(event.get("verdict"))),
        )


@dataclass
class RunHistory:
    """A run's events, without what a later resume has replaced.

    Attributes:
        config: settings, versions, command, device, data.
        windows: (epoch, number in the run, or in the epoch for logs of older programs) -> the window, as it was last.
        epochs: epoch, from 1 -> its event.
        incidents: folder name -> record, the oldest first.
        checkpoints: file -> the epoch at whose end it was written, and 0; or 0, and the window of the run.
        unreadable: image -> why.
        end: the last event, where that is ``run_end``.
        num_spoilt: lines that are no event: half-written, or damaged.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    windows: dict[tuple[int, int], WindowPoint] = field(default_factory=dict)
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    incidents: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)  # of all attempts
    num_starts: int = 0
    num_spoilt: int = 0
    first_time: float = math.nan
    last_time: float = math.nan
    end: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.config.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def state(self) -> str:
        if self.end is None:
            return "no end recorded: still going, or killed"
        code = self.end.get("exit_code")
        return _STATES.get(code, f"ended with exit code {code}") if isinstance(code, int) else "ended"

    @property
    def best(self) -> tuple[float, int] | None:
        """The best validation IoU and its epoch; None before the first epoch with a score."""
        scores = [(number(event, "iou"), -epoch) for epoch, event in self.epochs.items()]
        scores = [score for score in scores if not math.isnan(score[0])]
        return (max(scores)[0], -max(scores)[1]) if scores else None

    @cached_property
    def points(self) -> list[WindowPoint]:
        """In order. Windows carry their number in the run; in logs of older programs it is counted."""
        windows_of: Counter[int] = Counter()
        for epoch, window in self.windows:
            windows_of[epoch] = max(windows_of[epoch], window)
        before, total = {}, 0
        for epoch in sorted(windows_of):
            before[epoch], total = total, total + windows_of[epoch]
        in_order = (point for _, point in sorted(self.windows.items()))
        return [p if p.number else replace(p, number=before[p.epoch] + p.window) for p in in_order]

    @cached_property
    def spike_limits(self) -> list[float]:
        """Of each point, recomputed: a rollback may have made the detector's own ones differ for some windows."""
        return spike_limits((point.stage, point.grad_norm) for point in self.points)

    def window_number(self, epoch: int, window: float = math.inf) -> float:
        """The number in the run of a window of an epoch, or of the last one before it; NaN where there is none."""
        before = bisect.bisect_right(self._keys, (epoch, window))
        return self.points[before - 1].number if before else math.nan

    @cached_property
    def _keys(self) -> list[tuple[int, float]]:
        return [(point.epoch, point.window) for point in self.points]

    @property
    def saved(self) -> dict[str, float]:
        """Checkpoint -> the window of the run after which it was written."""
        return {
            file: self.window_number(epoch) if epoch else float(window)
            for file, (epoch, window) in self.checkpoints.items()
            if epoch or window
        }

    def recovery(self) -> dict[str, Any]:
        """As the run's last event has it; for a run without one, as far as its windows and incidents tell."""
        if self.end is not None and isinstance(self.end.get("recovery"), dict):
            return self.end["recovery"]
        given_up = Counter(point.verdict.replace("_", " ") for point in self.windows.values() if not point.applied)
        actions = [str(record.get("action", "")) for record in self.incidents.values()]
        culprits = Counter(str(name) for record in self.incidents.values() for name in record.get("culprits") or [])
        return {
            "applied": len(self.windows) - given_up.total(),
            "skipped": dict(given_up),
            "rollbacks": sum("rolled back" in action for action in actions),
            "quarantined": dict(culprits),
        }

    def take(self, event: dict[str, Any]) -> None:
        """The next event of the log."""
        kind, self.end = event["event"], None
        self.last_time = number(event, "time")
        if math.isnan(self.first_time):
            self.first_time = self.last_time
        if kind in ("run_start", "resume"):
            self._begin(event)
        elif kind == "window":
            point = WindowPoint.of(event)
            self.windows[point.epoch, point.number or point.window] = point
            self.verdicts[point.verdict] += 1
        elif kind == "epoch":
            self.epochs[whole(event, "epoch")] = event
        elif kind == "incident":
            self.incidents[str(event.get("folder"))] = event
        elif kind == "checkpoint":
            self._saved(str(event.get("file")))
        elif kind == "unreadable":
            self.unreadable[str(event.get("image"))] = str(event.get("reason"))
        elif kind == "run_end":
            self.end = event

    def _begin(self, event: dict[str, Any]) -> None:
        """A start, or a resume: what the log has beyond its position belongs to a branch that was given up."""
        self.num_starts += 1
        self.config = {key: value for key, value in event.items() if key not in _NOT_FACTS}
        progress = event.get("progress")
        progress = progress if isinstance(progress, dict) else {}
        done = whole(progress, "epoch") + 1, whole(progress, "window")
        total = whole(progress, "global_window")  # windows may be of another size from here on, and more or fewer
        self.windows = {
            key: point
            for key, point in self.windows.items()
            if (point.number <= total if point.number and "global_window" in progress else key <= done)
        }
        self.epochs = {epoch: event for epoch, event in self.epochs.items() if epoch < done[0]}
        limits = done[0], total + 1
        self.checkpoints = {
            file: where for file, where in self.checkpoints.items() if where[0] < limits[0] and where[1] < limits[1]
        }

    def _saved(self, file: str) -> None:
        """An epoch's file carries the epoch, a file of mid-epoch the window; the best one comes before its epoch's."""
        if found := re.fullmatch(r"epoch_(\d+)\.pth", file):
            self.checkpoints[file] = int(found[1]), 0
            if self.checkpoints.get(BEST) == (0, 0):
                self.checkpoints[BEST] = int(found[1]), 0
        elif found := re.fullmatch(r"step_(\d+)\.pth", file):
            self.checkpoints[file] = 0, int(found[1])
        elif file == BEST:
            self.checkpoints[BEST] = 0, 0  # until its epoch's file follows


def read_run(directory: Path) -> RunHistory:
    """Read what a run has left behind so far.

    Raises:
        ValueError: there is no such folder, or no run has written to it.
    """
    advice = "give the --checkpoint-dir of a run"
    if not directory.is_dir():
        raise ValueError(f"{directory}: {'no folder' if directory.exists() else 'no such folder'}; {advice}")
    if not any(directory.iterdir()):
        raise ValueError(f"{directory}: is empty, no run has written here yet; {advice}")
    run = RunHistory(directory)
    log = directory / LOG
    if not log.is_file():
        raise ValueError(f"{directory}: is no run's folder, there is no {LOG} in it; {advice}")
    num_events = 0
    for event in _events(log, run):
        run.take(event)
        num_events += 1
    if not num_events and not (directory / CONFIG).is_file():
        raise ValueError(f"{log}: not one event of a run in it; {advice}")
    run.config = {**run.config, **read_json(directory / CONFIG)}
    for folder in sorted((directory / INCIDENTS).glob("[0-9]*")):
        if record := read_json(folder / "incident.json"):
            run.incidents[folder.name] = {**run.incidents.get(folder.name, {}), **record}
    run.incidents = dict(sorted(run.incidents.items()))
    return run


def _events(log: Path, run: RunHistory) -> Iterator[dict[str, Any]]:
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # being written right now, or cut off by a crash
                run.num_spoilt += 1
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event
            else:
                run.num_spoilt += 1


def number(event: dict[str, Any], key: str, default: float = math.nan) -> float:
    """A number of an event; in the log, those that are not finite are text. ``default`` where there is none."""
    try:
        return float(event.get(key, default))
    except (TypeError, ValueError, OverflowError):
        return default


def whole(event: dict[str, Any], key: str, default: int = 0) -> int:
    value = event.get(key)
    return value if isinstance(value, int) else default


def unique_names(runs: Sequence[RunHistory]) -> list[str]:
    """The folders' names; where two are the same, their paths."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.directory) for run in runs]


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Setting -> its value in each run, of those that are not the same in all; versions and devices, too."""
    facts = [
        {**run.settings, **{k: v for k, v in run.config.items() if not isinstance(v, dict | list)}} for run in runs
    ]
    keys = dict.fromkeys(key for each in facts for key in each)
    ignored = ("command", "checkpoint_dir", "resume")
    return {
        key: [each.get(key) for each in facts]
        for key in keys
        if key not in ignored and any(each.get(key) != facts[0].get(key) for each in facts)
    }
