"""Processes that work on files beside the main one."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_QUEUED_PER_PROCESS = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@contextmanager
def process_pool(num_processes: int, work: str, way_out: str) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to this one, and end with it however it ends.

    Forked on Linux: spawned ones would import the main script, torch included, to use NumPy and Pillow.

    Args:
        num_processes: at least 1.
        work: what they do, for the message: "reads images".
        way_out: what to do when one of them is killed.

    Raises:
        ValueError: one of them was killed while its result was waited for.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin)
    # Forked at the first task. A Ctrl-C amid that would be lost: Python swallows what is raised in a fork's callbacks.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool.submit(os.getpid)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield pool
    except BrokenProcessPool as error:
        killed = f"a process that {work} was killed, by the system if memory ran out"
        raise ValueError(f"{killed}; {way_out}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], num_processes: int, work: str, way_out: str
) -> Iterator[tuple[Item, Result]]:
    """Each item with what the function makes of it in another process, in order, few of them under way at a time.

    Args:
        function: at a module's top level.
        items: taken as there is room for them.
        num_processes: 0: this one.
        work, way_out: see ``process_pool``.
    """
    if num_processes == 0:
        yield from ((item, function(item)) for item in items)
        return
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    with process_pool(num_processes, work, way_out) as pool:
        for item in items:
            under_way.append((item, pool.submit(function, item)))
            if len(under_way) > _QUEUED_PER_PROCESS * num_processes:
                done, future = under_way.popleft()
                yield done, future.result()
        while under_way:
            done, future = under_way.popleft()
            yield done, future.result()


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees, for its next image, where the C library can be told so (glibc).

    Given back to the system, it returns a page at a time, each with a fault: a quarter of the time that scoring takes,
    a tenth of training's on a CPU.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it accepts
        library.mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    warnings.simplefilter("ignore")  # Pillow's, about metadata and very large images: they are read all the same
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Where the main process was killed, this one would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def num_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """That this program may use: those it is bound to, or fewer where a container limits its share of their time.

    On a host with 64 cores, threads for all of them in a container with the time of two would wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups of version 2, and 1
        with suppress(OSError, ValueError):
            quota, period = (int(number) for name in files for number in (cgroups / name).read_text().split())
            if quota > 0 and period > 0:
                cores = min(cores, max(1, -(-quota // period)))
    return cores


def default_num_workers() -> int:
    """One process for each core but one, at most eight; of this rank's cores, where torchrun has started several here.

    Of the machine, so never saved.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, num_cores() // ranks_here - 1))
