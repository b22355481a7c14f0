"""Incidents: what went wrong where, written down so that it can be looked into later and elsewhere.

An incident is a window that recovery had to act on: not applied, or applied in the course of a loss that runs away. Its
folder holds ``incident.json`` for
people and ``replay.pt``, everything needed to run the window again without the data set.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.optim import gradient_norm
from training.runlog import first_line, write_json

RECORD, PAYLOAD = "incident.json", "replay.pt"
REPLAY_FORMAT = "train_ultimate/incident/1"
DIVERGED, NONFINITE_WEIGHTS = "diverged", "nonfinite_weights"  # verdicts on the run, beside those on windows
OF_THE_RUN = (DIVERGED, NONFINITE_WEIGHTS)
WORST_PARAMETERS = 10
STANDS_OUT = 10.0  # a sample's gradient norm, in medians of the window's other samples

Cause = Literal["data", "model", "precision", "not reproduced"]


@dataclass
class Diagnosis:
    """A window run once more, under hooks.

    Attributes:
        loss, grad_norm: unscaled; NaN and infinite ones as they are.
        first_nonfinite: the module in which the first number that is not finite appeared, and where in it; "" if none.
        worst_parameters: name -> gradient norm, the largest or not finite ones first.
    """

    loss: float
    grad_norm: float
    first_nonfinite: str
    worst_parameters: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def diagnose(model: nn.Module, backward: Callable[[], Tensor], loss_scale: float = 1.0) -> Diagnosis:
    """Run a window's forward and backward pass under hooks. Slow: the host waits for every module.

    Args:
        model: its ``.grad`` are empty before and after.
        backward: sums gradients, multiplied by ``loss_scale``, in ``.grad`` and returns the unscaled loss.
        loss_scale: that of the window.
    """
    with _watched(model) as found:
        loss = backward().item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(gradient).item() / loss_scale for name, gradient in gradients.items()}
    if not found and not math.isfinite(loss):
        found.append("the loss itself (all the network's outputs are finite)")
    if not found:
        found += [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)][:1]
    worst = sorted(norms, key=lambda name: -norms[name] if math.isfinite(norms[name]) else -math.inf)
    norm = gradient_norm(p for p in model.parameters()).item() / loss_scale
    model.zero_grad(set_to_none=True)
    return Diagnosis(loss, norm, found[0] if found else "", {name: norms[name] for name in worst[:WORST_PARAMETERS]})


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Collect, in the order of the computation, the modules in which numbers stop being finite.

    Gradients are watched at the modules' outputs, by hooks on tensors: hooks on modules do not get along with the
    in-place activations many backbones have.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after_forward(_module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            tensors = list(_tensors(outputs))
            if not all(_finite(tensor) for tensor in tensors):
                fine = all(_finite(tensor) for tensor in _tensors(inputs))
                found.append(f"{name} (output, from an input that is {'finite' if fine else 'not finite itself'})")
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(after_backward)

        def after_backward(gradient: Tensor) -> None:
            if not _finite(gradient):
                found.append(f"{name} (gradient at its output)")

        return after_forward

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let windows be run for their numbers alone: the model's buffers are as before afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics: a part of a batch, of one sample even, is then looked at by itself."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()


def find_culprits(num_samples: int, is_bad: Callable[[Sequence[int]], bool]) -> list[int]:
    """Samples that are bad alone, by bisection: about 2 log2(n) runs for one of n.

    Args:
        num_samples: positions 0 to ``num_samples - 1`` are looked through.
        is_bad: runs the samples at some positions, together.
    """

    def among(positions: Sequence[int]) -> list[int]:
        if not is_bad(positions):
            return []
        if len(positions) == 1:
            return list(positions)
        middle = len(positions) // 2
        return among(positions[:middle]) + among(positions[middle:])

    return among(range(num_samples)) if num_samples else []


def stand_out(norms: Sequence[float]) -> list[int]:
    """Positions of samples whose gradient is far larger than that of the others."""
    others = [median([*norms[:index], *norms[index + 1 :]]) for index in range(len(norms))] if len(norms) > 1 else []
    return [index for index, usual in enumerate(others) if norms[index] > STANDS_OUT * usual]


@dataclass
class IncidentRecord:
    """What ``incident.json`` says. Epoch and window count from 1."""

    verdict: str
    stage: int
    epoch: int
    window: int
    loss: float
    grad_norm: float
    loss_scale: float
    precision: str
    samples: list[str]  # image paths, in the window's order
    drill: str = ""  # the kind, where the fault was injected on purpose
    first_nonfinite: str = ""
    worst_parameters: dict[str, float] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)  # verdict, loss, grad_norm, precision of each
    cause: str = ""
    culprits: list[str] = field(default_factory=list)
    healthy_otherwise: bool | None = None  # whether the same weights were finite on other data; None: not tried
    action: str = "under way"


class IncidentStore:
    """The incident folders of one run: the newest ``most``, and no more than ``max_bytes`` in all.

    Where there is no room, the oldest lose what replay needs first and keep their record. Nothing here ends a run: a
    disk that is full costs the folder and a warning.
    """

    def __init__(self, directory: Path, most: int = 50, max_bytes: int = 200 * 2**20) -> None:
        self.directory = directory
        self.most = most
        self.max_bytes = max_bytes
        for leftover in directory.glob("*/.*.unfinished"):  # a write that was killed
            leftover.unlink(missing_ok=True)

    def open(self, record: IncidentRecord, payload: dict[str, Any]) -> Path:
        """Write a new incident; returns its folder."""
        folder = self.directory / f"{max(map(int, (path.name for path in self._folders())), default=0) + 1:06d}"
        unfinished, size = folder / f".{PAYLOAD}.unfinished", num_bytes(payload)
        try:
            self._make_room(size)
            folder.mkdir(parents=True)
            if size <= self.max_bytes:
                torch.save({"format": REPLAY_FORMAT, **payload}, unfinished)
                os.replace(unfinished, folder / PAYLOAD)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
            print(f"Warning: {folder}: cannot be replayed later, nothing to replay was saved ({error})")
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        self.update(folder, record)
        return folder

    def update(self, folder: Path, record: IncidentRecord) -> None:
        try:
            write_json(folder / RECORD, asdict(record))
        except OSError as error:
            print(f"Warning: {folder}: not written ({error})")

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("[0-9]*") if path.name.isdigit())

    def _make_room(self, size: int) -> None:
        """For one more incident with a payload of so many bytes (none at all, if it is too large by itself)."""
        folders = self._folders()
        for folder in folders[: max(0, len(folders) - self.most + 1)]:
            shutil.rmtree(folder, ignore_errors=True)
        payloads = [path for path in (folder / PAYLOAD for folder in self._folders()) if path.exists()]
        sizes = [path.stat().st_size for path in payloads]
        records = self.most * 64 * 2**10  # what the records themselves may take
        for index, path in enumerate(payloads):
            if size > self.max_bytes or sum(sizes[index:]) + size + records <= self.max_bytes:
                return
            path.unlink()


def read_incident(folder: Path) -> tuple[IncidentRecord, dict[str, Any]]:
    """The record and the payload of an incident, wherever its folder has been copied. Executes nothing from it.

    Raises:
        ValueError: it is no incident's folder, or what replay needs is not in it.
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
        raise ValueError(f"{folder / PAYLOAD}: not readable ({first_line(error)[:120]})") from error
    if not isinstance(payload, dict) or payload.get("format") != REPLAY_FORMAT:
        raise ValueError(f"{folder / PAYLOAD}: not written by this program (no format mark {REPLAY_FORMAT!r})")
    return record, payload


def name_cause(
    recorded: Diagnosis, full: Diagnosis, culprits: Collection[object], num_samples: int, healthy_otherwise: bool | None
) -> Cause:
    """Who is at fault for a window that is not finite.

    Args:
        recorded: the window run again in the precision of the incident.
        full: the same in fp32.
        culprits: samples that are not finite alone, in fp32.
        num_samples: of the window.
        healthy_otherwise: whether the same weights are finite on other data; None where there is none to try.
    """
    if recorded.finite and full.finite:
        return "not reproduced"
    if full.finite:
        return "precision"
    if 0 < 2 * len(culprits) <= num_samples or healthy_otherwise:
        return "data"
    return "data" if num_samples == 1 and healthy_otherwise is None else "model"


def num_bytes(value: Any) -> int:
    """Of the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(num_bytes(child) for child in children)
