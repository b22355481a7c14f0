"""Loaders: the same batches whatever the workers, and processes that leave signals to the main one."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from data.layouts import Pair, find_subsets, training_pairs
from data.loading import (
    batches_of,
    begin_loader_process,
    to_device,
    training_loader,
    validation_loader,
    windows,
    workers_that_fit,
)
from data.unreadable import UnreadableDataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pairs(tiny_dataset: Path) -> list[Pair]:
    return training_pairs(find_subsets(tiny_dataset), tiny_dataset)


def test_batches_are_the_same_for_any_number_of_workers(pairs: list[Pair]) -> None:
    def epoch(num_workers: int) -> list[list[tuple[torch.Tensor, ...]]]:
        loader = training_loader(
            pairs, 64, batch_size=4, seed=5, num_workers=num_workers, pin_memory=False, window_size=8
        )
        return [[batch[:3] for batch in window] for window in windows(loader, epoch=3, first_window=1)]

    expected = epoch(0)
    assert len(expected) == 2  # 22 samples: 6 batches, 3 windows, the first one skipped
    for num_workers in (1, 2):
        for window, reference in zip(epoch(num_workers), expected, strict=True):
            for batch, expected_batch in zip(window, reference, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(batch, expected_batch, strict=True))


def test_last_window_has_the_remaining_samples(pairs: list[Pair]) -> None:
    loader = training_loader(pairs, 64, batch_size=4, seed=5, num_workers=0, pin_memory=False, window_size=16)
    sizes = [[len(batch.indices) for batch in window] for window in windows(loader, epoch=0, first_window=0)]
    assert sizes == [[4, 4, 4, 4], [4, 2]]


def test_iterating_does_not_touch_the_global_generator(pairs: list[Pair]) -> None:
    """Otherwise the dropout of a resumed run would depend on how often the run had been interrupted."""
    loader = training_loader(pairs, 64, batch_size=4, seed=5, num_workers=0, pin_memory=False)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for _ in range(2):
        list(windows(loader, epoch=0, first_window=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_reads_every_pair_once_in_order(pairs: list[Pair]) -> None:
    loader = validation_loader(pairs, 64, batch_size=5, num_workers=0, pin_memory=False)
    for _ in range(2):
        assert torch.cat([batch.indices for batch in loader]).tolist() == list(range(len(pairs)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_replaced_raises_an_error_with_its_path(
    pairs: list[Pair], tmp_path: Path, num_workers: int
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pairs[0].image.read_bytes()[:300])
    broken_pairs = [Pair(broken, pair.mask) for pair in pairs[:4]]
    loader = training_loader(broken_pairs, 64, 2, 0, num_workers, pin_memory=False)
    with pytest.raises(
        UnreadableDataError, match=r"broken\.jpg.*none of 3 other images.*check that the disk is still there"
    ):
        next(windows(loader, epoch=0, first_window=0))


def test_to_device_scales_to_unit_range(pairs: list[Pair]) -> None:
    batch = next(iter(validation_loader(pairs, 64, 2, 0, pin_memory=False)))
    images, masks = to_device(batch, torch.device("cpu"), torch.channels_last)
    assert images.dtype == masks.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.mul(255).round().to(torch.uint8), batch.images)
    assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_a_signal_at_the_start_of_a_loader_process_does_not_end_it(tiny_dataset: Path) -> None:
    """``timeout`` and Slurm signal the whole process group, perhaps just as an epoch begins."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from data.layouts import find_subsets
from data.loading import training_loader, windows
pairs = [pair for subset in find_subsets(Path({str(tiny_dataset)!r})) for pair in subset.pairs]
loader = training_loader(pairs, 64, 2, 0, num_workers=1, pin_memory=False)
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
assert sum(len(batch.images) for window in windows(loader, 0, 0) for batch in window) == len(pairs)
del loader  # ends its processes
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


class Slow(Dataset[int]):
    """A dataset whose reads take as many seconds as their index."""

    def __getitem__(self, index: float) -> int:
        time.sleep(index)
        return 0


