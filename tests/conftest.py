"""Fixtures: a tiny data set, and the command line of a run that takes a second or two."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Launch
from torch import nn

import train_ultimate
from data.synthetic import write_synthetic_dataset
from evaluation import predictor as inference
from training import setup as builders

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs photographs and weights in ../shared")

Argv = Callable[..., list[str]]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background; its children would, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, most of all on a busy machine


@pytest.fixture(autouse=True)
def _without_followers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process write no report and nothing for TensorBoard, a second each, where that is not the matter."""
    if "followed" not in request.fixturenames:
        monkeypatch.setattr(builders, "listeners_of", lambda *_: [])


@pytest.fixture
def followed() -> None:
    """Runs of this test write their report, and for TensorBoard."""


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training and 3 test scenes of 64 px; at --val-fraction 0.1, 20 to train on and 2 to validate on."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    write_synthetic_dataset(root, num_train=22, num_test=3, img_size=64, seed=7)
    return root


def tiny_arguments(dataset: Path, checkpoint_dir: str | Path, *extra: str) -> list[str]:
    """Arguments of ``train`` on the tiny data set: 2 + 2 epochs of 4 windows, the last of which is short."""
    return [
        *("train", "--dataset-path", str(dataset), "--checkpoint-dir", str(checkpoint_dir)),
        *("--backbone", "test_efficientnet", "--no-pretrained", "--decoder-channels", "16", "--img-size", "64"),
        *("--batch-size", "2", "--accumulation-steps", "3", "--epochs", "4", "--stage1-epochs", "2"),
        *("--lr", "0.002", "--num-workers", "0", "--precision", "fp32", "--device", "cpu"),
        *extra,
    ]


@pytest.fixture
def tiny_argv(tiny_dataset: Path, tmp_path: Path) -> Argv:
    """``tiny_arguments`` with a checkpoint directory of the test's own."""

    def build(*extra: str, checkpoint_dir: str | Path = tmp_path / "run") -> list[str]:
        return tiny_arguments(tiny_dataset, checkpoint_dir, *extra)

    return build


@pytest.fixture(scope="session")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training scenes; at --val-fraction 0.3, 15 to train on and 7 to validate on: numbers that nothing divides."""
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


class SignalAt:
    """A signal that arrives as the script makes its nth call of one of its functions, here in this process."""

    def __init__(
        self, patch: pytest.MonkeyPatch, name: str, *calls: int, signal_number: signal.Signals = signal.SIGTERM
    ) -> None:
        self.left = set(calls)
        self.signal_number = signal_number
        self.count = 0
        self.original = getattr(train_ultimate, name)
        patch.setattr(train_ultimate, name, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.left:
            self.left.discard(self.count)
            os.kill(os.getpid(), self.signal_number)
        return self.original(*args, **options)


def bytes_kept(model: nn.Module, images: torch.Tensor) -> int:
    """Of a forward pass, for the backward pass; weights left out."""
    kept, weights = 0, {parameter.data_ptr() for parameter in model.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(images)
    return kept


def differing_tensors(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of the tensors and values in two nested structures that are not bitwise equal."""
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
def network_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded from a checkpoint puts out NaN."""
    original = inference.load_network

    def broken(*args: Any) -> inference.TrainedNetwork:
        network = original(*args)
        network.model.register_forward_hook(lambda _module, _inputs, outputs: [outputs[-1] * torch.nan])
        return network

    monkeypatch.setattr(inference, "load_network", broken)
