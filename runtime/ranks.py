"""The processes that train together, and everything they agree on.

Every process (rank) that PyTorch's launcher ``torchrun`` starts runs the whole program on its slice of each window.
DistributedDataParallel averages gradients; the rest is here. A run without a launcher has one rank, for which nothing
here costs anything.
"""

import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.console import write_line
from runtime.heartbeat import LONGEST_WAIT, Heartbeat, meet

T = TypeVar("T")


class ElsewhereError(ValueError):
    """Another rank has failed, and reports the reason itself."""


class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this process, from 0. Rank 0 prints and writes.
        size: number of processes (world size).
        gpu: number of its GPU among those that this process sees.
        shards: weights and gradients are split over ranks, see ``sharding.shard``; else each rank holds all of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, gpu: int = 0, heartbeat: Heartbeat | None = None) -> None:
        self.rank = rank
        self.size = size
        self.gpu = gpu
        self.shards = False
        self._heartbeat = heartbeat

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor, requests: Sequence[float],
        statistics: Sequence[Tensor] = (), weight: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Make a window's numbers bitwise the same on all ranks: one packed all-reduce, without a host sync.

        The verdict is a function of these numbers, so all ranks reach the same one, even if only one rank's loss or
        copy of the gradient is NaN.

        Args:
            loss: this rank's part of the window's loss; the parts add up.
            grad_norm: norm of the averaged gradient, of which every rank has a copy; the result is the mean. If ranks
                shard, the norm of this rank's part; the result is the root of the sum of squares.
            found_inf: 1 for an overflow on this rank; the result is the maximum.
            requests: this rank's stop requests, see ``Signals``; they add up.
            statistics: BatchNorm's running statistics, changed in place to the mean over ranks.
            weight: this rank's weight in that mean: its number of samples.

        Returns:
            loss, norm, flag; and the requests, None for a run of one rank.
        """
        if self.size == 1:
            return loss, grad_norm, found_inf, None
        norm = grad_norm.float().square() if self.shards else grad_norm.float() / self.size
        numbers = torch.stack([loss.float(), norm, found_inf.float()])
        # From pinned memory: a copy from pageable memory would wait for the device.
        sent = torch.tensor([weight, *requests], pin_memory=loss.is_cuda).to(loss.device, non_blocking=True)
        packed = torch.cat([numbers, sent, *(value.flatten().float() * weight for value in statistics)])
        dist.all_reduce(packed)
        (loss, grad_norm, found_inf, total), rest = packed[:4].unbind(), packed[4:]
        sizes = [len(requests), *(value.numel() for value in statistics)]
        requested, *means = rest.split(sizes)
        for value, mean in zip(statistics, means, strict=True):
            value.copy_((mean / total).view_as(value))
        return loss, grad_norm.sqrt() if self.shards else grad_norm, found_inf.clamp(max=1), requested

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over ranks. Waits for all ranks."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def all(self, condition: bool) -> bool:
        """Return whether the condition holds on every rank. Waits for all ranks."""
        return self.total([not condition])[0] == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order; anything that can be pickled. Waits for all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0 only, and broadcast the result.

        Raises:
            ElsewhereError: The call failed; raised on all ranks except rank 0, which raises the error itself.
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
        """Broadcast one rank's value: tensors, numbers, strings, lists, dicts."""
        return value if self.size == 1 else self._broadcast(value, rank)

    def _broadcast(self, value: Any, rank: int = 0) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=rank)
        return values[0]

    def replicate(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a module so that its backward pass averages gradients over ranks.

        One rank needs no wrapper, and a sharded module averages by itself: both get the module back. Wrap again
        whenever the trainable parameters change. Buffers are not broadcast: frozen statistics are identical, and
        ``agree`` averages those that learn.
        """
        if self.size == 1 or self.shards:
            return module
        devices = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch 2.15 renames an option; torch 2.9 does not know the new name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def lost(self) -> str:
        """Return the names of ranks that have gone, "" if none: after a failed exchange. Takes some seconds.

        If some have gone, this rank's heartbeat stops, so that nobody ends it while it saves.
        """
        lost = "" if self._heartbeat is None else self._heartbeat.lost()
        if lost and self._heartbeat is not None:
            self._heartbeat.stop(done=False)
        return lost

    def close(self, done: bool) -> None:
        """Leave the group. Without ``done``, after an error, without waiting for the other ranks."""
        if self._heartbeat is not None:
            self._heartbeat.stop(done)
            self._heartbeat = None
            if done:
                dist.destroy_process_group()


def join(device_type: str, patience: float) -> Ranks:
    """Join the other processes that the launcher has started, by the variables it sets (``RANK`` and others).

    Args:
        device_type: cuda (NCCL) or cpu (gloo).
        patience: seconds of a rank's silence after which all others end.

    Raises:
        ValueError: Some processes did not come, or they do not compute on the same kind of device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    rank, size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpu, identity = local_rank, f"rank {rank}"
    if device_type == "cuda":
        num_gpus = torch.cuda.device_count()
        gpu = 0 if num_gpus == 1 else local_rank  # Slurm shows each process one GPU: its own
        if gpu >= num_gpus:
            here = f"{num_gpus} GPUs, and rank {rank} is number {local_rank + 1}"
            raise ValueError(f"{socket.gethostname()} has {here} there; give torchrun --nproc-per-node=gpu")
        torch.cuda.set_device(gpu)
        identity = f"{socket.gethostname()}: {torch.cuda.get_device_properties(gpu).uuid}"
    if not is_launched():
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        write_line(
            sys.stderr,
            f"rank {rank} of {size}: waiting for the others at {where}, by the variables RANK, WORLD_SIZE and "
            "MASTER_ADDR; unset RANK and WORLD_SIZE to train in this process alone",
        )
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        # Two connections to the launcher's store: a connection that waits would block the heartbeat.
        (store, _, _), (beats, _, _) = (next(dist.rendezvous("env://", timeout=LONGEST_WAIT)) for _ in range(2))
        gathering, names = meet(store, rank, size, f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        heartbeat = Heartbeat(dist.PrefixStore(f"beats {gathering}", beats), rank, names, patience)
        dist.init_process_group(
            backend, store=dist.PrefixStore(f"ranks {gathering}", store), rank=rank, world_size=size,
            timeout=LONGEST_WAIT,
        )  # fmt: skip
        ranks = Ranks(rank, size, gpu, heartbeat)
        kinds, identities = zip(*ranks.gather((device_type, identity)), strict=True)
    except RuntimeError as error:  # torch's errors of communication are RuntimeErrors
        raise ValueError(f"rank {rank} of {size} did not find the others: {error}") from error
    if len(set(kinds)) > 1:
        listed = ", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise ValueError(f"ranks compute on different devices ({listed}); check driver and GPU of each machine")
    if len(set(identities)) < size:
        twice = next(name for name in identities if identities.count(name) > 1)
        sharing = " and ".join(str(rank) for rank, name in enumerate(identities) if name == twice)
        raise ValueError(
            f"ranks {sharing} have the same GPU ({twice}); start as many processes as there are GPUs: torchrun "
            "--nproc-per-node=gpu"
        )
    if device_type == "cuda":  # NCCL allocates now, before the trial of how much memory is left
        dist.all_reduce(torch.zeros(1, device="cuda"))
    return ranks


def rank_before_joining() -> int:
    """Return this process's rank by the launcher's variables; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def is_launched() -> bool:
    """Return whether torchrun has started this process. It forwards signals, and restarts processes that fail."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_started_again() -> bool:
    """Return whether torchrun has restarted this process after a failure, with the same command."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