def work_until_a_read_hangs(seconds: float, between_reads: Any) -> None:
    """Be a loader process that gets SIGTERM, reads without a pause, has nothing to do, and then reads from a dead disk.

    Args:
        seconds: length of each of the first two phases.
        between_reads: event to set when they are over.
    """
    begin_loader_process(0, patience=0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        Slow()[0.01]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
    between_reads.set()
    Slow()[60]


def test_loader_process_outlives_a_signal_until_a_read_hangs() -> None:
    """A window may take longer than its patience, and need more batches."""
    context = multiprocessing.get_context("fork")
    between_reads = context.Event()
    process = context.Process(target=work_until_a_read_hangs, args=(1.3, between_reads))  # two alarms each
    process.start()
    process.join(20)
    assert between_reads.is_set()
    assert process.exitcode == 1


def all_batches(pairs: list[Pair], num_workers: int, kill_before: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Images of an epoch's batches; before some of the windows, a worker process is killed."""
    loader = training_loader(pairs, 64, batch_size=2, seed=5, num_workers=num_workers, pin_memory=False, window_size=4)
    images = []
    for number, window in enumerate(windows(loader, epoch=0, first_window=0)):
        images += [batch.images for batch in window]
        if number in kill_before:
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined, union-attr]
    return images


@pytest.mark.slow
def test_the_death_of_a_worker_costs_no_batch_and_changes_none(
    pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    killed = all_batches(pairs, num_workers=1, kill_before=(0, 2))
    undisturbed = all_batches(pairs, num_workers=0)
    assert len(killed) == len(undisturbed) == 11
    assert all(torch.equal(a, b) for a, b in zip(killed, undisturbed, strict=True))
    assert caplog.text.count("a loader process died") >= 1
    assert "starts again at the same window" in caplog.text


def test_validation_reads_again_what_a_dead_worker_took_with_it(pairs: list[Pair]) -> None:
    loader = validation_loader(pairs, 64, batch_size=2, num_workers=1, pin_memory=False)
    indices = []
    for number, batch in enumerate(batches_of(loader)):
        indices += batch.indices.tolist()
        if number == 1:
            os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined, union-attr]
    assert indices == list(range(len(pairs)))


LOAD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from data.layouts import find_subsets, training_pairs
from data.loading import training_loader, windows
root = Path({dataset!r})
pairs = training_pairs(find_subsets(root), root)
loader = training_loader(pairs, 64, batch_size=4, seed=5, num_workers=2, pin_memory=False, window_size=8)
print(sum(len(batch.indices) for window in windows(loader, 0, 0) for batch in window), loader.num_workers)
"""


def load_elsewhere(dataset: Path, *prefix: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    program = LOAD.format(root=str(ROOT), dataset=str(dataset))
    return subprocess.run(
        [*prefix, sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_tmpdir_too_long_for_sockets_costs_the_workers_and_nothing_else(tiny_dataset: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    result = load_elsewhere(tiny_dataset, TMPDIR=str(long))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["22", "0"]
    assert "a shorter TMPDIR" in result.stderr


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="mounts a small /dev/shm: needs root")
def test_a_shared_memory_too_small_for_a_batch_costs_the_workers_and_nothing_else(tiny_dataset: Path) -> None:
    mount = 'mount -t tmpfs -o size=40k tmpfs /dev/shm && exec "$@"'
    result = load_elsewhere(tiny_dataset, "unshare", "--mount", "sh", "-c", mount, "sh")
    if "mount:" in result.stderr:
        pytest.skip("no mounts here")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["22", "0"]
    assert "/dev/shm more room" in result.stderr


def test_workers_are_as_many_as_shared_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batch = 4 * 384**2 * 8
    for free, expected in ((2**40, 8), (20 * batch, 8), (10 * batch, 3), (batch, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        caplog.clear()
        assert workers_that_fit(8, img_size=384, batch_size=8, batches_per_window=1) == expected
        assert ("--shm-size" in caplog.text) == (expected < 8)
