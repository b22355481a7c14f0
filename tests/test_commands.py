"""commands/__init__.py: what is answered before torch is imported, and errors in one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import commands

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("trian --dataset-path {data}", "trian: no such command; did you mean train?"),
        ("frobnicate", "frobnicate: no such command; choose from train, demo"),
        ("train --dataset-path {data} --gpus 2", "torchrun --nproc-per-node=gpu train_ultimate.py train"),
        (
            "train --dataset-path {data}/nowhere",
            "nowhere: no such folder; --dataset-path must name the dataset",
        ),
        ("train --dataset-path {data}/file", "file: is a file; --dataset-path must name"),
        ("train --resume best", "--resume best: no such file; give a file such as checkpoints/best_model.pth, or auto"),
        ("train --dataset-path {data} --exclude none.txt", "--exclude none.txt: no such file"),
        ("train --dataset-path {data} --backbone-weights none.pth", "--backbone-weights none.pth: no such file"),
        ("evaluate --checkpoint best --dataset-path {data}", "--checkpoint best: no such file"),
        ("predict --checkpoint best a.jpg --output found", "--checkpoint best: no such file"),
        ("export --checkpoint best --format onnx", "--checkpoint best: no such file"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert commands.answer(argv.format(data=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_checkpoint_is_answered_with_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best_model.pth").touch()
    assert commands.answer(["evaluate", "--checkpoint", "best.pth", "--dataset-path", str(tmp_path)]) == 2
    assert "--checkpoint best.pth: no such file; there is run/best_model.pth" in capsys.readouterr().err


@pytest.mark.parametrize("argv", ["train --dataset-path nowhere", "train --resume best", "train --help", "trian"])
def test_a_cheap_mistake_is_answered_before_torch_is_imported(tmp_path: Path, argv: str) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_ultimate.py"), *argv.split()], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "torch was imported" not in result.stdout + result.stderr
    assert result.returncode == (0 if "--help" in argv else 2)


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_idle_threads_are_told_to_sleep_before_torch_is_imported(
    tmp_path: Path, given: dict[str, str], spins: str
) -> None:
    """What the environment says already stays."""
    (tmp_path / "torch.py").write_text("import os; raise SystemExit('spins ' + str(os.environ.get('GOMP_SPINCOUNT')))")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_ultimate.py"), "train", "--dataset-path", "synthetic"], cwd=tmp_path,
        capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": str(tmp_path), **given},
    )  # fmt: skip
    assert f"spins {spins}\n" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_request_to_save_before_training_begins_ends_nothing(number: signal.Signals) -> None:
    program = f"import commands, os; commands.begin(); os.kill(os.getpid(), {int(number)}); print('alive')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "alive\n"


def failing_with(message: str) -> Callable[[], int]:
    def call() -> int:
        raise RuntimeError(message)

    return call


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be reported later",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
        "CUDA driver error: out of memory",
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        "No CUDA GPUs are available",
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    ],
)
def test_a_gpu_that_cannot_be_used_is_reported_in_one_line(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.attempt(failing_with(message)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the GPU cannot be used: {message.splitlines()[0]}. nvidia-smi shows")


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported later",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle)`",
        "Could not run 'aten::nms' with arguments from the 'CUDA' backend",
    ],
)
def test_a_bug_on_a_gpu_is_not_taken_for_a_gpu_in_use(message: str) -> None:
    with pytest.raises(RuntimeError):
        commands.attempt(failing_with(message))
