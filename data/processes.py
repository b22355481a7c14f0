"""Processes that work on files beside the main one."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor


def process_pool(num_processes: int) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to this one, and end with it however it ends.

    Forked on Linux: spawned ones would import the main script, torch included, to use NumPy and Pillow.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(num_processes, context, initializer=_begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about metadata and very large images: they are read all the same
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the main process was killed, this one would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
