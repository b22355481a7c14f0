"""Loaders: the same batches whatever the workers, and processes that leave signals to the main one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.layouts import Pair, find_subsets, training_pairs
from data.loading import to_device, training_loader, validation_loader, windows
from data.unreadable import UnreadableDataError


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
