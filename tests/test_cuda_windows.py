"""Windows on a CUDA device: no host sync, no copy from pageable memory, for every kind of network and option."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from conftest import Argv, prepare_run
from nullcuda.emulate import Emulation

from data.loading import training_loader
from data.synthetic import write_synthetic_dataset
from train_ultimate import begin_stage, train_epoch
from training.run import Run

pytestmark = [pytest.mark.rehearsal, pytest.mark.gpu]

BACKBONES = ("pvt_v2_b2", "resnet50", "tf_efficientnet_lite0", "convnext_tiny", "swin_tiny_patch4_window7_224",
             "vit_tiny_patch16_224")  # fmt: skip
OPTIONS = (
    "--zoom", "--multi-scale 0.5 1", "--gradient-checkpointing", "--augment-on device", "--no-channels-last",
    "--ema-decay 0", "--spike-policy off", "--checkpoint-every 1",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 8 images to train on."""
    root = tmp_path_factory.mktemp("data") / "two-windows"
    write_synthetic_dataset(root, num_train=9, num_test=1, img_size=64, seed=7)
    return root


@contextmanager
def host_syncs_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train_without_waiting(run: Run, emulation: Emulation | None) -> None:
    """Train one epoch of each stage. Only a stage's beginning, where weights are checked and copied, may wait."""
    for stage in run.stages:
        begin_stage(run, stage)
        loader = training_loader(
            run.data.train_pairs, run.settings.img_size, stage.batch_size, run.settings.seed, num_workers=0,
            pin_memory=True, window_size=run.data.window_size, augment_on_device=run.settings.augment_on == "device",
        )  # fmt: skip
        if emulation is not None:
            emulation.pageable["to device"].clear()
        run.state.progress.window = 0
        with host_syncs_are_errors():
            train_epoch(run, stage, loader)
        assert emulation is None or emulation.pageable["to device"] == []
        assert run.state.progress.window == len(run.data.train_pairs) // run.data.window_size
        assert not run.recovery.incidents.directory.exists()


def flags(dataset: Path, *extra: str) -> list[str]:
    return [
        *("--dataset-path", str(dataset), "--device", "cuda", "--batch-size", "2", "--accumulation-steps", "2"),
        *("--epochs", "2", "--stage1-epochs", "1", *extra),
    ]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_window_waits_for_the_device(
    backbone: str, precision: str, two_windows: Path, tiny_argv: Argv, arithmetic: Emulation | None
) -> None:
    argv = tiny_argv(*flags(two_windows, "--backbone", backbone, "--precision", precision))
    train_without_waiting(prepare_run(argv), arithmetic)


def test_frozen_levels_do_not_make_a_window_wait(
    two_windows: Path, tmp_path: Path, tiny_argv: Argv, arithmetic: Emulation | None
) -> None:
    pretrained = tmp_path / "resnet10t.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), pretrained)
    frozen = "--backbone", "resnet10t", "--frozen-levels", "1", "--backbone-weights", str(pretrained)
    train_without_waiting(prepare_run(tiny_argv(*flags(two_windows, *frozen, "--precision", "fp16"))), arithmetic)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_deterministic_algorithms_exist_for_all_it_does(
    precision: str, two_windows: Path, tiny_argv: Argv, arithmetic: Emulation | None
) -> None:
    extra = "--deterministic", "--backbone", "pvt_v2_b0", "--zoom", "--multi-scale", "0.5", "1", "--precision"
    try:
        train_without_waiting(prepare_run(tiny_argv(*flags(two_windows, *extra, precision))), arithmetic)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_option_makes_a_window_wait(
    options: str, two_windows: Path, tiny_argv: Argv, arithmetic: Emulation | None
) -> None:
    argv = tiny_argv(*flags(two_windows, "--backbone", "resnet10t", "--precision", "fp16", *options.split()))
    train_without_waiting(prepare_run(argv), arithmetic)
