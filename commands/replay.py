"""``replay INCIDENT_DIR``: run the window of an incident again, here, and say what was at fault.

Needs nothing but the folder: weights, images, masks and settings are in it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.network import CamouflageSegmenter, build_network
from runtime.files import first_line
from runtime.machine import memory_format_of, on_device, resolve_device
from training.batchnorm import running_statistics, untouched
from training.diagnosis import Diagnosis, diagnose, find_culprits, name_cause, stand_out
from training.gate import StepVerdict
from training.incidents import OF_THE_RUN, IncidentRecord, read_incident
from training.optim import all_finite
from training.setup import settings_of
from training.window import Window, accumulate_gradients, window_from_payload

_EXPLANATIONS = {
    "data": "other samples are fine under the same weights",
    "model": "the samples are not to blame one by one: the weights, or all of the data, lead there",
    "precision": "it is finite in fp32",
    "not reproduced": "run again it is as it should be: a passing fault of the machine, or a fire drill",
}


def replay(folder: Path, device_name: str) -> int:
    """Print loss, gradient norm and first non-finite module in the recorded precision and in fp32, and the cause.

    Raises:
        ValueError: the folder is no incident, or what replay needs is not in it.
    """
    record, payload = read_incident(folder)
    device = resolve_device(device_name)
    try:
        model, window = _rebuild(payload, device)
        full = window.in_full_precision(halve=False)
        recorded_again = _diagnose(model, window, record.loss_scale)
        full_again = _diagnose(model, full) if full is not window else recorded_again
        culprits = _culprits(model, full, record, full_again)
        samples = [record.samples[position] for position in culprits]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error)[:120]
        raise ValueError(f"{folder}: cannot be run again from its settings, weights and samples ({reason})") from error

    cause = name_cause(recorded_again, full_again, culprits, window.num_samples, record.healthy_otherwise)
    high = record.grad_norm / 2
    if record.verdict == StepVerdict.SPIKE and cause == "not reproduced" and recorded_again.grad_norm > high:
        cause = "precision" if full_again.grad_norm < high else "data" if culprits else "model"
    if record.verdict in OF_THE_RUN:
        cause = "model"

    print(f"{folder}: {record.verdict} in stage {record.stage}, epoch {record.epoch}, window {record.window}")
    print(f"Then: {record.action}")
    rows = [(f"recorded, {record.precision}", record.loss, record.grad_norm, record.first_nonfinite)]
    for name, again in ((f"replayed, {record.precision}", recorded_again), ("replayed, fp32", full_again)):
        rows.append((name, again.loss, again.grad_norm, again.first_nonfinite))
    if record.verdict in OF_THE_RUN:
        print("Replayed on the weights after that window's step: the run had gone astray by then")
    print(f"{'':16} {'loss':>10} {'grad norm':>10}  first number that is not finite")
    for name, loss, norm, where in rows:
        print(f"{name:16} {loss:10.4g} {norm:10.4g}  {where or 'none'}")
    if not all_finite(model.parameters()):
        print("Weights are not finite, so nothing after them is")
    for sample in samples if cause == "data" else ():
        print(f"Alone, in fp32, this sample does it: {sample}")
    drill = f" (a fire drill: {record.drill})" if record.drill else ""
    print(f"Cause: {cause}: {_EXPLANATIONS[cause]}{drill}")
    return 0


def _rebuild(payload: dict[str, Any], device: torch.device) -> tuple[CamouflageSegmenter, Window]:
    settings = settings_of(payload["settings"])
    memory_format = memory_format_of(settings)
    model = on_device(build_network(settings, load_weights=False), device, memory_format)
    model.load_state_dict(payload["model"])
    model.set_backbone_frozen(payload["backbone_frozen"])
    return model.train(), window_from_payload(payload["window"], device.type, memory_format)


def _diagnose(model: CamouflageSegmenter, window: Window, loss_scale: float = 1.0) -> Diagnosis:
    with untouched(model):
        return diagnose(model, lambda: accumulate_gradients(model, window), loss_scale)


def _culprits(
    model: CamouflageSegmenter, window: Window, record: IncidentRecord, diagnosis: Diagnosis
) -> Sequence[int]:
    """Positions of the samples that do it alone: not finite, or for a spike, far above the others."""
    with running_statistics(model):
        if not diagnosis.finite:
            return find_culprits(window.num_samples, lambda few: not _diagnose(model, window.only(few)).finite)
        if record.verdict != StepVerdict.SPIKE:
            return []
        return stand_out([_diagnose(model, window.only([n])).grad_norm for n in range(window.num_samples)])
