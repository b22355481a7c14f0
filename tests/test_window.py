import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bytes_kept
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from data.dataset import Batch
from models.network import build_model
from runtime.machine import Precision, PrecisionName, ScalerSettings
from training.batchnorm import BufferGuard
from training.drill import Drill
from training.feed import WindowFeed
from training.runner import WindowRunner
from training.window import Window, accumulate_gradients, window_from_payload, window_to_payload


class TinyNetwork(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        return [self.head(self.dropout(self.body(images * scale).tanh()))]


def batch(first: int, number: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 2, (number, 1, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, masks, torch.arange(first, first + number), {})


def window(
    sizes: tuple[int, ...] = (3, 3, 2), precision: PrecisionName = "fp32", size: int = 32, **changes: Any
) -> Window:
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Window(
        number=4,
        global_number=25,
        batches=[batch(first, number, size) for first, number in zip(firsts, sizes, strict=True)],
        lr=0.1,
        precision=Precision(precision, "cpu"),
        scaler=Precision(precision, "cpu").new_scaler(ScalerSettings(init_scale=8.0)),
        memory_format=torch.channels_last,
        seed=11,
        **{"uncertainty_weight": 0.3, **changes},
    )


def gradients(model: nn.Module, of: Window) -> list[Tensor]:
    model.zero_grad()
    accumulate_gradients(model, of)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@given(st.sets(st.integers(0, 7), min_size=1))
def test_part_of_a_window_has_just_those_samples(positions: set[int]) -> None:
    part = window().only(positions)
    assert part.sample_indices == sorted(positions)
    assert part.num_samples == len(positions)
    assert all(len(batch.images) for batch in part.batches)


def test_batches_left_with_too_few_samples_are_left_out() -> None:
    assert window(sizes=(3, 3, 2)).only([0, 3, 4, 6, 7], least=2).sample_indices == [3, 4, 6, 7]
    assert window(sizes=(2, 1)).only([0, 1, 2], least=2).num_samples == 3  # nothing is left out, so nothing is short


def test_full_precision_halves_batches_and_gives_the_same_gradient() -> None:
    model, half = TinyNetwork(), window(precision="bf16")
    full = half.in_full_precision(halve=True)
    assert [len(batch.images) for batch in full.batches] == [2, 1, 2, 1, 1, 1]
    assert full.precision.name == "fp32"
    assert not full.scaler.is_enabled()
    for gradient, expected in zip(gradients(model, full), gradients(model, window()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    in_fp32 = window()
    assert in_fp32.in_full_precision(halve=True) is in_fp32
    assert [len(batch.images) for batch in half.in_full_precision(halve=False).batches] == [3, 3, 2]


def test_gradients_are_scaled_and_the_loss_is_not() -> None:
    model = TinyNetwork()
    scaled, plain = window(precision="fp16"), window(precision="bf16")
    losses = [accumulate_gradients(model, each).item() for each in (scaled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    ratio = gradients(model, scaled)[0].norm() / gradients(model, plain)[0].norm()
    assert ratio.item() == pytest.approx(8, rel=0.05)


def test_dropout_is_a_function_of_the_window() -> None:
    model = TinyNetwork(dropout=0.5)
    first = gradients(model, window())
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model, window()), strict=True))
    other = gradients(model, dataclasses.replace(window(), seed=12))
    assert not torch.equal(first[0], other[0])


def numbers(feed: WindowFeed, hold: Callable[[], bool] = lambda: False) -> list[int]:
    taken = []
    while (next_window := feed.take(hold())) is not None:
        taken.append(next_window.number)
    return taken


def test_windows_that_are_put_back_come_first_and_in_order() -> None:
    five = [dataclasses.replace(window(), number=number) for number in range(5)]
    feed = WindowFeed(iter(five))
    taken = [feed.take(False) for _ in range(2)]
    feed.put_back([window for window in taken if window is not None])
    assert numbers(feed) == [0, 1, 2, 3, 4]


def test_a_hold_lets_through_what_was_put_back_and_nothing_new() -> None:
    feed = WindowFeed(iter([window(), window()]))
    first = feed.take(False)
    assert first is not None
    feed.put_back([first])
    assert len(numbers(feed, hold=lambda: True)) == 1


def test_drill_strikes_attempts_from_its_window_on_while_its_count_lasts() -> None:
    drill = Drill.parse("nan-loss@26x2")
    windows = [dataclasses.replace(window(), global_number=number) for number in range(25, 29)]
    feed = WindowFeed(iter(windows), [drill])
    struck = []
    while (taken := feed.take(False)) is not None:
        struck.append(taken.rehearses)
        if taken.drill is not None:
            assert accumulate_gradients(TinyNetwork(), taken).isnan()
            taken.drill.strike([])
    assert struck == ["", "nan-loss", "nan-loss", ""]


def test_bad_sample_is_not_finite_in_that_window_and_in_no_other() -> None:
    windows = [dataclasses.replace(window(), global_number=number) for number in (1, 2)]
    feed = WindowFeed(iter(windows), [Drill.parse("bad-sample@1")])
    bad, good = feed.take(False), feed.take(False)
    assert bad is not None
    assert good is not None
    assert (bad.rehearses, good.rehearses) == ("bad-sample", "")
    assert accumulate_gradients(TinyNetwork(), bad).isnan()
    assert accumulate_gradients(TinyNetwork(), bad.only(range(1, 8))).isfinite()
    assert accumulate_gradients(TinyNetwork(), good).isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_window_from_its_payload_gives_the_same_gradient_bitwise(precision: PrecisionName) -> None:
    model, original = TinyNetwork(dropout=0.3), window(precision=precision, scale=1.25)
    again = window_from_payload(window_to_payload(original, loss_scale=8.0), "cpu", torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, original), gradients(model, again), strict=True))
    assert again.scaler.is_enabled() == (precision == "fp16")


# Memory that is too short. (No CPU raises torch's error, so a hook does.)


def runner(recomputes: bool = False) -> WindowRunner:
    return WindowRunner(batch_size=8, recomputes=recomputes)


def with_memory_for(images: int, model: nn.Module) -> nn.Module:
    def refuse(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse)
    return model


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 3))
def test_parts_have_the_same_samples_in_order_and_none_is_too_small(sizes: list[int], parts: int, least: int) -> None:
    whole = window(tuple(sizes))
    cut = whole.in_parts(parts, least)
    assert cut.sample_indices == whole.sample_indices
    sizes_cut = [len(part.images) for part in cut.batches]
    assert min(sizes_cut) >= min(least, *sizes)
    if least == 1:
        assert max(sizes_cut) == max(-(-size // min(parts, size)) for size in sizes)


def test_batches_that_do_not_fit_are_halved_until_they_do_with_the_same_gradient(
    capsys: pytest.CaptureFixture[str],
) -> None:
    of, parts = window((8, 8, 3)), runner()
    expected = gradients(TinyNetwork(), of)
    model = with_memory_for(3, TinyNetwork())
    cut, loss = parts.gradients(model, of, BufferGuard(model))
    assert [len(part.images) for part in cut.batches] == [2] * 8 + [1] * 3
    assert cut.sample_indices == of.sample_indices
    assert loss.item() == pytest.approx(accumulate_gradients(TinyNetwork(), of).item())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert parts.num_parts == 4
    out = capsys.readouterr().out
    assert [line.split(" from")[0] for line in out.splitlines()] == [
        "Out of memory: each batch goes through in 2 parts",
        "Out of memory: each batch goes through in 4 parts",
    ]
    parts.gradients(model, of.in_parts(parts.num_parts), BufferGuard(model))
    assert capsys.readouterr().out == ""


def test_statistics_are_as_they_were_before_the_attempts_that_did_not_fit() -> None:
    """And BatchNorm, which learns here, is never given a single sample."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).train()
    network = with_memory_for(2, ListOf(model))
    guard = BufferGuard(network)
    guard.begin_window()
    runner().gradients(network, window((8,)), guard)
    assert model[0].num_batches_tracked == 4
    tight = with_memory_for(1, ListOf(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).train()))
    guard = BufferGuard(tight)
    guard.begin_window()
    with pytest.raises(torch.OutOfMemoryError):
        runner().gradients(tight, window((8,)), guard)


class ListOf(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        return [self.model(images)]


def test_window_run_again_that_does_not_fit_counts_as_not_finite() -> None:
    model = with_memory_for(0, TinyNetwork())
    assert runner().gradients(model, window((2,), attempt=2), BufferGuard(model))[1].isnan()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(torch.OutOfMemoryError):
        runner().gradients(model, window((2,)), BufferGuard(model))


# Compiled


def test_compiled_batches_give_the_same_loss_and_gradient_and_others_go_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, model, of = TinyNetwork(), TinyNetwork(), window((3, 3, 2))
    expected = gradients(plain, of), accumulate_gradients(plain, of)
    compiling = WindowRunner(batch_size=3)
    compiling.compile(model, 32, of.precision, of.memory_format)
    assert "Compiled in" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in model.parameters())  # the trial leaves nothing behind
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    _, loss = compiling.gradients(model, of, BufferGuard(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # neither anew nor for the short batch
    assert loss.item() == pytest.approx(expected[1].item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected[0], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_training_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, of = TinyNetwork(), window((2, 2), uncertainty_weight=0.123)
    compiling = WindowRunner(batch_size=2)
    compiling.compile(model, 32, of.precision, of.memory_format)
    out = capsys.readouterr().out
    assert out.startswith("Warning: --compile failed (InvalidCxxCompiler: No working C++ compiler found")
    assert out.count("\n") == 1
    _, loss = compiling.gradients(model, of, BufferGuard(model))
    assert loss.item() == accumulate_gradients(TinyNetwork(), of).item()


def test_a_drill_kills_a_rank_without_samples_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kills: list[int] = []
    monkeypatch.setattr("training.drill.os.kill", lambda _process, number: kills.append(number))
    whole = window((2,))
    empty = dataclasses.replace(whole, batches=[], blank=whole.batches[0].blank(1), total=2)
    feed = WindowFeed(iter([empty]), [Drill.parse(f"kill@{whole.global_number}")])
    feed.take(hold=False)
    assert kills == [signal.SIGKILL]


# Activations that are computed again


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0", "pvt_v2_b0", "vit_tiny_patch16_224"])
def test_gradient_checkpointing_saves_memory_and_changes_no_bit(backbone: str) -> None:
    def train(recomputes: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
        """Gradients and buffers of a step of a network that learns its statistics; bytes kept for the backward pass."""
        torch.manual_seed(0)
        model = build_model(backbone, 16, 64, freeze_norm_statistics=False)
        if recomputes:
            assert model.checkpoint_gradients()
        kept = bytes_kept(model, torch.rand(2, 3, 64, 64))
        of = window((3, 3), size=64)
        runner(recomputes).gradients(model, of, BufferGuard(model))
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return found, dict(model.named_buffers()), kept

    plain, recomputed = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], recomputed[0], strict=True))
    assert all(torch.equal(buffer, recomputed[1][name]) for name, buffer in plain[1].items())
    assert recomputed[2] < 0.7 * plain[2]  # a stem is kept, which is most of the smallest of them
