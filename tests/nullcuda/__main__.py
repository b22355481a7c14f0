"""Run a program's CUDA code without a GPU, with the CPU's arithmetic: this project's, or another script.

python -m tests.nullcuda [--memory BYTES] [--capability N] [--devices N] [--lazy] [--syncs MODE] -- train ...
python -m tests.nullcuda [--no-arithmetic] --program FILE -- ...
"""

import argparse
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from . import Runtime, begin, build, environment, is_active, why_not

PROGRAM = Path(__file__).parents[2] / "train_ultimate.py"


def run_program(program: Path, arguments: list[str], syncs: str, computes: bool) -> int:
    """Run a script in this process, which has null devices, and print what the devices have seen.

    Args:
        program: the script.
        arguments: of its command line.
        syncs: what torch does at a host sync: default, warn or error.
        computes: see ``Emulation``.
    """
    import torch

    from .emulate import Emulation

    begin()
    torch.set_num_threads(1)
    torch.cuda.init()
    torch.cuda.set_sync_debug_mode(syncs)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    exit_code = 0
    with Emulation(computes) as emulation:
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as ended:
            exit_code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    runtime = Runtime()
    pageable = ", ".join(f"{len(sizes)} {direction}" for direction, sizes in emulation.pageable.items())
    print(
        f"null GPU: {runtime.launches} kernels launched, at most {torch.cuda.max_memory_allocated() / 1e6:.0f} MB "
        f"allocated and {torch.cuda.max_memory_reserved() / 1e6:.0f} MB reserved; {runtime.races} races; copies that "
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
    parser.add_argument("--no-arithmetic", action="store_true", help="for memory and launches: results are arbitrary")
    parser.add_argument("--program", type=Path, default=PROGRAM, metavar="FILE")
    options, arguments = parser.parse_known_args()  # torchrun takes the "--" away
    if is_active():
        arguments = [argument for argument in arguments if argument != "--"]
        return run_program(options.program.resolve(), arguments, options.syncs, not options.no_arithmetic)
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        settings = environment(library, options.memory, options.capability, options.devices, options.lazy)
        return subprocess.call([sys.executable, "-m", __spec__.name, *sys.argv[1:]], env=settings)


if __name__ == "__main__":
    sys.exit(main())
