"""CUDA without a GPU: torch's own CUDA code on top of a runtime whose kernels do nothing.

torch's CUDA wheels are linked against cudart, cuBLAS, cuDNN, NCCL and the driver. ``runtime.c`` stands in for all of
them: it is preloaded, takes host memory for device memory, and answers "success". Everything above it is torch's own
C++, and runs for real: the caching allocator with its out-of-memory errors, pinned memory, streams and events,
autocast, autograd's device thread, fused AdamW, GradScaler, ProcessGroupNCCL, DDP and FSDP2, checks of devices and
dtypes, ``set_sync_debug_mode``. ``Emulation`` computes on the CPU, in the same memory, what the kernels leave undone.

    python -m tests.nullcuda -- train --dataset-path ...        this program, by hand
    python -m pytest -m rehearsal                               its tests

It says nothing about speed, the numerics of fp16 kernels, cuDNN's choices and workspaces, or failures of NCCL. cuDNN's
convolution and attention are switched off, because torch asks cuDNN for plans that only cuDNN can make.

To use it for another project: copy this folder; ``build`` needs gcc, nm and a CUDA build of torch on x86-64 Linux.
Start Python with ``environment(...)``, call ``begin`` before CUDA is used, and run what needs results in ``Emulation``.
"""

import ctypes
import os
from pathlib import Path

from .build import build, why_not

__all__ = ["Runtime", "begin", "build", "environment", "is_active", "why_not"]


def environment(
    library: Path, memory: int = 16 * 10**9, capability: int = 90, devices: int = 1, lazy: bool = False
) -> dict[str, str]:
    """Return the environment for a Python process that is to have null devices.

    Args:
        library: what ``build`` has returned.
        memory: bytes of each device; of the process, whose devices share them.
        capability: compute capability times 10.
        devices: their number.
        lazy: Copies to pinned memory arrive when the host waits, and are NaN before; a change of pinned memory while it
            is copied from counts as a race.
    """
    settings = {"MEMORY": memory, "CC": capability, "DEVICES": devices, "LAZY": int(lazy)}
    return {
        **os.environ,
        **{f"NULLCUDA_{name}": str(value) for name, value in settings.items()},
        "LD_PRELOAD": str(library),
        "CUDA_MODULE_LOADING": "LAZY",
    }


def is_active() -> bool:
    """Return whether this process has null devices."""
    return "nullcuda" in os.environ.get("LD_PRELOAD", "")


def begin() -> None:
    """Switch off cuDNN, which the null runtime cannot replace."""
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


class Runtime:
    """The runtime that was preloaded into this process: its counters and settings."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)

    def _count(self, name: str) -> int:
        function = getattr(self._library, f"nullcuda_{name}")
        function.restype = ctypes.c_long
        return function()

    @property
    def launches(self) -> int:
        """Number of kernels that torch has launched; those of cuBLAS and cuDNN are not among them."""
        return self._count("launches")

    @property
    def races(self) -> int:
        """Number of times that pinned memory was changed while it was copied from. Waits for all copies."""
        return self._count("races")

    @property
    def pinned_bytes(self) -> int:
        return self._count("pinned_bytes")

    @property
    def pinned_allocations(self) -> int:
        """Number of times that pinned memory was asked for, each of which makes a GPU wait."""
        return self._count("pinned_allocations")

    def set_memory(self, size: int) -> None:
        """Set a device's memory in bytes."""
        self._library.nullcuda_set_memory(ctypes.c_size_t(size))

    def set_lazy(self, lazy: bool) -> None:
        self._library.nullcuda_set_lazy(int(lazy))
