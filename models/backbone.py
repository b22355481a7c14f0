"""timm backbones as multi-scale feature extractors. The only module that imports timm."""

import difflib
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import timm.data
import timm.layers
import timm.layers.padding
import timm.models
import torch
from torch import Tensor, nn

_MAX_LEVELS = 4

# Silenced while timm builds a network: it warns about every classifier weight that a feature extractor does not use
# (missing weights are an error below), and the hub logs a page of retries if there is no connection.
_NOISY_LOGGERS = ("timm.models._builder", "huggingface_hub")


_USUAL = (  # to guess from when weights do not fit
    "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "res2net50_26w_4s", "pvt_v2_b0", "pvt_v2_b1",
    "pvt_v2_b2", "pvt_v2_b4", "tf_efficientnet_lite0", "tf_efficientnet_lite1", "efficientnet_b0", "convnext_tiny",
    "mobilenetv3_large_100", "swin_tiny_patch4_window7_224", "vit_base_patch16_224",
)  # fmt: skip


def embedding_like(weight: Tensor, wanted: Tensor | None, name: str) -> Tensor:
    """Return a position embedding at the size of another image size, by timm; other weights as they are.

    Args:
        weight: of a trained network.
        wanted: the same weight of the network to start; None if it has none.
        name: of the weight.
    """
    if wanted is None or weight.shape == wanted.shape or "pos_embed" not in name:
        return weight
    if weight.ndim == wanted.ndim == 4 and weight.shape[:2] == wanted.shape[:2]:  # (1, C, H, W)
        resized = nn.functional.interpolate(weight.float(), wanted.shape[2:], mode="bicubic", antialias=True)
        return resized.to(weight.dtype)
    if weight.ndim == wanted.ndim == 3 and weight.shape[2] == wanted.shape[2]:  # (1, N, C)
        for num_prefix in (0, 1, 2, 5):  # tokens beside the image's: class, distillation, registers
            old, new = (math.isqrt(max(tensor.shape[1] - num_prefix, 0)) for tensor in (weight, wanted))
            if old**2 + num_prefix == weight.shape[1] and new**2 + num_prefix == wanted.shape[1]:
                return timm.layers.resample_abs_pos_embed(weight, [new, new], [old, old], num_prefix)
    return weight


class Backbone(nn.Module):
    """The last four feature levels of a timm model, or all if it has fewer, fine to coarse.

    Attributes:
        channels: number of channels of each level.
        mean, std: input normalisation that the weights were trained with, per RGB channel of values in [0, 1].
        fixed_size: whether it takes only images of the size it was built for.
        usual_size: side in pixels of the images that timm's weights were trained with.

    Shape:
        images (B, 3, H, W), normalised -> list of (B, C_i, H / stride_i, W / stride_i)
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        speed_up_depthwise(body)
        # Swin and its kin return (B, H, W, C). Shapes do not say so: 96 channels look like a height of 96.
        self.channels_last_features = "NHWC" in str(getattr(body, "output_fmt", ""))
        self.channels: list[int] = body.feature_info.channels()[-_MAX_LEVELS:]
        config = getattr(body, "pretrained_cfg", None) or getattr(getattr(body, "model", None), "pretrained_cfg", {})
        self.fixed_size = bool(config.get("fixed_input_size"))
        data_config = timm.data.resolve_model_data_config(body)
        self.usual_size: int = data_config["input_size"][-1]
        self.mean: tuple[float, ...] = data_config["mean"]
        self.std: tuple[float, ...] = data_config["std"]

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = self.body(images)[-_MAX_LEVELS:]
        return [level.permute(0, 3, 1, 2) for level in levels] if self.channels_last_features else levels

    def parameters_of(self, num_levels: int, img_size: int) -> frozenset[str]:
        """Return the names of the parameters that the finest ``num_levels`` levels depend on: those with gradients.

        Raises:
            ValueError: the backbone has fewer levels.
        """
        mode = self.training
        levels = self.eval()(torch.zeros(1, 3, img_size, img_size))
        self.train(mode)
        if num_levels > len(levels):
            raise ValueError(f"--frozen-levels {num_levels}: this backbone has {len(levels)} feature levels")
        named = dict(self.named_parameters())
        sums = [level.sum() for level in levels[:num_levels]]
        gradients = torch.autograd.grad(sums, list(named.values()), allow_unused=True)
        return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)

    def checkpoint_gradients(self) -> bool:
        """Keep only each stage's input during training, and recompute its activations in the backward pass.

        Returns:
            whether timm supports it for this architecture.
        """
        switch = getattr(self.body, "set_grad_checkpointing", None) or getattr(
            getattr(self.body, "model", None), "set_grad_checkpointing", None
        )
        if switch is not None:
            switch(True)
        return switch is not None


class _TrainsInFp32OnCpu(nn.Conv2d):
    """Convolution whose training is computed in fp32 under bf16 autocast on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        in_bf16 = (
            input.is_cpu and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        )
        trains = input.requires_grad or self.weight.requires_grad
        if in_bf16 and trains and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                return super().forward(input.float()).to(torch.bfloat16)
        return super().forward(input)

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle and copy look classes up by name, and those of ``_trains_in_fp32`` are in no module.
        _, kind = type(self).__bases__
        return _empty_convolution, (kind,), self.__getstate__()


