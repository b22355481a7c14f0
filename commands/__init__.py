"""Commands other than training. Each is a module; only the one that is asked for is imported, and torch only by those
that need it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cli


def run(argv: Sequence[str] | None = None) -> int | None:
    """Run the command; its exit code, or None for ``train`` and ``demo``, which are the caller's.

    Answers mistakes in the command line of those two as well: exit code 2, one line on stderr.
    """
    try:
        args = cli.parse(argv)
        return None if args.command in ("train", "demo") else _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "replay":
        from commands.replay import replay

        return replay(Path(args.incident), args.device)
    num_workers = min(8, cli.num_cores()) if args.num_workers is None else args.num_workers
    if args.command == "check-data":
        from commands.check_data import check_data

        return check_data(args.dataset_path, args.json, args.write_exclude, num_workers, args.include_noncam)
    from commands.evaluate import evaluate

    return evaluate(args, num_workers)
