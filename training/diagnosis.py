"""Diagnosis of a window that is not finite: the first bad module, the samples at fault, the cause."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from runtime.tensors import named_tensors
from training.optim import gradient_norm

WORST_PARAMETERS = 10
STANDS_OUT = 10.0  # least gradient norm of a sample that stands out, in medians of the window's other samples

Cause = Literal["data", "model", "precision", "not reproduced"]


@dataclass
class Diagnosis:
    """Findings of a window's rerun under hooks.

    Attributes:
        loss: unscaled; can be NaN or infinite.
        grad_norm: unscaled; can be NaN or infinite.
        first_nonfinite: the module in which the first number that is not finite appeared, and the place in it; "" if
            all are finite.
        worst_parameters: name -> gradient norm; first those that are not finite, then the largest.
    """

    loss: float
    grad_norm: float
    first_nonfinite: str
    worst_parameters: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def diagnose(model: nn.Module, backward: Callable[[], Tensor], loss_scale: float = 1.0) -> Diagnosis:
    """Run a window's forward and backward pass under hooks. Slow: the host waits for every module.

    Args:
        model: the network, without gradients before and after.
        backward: adds up gradients, multiplied by ``loss_scale``, in ``.grad``, and returns the unscaled loss.
        loss_scale: the window's loss scale.
    """
    with _watched(model) as found:
        loss = backward().item()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(gradient).item() / loss_scale for name, gradient in gradients.items()}
    if not found and not math.isfinite(loss):
        found.append("the loss itself (all the network's outputs are finite)")
    if not found:
        found += [f"gradient of {name}" for name, norm in norms.items() if not math.isfinite(norm)][:1]
    worst = sorted(norms, key=lambda name: -norms[name] if math.isfinite(norms[name]) else -math.inf)
    norm = gradient_norm(p for p in model.parameters()).item() / loss_scale
    model.zero_grad(set_to_none=True)
    return Diagnosis(loss, norm, found[0] if found else "", {name: norms[name] for name in worst[:WORST_PARAMETERS]})


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that collects, in the order of the computation, the modules in which numbers stop being finite.

    Gradients are watched by hooks on the modules' output tensors: backward hooks on modules fail with the in-place
    activations of many backbones.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after_forward(_module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            tensors = [tensor for _, tensor in named_tensors(outputs)]
            if not all(_finite(tensor) for tensor in tensors):
                fine = all(_finite(tensor) for _, tensor in named_tensors(inputs))
                found.append(f"{name} (output, from an input that is {'finite' if fine else 'not finite itself'})")
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(after_backward)

        def after_backward(gradient: Tensor) -> None:
            if not _finite(gradient):
                found.append(f"{name} (gradient at its output)")

        return after_forward

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def find_culprits(num_samples: int, is_bad: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return the positions of samples that are bad by themselves: by bisection, about 2 log2(n) runs for one of n.

    Args:
        num_samples: number of positions, from 0.
        is_bad: runs the samples at some positions together, and returns whether the result is bad.
    """

    def among(positions: Sequence[int]) -> list[int]:
        if not is_bad(positions):
            return []
        if len(positions) == 1:
            return list(positions)
        middle = len(positions) // 2
        return among(positions[:middle]) + among(positions[middle:])

    return among(range(num_samples)) if num_samples else []


def stand_out(norms: Sequence[float], spike_limit: float = 0.0) -> list[int]:
    """Return the positions of samples that make a window's gradient norm spike.

    Their own norm is far above those of the others, and large enough to explain the window's: the window's gradient is
    the mean of its samples'.

    Args:
        norms: gradient norm of each sample of the window, unscaled.
        spike_limit: norm above which the window is a spike.
    """
    least = len(norms) * spike_limit / 2  # half: each sample was run alone, with other BatchNorm statistics
    others = [median([*norms[:index], *norms[index + 1 :]]) for index in range(len(norms))] if len(norms) > 1 else []
    return [index for index, usual in enumerate(others) if max(STANDS_OUT * usual, least) < norms[index] < math.inf]


def name_cause(
    recorded: Diagnosis, full: Diagnosis, culprits: Collection[object], num_samples: int, healthy_otherwise: bool | None
) -> Cause:
    """Return what is at fault for a window that is not finite.

    Args:
        recorded: diagnosis in the incident's precision.
        full: diagnosis in fp32.
        culprits: samples that are not finite by themselves in fp32.
        num_samples: number of samples in the window.
        healthy_otherwise: whether the same weights are finite on other data; None if there was none to try.
    """
    if recorded.finite and full.finite:
        return "not reproduced"
    if full.finite:
        return "precision"
    if 0 < 2 * len(culprits) <= num_samples or healthy_otherwise:
        return "data"
    return "data" if num_samples == 1 and healthy_otherwise is None else "model"
