"""The processes that train together: what they add up, what they agree on, how one notices that another has gone.

Started by PyTorch's launcher, ``torchrun``, every process (a rank) runs the whole program on its slice of each window.
Gradients are averaged by DistributedDataParallel; here is everything else. A run without a launcher is one of one rank,
for which none of this costs anything.
"""

import os
import socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.heartbeat import LONGEST_WAIT, Heartbeat, meet

T = TypeVar("T")


class ElsewhereError(ValueError):
    """Another rank has failed, and tells why itself."""


class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: of this process, from 0. The first one prints and writes.
        size: number of processes.
        local_rank: of this process on its machine, which is the number of its GPU.
        shards: weights and gradients are split over ranks, see ``sharding.shard``; else each rank has all of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.shards = False
        self._heartbeat: Heartbeat | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor, requests: Sequence[float],
        statistics: Sequence[Tensor] = (), weight: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Make a window's numbers the same on all ranks, bitwise, in one packed all-reduce; the host does not wait.

        The verdict is a function of these numbers, so it is the same everywhere, also where only one rank's loss is
        NaN, or only one rank's copy of the gradient.

        Args:
            loss: this rank's part of the window's; they add up.
            grad_norm: of the averaged gradient, of which every rank has a copy: their mean. Where ranks shard, of this
                one's part of it: the root of the sum of their squares.
            found_inf: the largest counts.
            requests: this rank's, from ``StopRequest``; they add up.
            statistics: BatchNorm's running ones, changed in place to the mean over ranks.
            weight: of this rank in that mean: the samples that it had.

        Returns:
            loss, norm, flag; and the requests, None of a run of one rank.
        """
        if self.size == 1:
            return loss, grad_norm, found_inf, None
        norm = grad_norm.float().square() if self.shards else grad_norm.float() / self.size
        numbers = torch.stack([loss.float(), norm, found_inf.float()])
        # From pinned memory: from any other, the host would wait until the device has come that far.
        told = torch.tensor([weight, *requests], pin_memory=loss.is_cuda).to(loss.device, non_blocking=True)
        packed = torch.cat([numbers, told, *(value.flatten().float() * weight for value in statistics)])
        dist.all_reduce(packed)
        (loss, grad_norm, found_inf, total), rest = packed[:4].unbind(), packed[4:]
        sizes = [len(requests), *(value.numel() for value in statistics)]
        requested, *means = rest.split(sizes)
        for value, mean in zip(statistics, means, strict=True):
            value.copy_((mean / total).view_as(value))
        return loss, grad_norm.sqrt() if self.shards else grad_norm, found_inf.clamp(max=1), requested

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over ranks; waits for all of them."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def all(self, condition: bool) -> bool:
        """Whether it holds on every rank; waits for all of them."""
        return self.total([not condition])[0] == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank; anything that can be pickled. Waits for all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """What the call returns on the first rank; the others do not make it.

        Raises:
            ElsewhereError: it failed, on all ranks but the first, where the error itself is raised.
        """
        if self.size == 1:
            return call()
        if not self.is_first:
            succeeded, value = self._broadcast(None)
            if not succeeded:
                raise ElsewhereError
            return value
        try:
            value = call()
        except (ValueError, OSError):
            self._broadcast((False, None))
            raise
        self._broadcast((True, value))
        return value

    def from_rank(self, rank: int, value: T) -> T:
        """One rank's value, on every rank; tensors, numbers, strings, lists, dicts."""
        return value if self.size == 1 else self._broadcast(value, rank)

    def _broadcast(self, value: Any, rank: int = 0) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=rank)
        return values[0]

    def replicate(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module, averaging its gradients over ranks in the backward pass; for one rank, the module itself, and
        where ranks shard, since a sharded one does.

        For the parameters that train now: another is needed when those change. Buffers are not sent around: frozen
        statistics are alike, and ``agree`` sees to those that learn.
        """
        if self.size == 1 or self.shards:
            return module
        devices = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.15 renames the option; what takes its place is not in 2.9
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def lost(self) -> str:
        """After an error in talking to the others: which of them have gone; "" if all are there. Takes some seconds.

        If any have, nothing more is expected of the others, and this process has the time it needs to save.
        """
        lost = "" if self._heartbeat is None else self._heartbeat.lost()
        if lost and self._heartbeat is not None:
            self._heartbeat.stop(done=False)
        return lost

    def close(self, done: bool) -> None:
        """Leave. Not ``done``: after an error, without waiting for anyone."""
        if self._heartbeat is not None:
            self._heartbeat.stop(done)
            self._heartbeat = None
            if done:
                dist.destroy_process_group()


def join(device_type: str, patience: float) -> Ranks:
    """Find the other processes that the launcher has started, by the variables that it sets (``RANK`` and others).

    Args:
        device_type: cuda talks by NCCL, cpu by gloo.
        patience: seconds of silence after which a rank is given up, and with it this process.

    Raises:
        ValueError: not all of them come together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            here = f"{torch.cuda.device_count()} GPUs, and rank {ranks.rank} is number {ranks.local_rank + 1}"
            raise ValueError(f"{socket.gethostname()} has {here} there; give torchrun --nproc-per-node=gpu")
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        # Two connections to the launcher's store: one that waits must not keep the other from its beat.
        (store, _, _), (beats, _, _) = (next(dist.rendezvous("env://", timeout=LONGEST_WAIT)) for _ in range(2))
        myself = f"rank {ranks.rank} (process {os.getpid()} on {socket.gethostname()})"
        gathering, names = meet(store, ranks.rank, ranks.size, myself)
        ranks._heartbeat = Heartbeat(dist.PrefixStore(f"beats {gathering}", beats), ranks.rank, names, patience)
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"ranks {gathering}", store), rank=ranks.rank, world_size=ranks.size,
            timeout=LONGEST_WAIT,
        )  # fmt: skip
        kinds = ranks.gather(device_type)
    except RuntimeError as error:  # torch's errors of this kind are RuntimeErrors
        raise ValueError(f"rank {ranks.rank} of {ranks.size} did not find the others: {error}") from error
    if len(set(kinds)) > 1:
        told = ", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise ValueError(f"ranks compute on different devices ({told}); are driver and GPU of each machine in order?")
    if device_type == "cuda":  # NCCL takes its memory now, before it is tried how much is left
        dist.all_reduce(torch.zeros(1, device="cuda"))
    return ranks


def is_launched() -> bool:
    """By torchrun, which passes signals on, and starts processes again that have failed."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_again() -> bool:
    """By torchrun, with the same command, after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
