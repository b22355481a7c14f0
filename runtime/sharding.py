"""Weights, gradients, moments and averaged weights split over ranks, for networks too large for one device.

FSDP2 does it (``torch.distributed.fsdp.fully_shard``; Zhao et al., "PyTorch FSDP", VLDB 2023): each rank keeps its part
of every parameter, as a DTensor, and a block's whole weights exist only while it computes. Checkpoints are the same as
those of one process, so any number of ranks, sharded or not, can resume from them. On modules and tensors that are not
sharded, every function here except ``shard`` does nothing.

FSDP is imported inside functions: that takes 0.4 s, a tenth of a run's start, and few runs need it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from runtime.tensors import first_difference

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

# Smallest share of all parameters for a block to be gathered by itself: small messages are all latency.
_LEAST_SHARE = 0.01


def shard(module: nn.Module, device: torch.device, num_ranks: int) -> None:
    """Split a module in place, the same way on all ranks: its blocks (members of sequences), then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (num_ranks,))
    total = sum(parameter.numel() for parameter in module.parameters())
    for parent in reversed(list(module.modules())):  # inner modules first
        for block in parent.children() if isinstance(parent, nn.Sequential | nn.ModuleList) else ():
            size = sum(parameter.numel() for parameter in block.parameters())
            if size >= _LEAST_SHARE * total and not isinstance(block, nn.ModuleList | nn.ModuleDict):
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; it may be empty."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def local_state(module: nn.Module) -> dict[str, Tensor]:
    """Return ``state_dict()`` with this rank's parts."""
    return {name: local(tensor) for name, tensor in module.state_dict().items()}


def load_local_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``local_state`` has returned back into the module."""
    for name, tensor in local_state(module).items():
        tensor.copy_(state[name])


def whole_on_first(payload: Any, is_first: bool) -> Any:
    """Gather the sharded tensors in nested dicts and lists: whole, in host memory, on rank 0; empty on the others.

    Call on all ranks. Tensors are gathered one after the other, so that a device holds only one whole tensor at a time.
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
    """Split a whole tensor, of which every rank has a copy, the way another tensor is sharded. Nothing is sent."""
    if not _is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded, like ``load_state_dict``.

    Raises:
        ValueError: The tensors belong to another module; the message is the first difference.
    """
    current = module.state_dict()
    if difference := first_difference(state, current):
        raise ValueError(difference)
    module.load_state_dict({name: split_like(value, current[name]) for name, value in state.items()})


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gather all weights on every rank while the block runs; each rank may then run passes by itself.

    Enter and leave on all ranks. This takes the memory of all weights, and in a backward pass of all gradients. Those
    are this rank's own: delete them before the block ends.
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
    """Set whether passes exchange nothing between ranks and keep the gathered weights.

    Args:
        part: sharded module.
        apart: exchange nothing.
        keeps_weights: keep the weights after a forward pass in any case. FSDP's outermost module does, because the
            backward pass, which comes next, needs them first.
    """
    part.set_requires_gradient_sync(not apart, recurse=False)
    part.set_reshard_after_forward(not apart and not keeps_weights, recurse=False)
    part.set_reshard_after_backward(not apart, recurse=False)