@functools.cache
def _trains_in_fp32(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Return the same kind of convolution, trained in fp32: a plain one, or one of timm's with padding of its own."""
    return type(kind.__name__, (_TrainsInFp32OnCpu, kind), {})


def _empty_convolution(kind: type[nn.Conv2d]) -> nn.Conv2d:
    """Return a convolution without its state, which pickle restores afterwards."""
    subclass = _trains_in_fp32(kind)
    return subclass.__new__(subclass)


def speed_up_depthwise(module: nn.Module) -> None:
    """Train depthwise convolutions in fp32 under bf16 autocast on a CPU, unless they are 3x3 with stride 1.

    oneDNN has no fast backward pass for them in bf16: 5x5 and strided ones take 4 to 30 times as long as in fp32, in
    total more than half of a step of EfficientNet. Inference and frozen layers stay in bf16, twice as fast.
    """
    for layer in module.modules():
        depthwise = isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        if depthwise and (layer.kernel_size, layer.stride) != ((3, 3), (1, 1)):
            layer.__class__ = _trains_in_fp32(type(layer))


@contextmanager
def padding_for_multiples() -> Iterator[None]:
    """Replace timm's "same" padding, inside the block, with a constant if the stride divides the image's side.

    Meant for exports whose image sides are any multiple of 32: timm's own formula divides and rounds up in each layer,
    which takes torch.export minutes to simplify.
    """
    original = timm.layers.padding.get_same_padding

    def padding(side: int, kernel_size: int, stride: int, dilation: int) -> Any:
        if side % stride == 0:
            return max((kernel_size - 1) * dilation + 1 - stride, 0)
        return original(side, kernel_size, stride, dilation)

    timm.layers.padding.get_same_padding = padding
    try:
        yield
    finally:
        timm.layers.padding.get_same_padding = original


def build_backbone(name: str, pretrained: bool, weights: Mapping[str, Tensor] | None, img_size: int) -> Backbone:
    """Create a backbone with weights from timm's hub, with given ones, or with random ones.

    Args:
        name: any timm model that supports ``features_only``.
        pretrained: download timm's weights; ignored if ``weights`` are given.
        weights: with timm's names, or with names that timm can convert.
        img_size: side of the square input in pixels; models with a fixed input size are built for it.

    Raises:
        ValueError: unknown name, no feature pyramid, or weights that cannot be downloaded or do not fit.
    """
    if not timm.is_model(name):
        matches = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
        hint = (
            f"; did you mean {', '.join(matches)}?"
            if matches
            else "; python -c 'import timm; print(timm.list_models())' lists all"
        )
        raise ValueError(f"--backbone {name}: timm {timm.__version__} has no model of that name{hint}")
    if weights is not None:
        return Backbone(_create_with(name, weights, img_size))
    try:
        return Backbone(_create(name, img_size, pretrained=pretrained))
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise ValueError(f"--backbone {name}: timm cannot build it ({reason_of(error)})") from error
        raise ValueError(
            f"--backbone {name}: its pretrained weights could not be loaded ({reason_of(error)}). Without a "
            f"connection, give a file with --backbone-weights, or start from random weights with --no-pretrained"
        ) from error


def _create(name: str, img_size: int, **options: Any) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = img_size
    try:
        with _silenced(_NOISY_LOGGERS):
            return timm.create_model(name, features_only=True, **options)
    except (AttributeError, AssertionError, NotImplementedError, TypeError, IndexError) as error:
        raise ValueError(
            f"--backbone {name}: timm cannot build it as a feature pyramid ({reason_of(error)})"
        ) from error
    except RuntimeError as error:
        if "features_only" not in str(error):
            raise
        raise ValueError(f"--backbone {name}: timm offers no feature pyramid for it; choose another") from error


def _create_with(name: str, weights: Mapping[str, Tensor], img_size: int) -> nn.Module:
    """Load weights with timm, but strictly.

    timm loads feature extractors non-strictly: it silently accepts weights of another architecture and leaves random
    ones. So build the model twice from one seed, with and without the weights: one that is equal in both was not given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initial = _create(name, img_size, pretrained=False)
        torch.manual_seed(0)
        try:
            loaded = _create(name, img_size, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(weights)})
        except Exception as error:  # timm's conversions of names raise anything
            own = initial.state_dict()
            fit = sum(own[key].shape == weights[key].shape for key in own.keys() & weights.keys())
            raise ValueError(
                f"--backbone-weights: not the weights of {name}: {fit} of its {len(own)} tensors fit"
                f"{_likeness(name, weights)} ({reason_of(error)})"
            ) from error
    before = dict(initial.named_parameters())
    matrices = [(key, weight) for key, weight in loaded.named_parameters() if weight.ndim >= 2]
    missing = [key for key, weight in matrices if torch.equal(weight, before[key])]
    likeness = _likeness(name, weights)
    if missing or likeness:  # a smaller network's tensors may all be among a larger one's
        what = f"{len(missing)} of its {len(matrices)} weight tensors are not in the file" if missing else "all fit"
        first = f", the first being {missing[0]}" if missing else ""
        raise ValueError(f"--backbone-weights: not the weights of {name}: {what}{first}{likeness}")
    return loaded


def _likeness(name: str, weights: Mapping[str, Tensor]) -> str:
    """Say which other usual backbone these weights look like, for an error message; "" if none."""

    def shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
        return {(key, value.shape) for key, value in tensors.items() if value.ndim >= 2}

    for candidate in (name, *_USUAL):
        try:
            with torch.device("meta"):  # no memory, no random numbers: at most 0.3 s each
                own = shapes(timm.create_model(candidate).state_dict())
        except Exception:  # networks whose construction needs values: nothing can be said
            continue
        if len(own ^ shapes(weights)) <= 4:  # no classifier, or one for other classes
            return "" if candidate == name else f"; they look like those of {candidate}, try --backbone {candidate}"
    return ""


@contextmanager
def _silenced(names: Sequence[str]) -> Iterator[None]:
    """Drop what these loggers say below an error; restore their levels afterwards."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def reason_of(error: Exception) -> str:
    """Return the first two lines of an error's message as one of at most 300 characters, or else the error's type.

    Two, because the first line of torch's error about weights that do not fit names none of them.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2])[:300] or type(error).__name__
