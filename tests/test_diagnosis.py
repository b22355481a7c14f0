"""The diagnosis of windows that are not finite: place, samples at fault, cause."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from training.diagnosis import Diagnosis, diagnose, find_culprits, name_cause, stand_out


class DividesByZero(nn.Module):
    """A module whose output is not finite."""

    def forward(self, values: Tensor) -> Tensor:
        return values / torch.zeros_like(values)


class InfiniteGradient(nn.Module):
    """A module with a square root at 0: the value is finite, its derivative is not."""

    def forward(self, values: Tensor) -> Tensor:
        return (values * 0).sqrt() + values


def backward(model: nn.Module, inputs: Tensor) -> Tensor:
    loss = model(inputs).square().mean()
    loss.backward()
    return loss.detach()


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), *middle, nn.Linear(4, 2))


def test_first_non_finite_module_of_the_forward_pass_is_named() -> None:
    model = network(DividesByZero())
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)))
    assert diagnosis.first_nonfinite == "2 (output, from an input that is finite)"
    assert not diagnosis.finite
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_input_that_is_not_finite_is_distinguished_from_a_module_at_fault() -> None:
    model = network()
    diagnosis = diagnose(model, lambda: backward(model, torch.full((3, 4), math.nan)))
    assert diagnosis.first_nonfinite == "0 (output, from an input that is not finite itself)"


def test_first_non_finite_gradient_is_named_even_behind_in_place_activations() -> None:
    model = network(InfiniteGradient())
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)))
    assert math.isfinite(diagnosis.loss)
    assert not math.isfinite(diagnosis.grad_norm)
    assert diagnosis.first_nonfinite == "1 (gradient at its output)"


def test_the_loss_itself_can_be_at_fault() -> None:
    model = network()
    diagnosis = diagnose(model, lambda: backward(model, torch.randn(3, 4)) * math.nan)
    assert diagnosis.first_nonfinite.startswith("the loss itself")


def test_finite_window_has_norms_of_unscaled_gradients_and_no_culprit() -> None:
    model, inputs = network(), torch.randn(3, 4)

    def scaled() -> Tensor:
        loss = model(inputs).square().mean()
        (loss * 1024).backward()
        return loss.detach()

    backward(model, inputs)
    expected = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    diagnosis = diagnose(model, scaled, loss_scale=1024)
    assert diagnosis.finite
    assert diagnosis.first_nonfinite == ""
    assert diagnosis.worst_parameters == pytest.approx(expected)
    assert list(diagnosis.worst_parameters.values()) == sorted(diagnosis.worst_parameters.values(), reverse=True)
    assert diagnosis.grad_norm == pytest.approx(math.hypot(*expected.values()))


def test_the_ten_worst_parameters_are_listed_infinite_ones_first() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))

    def explode() -> Tensor:
        loss = backward(model, torch.randn(3, 4))
        model[3].weight.grad[0, 0] = math.inf  # type: ignore[index]
        return loss

    diagnosis = diagnose(model, explode)
    assert len(diagnosis.worst_parameters) == 10
    assert next(iter(diagnosis.worst_parameters)) == "3.weight"
    assert diagnosis.first_nonfinite == "gradient of 3.weight"


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_culprit_is_found_and_nothing_else(case: tuple[int, set[int]]) -> None:
    num_samples, bad = case
    runs = 0

    def is_bad(positions: Sequence[int]) -> bool:
        nonlocal runs
        runs += 1
        return bool(bad & set(positions))

    assert find_culprits(num_samples, is_bad) == sorted(bad)
    assert runs <= 1 + 2 * len(bad) * math.ceil(math.log2(num_samples) + 1)


def test_samples_that_are_bad_only_together_are_not_blamed() -> None:
    assert find_culprits(8, lambda positions: {2, 5} <= set(positions)) == []


def test_sample_far_above_the_others_stands_out() -> None:
    assert stand_out([1.0, 2.0, 1.5, 40.0]) == [3]
    assert stand_out([1.0, 2.0, 1.5, 9.0]) == []
    assert stand_out([5.0]) == []


def test_a_sample_is_at_fault_for_a_spike_only_if_its_gradient_explains_it() -> None:
    assert stand_out([1.0, 2.0, 1.5, 40.0], spike_limit=15.0) == [3]
    assert stand_out([1.0, 2.0, 1.5, 40.0], spike_limit=25.0) == []  # of four samples' mean it is 10
    assert stand_out([1.0, 2.0, 1.5, math.inf], spike_limit=15.0) == []  # the window's norm was finite


fine, broken = Diagnosis(1.0, 1.0, ""), Diagnosis(math.nan, math.nan, "head")


@pytest.mark.parametrize(
    ("recorded", "full", "culprits", "healthy_otherwise", "cause"),
    [
        (broken, fine, [], True, "precision"),
        (broken, broken, [3], False, "data"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], False, "model"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], True, "data"),
        (broken, broken, [], True, "data"),  # bad together, but not by themselves
        (broken, broken, [], False, "model"),
        (broken, broken, [3], None, "data"),
        (broken, broken, [0, 1, 2, 3, 4, 5, 6, 7], None, "model"),
        (fine, fine, [], True, "not reproduced"),
    ],
)
def test_cause(
    recorded: Diagnosis, full: Diagnosis, culprits: list[int], healthy_otherwise: bool | None, cause: str
) -> None:
    assert name_cause(recorded, full, culprits, 8, healthy_otherwise) == cause


def test_a_single_sample_is_blamed_unless_the_weights_are_known_to_be_at_fault() -> None:
    assert [name_cause(broken, broken, [0], 1, healthy) for healthy in (None, True, False)] == ["data", "data", "model"]
