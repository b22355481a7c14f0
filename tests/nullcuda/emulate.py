"""Arithmetic for the null CUDA runtime: what its kernels leave undone is computed on the CPU, in the same memory."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CPU = torch.device("cpu")
_HALF = (torch.float16, torch.bfloat16)
# Run by torch as they are: they compute nothing.
_NO_ARITHMETIC = (
    "aten::detach", "aten::alias", "aten::empty", "aten::new_empty", "aten::set_", "aten::record_stream",
    "aten::resize_", "aten::_pin_memory", "aten::is_pinned", "aten::lift_fresh", "aten::_unsafe_view",
    "aten::_reshape_alias", "aten::_local_scalar_dense",
)  # fmt: skip
# In half precision slow on a CPU, or not there: computed in float32, and rounded.
_IN_FLOAT = (
    "aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
)  # fmt: skip
_ATTENTION = ("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention")


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in the null device's memory as a CPU tensor, without a copy."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_byte * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())


class Emulation(TorchDispatchMode):
    """Mode in which operations on the null device have results.

    torch runs each operation on "CUDA" first: allocations, checks of devices and dtypes, and warnings are its own. Then
    the CPU computes it again, on the same bytes. Random numbers are the CPU's; convolutions and matrix products of half
    precision are computed in float32 and rounded. An operation that the CPU does not know raises NotImplementedError.

    Args:
        computes: False leaves out the arithmetic, and what torch's own convolution needs besides its output, which
            cuDNN's does without. Results are arbitrary then; memory and launches are those of a GPU.

    Attributes:
        pageable: direction -> bytes of each copy between device and pageable host memory; CUDA makes the host wait.
        sent: (collective operation, bytes) of each call.
    """

    def __init__(self, computes: bool = True) -> None:
        super().__init__()
        self.computes = computes
        self.pageable: dict[str, list[int]] = {"to device": [], "to host": []}
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.name()
        flat, structure = tree_flatten((args, kwargs))
        device = kwargs.get("device")
        is_made_there = device is not None and torch.device(device).type == "cuda"
        if not is_made_there and not any(isinstance(value, Tensor) and value.is_cuda for value in flat):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # operations that consist of others arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if not self.computes and name.startswith("aten::convolution"):
            return _empty_results(func, flat, structure)
        result = func(*args, **kwargs)
        if name.startswith("c10d::"):
            self.sent.append((name, sum(value.nbytes for value in flat if isinstance(value, Tensor))))
            with _disable_current_modes():
                _communicate(name, args)
        elif not func.is_view and not name.startswith(_NO_ARITHMETIC) and not self._is_copied(name, args, result):
            with _disable_current_modes():
                if self.computes and name.startswith(_ATTENTION):
                    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                    _attend({**named, **kwargs}, result)
                elif self.computes:
                    _compute(func, name, flat, structure, result)
        return result

    def _is_copied(self, name: str, args: tuple[Any, ...], result: Any) -> bool:
        """Note a copy between host and device; return whether the null runtime has made it: it does not convert."""
        if not name.startswith(("aten::copy_", "aten::_to_copy")):
            return False
        target, source = (args[0], args[1]) if name.startswith("aten::copy_") else (result, args[0])
        if target.is_cuda == source.is_cuda:
            return False
        host, direction = (target, "to host") if source.is_cuda else (source, "to device")
        if source.numel() and not host.is_pinned():
            self.pageable[direction].append(source.nbytes)
        alike = target.dtype == source.dtype and target.shape == source.shape
        return alike and target.is_contiguous() and source.is_contiguous()


def _compute(func: Any, name: str, flat: list[Any], structure: Any, result: Any) -> None:
    """Compute an operation on the CPU, and write what it returns to the memory that torch has made for it."""
    mapped = [_on_cpu_if_cuda(value) for value in flat]
    args, kwargs = tree_unflatten(mapped, structure)
    kwargs.pop("pin_memory", None)
    if name.partition(".")[0] in _IN_FLOAT:
        args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.dtype in _HALF else t, (args, kwargs))
    if name == "aten::_softmax":  # on CUDA, the last argument asks for a float32 result of half precision
        args = (args[0].float(), args[1], False)
    elif name == "aten::_softmax_backward_data":
        args = (*args[:3], torch.float32) if args[0].dtype == torch.float32 else args
    computed = func(*args, **kwargs)
    given = {value.untyped_storage().data_ptr() for value in flat if isinstance(value, Tensor)}
    for target, value in zip(tree_flatten(result)[0], tree_flatten(computed)[0], strict=True):
        if not isinstance(target, Tensor) or not target.numel() or not value.numel():
            continue  # the CPU leaves out what only CUDA's backward pass wants
        if func._schema.is_mutable and target.untyped_storage().data_ptr() in given:
            continue  # changed where it is
        (on_cpu(target) if target.is_cuda else target).copy_(value)


def _attend(arguments: dict[str, Any], result: Sequence[Any]) -> None:
    """Compute fused attention, or its gradients, by the formula; the CPU has other kernels for it."""
    assert not arguments.get("dropout_p")
    query, key, value = (on_cpu(arguments[name]).float() for name in ("query", "key", "value"))
    scale = arguments.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ key.mT
    if (bias := arguments.get("attn_bias")) is not None:
        scores += on_cpu(bias).float()
    if arguments.get("is_causal"):
        scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    weights = scores.softmax(dim=-1)
    outputs = [weights @ value]
    if (grad := arguments.get("grad_out", arguments.get("grad_out_"))) is not None:
        grad = on_cpu(grad).float()
        of_weights = grad @ value.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        outputs = [scale * of_scores @ key, scale * of_scores.mT @ query, weights.mT @ grad]
        if bias is not None:
            outputs.append(of_scores)
    for target, output in zip(result, outputs, strict=False):
        if isinstance(target, Tensor) and target.numel():
            on_cpu(target).copy_(output)


def _empty_results(func: Any, flat: list[Any], structure: Any) -> Any:
    """Return memory for an operation's results, and nothing else."""
    args, kwargs = tree_unflatten([v.to("meta") if isinstance(v, Tensor) else v for v in flat], structure)
    return tree_map_only(
        Tensor,
        lambda like: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cuda"),
        func(*args, **kwargs),
    )


def _on_cpu_if_cuda(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_cuda:
        return on_cpu(value)
    if isinstance(value, torch.Generator):
        return torch.default_generator
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _communicate(name: str, args: tuple[Any, ...]) -> None:
    """Do with gloo what NCCL leaves undone for DDP, if the process group has gloo as well. Reductions are sums."""
    if "gloo" not in dist.get_backend_config():
        return
    if name == "c10d::allreduce_":
        for tensor in args[0]:
            _add_up(on_cpu(tensor))
    elif name == "c10d::broadcast_":
        for tensor in args[0]:
            dist.broadcast(on_cpu(tensor), args[2])
    elif name == "c10d::allgather_":
        for targets, source in zip(args[0], args[1], strict=True):
            dist.all_gather([on_cpu(target) for target in targets], on_cpu(source).contiguous())
    elif name != "c10d::barrier":
        raise NotImplementedError(f"{name} is not emulated")


def _add_up(tensor: Tensor) -> None:
    dense = tensor.float().contiguous() if tensor.dtype in _HALF else tensor.contiguous()
    dist.all_reduce(dense)
    tensor.copy_(dense)
