"""Subcommands, one module each. Only the one asked for is imported, and torch only by those that need it."""

import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from commands import cli
from commands.output import print_error, print_lines
from data.processes import num_cores
from runtime import console
from training.settings import Settings, UsageError

T = TypeVar("T")


def begin() -> None:
    """Set up signals and streams of a process of this program."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # None if it was closed
        sys.stdout.reconfigure(line_buffering=True)  # a redirected log can be read as it grows


def answer(argv: Sequence[str] | None = None) -> int | cli.Request:
    """Parse the command line, once a process, and run the command unless it is ``train`` or ``demo``.

    Returns:
        the exit code; or for those two, the request. Their mistakes that need no checkpoint are reported here, before
        torch is imported, which takes seconds.
    """

    def run() -> int | cli.Request:
        request = cli.parse(argv)
        if not request.trains:
            with console.configured():
                return _run(request)
        if request.given.get("resume") is None:  # else the checkpoint has settings too
            Settings.resolve(request.given, preset=request.preset)
        return request

    return attempt(run)


def attempt(call: Callable[[], T]) -> T | int:
    """Return the call's result. If a user's mistake or Ctrl-C ends it, print one line and return the exit code."""
    try:
        return call()
    except (ValueError, OSError) as error:
        # All ranks parse the same command line; other errors of one rank have no text on the others.
        reported_by_rank_0 = os.environ.get("RANK", "0") != "0" and (isinstance(error, UsageError) or not str(error))
        if not reported_by_rank_0:
            print_error(str(error))
        return 2
    except KeyboardInterrupt:
        print_lines(["interrupted"], to_stderr=True)
        return 130


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

        return check_data(args.dataset_path, args.json, args.write_exclude, num_workers, args.include_noncam)
    if request.command == "predict":
        from commands.predict import predict

        return predict(args, num_workers)
    from commands.evaluate import evaluate

    return evaluate(args, num_workers)
