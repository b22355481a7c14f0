"""``replay INCIDENT_DIR``: rerun the window of an incident on this machine, and name the cause.

The folder is all it takes: weights, images, masks and settings are in it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from commands.output import print_lines
from models.network import CamouflageSegmenter, NetworkSettings, build_network
from runtime.checkpoint import made_by_modified_copy
from runtime.files import first_line
from runtime.machine import on_device, resolve_device
from runtime.tensors import first_difference
from training.batchnorm import running_statistics, statistics_kept
from training.diagnosis import Diagnosis, diagnose, find_culprits, name_cause, stand_out
from training.gate import StepVerdict
from training.incidents import OF_THE_RUN, IncidentRecord, read_incident
from training.optim import all_finite
from training.window import Window, accumulate_gradients, window_from_payload

_EXPLANATIONS = {
    "data": "other samples are fine under the same weights",
    "model": "the samples are not to blame one by one: the weights, or all of the data, lead to it",
    "precision": "it is finite in fp32",
    "not reproduced": "the rerun is as it should be: a passing fault of the machine, or a fire drill",
}
NetworkBuilder = Callable[[NetworkSettings], CamouflageSegmenter]


def replay(folder: Path, device_name: str, build_network: NetworkBuilder = build_network) -> int:
    """Rerun an incident's window in the recorded precision and in fp32, and print the numbers of both and the cause.

    Args:
        folder: folder of the incident, or a copy of it.
        device_name: auto, cpu or cuda.
        build_network: builds the network that the incident's weights belong to.

    Returns:
        exit code 0.

    Raises:
        ValueError: the folder holds no incident, or not all that its rerun needs.
    """
    record, payload = read_incident(folder)
    device = resolve_device(device_name)
    try:
        model, window = _rebuild(folder, payload, device, build_network)
        full = window.in_full_precision(halve=False)
        recorded_again = _diagnose(model, window, record.loss_scale)
        full_again = _diagnose(model, full) if full is not window else recorded_again
        culprits = _culprits(model, full, record, full_again)
        samples = [record.samples[position] for position in culprits]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error, 120)
        raise ValueError(f"{folder}: its settings, weights and samples cannot be rerun ({reason})") from error

    cause = name_cause(recorded_again, full_again, culprits, window.num_samples, record.healthy_otherwise)
    high = record.grad_norm / 2
    if record.verdict == StepVerdict.SPIKE and cause == "not reproduced" and recorded_again.grad_norm > high:
        cause = "precision" if full_again.grad_norm < high else "data" if culprits else "model"
    if record.verdict in OF_THE_RUN:
        cause = "model"

    lines = [f"{folder}: {record.verdict} in stage {record.stage}, epoch {record.epoch}, window {record.window}"]
    lines.append(f"Then: {record.action}")
    if record.verdict in OF_THE_RUN:
        lines.append("Replayed on the weights after that window's step: the run had failed by then")
    lines.append(f"{'':16} {'loss':>10} {'grad norm':>10}  first number that is not finite")
    rows = [(f"recorded, {record.precision}", record.loss, record.grad_norm, record.first_nonfinite)]
    for name, again in ((f"replayed, {record.precision}", recorded_again), ("replayed, fp32", full_again)):
        rows.append((name, again.loss, again.grad_norm, again.first_nonfinite))
    lines += [f"{name:16} {loss:10.4g} {norm:10.4g}  {module or 'none'}" for name, loss, norm, module in rows]
    if not all_finite(model.parameters()):
        lines.append("Weights are not finite, so nothing after them is")
    if cause == "data":
        lines += [f"Alone, in fp32, this sample does it: {sample}" for sample in samples]
    drill = f" (a fire drill: {record.drill})" if record.drill else ""
    print_lines([*lines, f"Cause: {cause}: {_EXPLANATIONS[cause]}{drill}"])
    return 0


def _rebuild(
    folder: Path, payload: dict[str, Any], device: torch.device, build_network: NetworkBuilder
) -> tuple[CamouflageSegmenter, Window]:
    settings = payload["settings"]
    memory_format = torch.channels_last if settings.get("channels_last", True) else torch.contiguous_format
    model = on_device(build_network(NetworkSettings.of(settings)), device, memory_format)
    if difference := first_difference(payload["model"], model.state_dict()):
        raise made_by_modified_copy(folder, difference)
    model.load_state_dict(payload["model"])
    model.set_backbone_frozen(payload["backbone_frozen"])
    return model.train(), window_from_payload(payload["window"], device.type, memory_format)


def _diagnose(model: CamouflageSegmenter, window: Window, loss_scale: float = 1.0) -> Diagnosis:
    with statistics_kept(model):
        return diagnose(model, lambda: accumulate_gradients(model, window), loss_scale)


def _culprits(
    model: CamouflageSegmenter, window: Window, record: IncidentRecord, diagnosis: Diagnosis
) -> Sequence[int]:
    """Return the positions of the samples at fault: not finite by themselves, or in a spike far above the others."""
    with running_statistics(model):
        if not diagnosis.finite:
            return find_culprits(window.num_samples, lambda few: not _diagnose(model, window.only(few)).finite)
        if record.verdict != StepVerdict.SPIKE:
            return []
        return stand_out([_diagnose(model, window.only([n])).grad_norm for n in range(window.num_samples)])
