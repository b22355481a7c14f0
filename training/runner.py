"""How windows go through the network on this machine: compiled, in parts, on several ranks."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.dataset import Batch
from runtime.files import first_line
from runtime.machine import Precision, ScalerSettings
from runtime.ranks import Ranks
from training.batchnorm import BufferGuard, statistics_kept
from training.window import Window, accumulate_gradients, batch_loss


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
