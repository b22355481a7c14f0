"""The history of a run, read from its ``metrics.jsonl``, ``config.json`` and incidents, for a report.

The run may still be going. Nothing here imports torch.
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

EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")
_STEP_FILE = re.compile(r"step_(\d+)\.pth")
_NOT_FACTS = ("event", "time", "progress")  # the other fields of run_start and resume are those of config.json
_STATES = {
    0: "finished",
    1: "ended by an error in the program, or its last state could not be saved",
    2: "ended by an error in its data or its command",
    3: "diverged, all recoveries spent",
    129: "stopped by a terminal that was closed (SIGHUP)",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}


@dataclass(frozen=True, slots=True)
class WindowPoint:
    """The last attempt of a window."""

    number: int  # in the run, from 1; 0 in logs of older programs until RunHistory.points counts it
    stage: int
    epoch: int  # from 1
    window: int  # in its epoch, from 1
    loss: float
    grad_norm: float
    spike_limit: float  # a larger gradient norm is a spike; inf without a history, NaN in logs of older programs
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
            spike_limit=number(event, "spike_limit"),
            loss_scale=number(event, "loss_scale"),
            lr=number(event, "lr"),
            verdict=sys.intern(str(event.get("verdict"))),
        )


@dataclass
class RunHistory:
    """The events of a run, without those that a later resume has replaced.

    Attributes:
        config: settings, versions, command, device and data, as last started.
        windows: (epoch, number in the run) -> last attempt; logs of older programs have the number in the epoch.
        epochs: epoch, from 1 -> its event.
        incidents: folder name -> record, oldest first.
        checkpoints: file -> (epoch, 0) if written at the end of an epoch, else (0, window of the run).
        unreadable: image -> reason.
        verdicts: verdict -> number of attempts.
        began: time of the start; NaN if it was resumed.
        num_spoilt: number of lines that hold no event: half-written or damaged.
        end: the ``run_end`` event, if it is the last one.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    windows: dict[tuple[int, int], WindowPoint] = field(default_factory=dict)
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    incidents: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    verdicts: Counter[str] = field(default_factory=Counter)
    num_starts: int = 0
    num_spoilt: int = 0
    last_time: float = math.nan
    began: float = math.nan
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
        """Best validation IoU and its epoch; None before the first finite score."""
        scores = [(number(event, "iou"), -epoch) for epoch, event in self.epochs.items()]
        scores = [score for score in scores if not math.isnan(score[0])]
        return (max(scores)[0], -max(scores)[1]) if scores else None

    @cached_property
    def points(self) -> list[WindowPoint]:
        """Windows in order, all with their number in the run, which is counted for logs of older programs."""
        windows_of: Counter[int] = Counter()
        for epoch, window in self.windows:
            windows_of[epoch] = max(windows_of[epoch], window)
        before, total = {}, 0
        for epoch in sorted(windows_of):
            before[epoch], total = total, total + windows_of[epoch]
        in_order = (point for _, point in sorted(self.windows.items()))
        return [p if p.number else replace(p, number=before[p.epoch] + p.window) for p in in_order]

    def window_number(self, epoch: int, window: float = math.inf) -> float:
        """Return the number in the run of an epoch's window, or of the last one before it; NaN if there is none."""
        before = bisect.bisect_right(self._keys, (epoch, window))
        return self.points[before - 1].number if before else math.nan

    @cached_property
    def _keys(self) -> list[tuple[int, float]]:
        return [(point.epoch, point.window) for point in self.points]

    @property
    def saved(self) -> dict[str, float]:
        """Checkpoint -> number of the window after which it was written."""
        return {
            file: self.window_number(epoch) if epoch else float(window)
            for file, (epoch, window) in self.checkpoints.items()
            if epoch or window
        }

    def recovery(self) -> dict[str, Any]:
        """Return the summary in the ``run_end`` event, or one counted from windows and incidents if it is missing."""
        if self.end is not None and isinstance(self.end.get("recovery"), dict):
            return self.end["recovery"]
        skipped = Counter(point.verdict for point in self.windows.values() if not point.applied)
        actions = [str(record.get("action", "")) for record in self.incidents.values()]
        culprits = Counter(str(name) for record in self.incidents.values() for name in record.get("culprits") or [])
        return {
            "applied": len(self.windows) - skipped.total(),
            "skipped": dict(skipped),
            "rollbacks": sum("rolled back" in action for action in actions),
            "quarantined": dict(culprits),
        }

    def take(self, event: dict[str, Any]) -> None:
        """Take in the next event of the log."""
        kind, self.end = event["event"], None
        self.last_time = number(event, "time")
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
            self._take_checkpoint(str(event.get("file")))
        elif kind == "unreadable":
            self.unreadable[str(event.get("image"))] = str(event.get("reason"))
        elif kind == "run_end":
            self.end = event

    def _begin(self, event: dict[str, Any]) -> None:
        """Take in a start or a resume, and drop what the log has beyond its position."""
        self.num_starts += 1
        self.began = self.last_time if self.num_starts == 1 else math.nan
        self.config = {key: value for key, value in event.items() if key not in _NOT_FACTS}
        progress = event.get("progress")
        progress = progress if isinstance(progress, dict) else {}
        num_epochs, num_windows = whole(progress, "epoch"), whole(progress, "global_window")
        last = num_epochs + 1, whole(progress, "window")
        # By the number in the run if the log has it: a resume may change the size of windows, and so those of an epoch.
        self.windows = {
            key: point
            for key, point in self.windows.items()
            if (point.number <= num_windows if point.number and "global_window" in progress else key <= last)
        }
        self.epochs = {epoch: event for epoch, event in self.epochs.items() if epoch <= num_epochs}
        self.checkpoints = {
            file: (epoch, window)
            for file, (epoch, window) in self.checkpoints.items()
            if epoch <= num_epochs and window <= num_windows
        }

    def _take_checkpoint(self, file: str) -> None:
        if found := EPOCH_FILE.fullmatch(file):
            self.checkpoints[file] = int(found[1]), 0
            if self.checkpoints.get(BEST) == (0, 0):
                self.checkpoints[BEST] = int(found[1]), 0
        elif found := _STEP_FILE.fullmatch(file):
            self.checkpoints[file] = 0, int(found[1])
        elif file == BEST:
            self.checkpoints[BEST] = 0, 0  # its epoch's file is logged next, and names the epoch


