"""A window, one optimizer step's worth of batches: how it is handed out, and how its gradients come about."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.dataset import Batch
from data.loading import to_device
from losses import deep_supervision_loss
from training.distributed import Ranks
from training.drill import Drill
from training.precision import LossScaler, Precision
from training.runlog import first_line
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
    total: int | None = None  # samples that count, over all ranks; None: those here are all
    blank: Batch | None = None  # to be run, and not to count, by a rank that has fewer batches than others
    rounds: int = 0  # batches to run at the least, where ranks wait for one another in each
    scale: float = 1.0  # of the images, as the backbone sees them
    attempt: int = 0  # how often it has been run before
    drill: Drill | None = None  # strikes this attempt
    spoilt_by: str = ""  # the kind of drill that has changed its samples

    @property
    def rehearses(self) -> str:
        """The kind of drill, where one strikes."""
        return self.spoilt_by if self.drill is None else self.drill.kind

    @property
    def num_samples(self) -> int:
        """Of this rank."""
        return sum(len(batch.images) for batch in self.batches)

    @property
    def num_samples_everywhere(self) -> int:
        return self.num_samples if self.total is None else self.total

    @property
    def sample_indices(self) -> list[int]:
        return [index for batch in self.batches for index in batch.indices.tolist()]

    def only(self, positions: Iterable[int], least: int = 1) -> "Window":
        """The window made of some of this rank's samples alone, by position, in the batches they are in.

        Args:
            positions: over all batches, from 0.
            least: batches left with fewer samples are left out.
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
        return replace(self, batches=batches, rounds=parts * self.rounds)


def batch_loss(
    model: nn.Module, images: Tensor, masks: Tensor, uncertainty_weight: Tensor, precision: Precision, scale: float
) -> Tensor:
    """Forward pass and loss of a batch: what ``--compile`` compiles.

    Shape:
        images (B, 3, S, S), masks (B, 1, S, S), uncertainty_weight () -> ()
    """
    with precision.autocast():
        side_logits = model(images, scale)
    return deep_supervision_loss(side_logits, masks, uncertainty_weight)


def accumulate_gradients(
    model: nn.Module,
    window: Window,
    loss_of: Callable[..., Tensor] = batch_loss,
    around_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
    num_ranks: int = 1,
) -> Tensor:
    """Forward and backward pass of each batch of a window; gradients, scaled by its scaler, are summed in ``.grad``.

    Dropout is a function of the window, too: run again, now or after a resume, it is the same computation.

    Args:
        model: in training mode.
        window: what to compute them from.
        loss_of: ``batch_loss``, or something faster that computes the same.
        around_backward: entered for each backward pass.
        num_ranks: that average gradients in the model's backward pass: a replica in that of the last batch, a sharded
            one in each. What each rank has of the loss is multiplied by their number, so that the mean is the sum.

    Returns:
        the window's loss, unscaled, a scalar on the device: the mean over its samples, or this rank's part of it. A
        batch counts by the samples it has, so that the short last one, too, contributes as it would to one large batch.
    """
    device = torch.device(window.precision.device_type)
    total = torch.zeros((), device=device)
    uncertainty_weight = torch.full((), window.uncertainty_weight, device=device)  # a number would be compiled in
    torch.manual_seed(window.seed)
    idle = max(1, len(window.batches), window.rounds if num_ranks > 1 else 0) - len(window.batches)
    batches = [*window.batches, *[window.blank] * idle]
    for number, batch in enumerate(batches):
        assert batch is not None, "an empty window is left out, or has something blank to run"
        images, masks = to_device(batch, device, window.memory_format)
        counts = number < len(window.batches)
        share = num_ranks * len(images) / window.num_samples_everywhere if counts else 0.0
        is_last = number == len(batches) - 1
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            loss = loss_of(model, images, masks, uncertainty_weight, window.precision, window.scale) * share
            if window.drill is not None:
                loss = window.drill.spoil_loss(loss, window.scaler.is_enabled())
            with around_backward():
                window.scaler.scale(loss).backward()
        total += loss.detach()
    return total / num_ranks


