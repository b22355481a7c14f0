"""Subcommands, one module each. Only the one asked for is imported, and torch only by those that need it."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from commands import cli
from commands.output import print_error, print_lines
from data.processes import num_cores
from runtime import console
from runtime.files import first_line
from runtime.folder import BEST, CONFIG, read_json
from training.settings import Settings, UsageError, flag, with_paths_found

T = TypeVar("T")

# How torch begins the errors of the driver, CUDA, cuBLAS, cuDNN and NCCL. What a kernel was given wrongly is a bug.
_NO_GPU = re.compile(
    "(CUDA (error|out of memory|driver|unknown error)|cuDNN error|NCCL error|No CUDA GPUs|Found no NVIDIA driver"
    "|The NVIDIA driver|Unexpected error from cuda)(?!.*(assert|illegal|misaligned|invalid (arg|conf)|INVALID_VALUE))"
)


def prepare_for_torch() -> None:
    """Have the idle threads of torch's CPU kernels sleep soon. Call before torch is imported.

    By default they spin for a millisecond. If other programs need the cores, training waits for threads that do not
    run, in each of its kernels: beside four busy processes on two cores it took up to five times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def begin() -> None:
    """Set up signals and streams of a process of this program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # before and after training there is nothing to save
        if signal.getsignal(number) is signal.SIG_DFL:  # which would end the process
            signal.signal(number, signal.SIG_IGN)
    if isinstance(sys.stdout, io.TextIOWrapper):  # None if it was closed
        sys.stdout.reconfigure(line_buffering=True)  # a redirected log can be read as it grows


def answer(argv: Sequence[str] | None = None) -> int | cli.Request:
    """Parse the command line, once a process, and run the command unless it trains: ``train``, ``demo`` and ``plan``.

    Returns:
        the exit code; or for those, the request. Their mistakes that need no checkpoint are reported here, before
        torch is imported, which takes seconds.
    """

    def run() -> int | cli.Request:
        request = cli.parse(argv)
        if "plan" in request.given:
            request = replace(request, preset={**request.preset, **_read_plan(request.given["plan"])})
        if request.trains and request.given.get("resume") is None:  # else the checkpoint has settings too
            Settings.resolve(request.given, preset=request.preset)
        _require_inputs(request)
        if request.trains or request.command == "plan":
            return request
        with console.configured():
            return _run(request)

    return attempt(run)


def attempt(call: Callable[[], T]) -> T | int:
    """Return the call's result. If a user's mistake, the GPU or Ctrl-C ends it, print a line, return the exit code."""
    try:
        return call()
    except (ValueError, OSError) as error:
        # All ranks parse the same command line; other errors of one rank have no text on the others.
        reported_by_rank_0 = os.environ.get("RANK", "0") != "0" and (isinstance(error, UsageError) or not str(error))
        if not reported_by_rank_0:
            print_error(str(error))
        return 2
    except RuntimeError as error:
        if not _NO_GPU.match(str(error)):
            raise
        print_error(
            f"the GPU cannot be used: {first_line(error)}. nvidia-smi shows what else uses it; CUDA_VISIBLE_DEVICES "
            "chooses another, --device cpu none"
        )
        return 1
    except KeyboardInterrupt:
        print_lines(["interrupted"], to_stderr=True)
        return 130


def _read_plan(path: str) -> dict[str, Any]:
    """Return the settings in a file of ``plan``.

    Raises:
        UsageError: There is no such file, or ``plan`` did not write it.
    """
    if not Path(path).is_file():
        raise UsageError(f"--plan {path}: no such file; write one with: plan --dataset-path DIR --json {path}")
    plan = read_json(Path(path))
    if not isinstance(plan.get("settings"), dict) or "forecast" not in plan:
        raise UsageError(f"--plan {path}: not a file that plan has written")
    known = {entry.name for entry in fields(Settings)}
    return {name: value for name, value in with_paths_found(plan).items() if name in known}


def _require_inputs(request: cli.Request) -> None:
    """Check that the files and folders named on the command line exist, before anything slow is imported.

    Raises:
        ValueError: One of them does not exist.
    """
    named = request.given if request.trains else vars(request.args)
    for name in ("backbone_weights", "exclude"):
        path = named.get(name)
        if path is not None and not Path(path).is_file() and named.get("resume") is None:  # else it was read before
            raise ValueError(f"{flag(name)} {path}: no such file")
    for name in ("checkpoint", "resume"):
        path = named.get(name)
        if path in (None, "auto") or Path(path).exists():
            continue
        known = [*Path().glob(f"*/{BEST}"), *Path().glob(f"*/*/{BEST}")]
        hint = f"; there is {known[0]}" if known else "; give a file such as checkpoints/best_model.pth"
        raise ValueError(f"{flag(name)} {path}: no such file{hint}{', or auto' if name == 'resume' else ''}")
    if request.trains and named.get("resume") is None:
        from commands.own_files import is_json_with, is_report, require_own  # Pillow, which --help does not need
        from reporting.report import REPORT

        directory = Path(named["checkpoint_dir"])
        for file, is_own in ((CONFIG, is_json_with("settings")), (REPORT, is_report)):
            require_own([directory / file], is_own, request.command, f"--checkpoint-dir {directory}")
    for name in ("dataset_path", "rehearse"):
        path = named.get(name)
        for folder in path if isinstance(path, list) else [path]:
            if folder not in (None, "synthetic") and not Path(folder).is_dir():
                what = "is a file" if Path(folder).exists() else "no such folder"
                raise ValueError(f"{folder}: {what}; {flag(name)} must name the dataset's folder")


def _run(request: cli.Request) -> int:
    args = request.args
    if request.command == "replay":
        from commands.replay import replay

        return replay(Path(args.incident), args.device)
    if request.command == "export":
        from commands.export import export

        return export(args.checkpoint, args.format, args.output, args.img_size, args.fixed_size)
    if request.command == "report":
        from commands.report import report

        return report(args.directories, args.output, args.epochs)
    num_workers = min(8, num_cores()) if args.num_workers is None else args.num_workers
    if request.command == "check-data":
        from commands.check_data import check_data

        return check_data(
            args.dataset_path, args.json, args.write_exclude, num_workers, args.include_noncam, args.mask_values
        )
    if request.command == "predict":
        from commands.predict import predict

        return predict(args, num_workers)
    if request.command == "compare":
        from commands.compare import compare

        return compare(args, num_workers)
    from commands.evaluate import evaluate

    return evaluate(args, num_workers)
