"""Build the null CUDA runtime for the torch that is installed: a second or two."""

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What torch takes from the libraries that are left out, and what it looks up in the driver by name.
_FROM_LIBRARIES = re.compile(r"(cuda|cu|nccl)[A-Z]|cublas|cudnn|cusolver|cusparse|curand|cufft|nvrtc|nvshmem|cufile")
_FROM_DRIVER = (
    "cuInit", "cuGetErrorString", "cuGetErrorName", "cuCtxSetCurrent", "cuModuleLoadData", "cuModuleUnload",
    "cuModuleGetFunction", "cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel", "cuFuncSetAttribute",
    "cuFuncGetAttribute", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuPointerGetAttribute",
    "cuMemGetAllocationGranularity", "cuStreamWriteValue32", "cuGetProcAddress", "cuGetProcAddress_v2",
)  # fmt: skip
_NEED_NO_DEVICE = re.compile(r"(nvrtc|cudnn|cusparse)GetErrorString|cudnnGetVersion|cublasGetStatusString")
# torch's wheels do not bring this header of the CUDA compiler; driver_types.h needs no more of it than this.
_HOST_DEFINES = """
#pragma once
#define __device_builtin__
#define __host__
#define __device__
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDARTAPI
#define CUDART_CB
"""


def why_not() -> str:
    """Return why the runtime cannot be built here, "" if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the null CUDA runtime needs x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if missing := [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]:
        return f"the null CUDA runtime is built with {' and '.join(missing)}: apt-get install gcc binutils"
    if not (_site_packages() / "torch/lib/libtorch_cuda.so").is_file():
        return "the null CUDA runtime needs a CUDA build of torch: pip install torch, without the CPU index"
    return "" if _headers() else "the null CUDA runtime needs driver_types.h, which pip's CUDA packages hold"


def build(folder: Path) -> Path:
    """Compile runtime.c, and a function that returns 0 for each other one that torch's libraries ask for.

    Args:
        folder: written to.

    Returns:
        the library, to be preloaded. Its name inside is the driver's, so that torch finds no other driver.

    Raises:
        subprocess.CalledProcessError: gcc or nm failed.
    """
    source = (HERE / "runtime.c").read_text()
    written = set(re.findall(r"\b(\w+)\([^;{}]*\) \{", source))
    others = sorted(name for name in (_wanted() | {*_FROM_DRIVER}) - written if not _NEED_NO_DEVICE.match(name))
    everything = folder / "everything.c"
    everything.write_text(source + "\n" + "\n".join(f"long {name}() {{ return 0; }}" for name in others) + "\n")
    (folder / "crt").mkdir()
    (folder / "crt/host_defines.h").write_text(_HOST_DEFINES)
    library = folder / "libnullcuda.so"
    includes = [f"-I{place}" for place in (folder, _headers())]
    flags = ["-shared", "-fPIC", "-O1", "-w", "-pthread", "-Wl,-soname,libcuda.so.1", f"-DCUDA_VERSION={_version()}"]
    subprocess.run(["gcc", *flags, *includes, "-o", library, everything], check=True)
    return library


def _site_packages() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parents[1]


def _headers() -> Path | None:
    """Return the folder of the CUDA headers that came with torch."""
    return next((path.parent for path in _site_packages().glob("nvidia/*/include/driver_types.h")), None)


def _version() -> int:
    """Return the version of CUDA that torch was built for, as CUDA writes it: 13.0 is 13000."""
    found = re.search(r"cuda.*= '(\d+)\.(\d+)'", (_site_packages() / "torch/version.py").read_text())
    assert found is not None
    return 1000 * int(found[1]) + 10 * int(found[2])


def _wanted() -> set[str]:
    """Return the functions of CUDA's libraries that torch's own libraries are linked against."""
    libraries = sorted((_site_packages() / "torch/lib").glob("*.so"))
    listing = subprocess.run(["nm", "-D", "-u", "-A", *libraries], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    return {name for name in names if _FROM_LIBRARIES.match(name)}
