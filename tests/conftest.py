"""Fixtures and helpers: a tiny dataset, and runs on it that take a second or two."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nullcuda
import pytest
import torch
from launching import Launch
from nullcuda.emulate import Emulation
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from commands import cli
from data.synthetic import write_synthetic_dataset
from reporting.listeners import EpochLines
from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.log import Listener
from runtime.ranks import Ranks
from train_ultimate import ScriptParts, Validation, main
from training.run import Run
from training.settings import NOT_RESUMED
from training.setup import Parts, prepare

ROOT = Path(__file__).parents[1]  # the program's folder
SHARED = ROOT.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs photographs and weights in ../shared")

Argv = Callable[..., list[str]]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job in the background; child processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, most of all on a busy machine
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic: read when CUDA is first used
if nullcuda.is_active():
    nullcuda.begin()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run ``-m rehearsal`` in a pytest of its own that has null CUDA devices, and ``-m gpu`` in one process.

    Several processes would share a GPU's memory and its time.
    """
    if re.fullmatch(r"gpu2?", config.option.markexpr) and not nullcuda.is_active():
        config.option.numprocesses = 0
    asked_for = re.search(r"(?<!not )\brehearsal\b", config.option.markexpr)
    if not asked_for or nullcuda.is_active() or nullcuda.why_not():
        return None
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        return subprocess.call(command, env=nullcuda.environment(nullcuda.build(Path(folder))))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of the CUDA code where there is no device, not even a null one."""
    if item.get_closest_marker("rehearsal") and not torch.cuda.is_available():
        pytest.skip(nullcuda.why_not() or "runs with -m rehearsal")


@pytest.fixture
def arithmetic() -> Iterator[Emulation | None]:
    """Let operations on a null device have results; a GPU has them anyway."""
    if not nullcuda.is_active():
        yield None
        return
    with Emulation() as emulation:
        yield emulation


def epoch_lines_only(run: Run) -> list[Listener]:
    """Return the listeners of a run that writes no report and nothing for TensorBoard: that takes a second each."""
    return [EpochLines(run.settings.epochs, run.settings.grad_clip)]


def train(argv: Sequence[str], **parts: Any) -> int:
    """Run a command in this process, like ``main``, but without report and TensorBoard files.

    Args:
        argv: the command line.
        **parts: fields of ``ScriptParts``, such as ``loss`` or ``validate``.
    """
    return main(argv, ScriptParts(**{"listeners_of": epoch_lines_only, **parts}))


def prepare_run(argv: Sequence[str], **parts: Any) -> Run:
    """Prepare the run that a command line of ``train`` asks for. ``parts`` are fields of ``Parts``."""
    request = cli.parse(argv)
    return prepare(request.given, Ranks(), request.preset, Parts(**parts))


def prepare_again(directory: Path, **changes: Any) -> Run:
    """Prepare a new run, in another folder, with the settings of the run in ``directory`` except for ``changes``."""
    saved = json.loads((directory / "config.json").read_text())["settings"]
    settings = {name: value for name, value in saved.items() if name not in NOT_RESUMED}
    fresh = directory.parent / f"{directory.name}-again-{time.monotonic_ns()}"
    return prepare({**settings, **changes, "checkpoint_dir": str(fresh)}, Ranks())


def scripted_validation(*ious: float) -> Validation:
    """Return a validation that scores the first epoch with the first IoU, and so on."""
    left = iter(ious)
    return lambda _run, _loader: dict.fromkeys(("iou", "dice", "mae", "s_measure"), next(left))


def failing(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with exit code 2, and return the one line of its error message."""
    assert train(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def final_state(directory: Path, name: str = "epoch_0004.pth") -> dict[str, Any]:
    """Return what a resumed run must share bitwise with an undisturbed one. The best score belongs to the folder."""
    state = read_checkpoint(directory / name)
    for key in ("config", "epoch_stats"):
        del state[key]
    for key in ("best_iou", "best_epoch"):
        del state["progress"][key]
    return state


@contextmanager
def signal_at_step(*steps: int, signal_number: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Send this process a signal right before the optimizer's nth step, for each n given; steps count over all runs.

    A skipped window counts too: the optimizer's kernel is called, and changes nothing.
    """
    count = 0

    def send(*_: Any) -> None:
        nonlocal count
        count += 1
        if count in steps:
            os.kill(os.getpid(), signal_number)

    hook = register_optimizer_step_pre_hook(send)  # torch's own, for the optimizers of all runs
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 22 training and 3 test scenes, 64 px: at --val-fraction 0.1, 20 to train on, 2 to validate on."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    write_synthetic_dataset(root, num_train=22, num_test=3, img_size=64, seed=7)
    return root


def tiny_arguments(dataset: Path, checkpoint_dir: str | Path, *extra: str) -> list[str]:
    """Return arguments of ``train`` on the tiny dataset: 2 + 2 epochs of 4 windows, the last one short."""
    return [
        *("train", "--dataset-path", str(dataset), "--checkpoint-dir", str(checkpoint_dir)),
        *("--backbone", "test_efficientnet", "--no-pretrained", "--decoder-channels", "16", "--img-size", "64"),
        *("--batch-size", "2", "--accumulation-steps", "3", "--epochs", "4", "--stage1-epochs", "2"),
        *("--lr", "0.002", "--num-workers", "0", "--precision", "fp32", "--device", "cpu"),
        *extra,
    ]


@pytest.fixture
def tiny_argv(tiny_dataset: Path, tmp_path: Path) -> Argv:
    """``tiny_arguments`` with the test's own checkpoint folder."""

    def build(*extra: str, checkpoint_dir: str | Path = tmp_path / "run") -> list[str]:
        return tiny_arguments(tiny_dataset, checkpoint_dir, *extra)

    return build


@pytest.fixture(scope="session")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of ``tiny_arguments``, with report and TensorBoard files."""
    directory = tmp_path_factory.mktemp("finished")
    assert main(tiny_arguments(tiny_dataset, directory, "--keep-checkpoints", "9")) == 0
    return directory


@pytest.fixture(scope="session")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 22 training scenes: at --val-fraction 0.3, 15 to train on, 7 to validate on; neither is even."""
    root = tmp_path_factory.mktemp("ranks") / "tiny"
    write_synthetic_dataset(root, num_train=22, num_test=3, img_size=64, seed=7)
    return root


@pytest.fixture(scope="session")
def two_ranks(odd_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """An undisturbed run of two ranks: 2 epochs of 3 windows of 6, 6 and 3 samples."""
    launch = Launch(odd_dataset, tmp_path_factory.mktemp("two"))
    code, _, err = launch.run(2, "--accumulation-steps", "3")
    assert code == 0, err
    return launch


def bytes_kept(model: nn.Module, images: torch.Tensor) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, without the weights."""
    kept, weights = 0, {parameter.data_ptr() for parameter in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(images)
    return kept


def differing_tensors(first: Any, second: Any, name: str = "") -> list[str]:
    """Return the names of the tensors and values in two nested structures that are not bitwise equal."""
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
        return [] if same else [name]
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        return [bad for key in first for bad in differing_tensors(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list | tuple):
        assert len(first) == len(second), name
        return [
            bad
            for i, pair in enumerate(zip(first, second, strict=True))
            for bad in differing_tensors(*pair, f"{name}[{i}]")
        ]
    return [] if first == second else [name]


@pytest.fixture
def checkpoint_of_nan(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the test's checkpoint whose weights are finite and whose network's output is NaN."""
    content = read_checkpoint(checkpoint)
    for weights in (content["model"], content["ema"]["model"]):
        weights["backbone.body.bn1.running_var"].fill_(-1.0)  # BatchNorm takes its root
    path = tmp_path / "nan.pth"
    write_checkpoint(path, content)
    return path