def read_run(directory: Path) -> RunHistory:
    """Read what a run has written so far.

    Raises:
        ValueError: the folder does not exist, or is not that of a run.
    """
    advice = "give the --checkpoint-dir of a run"
    if not directory.is_dir():
        raise ValueError(f"{directory}: {'not a folder' if directory.exists() else 'no such folder'}; {advice}")
    if not any(directory.iterdir()):
        raise ValueError(f"{directory}: the folder is empty, no run has written to it; {advice}")
    run = RunHistory(directory)
    log = directory / LOG
    if not log.is_file():
        raise ValueError(f"{directory}: not the folder of a run, it has no {LOG}; {advice}")
    num_events = 0
    for event in _events(log, run):
        run.take(event)
        num_events += 1
    if not num_events and not (directory / CONFIG).is_file():
        raise ValueError(f"{log}: holds no event of a run; {advice}")
    run.config = {**run.config, **read_json(directory / CONFIG)}
    for folder in sorted((directory / INCIDENTS).glob("[0-9]*")):
        if record := read_json(folder / "incident.json"):
            run.incidents[folder.name] = {**run.incidents.get(folder.name, {}), **record}
    run.incidents = dict(sorted(run.incidents.items()))
    return run


def _events(log: Path, run: RunHistory) -> Iterator[dict[str, Any]]:
    """Yield the events of a log; lines that hold none are counted in ``run``."""
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):  # still being written, or cut off by a crash
                run.num_spoilt += 1
                continue
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event
            else:
                run.num_spoilt += 1


def interval(event: dict[str, Any]) -> str:
    """Return " (95 % interval 0.664 to 0.731)" of an epoch's IoU; "" if its event has none, as in older logs."""
    low, high = number(event, "iou_low"), number(event, "iou_high")
    return "" if math.isnan(low + high) else f" (95 % interval {low:.3f} to {high:.3f})"


def number(event: dict[str, Any], key: str, default: float = math.nan) -> float:
    """Return a number of an event, ``default`` if it has none; the log holds non-finite ones as strings."""
    try:
        return float(event.get(key, default))
    except (TypeError, ValueError, OverflowError):
        return default


def whole(event: dict[str, Any], key: str, default: int = 0) -> int:
    """Return a whole number of an event, ``default`` if it has none."""
    value = event.get(key)
    return value if isinstance(value, int) else default


def duration(seconds: float) -> str:
    """Return a time in the unit that fits it: 50 s, 45 min, 3.1 h, 2.3 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def label(verdict: object) -> str:
    """Return a verdict as a reader sees it: "nonfinite loss" for ``nonfinite_loss``."""
    return str(verdict).replace("_", " ")


def unique_names(runs: Sequence[RunHistory]) -> list[str]:
    """Return the folders' names, or the paths of those that share a name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.directory) for run in runs]


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Return setting -> its value in each run, for all settings, versions and devices that differ."""
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
