"""A CUDA device against the CPU, and what only a GPU can tell; its figures go to docs/gpu.md.

python -m pytest -m gpu
"""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import nullcuda
import pytest
import torch
from conftest import ROOT, Argv, prepare_run, train
from nullcuda.emulate import Emulation
from torch import Tensor, nn
from windows import batch

from benchmarks.device_memory import GB, OTHERS, PRESETS, peak
from data.loading import to_device, training_loader
from models import CamouflageSegmenter
from models.network import NetworkSettings, build_network
from runtime.machine import Precision, PrecisionName, ScalerSettings, on_device
from train_ultimate import begin_stage, train_epoch
from training.window import Window, accumulate_gradients

pytestmark = pytest.mark.gpu
gpu_only = pytest.mark.skipif(
    nullcuda.is_active() or not torch.cuda.is_available(), reason="needs a GPU: a null one has no speed"
)


@pytest.fixture(scope="module")
def note() -> Iterator[Callable[[str, str], None]]:
    """A function that notes a figure for docs/gpu.md, which is written when all tests have run on a GPU."""
    figures: list[tuple[str, str]] = []
    yield lambda name, value: figures.append((name, value))
    if figures and not nullcuda.is_active():
        rows = "\n".join(f"| {name} | {value} |" for name, value in figures)
        machine = (
            f"{torch.cuda.get_device_name()}, {platform.processor() or platform.machine()}, torch {torch.__version__}"
        )
        (ROOT / "docs/gpu.md").write_text(
            f"# On a GPU\n\n`python -m pytest -m gpu`, {date.today()}: {machine}.\n\n| | |\n|---|---|\n{rows}\n"
        )


def loss_and_gradients(model: nn.Module, precision: PrecisionName, device: str) -> tuple[float, Tensor]:
    """Return a window's loss, and all its gradients as one vector on the CPU."""
    computed = Precision(precision, device)
    window = Window(
        number=0, global_number=1, batches=[batch(0, 4, 64)], lr=0.0, uncertainty_weight=0.5, precision=computed,
        scaler=computed.new_scaler(ScalerSettings(init_scale=16.0)), memory_format=torch.channels_last, seed=5,
    )  # fmt: skip
    model = on_device(model, torch.device(device), torch.channels_last).train()
    model.zero_grad(set_to_none=True)
    loss = accumulate_gradients(model, window).item()
    scale = 16.0 if precision == "fp16" else 1.0
    gradients = [
        parameter.grad.flatten().cpu() / scale for parameter in model.parameters() if parameter.grad is not None
    ]
    return loss, torch.cat(gradients)


def network(backbone: str) -> CamouflageSegmenter:
    """Return a network whose normalisation statistics are fixed, as a pretrained one's are."""
    torch.manual_seed(0)
    return build_network(NetworkSettings(backbone, decoder_channels=16, img_size=64))


@pytest.mark.rehearsal
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.2), ("fp16", 0.1)])
@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "resnet10t", "tf_efficientnet_lite0", "convnext_atto"])
def test_loss_and_gradients_are_those_of_a_cpu_in_float32(
    backbone: str, precision: PrecisionName, tolerance: float, arithmetic: Emulation | None
) -> None:
    """Tolerances are relative to the gradient's norm: bf16 keeps 8 bits of each product, fp16 11."""
    expected_loss, expected = loss_and_gradients(network(backbone), "fp32", "cpu")
    loss, gradients = loss_and_gradients(network(backbone), precision, "cuda")
    assert loss == pytest.approx(expected_loss, rel=tolerance / 10)
    assert (gradients - expected).norm() <= tolerance * expected.norm()


@pytest.mark.rehearsal
def test_augmentation_on_the_device_is_that_of_the_loader(tiny_argv: Argv, arithmetic: Emulation | None) -> None:
    run = prepare_run(tiny_argv("--device", "cuda"))
    shown = {}
    for on_device_ in (False, True):
        loader = training_loader(
            run.data.train_pairs, 64, 8, seed=3, num_workers=0, pin_memory=True, augment_on_device=on_device_
        )
        shown[on_device_] = [
            tensor.cpu() for tensor in to_device(next(iter(loader)), run.machine.device, torch.channels_last)
        ]
    images, masks = zip(shown[False], shown[True], strict=True)
    assert ((images[0] - images[1]).abs() > 0.02).float().mean() < 0.01  # a grey level is 0.017 of a standard deviation
    assert torch.equal(*masks)


@gpu_only
def test_save_returns_while_the_device_is_busy(tiny_argv: Argv, note: Callable[[str, str], None]) -> None:
    run = prepare_run(tiny_argv("--device", "cuda", "--precision", "fp16"))
    begin_stage(run, run.stages[0])
    run.save_step()
    run.folder.store.wait()  # its memory is pinned now
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    begun = time.perf_counter()
    path = run.save_step()
    returned = time.perf_counter() - begun
    torch.cuda.synchronize()
    busy = time.perf_counter() - begun
    run.folder.store.wait()
    assert path.exists()
    assert returned < busy / 2
    note("a save returns after, while the device is busy", f"{1000 * returned:.1f} ms of {1000 * busy:.0f}")


@gpu_only
def test_memory_does_not_grow(tiny_argv: Argv) -> None:
    run = prepare_run(
        tiny_argv("--device", "cuda", "--epochs", "30", "--stage1-epochs", "30", "--multi-scale", "0.5", "1")
    )
    stage = run.stages[0]
    begin_stage(run, stage)
    loader = training_loader(
        run.data.train_pairs, 64, run.runner.batch_size, 0, num_workers=0, pin_memory=True,
        window_size=run.data.window_size,
    )  # fmt: skip
    reserved = []
    for epoch in range(30):
        run.state.progress.epoch, run.state.progress.window = epoch, 0
        train_epoch(run, stage, loader)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved) == max(reserved[:10])


@gpu_only
def test_memory_of_the_readmes_presets(note: Callable[[str, str], None]) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    for name, flags in {**PRESETS, **OTHERS}.items():
        if name == "80 GB" and total < 60 * GB:
            continue
        note(f"memory, GB: `{flags}`", f"{peak(flags, Precision('bf16', 'cuda')) / GB:.1f}")


@gpu_only
@pytest.mark.parametrize(
    "command",
    [
        "gate_cost.py --device cuda --windows 100",
        "window_profile.py --dataset-path DATA --backbone pvt_v2_b2 --img-size 384",
        "throughput.py --dataset-path DATA --backbone pvt_v2_b2 --img-size 384 --ways ours bare --images 20 --rounds 3",
    ],
)
def test_benchmark(command: str, tiny_dataset: Path, note: Callable[[str, str], None]) -> None:
    script, *flags = command.replace("DATA", str(tiny_dataset)).split()
    line = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for figure in filter(None, map(str.strip, done.stdout.splitlines())):
        note(f"`{command}`", figure)


@gpu_only
def test_compiled_network_trains(tiny_argv: Argv, caplog: pytest.LogCaptureFixture) -> None:
    assert train(tiny_argv("--device", "cuda", "--compile", "--epochs", "1", "--stage1-epochs", "1")) == 0
    assert "--compile failed" not in caplog.text
