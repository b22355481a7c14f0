"""Notice when another process of the run has gone: every rank beats, and watches the next one."""

import hashlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from runtime.files import first_line

LONGEST_WAIT = timedelta(minutes=30)  # of ranks that answer, for one another: while one builds a cache, say

_BEAT = 1.0  # seconds


def meet(store: dist.Store, rank: int, size: int, name: str) -> tuple[str, list[str]]:
    """Wait for all ranks that are started now; returns what no other gathering of ranks is called, and their names.

    The launcher's store outlives processes, with all that they wrote, and how often it has started them again each
    node counts for itself. So ranks write down a number drawn afresh, the first one lists those it finds, and a list
    counts when every rank has found its own in it: before that, some are of processes that have gone.

    Args:
        store: of keys and values, shared by all ranks, of any past.
        rank: of this process.
        size: number of ranks.
        name: of this one, for people.

    Raises:
        RuntimeError: not all of them come.
    """
    drawn, listed = f"{uuid.uuid4().hex} {name}", [f"drawn {other}" for other in range(size)]
    store.set(listed[rank], drawn)
    deadline = time.monotonic() + LONGEST_WAIT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0 and store.check(listed):
            store.set("gathering", "\n".join(written.decode() for written in store.multi_get(listed)))
        here = store.get("gathering").decode().split("\n") if store.check(["gathering"]) else []
        if len(here) == size and here[rank] == drawn:
            gathering = hashlib.sha256("\n".join(here).encode()).hexdigest()[:16]
            store.set(f"found {gathering} {rank}", "")
            if rank == 0 and store.check([f"found {gathering} {other}" for other in range(size)]):
                store.set(f"complete {gathering}", "")
            if store.check([f"complete {gathering}"]):
                return gathering, [written.partition(" ")[2] for written in here]
        time.sleep(0.1)
    raise RuntimeError(f"not all of {size} ranks came")


class Heartbeat:
    """A thread of each rank that tells the others it is alive, and ends this process when one of them is not.

    Every rank watches the next one; who finds it silent raises an alarm that all see. So a beat costs each rank three
    small messages to the launcher's store, however many ranks there are. A process that waits for the others is alive;
    one that is stopped, or whose machine or link is gone, is not, and the rest would wait for it for ever.

    Args:
        store: of keys and values, shared by all ranks.
        rank: of this process.
        names: of all ranks, for people.
        patience: seconds of silence after which a rank is given up.
    """

    def __init__(self, store: dist.Store, rank: int, names: Sequence[str], patience: float) -> None:
        self._store = store
        self._rank = rank
        self._names = names
        self._patience = patience
        self._beats = 0
        self._ended = threading.Event()
        self._reached_at = time.monotonic()
        self._store.set(str(rank), "0")
        for target in (self._beat, self._watch_store):
            threading.Thread(target=target, name="heartbeat", daemon=True).start()

    def stop(self, done: bool) -> None:
        """Fall silent for good. Where the run is ``done``, nobody is to wonder why."""
        self._ended.set()
        if done:
            with suppress(RuntimeError):  # the store may have gone before, with the launcher or the first rank
                self._store.set(str(self._rank), "done")

    def lost(self) -> str:
        """The ranks that do not beat, by looking twice; "" for none."""
        keys = [str(rank) for rank in range(len(self._names))]
        try:
            before = self._store.multi_get(keys)
            time.sleep(3 * _BEAT)
            after = self._store.multi_get(keys)
        except RuntimeError as error:
            return f"the launcher's store cannot be reached ({first_line(error)[:200]})"
        silent = [rank for rank, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) == 1]
        return ", ".join(self._names[rank] for rank in silent if rank != self._rank)

    def _beat(self) -> None:
        watched = (self._rank + 1) % len(self._names)
        last_beat, heard_at = b"", time.monotonic()
        while not self._ended.wait(_BEAT):
            self._beats += 1
            try:
                self._store.set(str(self._rank), str(self._beats))
                if self._store.check(["alarm"]):
                    self._give_up(self._store.get("alarm").decode())
                beat = self._store.get(str(watched)) if self._store.check([str(watched)]) else b""
                now = self._reached_at = time.monotonic()
                if beat != last_beat or beat == b"done":
                    last_beat, heard_at = beat, now
                elif now - heard_at > self._patience:
                    alarm = f"{self._names[watched]} has been silent for {now - heard_at:.0f} s"
                    self._store.set("alarm", alarm)
                    self._give_up(alarm)
            except RuntimeError:  # see below
                continue

    def _watch_store(self) -> None:
        """A store that is gone, or behind a link that is, can keep the other thread for ever."""
        while not self._ended.wait(_BEAT):
            silence = time.monotonic() - self._reached_at
            if silence > self._patience:
                self._give_up(f"the launcher's store has not answered for {silence:.0f} s")

    def _give_up(self, reason: str) -> None:
        """End this process, whose main thread may be waiting in a library for what will never come."""
        if not self._ended.is_set():
            print(
                f"error: {reason}; rank {self._rank} ends, too. Go on with --resume auto; torchrun does by "
                "itself, with --max-restarts",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)
