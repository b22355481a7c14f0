"""Nested dicts, lists and tuples of tensors, as checkpoints and incidents hold them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its place, such as "optimizer.state.0.exp_avg"."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from named_tensors(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from named_tensors(child, f"{name}[{index}]")


def map_tensors(value: Any, function: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Return the same structure with ``function(place, tensor)`` instead of each tensor."""
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, dict):
        return {
            key: map_tensors(child, function, f"{name}.{key}" if name else str(key)) for key, child in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(child, function, f"{name}[{index}]") for index, child in enumerate(value))
    return value


def first_difference(found: Any, expected: Mapping[str, Tensor]) -> str:
    """Return the first name or shape in which weights from a file differ from a network's, in words; "" if none."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__} in place of weights by name"
    for name, tensor in expected.items():
        if name not in found:
            return f"{name} is not in the file"
        shape = getattr(found[name], "shape", ())
        if shape != tensor.shape:
            return f"{name} has the shape {tuple(shape)} in the file, not {tuple(tensor.shape)}"
    unknown = next((name for name in found if name not in expected), None)
    return "" if unknown is None else f"{unknown} is only in the file"
