"""A window: its parts, its gradient, and its copy in an incident."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from windows import TinyNetwork, gradients, window

from runtime.machine import PrecisionName
from training.window import accumulate_gradients, window_from_payload, window_to_payload


@given(st.sets(st.integers(0, 7), min_size=1))
def test_part_of_a_window_has_exactly_those_samples(positions: set[int]) -> None:
    part = window().only(positions)
    assert part.sample_indices == sorted(positions)
    assert part.num_samples == len(positions)
    assert all(len(batch.images) for batch in part.batches)


def test_batches_left_with_too_few_samples_are_left_out() -> None:
    assert window(sizes=(3, 3, 2)).only([0, 3, 4, 6, 7], least=2).sample_indices == [3, 4, 6, 7]
    assert (
        window(sizes=(2, 1)).only([0, 1, 2], least=2).num_samples == 3
    )  # nothing is left out, so no batch gets smaller


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


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_forward_and_backward_pass_round_products_as_the_precision_says(
    precision: PrecisionName, expected: str
) -> None:
    seen: list[str] = []
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]

    class Noting(TinyNetwork):
        def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
            (logits,) = super().forward(images, scale)
            logits.register_hook(lambda _: seen.append(convolutions.fp32_precision))
            seen.append(convolutions.fp32_precision)
            return [logits]

    accumulate_gradients(Noting(), window((2,), precision))
    assert seen == [expected, expected]


def test_dropout_is_a_function_of_the_window() -> None:
    model = TinyNetwork(dropout=0.5)
    first = gradients(model, window())
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model, window()), strict=True))
    other = gradients(model, dataclasses.replace(window(), seed=12))
    assert not torch.equal(first[0], other[0])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 3))
def test_parts_have_the_same_samples_in_order_and_none_is_too_small(sizes: list[int], parts: int, least: int) -> None:
    whole = window(tuple(sizes))
    cut = whole.in_parts(parts, least)
    assert cut.sample_indices == whole.sample_indices
    sizes_cut = [len(part.images) for part in cut.batches]
    assert min(sizes_cut) >= min(least, *sizes)
    if least == 1:
        assert max(sizes_cut) == max(-(-size // min(parts, size)) for size in sizes)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_window_from_its_payload_gives_the_same_gradient_bitwise(precision: PrecisionName) -> None:
    model, original = TinyNetwork(dropout=0.3), window(precision=precision, scale=1.25)
    again = window_from_payload(window_to_payload(original, loss_scale=8.0), "cpu", torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, original), gradients(model, again), strict=True))
    assert again.scaler.is_enabled() == (precision == "fp16")
