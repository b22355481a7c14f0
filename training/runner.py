"""The way of windows through the network on this machine: compiled or eager, in parts that fit, on several ranks."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data.dataset import Batch
from losses import deep_supervision_loss
from runtime.files import first_line
from runtime.machine import Machine, Precision, ScalerSettings
from training.batchnorm import BufferGuard, statistics_kept
from training.window import Loss, Window, accumulate_gradients, batch_loss

logger = logging.getLogger("train_ultimate")


class WindowRunner:
    """Runs windows forward and backward.

    Args:
        machine: device, memory layout and ranks.
        img_size: S.
        batch_size: largest batch of the training loader, as asked for.
        scales: the windows' possible scales.
        recomputes: The model recomputes activations in the backward pass, see ``checkpoint_gradients``.
        loss: maps side logits, masks and uncertainty weight to a scalar.

    Attributes:
        batch_size: largest batch of the training loader; on a GPU, ``replicate`` chooses it when a stage begins.
        num_parts: number of parts of each batch; doubled whenever the device runs out of memory.
    """

    def __init__(
        self, machine: Machine, img_size: int, batch_size: int, scales: Sequence[float] = (1.0,),
        recomputes: bool = False, loss: Loss = deep_supervision_loss,
    ) -> None:  # fmt: skip
        self.batch_size = self._asked_for = batch_size
        self.num_parts = 1
        self._machine = machine
        self._img_size = img_size
        self._replica: nn.Module | None = None  # wrapped model of one of several ranks
        self._scales = sorted(scales, reverse=True)  # the largest, which needs most memory, first
        self._recomputes = recomputes
        self._loss = loss
        self._unreached: list[nn.Parameter] = []  # by the trial's backward pass; timm's pit has a norm that it skips
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_for: Precision | None = None

    def replicate(self, model: nn.Module, precision: Precision, most: int | None = None) -> None:
        """Make ranks average gradients, if there are several. Call again whenever the trainable parameters change.

        Run out of memory here if at all: during a real window's all-reduce, the other ranks would hang. So every rank
        tries a batch first, and all take the smallest that one of them needs. Passes of a sharded model involve all
        ranks, so there is no trial.

        Args:
            model: in training mode.
            precision: of the passes.
            most: images of a window on the rank with most, when a stage begins. On a GPU, as many of them as fit become
                one batch: the same gradient by fewer kernels, whose launches are what a small batch waits for. Not if
                layers normalise by the batch's statistics: its size matters then.

        Raises:
            torch.OutOfMemoryError: One image does not fit.
        """
        ranks, guard = self._machine.ranks, BufferGuard(model)
        grows = self._machine.device.type == "cuda" and not guard.batch_matters and not ranks.shards
        self._replica = None  # first: two replicas would both hook the same gradients
        if most is not None:
            self.batch_size = max(self._asked_for, most) if grows else self._asked_for
            self.num_parts = 1 if grows else self.num_parts
        wanted = self._largest_part
        if (grows and most is not None) or (ranks.size > 1 and not ranks.shards):
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            # DDP's buckets come after the trial; in the second window new ones, while NCCL still holds the first ones.
            buckets = torch.empty(2 * trainable if ranks.size > 1 else 0, device=self._machine.device)
            self._shrink_until_it_fits(model, precision, guard, most or wanted + 1)
            del buckets
            self.batch_size = min(ranks.gather(self.batch_size))
        if grows and self.batch_size > self._asked_for:
            logger.info(f"Batches of {self.batch_size} images: as many of a step's as fit into the GPU's memory")
        elif self._largest_part < min(wanted, self._asked_for):
            logger.warning(f"out of memory: batches of {self._largest_part} images instead of {self._asked_for}")
        if ranks.size == 1:
            return
        for parameter in self._unreached:  # DDP would wait for their gradients
            parameter.requires_grad_(False)
        device = torch.device(precision.device_type, ranks.gpu)
        self._replica = ranks.replicate(model, device)

    def compile(self, model: nn.Module, precision: Precision) -> None:
        """Compile the loader's batches with ``torch.compile``, and try them on zeros at every scale; a minute each.

        Other batches run eagerly: a shorter one at an epoch's end, those of a window rerun in fp32. If compilation
        fails, all batches do, with a warning. Call again whenever the trainable parameters change.
        """
        torch.compiler.reset()  # forget the previous stage's code
        ranks = self._machine.ranks
        self._compiled, self._compiled_for = torch.compile(batch_loss, dynamic=False), precision
        start = time.perf_counter()
        reason, fits, example = "", True, self._example(precision)
        examples = [replace(example, scale=scale) for scale in self._scales]
        replica = self._replica if isinstance(self._replica, DistributedDataParallel) else None
        with statistics_kept(model):
            try:
                with replica.no_sync() if replica is not None else nullcontext():  # a failure must leave none waiting
                    for example in examples:
                        self._accumulate(self._replica or model, example)
            except torch.OutOfMemoryError:  # one rank: the first window meets it too, and halves its batches
                reason, fits = "out of memory" if replica is not None else "", False
            except Exception as error:  # no compiler, an operation that it does not know
                reason = first_line(error)
            reasons = {rank: text for rank, text in enumerate(ranks.gather(reason)) if text}
            if reasons:
                self._compiled = None
                where = f"on rank {min(reasons)}: " if ranks.size > 1 else ""
                logger.warning(f"--compile failed ({where}{reasons[min(reasons)]}); training goes on without it")
            elif fits:
                for example in examples if replica is not None else ():  # kernels of a window's last batch
                    self._accumulate(self._replica or model, example)
                logger.info(f"Compiled in {time.perf_counter() - start:.0f} s")
            model.zero_grad(set_to_none=True)

    def backward(self, model: nn.Module, window: Window, guard: BufferGuard) -> tuple[Window, Tensor]:
        """Run ``accumulate_gradients``. If memory runs out, halve the batches, from then on.

        Returns:
            the window, split into batches that fit, and its loss. The loss is NaN if an fp32 rerun does not fit;
            recovery then skips the window.

        Raises:
            torch.OutOfMemoryError: The smallest batches do not fit.
        """
        if self._replica is not None:
            return window, self._backward_with_others(model, window, guard)
        largest = max(len(batch.images) for batch in window.batches)
        while True:
            can_be_cut = largest // 2 >= guard.least_batch
            try:
                return window, self._accumulate(model, window)
            except torch.OutOfMemoryError:
                if not can_be_cut and window.attempt == 0:
                    raise
            self._clear(model, guard)  # outside `except`: the traceback keeps the failed pass's tensors alive
            if not can_be_cut:
                return window, self._not_a_number(window)
            window, largest = window.in_parts(2, guard.least_batch), (largest + 1) // 2
            if window.attempt == 0:
                self.num_parts *= 2
                logger.warning(
                    f"out of memory: each batch goes through in {self.num_parts} parts from here on, of at most "
                    f"{largest} images; the number of images per step stays the same"
                )

    def examine(self, model: nn.Module, window: Window) -> Tensor:
        """Run a window eagerly, as it is, on this rank only: for diagnosis. Gradients stay in ``.grad``."""
        return accumulate_gradients(model, window, self._eager_loss_of)

    def _shrink_until_it_fits(self, model: nn.Module, precision: Precision, guard: BufferGuard, most: int) -> None:
        """Halve ``batch_size`` until a window of ``most`` images fits: its second batch meets the first one's gradient.

        Raises:
            torch.OutOfMemoryError: The smallest batch does not fit.
        """
        guard.begin_window()
        while True:
            window = self._example(precision, guard.least_batch)
            if self._largest_part < most:
                window = replace(window, batches=[*window.batches, *window.batches])
            if self._fits(model, window, guard):
                return
            if self._largest_part // 2 < guard.least_batch:
                raise torch.OutOfMemoryError
            self.batch_size = -(-self.batch_size // 2)

    def _fits(self, model: nn.Module, window: Window, guard: BufferGuard) -> bool:
        """Run a window, and leave no trace of it."""
        fits = True
        try:
            self._accumulate(model, window)
            self._unreached = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        except torch.OutOfMemoryError:
            fits = False
        self._clear(model, guard)
        return fits

    @staticmethod
    def _clear(model: nn.Module, guard: BufferGuard) -> None:
        """Forget a window's gradients, and give its memory back: other libraries may need it."""
        model.zero_grad(set_to_none=True)
        guard.restore()
        torch.cuda.empty_cache()

    def _example(self, precision: Precision, least: int = 1) -> Window:
        """Return a window of one batch of the loader's size, or the part of it that fits, at the largest scale."""
        size = max(self._largest_part, least)
        side = self._img_size
        images, masks = (torch.zeros(size, channels, side, side, dtype=torch.uint8) for channels in (3, 1))
        return Window(
            number=0,
            global_number=0,
            batches=[Batch(images, masks, torch.arange(size), {})],
            lr=0.0,
            uncertainty_weight=0.0,
            precision=precision,
            scaler=precision.new_scaler(ScalerSettings()),
            memory_format=self._machine.memory_format,
            seed=0,
            scale=self._scales[0],
        )

    def _backward_with_others(self, model: nn.Module, window: Window, guard: BufferGuard) -> Tensor:
        """Average gradients over all ranks, or over none. A rerun may need more memory, so it is tried first."""
        assert self._replica is not None
        ranks, fits = self._machine.ranks, True
        if window.attempt and not ranks.shards:
            fits = ranks.all(self._fits(model, window, guard))
        return self._accumulate(self._replica, window) if fits else self._not_a_number(window)

    @staticmethod
    def _not_a_number(window: Window) -> Tensor:
        return torch.full((), torch.nan, device=window.precision.device_type)

    @property
    def _largest_part(self) -> int:
        return -(-self.batch_size // self.num_parts)

    def _accumulate(self, model: nn.Module, window: Window) -> Tensor:
        around_backward = (lambda: statistics_kept(model)) if self._recomputes else nullcontext
        num_ranks = self._machine.ranks.size if model is self._replica else 1
        return accumulate_gradients(model, window, self._loss_of, around_backward, num_ranks)

    def _loss_of(
        self, model: nn.Module, images: Tensor, masks: Tensor, uncertainty_weight: Tensor, precision: Precision,
        scale: float,
    ) -> Tensor:  # fmt: skip
        fits = len(images) == self._largest_part and precision == self._compiled_for
        if self._compiled is None or not fits:
            return self._eager_loss_of(model, images, masks, uncertainty_weight, precision, scale)
        return self._compiled(model, images, masks, uncertainty_weight, precision, scale, self._loss)

    def _eager_loss_of(
        self, model: nn.Module, images: Tensor, masks: Tensor, uncertainty_weight: Tensor, precision: Precision,
        scale: float,
    ) -> Tensor:  # fmt: skip
        return batch_loss(model, images, masks, uncertainty_weight, precision, scale, self._loss)
