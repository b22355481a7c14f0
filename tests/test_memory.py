"""Runs whose device runs out of memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, train
from launching import read_events
from torch import Tensor

from models import CamouflageSegmenter, build_network
from training.setup import NetworkBuilder


def network_that_fits(num_images: int) -> NetworkBuilder:
    """Return a builder of networks that run out of memory in training on more images at once.

    No CPU raises torch's error.
    """

    def refuse(model: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if model.training and len(inputs[0]) > num_images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def build(*args: Any) -> CamouflageSegmenter:
        model = build_network(*args)
        model.register_forward_pre_hook(refuse)
        return model

    return build


def test_run_that_does_not_fit_goes_on_in_smaller_batches_with_the_same_effective_batch(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny_argv("--batch-size", "6", "--accumulation-steps", "1")
    assert train(argv, build_network=network_that_fits(2)) == 0
    assert capsys.readouterr().out.count("out of memory: each batch goes through in") == 2  # 6, 3, 2
    ours, fits = (read_events(directory, "window") for directory in (tmp_path / "run", finished))
    assert {entry["verdict"] for entry in ours} == {"applied"}
    for first, second in zip(ours[:8], fits[:8], strict=True):  # stage 1: no statistics of batches
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_run_that_cannot_fit_ends_with_flags_that_need_less_memory(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_argv(), build_network=network_that_fits(0)) == 1
    error = capsys.readouterr().err
    assert "out of memory with the smallest batches; --gradient-checkpointing, a smaller --img-size" in error
    assert "Traceback" not in error
    assert len(list((tmp_path / "run").glob("step_*.pth"))) == 1
