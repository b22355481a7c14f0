"""Weights, gradients, moments and average split over ranks, for networks that one device cannot hold with all that.

FSDP2 does it (``torch.distributed.fsdp.fully_shard``; Zhao et al., "PyTorch FSDP", VLDB 2023): each rank keeps its part
of every parameter, as a DTensor, and a block's whole weights are there only while it computes. Checkpoints stay what
they are for one process, so any number of ranks, sharded or not, can go on from them. On modules and tensors that are
not sharded, everything here but ``shard`` does nothing.

FSDP is imported where it is used: that takes 0.4 s, a tenth of a run's start, and few runs need it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_LEAST_SHARE = 0.01  # of all parameters, for a block to be gathered by itself: messages of a few bytes are all latency


def shard(module: nn.Module, device: torch.device, num_ranks: int) -> None:
    """Split a module in place, alike on all ranks: its blocks, which are members of sequences, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_ranks,))
    total = sum(parameter.numel() for parameter in module.parameters())
    for parent in reversed(list(module.modules())):  # the inner ones first
        for block in parent.children() if isinstance(parent, nn.Sequential | nn.ModuleList) else ():
            size = sum(parameter.numel() for parameter in block.parameters())
            if size >= _LEAST_SHARE * total and not isinstance(block, nn.ModuleList | nn.ModuleDict):
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it, in the same memory; it may be empty."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict()`` of this rank's parts."""
    return {name: local(tensor) for name, tensor in module.state_dict().items()}


def load_local_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, tensor in local_state(module).items():
        tensor.copy_(state[name])


def whole_on_first(payload: Any, is_first: bool) -> Any:
    """Nested dicts and lists with sharded tensors whole, in host memory, on the first rank; empty on the others.

    All ranks must call it. It gathers one tensor after the other, so that no device has to hold more than one of them.
    """
    if _is_sharded(payload):
        whole = payload.full_tensor().detach()
        return whole.cpu() if is_first else torch.empty(0)
    if isinstance(payload, dict):
        return {key: whole_on_first(child, is_first) for key, child in payload.items()}
    if isinstance(payload, list):
        return [whole_on_first(child, is_first) for child in payload]
    return payload


def split_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, of which every rank has a copy, as parts like those of another one; nothing is sent."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict``, whole tensors into a module that may be sharded.

    Raises:
        RuntimeError: they are those of another module.
    """
    current = module.state_dict()
    fits = {name for name, value in state.items() if name in current and current[name].shape == value.shape}
    module.load_state_dict(
        {name: split_like(value, current[name]) if name in fits else value for name, value in state.items()}
    )


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """All weights on every rank, where each may run forward and backward passes by itself, or none.

    All ranks must enter and leave it. It takes the memory of all weights, and of all gradients in a backward pass;
    those stay this rank's own, and must be gone before it is left.
    """
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in parts:
        _set_apart(part, True)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            _set_apart(part, False, keeps_weights=part is module)


def _is_sharded(value: Any) -> "TypeGuard[DTensor]":
    return hasattr(value, "full_tensor")


def _set_apart(part: "FSDPModule", apart: bool, keeps_weights: bool = False) -> None:
    """Set apart, passes send nothing and leave whole weights where they are.

    Args:
        part: of a sharded module.
        apart: whether.
        keeps_weights: after a forward pass all the same, as FSDP has its outermost module do: the backward pass, which
            needs them first, comes at once.
    """
    part.set_requires_gradient_sync(not apart, recurse=False)
    part.set_reshard_after_forward(not apart and not keeps_weights, recurse=False)
    part.set_reshard_after_backward(not apart, recurse=False)
