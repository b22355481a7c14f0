"""Commands other than training. Each is a module; only the one that is asked for is imported, and torch only by those
that need it.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from commands import cli
from data.processes import num_cores
from training.settings import check

T = TypeVar("T")


def begin() -> None:
    """What a process of this program starts with."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # none where it was closed
        sys.stdout.reconfigure(line_buffering=True)  # a redirected log is to be read as it grows


def run(argv: Sequence[str] | None = None) -> int | None:
    """Run the command; its exit code, or None for ``train`` and ``demo``, which are the caller's.

    Mistakes in the command line of those two are answered here, too.
    """
    return attempt(lambda: _run(cli.parse(argv)))


def attempt(call: Callable[[], T]) -> T | int:
    """What the call returns; where a user's mistake or Ctrl-C ends it, one line on stderr and the exit code."""
    try:
        return call()
    except (ValueError, OSError) as error:
        told_by_another = os.environ.get("RANK", "0") != "0" and (isinstance(error, cli.UsageError) or not str(error))
        if not told_by_another:  # of the processes that PyTorch's launcher starts, all parse the same command line
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int | None:
    if args.command in ("train", "demo"):
        if args.resume is None:  # else the checkpoint has settings, too
            check(args)
        return None
    if args.command == "replay":
        from commands.replay import replay

        return replay(Path(args.incident), args.device)
    if args.command == "export":
        from commands.export import export

        return export(args.checkpoint, args.format, args.output, args.img_size, args.fixed_size)
    if args.command == "report":
        from commands.report import report

        return report(args.directories, args.output, args.epochs)
    num_workers = min(8, num_cores()) if args.num_workers is None else args.num_workers
    if args.command == "check-data":
        from commands.check_data import check_data

        return check_data(args.dataset_path, args.json, args.write_exclude, num_workers, args.include_noncam)
    if args.command == "predict":
        from commands.predict import predict

        return predict(args, num_workers)
    from commands.evaluate import evaluate

    return evaluate(args, num_workers)
