"""Memory of a CUDA device: as much of a window at once as fits, halves after that, and an end with a way out."""

import gc
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nullcuda
import pytest
import torch
from conftest import ROOT, Argv, prepare_run, train
from nullcuda.emulate import Emulation
from torch import Tensor

from benchmarks.device_memory import GB, PRESETS, peak
from data.dataset import Batch
from data.loading import training_loader
from data.synthetic import write_synthetic_dataset
from losses import deep_supervision_loss
from runtime.checkpoint import read_checkpoint
from runtime.machine import Precision
from train_ultimate import begin_stage, train_epoch
from training.run import Run
from training.window import Window

pytestmark = [pytest.mark.rehearsal, pytest.mark.gpu]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 16 images to train on."""
    root = tmp_path_factory.mktemp("data") / "sixteen"
    write_synthetic_dataset(root, num_train=18, num_test=1, img_size=128, seed=7)
    return root


@pytest.fixture
def argv(dataset: Path, tiny_argv: Argv) -> Argv:
    """Windows of 2 x 4 images of 128 px; the decoder's layers and the frozen backbone's do not use batch statistics."""

    def build(*extra: str, checkpoint_dir: Path | None = None) -> list[str]:
        flags = (
            *("--dataset-path", str(dataset), "--device", "cuda", "--img-size", "128", "--precision", "bf16"),
            *("--batch-size", "2", "--accumulation-steps", "4", "--epochs", "1", "--stage1-epochs", "1", *extra),
        )
        return tiny_argv(*flags) if checkpoint_dir is None else tiny_argv(*flags, checkpoint_dir=checkpoint_dir)

    return build


@contextmanager
def memory_limited_to(size: int) -> Iterator[None]:
    """Let the device have no more memory than this: a GPU by torch's own limit, a null one by its runtime's."""
    total = torch.cuda.get_device_properties(0).total_memory
    if nullcuda.is_active():
        nullcuda.Runtime().set_memory(size)
    else:
        torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        if nullcuda.is_active():
            nullcuda.Runtime().set_memory(total)
        else:
            torch.cuda.set_per_process_memory_fraction(1.0)


def begun(argv: Sequence[str], **parts: object) -> Run:
    run = prepare_run(argv, **parts)
    begin_stage(run, run.stages[0])
    return run


def forget() -> None:
    """Free what earlier runs of the test have left on the device."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def needed_for(argv: Sequence[str]) -> int:
    """Return the bytes that a run reserves until its first window."""
    forget()
    begun(argv)
    needed = torch.cuda.max_memory_reserved()
    forget()
    return needed


def train_first_epoch(run: Run) -> list[Window]:
    """Train an epoch, and return its windows as they were run."""
    windows: list[Window] = []
    backward = run.runner.backward

    def noted(model: torch.nn.Module, window: Window, guard: object) -> tuple[Window, Tensor]:
        window, loss = backward(model, window, guard)  # type: ignore[arg-type]
        windows.append(window)
        return window, loss

    run.runner.backward = noted  # type: ignore[method-assign]
    loader = training_loader(
        run.data.train_pairs, run.settings.img_size, run.runner.batch_size, run.settings.seed, num_workers=0,
        pin_memory=True, window_size=run.data.window_size,
    )  # fmt: skip
    train_epoch(run, run.stages[0], loader)
    return windows


def batches_of(windows: Sequence[Window]) -> list[Batch]:
    return [batch for window in windows for batch in window.batches]


