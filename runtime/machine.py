"""Machine of a run: device, number format, memory layout, ranks, and fp16 loss scaling."""

import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from runtime.files import first_line
from runtime.ranks import Ranks

logger = logging.getLogger("train_ultimate")

Network = TypeVar("Network", bound=nn.Module)
PrecisionName = Literal["fp16", "bf16", "tf32", "fp32"]
LEAST_GAIN = 1.1  # of bf16 on a CPU: less does not pay for its rounding, and might be another choice the next time
# What cuBLAS, cuDNN, the driver and the CPU's allocator say when there is no memory for their part of the work; cuBLAS
# cannot make its handle then.
_NO_MEMORY = re.compile(r"out of memory|ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|can't allocate memory", re.I)
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ScalerSettings:
    """The search of fp16 loss scaling for the largest scale that does not overflow.

    The scale starts at ``init_scale``, is multiplied by ``backoff_factor`` at each overflow and by ``growth_factor``
    after ``growth_interval`` windows without one.
    """

    init_scale: float = 2.0**12
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


# The whole network at once is where explosions happen: start low, grow slowly.
CONSERVATIVE_SCALER = ScalerSettings(init_scale=2.0**10, growth_factor=1.5, backoff_factor=0.5, growth_interval=1000)


@dataclass(frozen=True)
class Precision:
    """Number format of the forward pass. Weights, gradients, losses and optimizer state are float32 in all of them.

    tf32 is float32 whose products are rounded to 10 bits on NVIDIA's GPUs since Ampere. torch takes it for fp32's
    convolutions by default; here, fp32 is float32.
    """

    name: PrecisionName
    device_type: str

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=_DTYPES.get(self.name), enabled=self.name in _DTYPES)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Compute products of float32 numbers as the precision says: around forward and backward passes."""
        kinds: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        before = [kind.fp32_precision for kind in kinds]
        for kind in kinds:
            kind.fp32_precision = "tf32" if self.name == "tf32" else "ieee"
        try:
            yield
        finally:
            for kind, precision in zip(kinds, before, strict=True):
                kind.fp32_precision = precision

    def full(self) -> "Precision":
        return Precision("fp32", self.device_type)

    def new_scaler(self, settings: ScalerSettings) -> "LossScaler":
        return LossScaler(self.device_type, settings, enabled=self.name == "fp16")


@dataclass(frozen=True)
class Machine:
    """What a run computes on, the same on every rank except for the number of the GPU."""

    device: torch.device
    precision: Precision  # recovery may switch to fp32
    memory_format: torch.memory_format
    ranks: Ranks

    @classmethod
    def of(cls, device: str, precision: str, channels_last: bool, shard: bool, ranks: Ranks) -> Self:
        """Resolve "auto" and agree with the other ranks on it.

        Args:
            device: auto, cpu or cuda.
            precision: auto, fp16, bf16, tf32 or fp32.
            channels_last: The memory layout that convolutions prefer.
            shard: Split weights over ranks, if there are several.
            ranks: The processes that train together.

        Raises:
            ValueError: The device is not available, or does not have the precision.
        """
        ranks.shards = shard and ranks.size > 1  # before anything is built on it
        where = resolve_device(device)
        return cls(where, _agreed_precision(precision, where, ranks), memory_format_of(channels_last), ranks)

    def place(self, model: Network) -> Network:
        """Move a network to the device, in the memory layout."""
        return on_device(model, self.device, self.memory_format)


def _agreed_precision(name: str, device: torch.device, ranks: Ranks) -> Precision:
    """Return one precision for all ranks: what all of them can do, if "auto" resolves differently on some machine."""
    mine = resolve_precision(name, device)
    found = ranks.gather((mine.name, torch.__version__))
    if len({version for _, version in found}) > 1:
        versions = ", ".join(f"rank {rank}: {version}" for rank, (_, version) in enumerate(found))
        logger.warning(f"ranks have different versions of torch ({versions}); use the same on all machines")
    if len({precision for precision, _ in found}) == 1:
        return mine
    return Precision("fp16" if device.type == "cuda" else "fp32", device.type)


def resolve_device(name: str) -> torch.device:
    """Return the device; "auto" is CUDA if there is one.

    Raises:
        ValueError: CUDA is asked for and not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; see nvidia-smi and torch.version.cuda, or use cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def free_memory(device: torch.device) -> float:
    """Return the bytes of memory that are free: of the GPU, or of this machine or the container's share of it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    with suppress(OSError, ValueError, AttributeError):
        text = Path("/proc/meminfo").read_text()
        found.append(1024.0 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", text, flags=re.MULTILINE)[0]))
    with suppress(OSError, ValueError):  # "max" if there is no limit
        group = Path("/sys/fs/cgroup")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return max(0.0, min(found))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise ``torch.OutOfMemoryError`` whoever runs out of memory: torch does so only for its own allocations.

    Also a decorator.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            raise torch.OutOfMemoryError(first_line(error)) from error
        raise


def use_deterministic_algorithms() -> None:
    """Make CUDA compute the same bits from the same inputs. Call before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return the precision; "auto" is bf16 if the hardware computes in it, else fp16 on CUDA and fp32 on a CPU.

    Raises:
        ValueError: tf32 is asked for on a CPU.
    """
    if name == "auto":
        name = "bf16" if _has_native_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if name == "tf32" and device.type != "cuda":
        raise ValueError("--precision tf32: only GPUs have it; on a CPU take auto, bf16 or fp32")
    assert name == "fp16" or name == "bf16" or name == "tf32" or name == "fp32", name
    return Precision(name, device.type)


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def gain_of_bf16(step: Callable[[Precision], object], seconds: float = 1.0) -> float:
    """Return how many times as fast a step is in bf16 as in fp32 on this CPU.

    Some CPUs have instructions for bf16 and are slower with them.

    Args:
        step: computes in the precision it is given.
        seconds: least time to spend; each runs twice at least, and the first time does not count.
    """
    bf16, fp32 = Precision("bf16", "cpu"), Precision("fp32", "cpu")
    times: dict[Precision, list[float]] = {bf16: [], fp32: []}
    begin = time.perf_counter()
    while len(times[fp32]) < 2 or time.perf_counter() - begin < seconds:
        for precision, durations in times.items():
            start = time.perf_counter()
            step(precision)
            durations.append(time.perf_counter() - start)
    return statistics.median(times[fp32][1:]) / statistics.median(times[bf16][1:])


class LossScaler(torch.amp.GradScaler):
    """GradScaler with a floor of 1, whose overflow flag can be read on the device.

    Overflows in a row can drive the stock scaler below 2^-128. The reciprocal of such a scale is infinite, the overflow
    check, which examines gradients before they are unscaled, finds nothing, and NaN reaches the weights. A scale below
    1 has no use: it would shrink gradients, not protect them from underflow.
    """

    def __init__(self, device_type: str, settings: ScalerSettings, enabled: bool) -> None:
        self.settings = settings
        super().__init__(
            device_type,
            init_scale=settings.init_scale,
            growth_factor=settings.growth_factor,
            backoff_factor=settings.backoff_factor,
            growth_interval=settings.growth_interval,
            enabled=enabled,
        )

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(new_scale)
        if self.is_enabled():
            assert self._scale is not None
            self._scale.clamp_(min=1.0)

    def update_after(self, loss: Tensor, found_inf: Tensor) -> None:
        """Update the scale, unless the loss is not finite: it is computed unscaled and says nothing about the scale.

        Decided on the device, without a host sync.

        Args:
            loss: The window's loss, a scalar.
            found_inf: 1 for an overflow on any rank. With sharded gradients, each rank sees only its own part.
        """
        if not self.is_enabled():
            return
        for state in self._per_optimizer_states.values():
            for flag in state["found_inf_per_device"].values():
                flag.copy_(found_inf)
        assert self._scale is not None
        assert self._growth_tracker is not None
        scale, growth_tracker = self._scale.clone(), self._growth_tracker.clone()
        self.update()
        finite = torch.isfinite(loss)
        self._scale.copy_(torch.where(finite, self._scale, scale))
        self._growth_tracker.copy_(torch.where(finite, self._growth_tracker, growth_tracker))

    def found_inf(self, optimizer: torch.optim.Optimizer, like: Tensor) -> Tensor:
        """Return 1 if the last ``unscale_`` met a non-finite gradient, else 0 (always 0 if scaling is off).

        A scalar on the device of ``like``, without a host sync.
        """
        flags = self._found_inf_per_device(optimizer).values() if self.is_enabled() else ()
        return torch.stack([flag.to(like.device) for flag in flags]).amax() if flags else torch.zeros_like(like)

    def current_scale(self, like: Tensor) -> Tensor:
        """Return the current scale, 1 if scaling is off: a scalar on the device of ``like``, without a host sync."""
        if not self.is_enabled():
            return torch.ones_like(like)
        assert self._scale is not None
        return self._scale.to(like.device, copy=True)  # a copy: update() changes the scale in place

    def state_dict(self) -> dict[str, Any]:
        """Return torch's entries, with scale and growth counter as tensors where they are: numbers are a host sync."""
        if not self.is_enabled() or self._scale is None:
            return super().state_dict()
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Load scale and growth counter from a checkpoint, and keep this stage's growth and backoff settings.

        ``load_state_dict`` would load the settings of the run that wrote the checkpoint, and it refuses the empty state
        of a run without scaling.
        """
        if self.is_enabled() and state:
            numbers = {key: value.item() if isinstance(value, Tensor) else value for key, value in state.items()}
            ours = {"growth_factor", "backoff_factor", "growth_interval"}
            kept = {key: value for key, value in self.state_dict().items() if key in ours}
            self.load_state_dict({**numbers, **kept})


def memory_format_of(channels_last: bool) -> torch.memory_format:
    """Return the memory layout of images, activations and convolution weights."""
    return torch.channels_last if channels_last else torch.contiguous_format


def on_device(model: Network, device: torch.device, memory_format: torch.memory_format) -> Network:
    """Move a network to a device, in a memory layout."""
    return model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]  # torch types no such one
