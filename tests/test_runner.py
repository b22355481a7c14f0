"""Windows that run in parts, compiled, or with activations that are recomputed."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import bytes_kept
from torch import Tensor, nn
from windows import TinyNetwork, gradients, window

from models.network import NetworkSettings, build_network
from runtime.machine import Machine, Precision
from runtime.ranks import Ranks
from training.batchnorm import BufferGuard
from training.runner import WindowRunner
from training.window import accumulate_gradients

# Out of memory (no CPU raises torch's error, so a hook does)


CPU = Machine(torch.device("cpu"), Precision("fp32", "cpu"), torch.channels_last, Ranks())


def runner(batch_size: int = 8, recomputes: bool = False) -> WindowRunner:
    """Return a runner for windows of 32 px on the CPU."""
    return WindowRunner(CPU, img_size=32, batch_size=batch_size, recomputes=recomputes)


def with_memory_for(images: int, model: nn.Module) -> nn.Module:
    """Return the network with a hook that refuses larger batches."""

    def refuse(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse)
    return model


def test_batches_that_do_not_fit_are_halved_until_they_do_with_the_same_gradient(
    caplog: pytest.LogCaptureFixture,
) -> None:
    of, parts = window((8, 8, 3)), runner()
    expected = gradients(TinyNetwork(), of)
    model = with_memory_for(3, TinyNetwork())
    cut, loss = parts.backward(model, of, BufferGuard(model))
    assert [len(part.images) for part in cut.batches] == [2] * 8 + [1] * 3
    assert cut.sample_indices == of.sample_indices
    assert loss.item() == pytest.approx(accumulate_gradients(TinyNetwork(), of).item())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert parts.num_parts == 4
    assert [entry.getMessage().split(" from")[0] for entry in caplog.records] == [
        "out of memory: each batch goes through in 2 parts",
        "out of memory: each batch goes through in 4 parts",
    ]
    assert {entry.levelname for entry in caplog.records} == {"WARNING"}
    caplog.clear()
    parts.backward(model, of.in_parts(parts.num_parts), BufferGuard(model))
    assert not caplog.records


def test_statistics_are_as_before_the_attempts_that_did_not_fit() -> None:
    """BatchNorm, which learns here, never gets a single sample."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).train()
    network = with_memory_for(2, ListOf(model))
    guard = BufferGuard(network)
    guard.begin_window()
    runner().backward(network, window((8,)), guard)
    assert model[0].num_batches_tracked == 4
    tight = with_memory_for(1, ListOf(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).train()))
    guard = BufferGuard(tight)
    guard.begin_window()
    with pytest.raises(torch.OutOfMemoryError):
        runner().backward(tight, window((8,)), guard)


class ListOf(nn.Module):
    """A network with one side output, from a module that makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        return [self.model(images)]


def test_rerun_that_does_not_fit_counts_as_not_finite() -> None:
    model = with_memory_for(0, TinyNetwork())
    assert runner().backward(model, window((2,), attempt=2), BufferGuard(model))[1].isnan()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(torch.OutOfMemoryError):
        runner().backward(model, window((2,)), BufferGuard(model))


# Compiled


@pytest.mark.slow
def test_compiled_batches_give_the_same_loss_and_gradient_and_others_run_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    plain, model, of = TinyNetwork(), TinyNetwork(), window((3, 3, 2))
    expected = gradients(plain, of), accumulate_gradients(plain, of)
    compiling = runner(batch_size=3)
    compiling.compile(model, of.precision)
    assert "Compiled in" in caplog.text
    assert all(parameter.grad is None for parameter in model.parameters())  # the trial leaves none behind
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    _, loss = compiling.backward(model, of, BufferGuard(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # not again, nor for the short batch
    assert loss.item() == pytest.approx(expected[1].item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected[0], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_training_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, of = TinyNetwork(), window((2, 2), uncertainty_weight=0.123)
    compiling = runner(batch_size=2)
    compiling.compile(model, of.precision)
    (entry,) = [entry for entry in caplog.records if entry.name == "train_ultimate"]
    assert entry.levelname == "WARNING"
    assert entry.getMessage().startswith("--compile failed (InvalidCxxCompiler: No working C++ compiler found")
    assert "\n" not in entry.getMessage()
    _, loss = compiling.backward(model, of, BufferGuard(model))
    assert loss.item() == accumulate_gradients(TinyNetwork(), of).item()


# Activations that are recomputed


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "pvt_v2_b0", "vit_tiny_patch16_224"])
def test_gradient_checkpointing_saves_memory_and_changes_no_bit(backbone: str) -> None:
    def train(recomputes: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
        """Return gradients, buffers and the bytes kept for the backward pass; the network learns its statistics."""
        torch.manual_seed(0)
        model = build_network(NetworkSettings(backbone, 16, 64, freeze_norm_statistics=False))
        if recomputes:
            assert model.checkpoint_gradients()
        kept = bytes_kept(model, torch.rand(2, 3, 64, 64))
        of = window((3, 3), size=64)
        runner(recomputes=recomputes).backward(model, of, BufferGuard(model))
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return found, dict(model.named_buffers()), kept

    plain, recomputed = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputed[0], strict=True))
    assert all(torch.equal(buffer, recomputed[1][name]) for name, buffer in plain[1].items())
    assert recomputed[2] < 0.7 * plain[2]  # the stem's activations stay, and are most of the smallest network's
