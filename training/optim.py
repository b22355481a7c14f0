"""Optimizer, gradient norm and weight averaging."""

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from runtime.sharding import load_whole_state, local, split_like


def build_optimizer(model: nn.Module, backbone: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Return fused AdamW over every parameter, with the backbone's in groups of their own.

    A frozen backbone has no gradients, so the optimizer skips it, and unfreezing it rebuilds nothing. Only the fused
    kernel takes a flag on the device to skip a step, without a host sync.

    Args:
        model: the network.
        backbone: the part of it that learns at a rate of its own.
        weight_decay: decay of matrices and kernels. Biases and norm scales (one dimension) are not decayed.
    """
    groups: list[dict[str, Any]] = []
    of_backbone = list(backbone.parameters())
    known = set(of_backbone)
    others = [parameter for parameter in model.parameters() if parameter not in known]
    for name, parameters in (("decoder", others), ("backbone", of_backbone)):
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        groups.append({"params": matrices, "weight_decay": weight_decay, "part": name})
        groups.append({"params": vectors, "weight_decay": 0.0, "part": name})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float, backbone_lr_scale: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * backbone_lr_scale if group["part"] == "backbone" else lr


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts. Hyperparameters stay those of this run's settings.

    Raises:
        ValueError: The state belongs to other parameters.
    """
    current = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        index: {name: split_like(value, parameters[index]) if value.ndim else value for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    for index, moments in split.items():  # AdamW's fused kernel does not check: it would write beyond their memory
        for name, value in moments.items():
            if value.ndim and value.shape != parameters[index].shape:
                raise ValueError(
                    f"{name} of parameter {index} has the shape {tuple(value.shape)} in the file, "
                    f"not {tuple(parameters[index].shape)}"
                )
    optimizer.load_state_dict({**state, "state": split})
    for group, hyperparameters in zip(optimizer.param_groups, current, strict=True):
        group.update(hyperparameters)
        for parameter in group["params"]:
            for name, moment in optimizer.state.get(parameter, {}).items():  # [] would add an entry
                # The fused kernel walks memory, not indices: a moment saved in another memory format must be laid out
                # like its parameter, or it would act on other weights.
                if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                    optimizer.state[parameter][name] = torch.empty_like(parameter, requires_grad=False).copy_(moment)


def fresh_moments(optimizer: torch.optim.Optimizer, everywhere: bool) -> None:
    """Create AdamW's moments and step counts, all zero, for the trainable parameters.

    torch would create them in the first step even if it is skipped, so a window that is not applied would leave a mark.

    Args:
        optimizer: fused AdamW.
        everywhere: Replace existing ones too, and drop those of frozen parameters.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if everywhere:
            optimizer.state.pop(parameter, None)
        if parameter.requires_grad and parameter not in optimizer.state:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no number is NaN or infinite: one fused pass and a host sync. Integer tensors are skipped.

    Of sharded tensors, only this rank's part is checked.
    """
    floats = [local(tensor) for tensor in tensors if tensor.is_floating_point()]
    return bool(torch.isfinite(get_total_norm(floats)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm over all gradients, a scalar on the device: one fused pass, without a host sync.

    Of sharded gradients, only this rank's part counts.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return get_total_norm(gradients, foreach=True)


class Ema:
    """Exponential moving average of a module's parameters and buffers, in a module of its own.

    After n updates the decay is (1 + n) / (10 + n), until it reaches its final value: with a constant 0.999, the first
    thousand windows would be validated with mostly the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @cached_property
    def _parameters(self) -> list[Tensor]:
        """Each parameter's part on this rank. Listed at the first use, because sharding replaces the parameters."""
        return [local(parameter) for parameter in self.module.parameters()]

    @cached_property
    def _buffers(self) -> dict[str, Tensor]:
        return dict(self.module.named_buffers())

    @torch.no_grad()
    def update(self, module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        """Add a module's parameters and its BatchNorm statistics, as its last step left them, to the average.

        Args:
            module: a module of the averaged module's architecture.
            buffers: name -> value of BatchNorm's running statistics. They are passed separately because the next
                forward pass has changed the module's own by the time a window's verdict is known.
        """
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averaged: list[Tensor] = [*self._parameters]
        current: list[Tensor] = [local(parameter) for parameter in module.parameters()]
        for name, value in buffers.items():
            average = self._buffers[name]
            if average.is_floating_point():
                averaged.append(average)
                current.append(value)
            else:  # BatchNorm's count of batches
                average.copy_(value)
        get_ema_multi_avg_fn(decay)(averaged, current, self.num_updates)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_whole_state(self.module, state["model"])
        self.num_updates = state["num_updates"]