class WindowRunner:
    """How windows go through the network on this machine: compiled or not, in batches that fit its memory.

    Args:
        batch_size: that the loader makes.
        scales: that windows have.
        recomputes: the model computes activations again in the backward pass, ``checkpoint_gradients``.

    Attributes:
        num_parts: that each batch is to go through in; doubled where the device's memory is too short.
    """

    def __init__(self, batch_size: int, scales: Sequence[float] = (1.0,), recomputes: bool = False) -> None:
        self.num_parts = 1
        self._ranks = Ranks()
        self._replica: nn.Module | None = None  # of the model, on each of several ranks
        self._batch_size = batch_size
        self._scales = sorted(scales, reverse=True)  # what needs most memory first
        self._recomputes = recomputes
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_for: Precision | None = None

    def replicate(
        self, model: nn.Module, ranks: Ranks, img_size: int, precision: Precision, memory_format: torch.memory_format
    ) -> None:
        """Have ranks average gradients, where there are several; called anew where what trains changes.

        Memory that is too short must show now. In a window, it would show in the midst of the averaging, and the other
        ranks would wait for the rest of it. So every rank tries a batch first, and all take the smallest size that fits
        one of them. A sharded model takes all ranks for each pass, so there is nothing to try.

        Raises:
            torch.OutOfMemoryError: one image does not fit.
        """
        if ranks.size == 1:
            return
        self._replica = None  # first: two of them would both be at work on the same gradients
        if not ranks.shards:
            guard = BufferGuard(model)
            guard.begin_window()
            self.gradients(model, self._example(img_size, precision, memory_format, guard.least_batch), guard)
            model.zero_grad(set_to_none=True)
            guard.restore()
            torch.cuda.empty_cache()  # what it kept is NCCL's now, if that needs it
            needed = max(ranks.gather(self.num_parts))
            if needed > self.num_parts:
                print(f"Out of memory on another rank: each batch goes through in {needed} parts")
            self.num_parts = needed
        self._ranks, device = ranks, torch.device(precision.device_type, ranks.local_rank)
        self._replica = ranks.replicate(model, device)

    def compile(
        self, model: nn.Module, img_size: int, precision: Precision, memory_format: torch.memory_format
    ) -> None:
        """Have ``torch.compile`` make kernels for the loader's batches, tried on zeros at every scale; a minute each.

        Other batches, a shorter one at an epoch's end or those of a window that is run again in fp32, go through the
        network as it is written. So they do all where this fails, with a warning. Called anew where what is trained
        changes.
        """
        torch.compiler.reset()  # what was made for another stage
        self._compiled, self._compiled_for = torch.compile(batch_loss, dynamic=False), precision
        guard, start = BufferGuard(model), time.perf_counter()
        guard.begin_window()
        reason, fits, example = "", True, self._example(img_size, precision, memory_format)
        examples = [replace(example, scale=scale) for scale in self._scales]
        replica = self._replica if isinstance(self._replica, DistributedDataParallel) else None
        try:
            with replica.no_sync() if replica is not None else nullcontext():  # where one fails, none must wait for it
                for example in examples:
                    self._accumulate(self._replica or model, example)
        except torch.OutOfMemoryError:  # as the first window will, and then batches are halved; not so by several ranks
            reason, fits = "out of memory" if replica is not None else "", False
        except Exception as error:  # a compiler that is not there, an operation that it does not know
            reason = first_line(error)[:200]
        reasons = {rank: told for rank, told in enumerate(self._ranks.gather(reason)) if told}
        if reasons:
            self._compiled = None
            where = f"on rank {min(reasons)}: " if self._ranks.size > 1 else ""
            print(f"Warning: --compile failed ({where}{reasons[min(reasons)]}); training goes on without it")
        elif fits:
            for example in examples if replica is not None else ():  # the kernels of a window's last batch
                self._accumulate(self._replica or model, example)
            print(f"Compiled in {time.perf_counter() - start:.0f} s")
        model.zero_grad(set_to_none=True)
        guard.restore()

    def gradients(self, model: nn.Module, window: Window, guard: BufferGuard) -> tuple[Window, Tensor]:
        """``accumulate_gradients``; where that runs out of memory, in batches of half the size, and so from then on.

        Returns:
            the window in the batches that fitted, to be run again or looked into, and its loss. Of a window that is run
            again in fp32 and does not fit, NaN: it is given up like one that is not finite in fp32 either.

        Raises:
            torch.OutOfMemoryError: the smallest batches do not fit.
        """
        if self._replica is not None:
            return window, self._with_others(model, window, guard)
        largest = max(len(batch.images) for batch in window.batches)
        while True:
            can_be_cut = largest // 2 >= guard.least_batch
            try:
                return window, self._accumulate(model, window)
            except torch.OutOfMemoryError:
                if not can_be_cut and window.attempt == 0:
                    raise
            # Only here are the tensors gone that the traceback held on to.
            model.zero_grad(set_to_none=True)
            guard.restore()
            torch.cuda.empty_cache()
            if not can_be_cut:
                return window, self._not_a_number(window)
            window, largest = window.in_parts(2, guard.least_batch), (largest + 1) // 2
            if window.attempt == 0:
                self.num_parts *= 2
                tqdm.write(
                    f"Out of memory: each batch goes through in {self.num_parts} parts from here on, of at most "
                    f"{largest} images; as many images make a step as before"
                )

    def _example(
        self, img_size: int, precision: Precision, memory_format: torch.memory_format, least: int = 1
    ) -> Window:
        """A window of one batch of the loader's size, or of the part of it that fits, at the largest scale."""
        size = max(self._largest_part, least)
        images, masks = (torch.zeros(size, channels, img_size, img_size, dtype=torch.uint8) for channels in (3, 1))
        batch = Batch(images, masks, torch.arange(size), {})
        scaler = precision.new_scaler(ScalerSettings())
        return Window(0, 0, [batch], 0.0, 0.0, precision, scaler, memory_format, seed=0, scale=self._scales[0])

    def _with_others(self, model: nn.Module, window: Window, guard: BufferGuard) -> Tensor:
        """All ranks average their gradients, or none does. What may need more memory than before is tried first."""
        assert self._replica is not None
        fits = True
        if window.attempt and not self._ranks.shards:
            try:
                self._accumulate(model, window)
            except torch.OutOfMemoryError:
                fits = False
            model.zero_grad(set_to_none=True)
            guard.restore()
            fits = self._ranks.all(fits)
        return self._accumulate(self._replica, window) if fits else self._not_a_number(window)

    @staticmethod
    def _not_a_number(window: Window) -> Tensor:
        return torch.full((), torch.nan, device=window.precision.device_type)

    @property
    def _largest_part(self) -> int:
        return -(-self._batch_size // self.num_parts)

    def _accumulate(self, model: nn.Module, window: Window) -> Tensor:
        around_backward = (lambda: statistics_kept(model)) if self._recomputes else nullcontext
        num_ranks = self._ranks.size if model is self._replica else 1
        return accumulate_gradients(model, window, self._loss_of, around_backward, num_ranks)

    def _loss_of(
        self, model: nn.Module, images: Tensor, masks: Tensor, uncertainty_weight: Tensor, precision: Precision,
        scale: float,
    ) -> Tensor:  # fmt: skip
        fits = len(images) == self._largest_part and precision == self._compiled_for
        loss_of = self._compiled if self._compiled is not None and fits else batch_loss
        return loss_of(model, images, masks, uncertainty_weight, precision, scale)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """For a backward pass that computes activations again: BatchNorm's statistics have taken in the batch already."""
    guard = BufferGuard(model)
    guard.begin_window()
    try:
        yield
    finally:
        guard.restore()


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
            if drill.strikes_window(window.global_number) and (window.batches or drill.kind == "kill"):
                first, *others = window.batches or [window.blank]
                assert first is not None, "a rank without samples has something blank to run"
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
        "scale": window.scale,
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
        scale=payload.get("scale", 1.0),  # incidents from before there were several have none
    )