def test_a_window_becomes_one_batch_if_it_fits(
    argv: Argv, arithmetic: Emulation | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    run = begun(argv())
    assert run.runner.batch_size == 8
    assert "Batches of 8 images: as many of a step's as fit into the GPU's memory" in caplog.text
    assert [len(batch.images) for batch in batches_of(train_first_epoch(run))] == [8, 8]


def test_batches_become_as_large_as_fits_and_a_resumed_run_keeps_them(
    argv: Argv, tmp_path: Path, arithmetic: Emulation | None
) -> None:
    whole = needed_for(argv(checkpoint_dir=tmp_path / "first"))
    with memory_limited_to(whole - 2**20):
        assert train(argv("--checkpoint-every", "1")) == 0
    config = read_checkpoint(tmp_path / "run/epoch_0001.pth")["config"]
    assert config["batches"] == [4, 1]
    resumed = prepare_run(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run"), "--epochs", "2"])
    assert (resumed.runner.batch_size, resumed.runner.num_parts) == (4, 1)


def test_batches_of_layers_that_use_their_statistics_stay_as_asked_for(
    argv: Argv, arithmetic: Emulation | None
) -> None:
    run = prepare_run(argv("--stage1-epochs", "0"))  # stage 2, untrained: BatchNorm learns
    begin_stage(run, run.stages[0])
    assert run.runner.batch_size == 2


def test_batches_that_were_halved_are_pinned_and_add_up_to_the_same_gradient(
    argv: Argv, tmp_path: Path, arithmetic: Emulation | None
) -> None:
    """The device fills up after the trial, as it does when another process takes memory."""
    losses = {}
    for is_full in (False, True):
        run = begun(argv("--precision", "fp32", checkpoint_dir=tmp_path / str(is_full)))
        forget()
        kept = [torch.empty(2**20, dtype=torch.uint8, device="cuda")]
        if is_full:
            with memory_limited_to(torch.cuda.memory_reserved() + 24 * 2**20):
                windows = train_first_epoch(run)
            assert run.runner.num_parts > 1
            assert {len(batch.images) for batch in batches_of(windows)} < {1, 2, 4}
            assert [window.num_samples for window in windows] == [8, 8]
        else:
            windows = train_first_epoch(run)
        assert all(batch.images.is_pinned() and batch.masks.is_pinned() for batch in batches_of(windows))
        losses[is_full] = run.state.epoch_stats.loss
        del kept
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: out of memory",
    ],
)
def test_libraries_that_run_out_of_memory_halve_the_batches_too(
    message: str, argv: Argv, arithmetic: Emulation | None
) -> None:
    def loss(side_logits: Sequence[Tensor], masks: Tensor, weight: Tensor) -> Tensor:
        if len(masks) > 4:
            raise RuntimeError(message)
        return deep_supervision_loss(side_logits, masks, weight)

    run = begun(argv(), loss=loss)
    assert run.runner.batch_size == 4
    assert [len(batch.images) for batch in batches_of(train_first_epoch(run))] == [4, 4, 4, 4]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_gpu_that_others_have_filled_is_reported_in_one_line(
    command: str, argv: Argv, finished: Path, tiny_dataset: Path, arithmetic: Emulation | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before the first window, there is nothing to halve."""
    score = ["evaluate", "--checkpoint", str(finished / "best_model.pth"), "--dataset-path", str(tiny_dataset)]
    forget()
    with memory_limited_to(torch.cuda.memory_reserved()):
        assert train(argv() if command == "train" else [*score, "--device", "cuda", "--num-workers", "0"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: the GPU cannot be used: CUDA out of memory")
    assert "nvidia-smi" in line


def test_one_image_that_does_not_fit_ends_the_run_with_what_to_do(
    argv: Argv, arithmetic: Emulation | None, capsys: pytest.CaptureFixture[str]
) -> None:
    forget()
    with memory_limited_to(torch.cuda.memory_reserved() + 24 * 2**20):
        assert train(argv("--img-size", "512")) == 1
    err = capsys.readouterr().err
    assert "out of memory with the smallest batches; --gradient-checkpointing" in err
    assert "saved " in err


@pytest.mark.skipif(not nullcuda.is_active(), reason="the README's figures are a null device's: -m rehearsal")
def test_memory_of_the_readmes_presets_is_what_torch_allocates() -> None:
    """Within 5 %, cuDNN's workspaces aside; docs/gpu.md has what a GPU measured."""
    rows = re.findall(r"^\| GPU, (\d+ GB) \| `([^`]+)` \| ([\d.]+) GB \|$", (ROOT / "README.md").read_text(), re.M)
    assert {name: sorted(flags.split()) for name, flags, _ in rows} == {
        name: sorted(flags.split()) for name, flags in PRESETS.items()
    }
    with memory_limited_to(80 * 10**9), Emulation(computes=False):
        for _, flags, gigabytes in rows:
            assert peak(flags, Precision("bf16", "cuda")) / GB == pytest.approx(float(gigabytes), rel=0.05), flags
