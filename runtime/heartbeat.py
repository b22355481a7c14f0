"""Detection of ranks that have gone: every rank beats, and watches the next one."""

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

from runtime.console import write_line
from runtime.files import first_line

LONGEST_WAIT = timedelta(minutes=30)  # for a rank that beats, for example while it builds a cache

_BEAT = 1.0  # seconds


def meet(store: dist.Store, rank: int, size: int, name: str) -> tuple[str, list[str]]:
    """Wait for all ranks of this start. Return an identifier that no other start has, and the ranks' names.

    The launcher's store outlives processes and keeps what they wrote, and every node counts restarts by itself. So each
    rank writes a fresh random number, rank 0 lists those it finds, and the list counts once every rank has found its
    own number in it: before that, some numbers are left from processes that have gone.

    Args:
        store: key-value store that all ranks share; it may hold keys of earlier starts.
        rank: number of this process.
        size: number of ranks.
        name: this rank's name in messages.

    Raises:
        RuntimeError: Some ranks did not come.
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
    """Threads that show the other ranks that this one is alive, and end this process if one of the others is not.

    Every rank watches the next one; if that falls silent, it raises an alarm that all ranks see. So a beat costs each
    rank three small messages to the launcher's store, however many ranks there are. A process that waits for the others
    is alive. One that is stopped, or whose machine or link has gone, is not, and the rest would wait for it forever.

    Args:
        store: key-value store that all ranks share.
        rank: number of this process.
        names: names of all ranks in messages.
        patience: seconds of silence after which a rank counts as lost.
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
        """Stop beating and watching. If the run is ``done``, the others see it and raise no alarm."""
        self._ended.set()
        if done:
            with suppress(RuntimeError):  # the store may have gone already, with the launcher or rank 0
                self._store.set(str(self._rank), "done")

    def lost(self) -> str:
        """Return the names of ranks that do not beat between two looks, 3 s apart; "" if all do."""
        keys = [str(rank) for rank in range(len(self._names))]
        try:
            before = self._store.multi_get(keys)
            time.sleep(3 * _BEAT)
            after = self._store.multi_get(keys)
        except RuntimeError as error:
            return f"the launcher's store cannot be reached ({first_line(error)})"
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
                    self._end_process(self._store.get("alarm").decode())
                beat = self._store.get(str(watched)) if self._store.check([str(watched)]) else b""
                now = self._reached_at = time.monotonic()
                if beat != last_beat or beat == b"done":
                    last_beat, heard_at = beat, now
                elif now - heard_at > self._patience:
                    alarm = f"{self._names[watched]} has been silent for {now - heard_at:.0f} s"
                    self._store.set("alarm", alarm)
                    self._end_process(alarm)
            except RuntimeError:  # the store does not answer: see ``_watch_store``
                continue

    def _watch_store(self) -> None:
        """End this process if the store has gone, which can block the other thread forever."""
        while not self._ended.wait(_BEAT):
            silence = time.monotonic() - self._reached_at
            if silence > self._patience:
                self._end_process(f"the launcher's store has not answered for {silence:.0f} s")

    def _end_process(self, reason: str) -> None:
        """End this process at once: its main thread may be blocked in a library."""
        if not self._ended.is_set():
            advice = "Go on with --resume auto; torchrun does so by itself, with --max-restarts"
            write_line(sys.stderr, f"error: {reason}; rank {self._rank} ends, too. {advice}")  # every rank reports it
            os._exit(1)
