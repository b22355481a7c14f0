"""A window, one optimizer step's worth of batches: how it is handed out, and how its gradients come about."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import Batch
from data.loading import to_device
from losses import deep_supervision_loss
from training.drill import Drill
from training.precision import LossScaler, Precision
from training.stability import BufferGuard
from training.stages import ScalerSettings


@dataclass(frozen=True)
class Window:
    """What one optimizer step is computed from, complete enough to be computed again."""

    number: int  # in its epoch, from 0
    global_number: int  # in the run, from 1
    batches: Sequence[Batch]
    lr: float  # the decoder's, as scheduled: before what recovery takes off it
    uncertainty_weight: float
    precision: Precision
    scaler: LossScaler
    memory_format: torch.memory_format
    seed: int  # of dropout and drop-path
    attempt: int = 0  # how often it has been run before
    drill: Drill | None = None  # strikes this attempt
    spoilt_by: str = ""  # the kind of drill that has changed its samples

    @property
    def rehearses(self) -> str:
        """The kind of drill, where one strikes."""
        return self.spoilt_by if self.drill is None else self.drill.kind

    @property
    def num_samples(self) -> int:
        return sum(len(batch.images) for batch in self.batches)

    @property
    def sample_indices(self) -> list[int]:
        return [index for batch in self.batches for index in batch.indices.tolist()]

    def only(self, positions: Iterable[int], least: int = 1) -> "Window":
        """The window made of some of its samples, by position, in the batches they are in.

        Args:
            positions: over all batches, from 0.
            least: batches left with fewer samples are left out.
        """
        wanted, batches, first = set(positions), [], 0
        if len(wanted) == self.num_samples:
            return self
        for batch in self.batches:
            chosen = [position for position in range(len(batch.images)) if first + position in wanted]
            first += len(batch.images)
            if len(chosen) >= least:
                batches.append(batch.take(chosen))
        return replace(self, batches=batches)

    def in_full_precision(self, halve: bool) -> "Window":
        """The same in fp32, without loss scaling.

        Args:
            halve: each batch in two halves, so that it needs no more memory than it did. Not the same computation where
                layers normalise by the batch's statistics.
        """
        if self.precision.name == "fp32":
            return self
        full = self.precision.full()
        window = self.in_parts(2) if halve else self
        return replace(window, precision=full, scaler=full.new_scaler(self.scaler.settings))

    def in_parts(self, parts: int, least: int = 1) -> "Window":
        """The same samples in smaller batches: the same gradient, but for what layers make of a batch's statistics.

        Args:
            parts: that each batch is cut into, nearly equal.
            least: samples that a part must have.
        """
        if parts == 1:
            return self
        batches: list[Batch] = []
        for batch in self.batches:
            size = len(batch.images)
            number = max(1, min(parts, size // least))
            ends = [-(-size * part // number) for part in range(number + 1)]  # the larger ones first
            batches += [batch.take(range(start, end)) for start, end in pairwise(ends)]
        return replace(self, batches=batches)


def accumulate_gradients(model: nn.Module, window: Window) -> Tensor:
    """Forward and backward pass of each batch of a window; gradients, scaled by its scaler, are summed in ``.grad``.

    Dropout is a function of the window, too: run again, now or after a resume, it is the same computation.

    Returns:
        the window's loss, unscaled, a scalar on the device: the mean over its samples. A batch counts by the samples it
        has, so that the short last one, too, contributes as it would to one large batch.
    """
    device = torch.device(window.precision.device_type)
    total = torch.zeros((), device=device)
    torch.manual_seed(window.seed)
    for batch in window.batches:
        images, masks = to_device(batch, device, window.memory_format)
        with window.precision.autocast():
            side_logits = model(images)
        share = len(images) / window.num_samples
        loss = deep_supervision_loss(side_logits, masks, window.uncertainty_weight) * share
        if window.drill is not None:
            loss = window.drill.spoil_loss(loss, window.scaler.is_enabled())
        window.scaler.scale(loss).backward()
        total += loss.detach()
    return total


class BatchParts:
    """Cuts batches down where the device's memory is too short for them; as many samples make a step as before."""

    def __init__(self) -> None:
        self.number = 1  # of parts that each batch is to go through in

    def gradients(self, model: nn.Module, window: Window, guard: BufferGuard) -> tuple[Window, Tensor]:
        """``accumulate_gradients``; where that runs out of memory, in batches of half the size, and so from then on.

        Returns:
            the window in the batches that fitted, to be run again or looked into, and its loss. Of a window that is run
            again in fp32 and does not fit, NaN: it is given up like one that is not finite in fp32 either.

        Raises:
            torch.OutOfMemoryError: the smallest batches do not fit.
        """
        largest = max(len(batch.images) for batch in window.batches)
        while True:
            can_be_cut = largest // 2 >= guard.least_batch
            try:
                return window, accumulate_gradients(model, window)
            except torch.OutOfMemoryError:
                if not can_be_cut and window.attempt == 0:
                    raise
            # Only here are the tensors gone that the traceback held on to.
            model.zero_grad(set_to_none=True)
            guard.restore()
            torch.cuda.empty_cache()
            if not can_be_cut:
                return window, torch.full((), torch.nan, device=window.precision.device_type)
            window, largest = window.in_parts(2, guard.least_batch), (largest + 1) // 2
            if window.attempt == 0:
                self.number *= 2
                tqdm.write(
                    f"Out of memory: each batch goes through in {self.number} parts from here on, of at most {largest} "
                    "images; as many images make a step as before"
                )


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
            if drill.strikes_window(window.global_number):
                first, *others = window.batches
                spoilt = first._replace(images=drill.spoil_images(first.images))
                window = replace(window, batches=[spoilt, *others], spoilt_by=drill.kind)
        return window


def window_to_payload(window: Window, loss_scale: float) -> dict[str, Any]:
    """Tensors and plain numbers, to be run again elsewhere."""
    return {
        "global_number": window.global_number,
        "batches": [batch._asdict() for batch in window.batches],
        "uncertainty_weight": window.uncertainty_weight,
        "precision": window.precision.name,
        "loss_scale": loss_scale,
        "seed": window.seed,
    }


def window_from_payload(payload: dict[str, Any], device_type: str, memory_format: torch.memory_format) -> Window:
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
    )
