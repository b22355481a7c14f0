"""commands/__init__.py: what is answered before torch is imported."""

import os
import signal
import subprocess
import sys
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
