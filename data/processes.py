"""Worker processes beside the main one: how many, how they start and end, and how they keep the memory they free."""

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


def num_cores(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores this program may use: its CPU affinity, or a container's CPU limit if that is lower.

    On a host with 64 cores, 64 threads in a container limited to two cores' time would wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroups of version 2, and 1
        with suppress(OSError, ValueError):
            quota, period = (int(number) for name in files for number in (cgroups / name).read_text().split())
            if quota > 0 and period > 0:
                cores = min(cores, max(1, -(-quota // period)))
    return cores


def default_num_workers(cores: int | None = None) -> int:
    """Return this rank's share of the machine's cores, less one, between 1 and 8.

    It depends on the machine, so it is never saved with a run's settings.

    Args:
        cores: cores that all ranks here may use; None for ``num_cores()``.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return min(8, max(1, (num_cores() if cores is None else cores) // ranks_here - 1))


@contextmanager
def process_pool(num_processes: int, work: str, way_out: str, fresh: bool = False) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes that ignore Ctrl-C and end with this process, however it ends.

    They are forked on Linux: spawned ones would import the main script, torch included, to use NumPy and Pillow.

    Args:
        num_processes: at least 1.
        work: what they do, for the error message: "reads images".
        way_out: what the user can do if one of them is killed.
        fresh: spawn them all the same: they train, and their memory is to be measured.

    Raises:
        ValueError: a process was killed before its result arrived.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" and not fresh else "spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin)
    # The first task forks. A Ctrl-C during a fork would be lost: Python swallows what its callbacks raise.
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
    """Yield each item with the function's result for it, in order, a few items ahead.

    Args:
        function: defined at a module's top level.
        items: consumed as results are taken.
        num_processes: processes to compute in; 0 computes in this one.
        work, way_out: see ``process_pool``.
    """
    if num_processes == 0:
        yield from ((item, function(item)) for item in items)
        return
    queued: deque[tuple[Item, Future[Result]]] = deque()
    with process_pool(num_processes, work, way_out) as pool:
        for item in items:
            queued.append((item, pool.submit(function, item)))
            if len(queued) > _QUEUED_PER_PROCESS * num_processes:
                done, future = queued.popleft()
                yield done, future.result()
        while queued:
            done, future = queued.popleft()
            yield done, future.result()


def keep_freed_memory() -> None:
    """Have this process keep freed memory for its next image, if the C library has that option (glibc).

    Memory returned to the system comes back one page fault at a time: a quarter of the time that scoring takes, a tenth
    of training's on a CPU.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest value it accepts
        library.mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    warnings.simplefilter("ignore")  # Pillow's, about metadata and very large images, which it reads all the same
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the main process is gone: otherwise this one would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
