"""Run this program on a null GPU: its CUDA code without a GPU, with the CPU's arithmetic.

python -m tests.nullcuda [--memory BYTES] [--capability N] [--devices N] [--lazy] [--syncs MODE] -- train ...
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from . import Runtime, begin, build, environment, is_active, why_not


def run_program(arguments: list[str], syncs: str) -> int:
    """Run the program in this process, which has null devices, and print what the devices have seen."""
    import torch

    begin()
    torch.set_num_threads(1)
    from .emulate import Emulation

    sys.path.insert(0, str(Path(__file__).parents[2]))
    import commands

    commands.prepare_for_torch()
    import train_ultimate

    torch.cuda.init()
    torch.cuda.set_sync_debug_mode(syncs)
    with Emulation() as emulation:
        exit_code = train_ultimate.main(arguments)
    pageable = ", ".join(f"{len(sizes)} {direction}" for direction, sizes in emulation.pageable.items())
    print(
        f"null GPU: {Runtime().launches} kernels launched, at most {torch.cuda.max_memory_allocated() / 1e6:.0f} MB "
        f"allocated and {torch.cuda.max_memory_reserved() / 1e6:.0f} MB reserved; {Runtime().races} races; copies that "
        f"make the host wait: {pageable}",
        file=sys.stderr,
    )
    return exit_code


def main() -> int:
    """Build the runtime, and run this module again with it; there, run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--memory", type=int, default=16 * 10**9, help="bytes of a device")
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--lazy", action="store_true", help="copies are as late as CUDA allows")
    parser.add_argument("--syncs", choices=["default", "warn", "error"], default="default", help="host syncs")
    options, arguments = parser.parse_known_args()  # the others are train_ultimate.py's; torchrun takes the "--" away
    if is_active():
        return run_program([argument for argument in arguments if argument != "--"], options.syncs)
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        settings = environment(build(Path(folder)), options.memory, options.capability, options.devices, options.lazy)
        return subprocess.call([sys.executable, "-m", __spec__.name, *sys.argv[1:]], env=settings)


if __name__ == "__main__":
    sys.exit(main())
