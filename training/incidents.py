"""Incidents: records of what went wrong, complete enough to be examined later and elsewhere.

An incident is a window that recovery had to act on: not applied, or applied while the loss diverged. Its folder holds
``incident.json`` for people, and ``replay.pt``, from which the window can be rerun without the dataset.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.files import UNFINISHED, first_line, remove_leftovers, replacing, write_json
from runtime.tensors import named_tensors

logger = logging.getLogger("train_ultimate")

RECORD, PAYLOAD = "incident.json", "replay.pt"
REPLAY_FORMAT = "train_ultimate/incident/1"
DIVERGED, NONFINITE_WEIGHTS = "diverged", "nonfinite_weights"  # verdicts on the run, beside those on windows
OF_THE_RUN = (DIVERGED, NONFINITE_WEIGHTS)


@dataclass
class IncidentRecord:
    """Content of ``incident.json``. Epoch and window count from 1."""

    verdict: str
    stage: int
    epoch: int
    window: int
    loss: float
    grad_norm: float
    loss_scale: float
    precision: str
    samples: list[str]  # image paths, in the window's order
    drill: str = ""  # kind of the fire drill that injected the fault, if one did
    first_nonfinite: str = ""
    worst_parameters: dict[str, float] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)  # verdict, loss, grad_norm, precision of each
    cause: str = ""
    culprits: list[str] = field(default_factory=list)
    healthy_otherwise: bool | None = None  # whether the same weights were finite on other data; None: not tried
    action: str = "under way"  # until recovery has ended

    def describe(self) -> str:
        """Return place, verdict and action in words: "Epoch 3, window 4: spike; skipped"."""
        where = f" in {self.first_nonfinite}" if self.first_nonfinite else ""
        return f"Epoch {self.epoch}, window {self.window}: {self.verdict.replace('_', ' ')}{where}; {self.action}"


class IncidentStore:
    """The incident folders of one run: the newest ``most``, of at most ``max_bytes`` together.

    To make room, the oldest lose their replay payload but keep their record. Nothing here ends a run: a full disk costs
    the folder, and a warning.
    """

    def __init__(self, directory: Path, most: int = 50, max_bytes: int = 200 * 2**20) -> None:
        self.directory = directory
        self.most = most
        self.max_bytes = max_bytes
        remove_leftovers(directory, f"*/{UNFINISHED}")

    def open(self, record: IncidentRecord, payload: dict[str, Any]) -> Path:
        """Write a new incident and return its folder."""
        folder = self.directory / f"{max(map(int, (path.name for path in self._folders())), default=0) + 1:06d}"
        size = sum(tensor.nbytes for _, tensor in named_tensors(payload))
        try:
            self._make_room(size)
            folder.mkdir(parents=True)
            if size <= self.max_bytes:
                with replacing(folder / PAYLOAD) as unfinished:
                    torch.save({"format": REPLAY_FORMAT, **payload}, unfinished)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
            logger.warning(f"{folder}: cannot be replayed later, the window was not saved ({error})")
        self.update(folder, record)
        return folder

    def update(self, folder: Path, record: IncidentRecord) -> None:
        try:
            write_json(folder / RECORD, asdict(record))
        except OSError as error:
            logger.warning(f"{folder}: not written ({error})")

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("[0-9]*") if path.name.isdigit())

    def _make_room(self, size: int) -> None:
        """Remove old incidents and payloads for a new one of ``size`` bytes, unless it is too large by itself."""
        folders = self._folders()
        for folder in folders[: max(0, len(folders) - self.most + 1)]:
            shutil.rmtree(folder, ignore_errors=True)
        payloads = [path for path in (folder / PAYLOAD for folder in self._folders()) if path.exists()]
        sizes = [path.stat().st_size for path in payloads]
        records = self.most * 64 * 2**10  # room for the records themselves
        for index, path in enumerate(payloads):
            if size > self.max_bytes or sum(sizes[index:]) + size + records <= self.max_bytes:
                return
            path.unlink()


def read_incident(folder: Path) -> tuple[IncidentRecord, dict[str, Any]]:
    """Read record and payload of an incident, also from a copy of its folder. Executes nothing in them.

    Raises:
        ValueError: It is not an incident's folder, or the payload is missing or damaged.
    """
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = IncidentRecord(
            **{**values, **{key: float(values[key]) for key in ("loss", "grad_norm", "loss_scale")}}
        )
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {RECORD} there; give a folder from a run's incidents/") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / RECORD}: not a record of this program ({error})") from error
    if not (folder / PAYLOAD).exists():
        raise ValueError(
            f"{folder}: {PAYLOAD} is not there: too large to keep, removed to make room for newer ones, or not copied"
        )
    try:
        payload = torch.load(folder / PAYLOAD, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives raise anything
        raise ValueError(f"{folder / PAYLOAD}: not readable ({first_line(error, 120)})") from error
    if not isinstance(payload, dict) or payload.get("format") != REPLAY_FORMAT:
        raise ValueError(f"{folder / PAYLOAD}: not written by this program (no format mark {REPLAY_FORMAT!r})")
    return record, payload
