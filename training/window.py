"""A window, one optimizer step's worth of batches, and the computation of its gradient."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.dataset import Batch
from data.loading import to_device
from losses import deep_supervision_loss
from runtime.machine import LossScaler, Precision, ScalerSettings, memory_errors
from training.drill import Drill

Loss = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]  # side logits, masks, uncertainty weight -> scalar


@dataclass(frozen=True)
class Window:
    """One optimizer step's worth of batches, complete enough to be computed again."""

    number: int  # in its epoch, from 0
    global_number: int  # in the run, from 1
    batches: Sequence[Batch]
    lr: float  # the decoder's, as scheduled: without recovery's factor
    uncertainty_weight: float
    precision: Precision
    scaler: LossScaler
    memory_format: torch.memory_format
    seed: int  # of dropout and drop-path
    total: int | None = None  # samples over all ranks; None: this rank has them all
    blank: Batch | None = None  # batch that a rank with fewer batches than others runs with weight 0
    rounds: int = 0  # least number of batches, if ranks wait for one another in each
    scale: float = 1.0  # factor of the image size in the backbone, see --multi-scale
    attempt: int = 0  # number of earlier runs of this window
    drill: Drill | None = None  # strikes this attempt
    spoilt_by: str = ""  # kind of the drill that has changed its samples

    @property
    def rehearses(self) -> str:
        """Kind of the drill that strikes, "" for none."""
        return self.spoilt_by if self.drill is None else self.drill.kind

    @property
    def num_samples(self) -> int:
        """Number of this rank's samples."""
        return sum(len(batch.images) for batch in self.batches)

    @property
    def num_samples_everywhere(self) -> int:
        return self.num_samples if self.total is None else self.total

    @property
    def sample_indices(self) -> list[int]:
        return [index for batch in self.batches for index in batch.indices.tolist()]

    def strike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let a fire drill spoil the gradients; nothing happens in an ordinary window."""
        if self.drill is not None:
            self.drill.strike(parameters)

    def only(self, positions: Iterable[int], least: int = 1) -> "Window":
        """Return the window with only some of this rank's samples, in the batches they are in.

        Args:
            positions: of the samples, from 0 over all batches.
            least: smallest batch to keep.
        """
        wanted, batches, first = set(positions), [], 0
        if len(wanted) == self.num_samples:
            return replace(self, total=None)
        for batch in self.batches:
            chosen = [position for position in range(len(batch.images)) if first + position in wanted]
            first += len(batch.images)
            if len(chosen) >= least:
                batches.append(batch.take(chosen))
        return replace(self, batches=batches, total=None)

    def in_full_precision(self, halve: bool) -> "Window":
        """Return the window in fp32, without loss scaling.

        Args:
            halve: Split each batch in two, so that fp32 needs no more memory. If layers normalise by the batch's
                statistics, that is another computation.
        """
        if self.precision.name == "fp32":
            return self
        full = self.precision.full()
        window = self.in_parts(2) if halve else self
        return replace(window, precision=full, scaler=full.new_scaler(self.scaler.settings))

    def in_parts(self, parts: int, least: int = 1) -> "Window":
        """Return the window in smaller batches: the same gradient, unless layers normalise by the batch's statistics.

        Args:
            parts: number of nearly equal parts of each batch.
            least: smallest part.
        """
        if parts == 1:
            return self
        batches: list[Batch] = []
        for batch in self.batches:
            size = len(batch.images)
            number = max(1, min(parts, size // least))
            ends = [-(-size * part // number) for part in range(number + 1)]  # the larger ones first
            batches += [batch.part(start, end) for start, end in pairwise(ends)]
        return replace(self, batches=batches, rounds=parts * self.rounds)


def batch_loss(
    model: nn.Module, images: Tensor, masks: Tensor, uncertainty_weight: Tensor, precision: Precision, scale: float,
    loss: Loss = deep_supervision_loss,
) -> Tensor:  # fmt: skip
    """Compute forward pass and loss of a batch. ``--compile`` compiles this function.

    Shape:
        images (B, 3, S, S), masks (B, 1, S, S), uncertainty_weight () -> ()
    """
    with precision.autocast():
        side_logits = model(images, scale)
    return loss(side_logits, masks, uncertainty_weight)


@memory_errors()
def accumulate_gradients(
    model: nn.Module,
    window: Window,
    loss_of: Callable[..., Tensor] = batch_loss,
    around_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
    num_ranks: int = 1,
) -> Tensor:
    """Run forward and backward pass of each batch of a window; ``.grad`` sums the gradients, scaled by its scaler.

    Dropout depends only on the window's seed, so a rerun, now or after a resume, is the same computation.

    Args:
        model: in training mode.
        window: the window.
        loss_of: ``batch_loss``, or a faster function that computes the same.
        around_backward: context of each backward pass.
        num_ranks: ranks that average gradients in the model's backward pass: a replica in that of the last batch, a
            sharded model in each. Each rank's part of the loss is multiplied by it, so that the mean becomes the sum.

    Returns:
        the window's loss, unscaled, a scalar on the device: the mean over its samples, or this rank's part of it. A
        batch is weighted by its number of samples, so that a short last batch counts as it would in one large batch.

    Raises:
        torch.OutOfMemoryError: The device has no memory for it, whichever library found out.
    """
    device = torch.device(window.precision.device_type)
    total = torch.zeros((), device=device)
    uncertainty_weight = torch.full((), window.uncertainty_weight, device=device)  # a float would be compiled in
    torch.manual_seed(window.seed)
    idle = max(1, len(window.batches), window.rounds if num_ranks > 1 else 0) - len(window.batches)
    batches = [*window.batches, *[window.blank] * idle]
    for number, batch in enumerate(batches):
        assert batch is not None, "an empty window is left out, or has a blank batch to run"
        images, masks = to_device(batch, device, window.memory_format)
        counts = number < len(window.batches)
        share = num_ranks * len(images) / window.num_samples_everywhere if counts else 0.0
        is_last = number == len(batches) - 1
        sums = nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with sums, window.precision.products():
            loss = loss_of(model, images, masks, uncertainty_weight, window.precision, window.scale) * share
            if window.drill is not None:
                loss = window.drill.spoil_loss(loss, window.scaler.is_enabled())
            with around_backward():
                window.scaler.scale(loss).backward()
        total += loss.detach()
    return total / num_ranks


def window_to_payload(window: Window, loss_scale: float) -> dict[str, Any]:
    """Return the window as tensors and plain numbers, from which ``replay`` computes it elsewhere."""
    return {
        "global_number": window.global_number,
        "batches": [batch._asdict() for batch in window.batches],
        "uncertainty_weight": window.uncertainty_weight,
        "precision": window.precision.name,
        "loss_scale": loss_scale,
        "seed": window.seed,
        "scale": window.scale,
    }


def window_from_payload(payload: dict[str, Any], device_type: str, memory_format: torch.memory_format) -> Window:
    """Rebuild a window from an incident's payload."""
    precision = Precision(payload["precision"], device_type)
    return Window(
        number=0,
        global_number=payload["global_number"],
        batches=[Batch(**batch) for batch in payload["batches"]],
        lr=0.0,
        uncertainty_weight=payload["uncertainty_weight"],
        precision=precision,
        scaler=precision.new_scaler(ScalerSettings(init_scale=payload["loss_scale"])),
        memory_format=memory_format,
        seed=payload["seed"],
        scale=payload.get("scale", 1.0),  # older incidents have none
    )
