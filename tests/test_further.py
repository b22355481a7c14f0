"""Measures that few papers name, against pysodmetrics, and where that has no number, against their definitions."""

import warnings
from typing import Any

import numpy as np
import py_sod_metrics
import pytest
from hypothesis import given, settings
from py_sod_metrics.utils import prepare_data
from test_metrics import cases

from evaluation.further import FURTHER, further_scores
from evaluation.metrics import BoolArray, ByteArray, Protocol

_HAND_MADE = sorted(FURTHER.keys() - {"camouflage_context", "correction_effort"})  # the others are pysodmetrics' own


def reference(name: str, prediction: ByteArray, mask: BoolArray) -> float:
    """Return a measure by pysodmetrics; NaN where it fails or warns that it divides by zero."""
    once: Any = {"with_dynamic": False, "with_adaptive": False, "with_binary": True}
    curve: Any = {"with_dynamic": True, "with_adaptive": False}
    if name == "multiscale_iou":  # its step adds up edges in 16 bits, which are too few
        return multiscale_iou(prediction, mask)
    measure: Any = {
        "balanced_error": lambda: py_sod_metrics.FmeasureV2({"": py_sod_metrics.BERHandler(**once)}),
        "context": py_sod_metrics.ContextMeasure,
        "size_invariant_f": lambda: py_sod_metrics.SizeInvarianceFmeasureV2(
            {"": py_sod_metrics.FmeasureHandler(**curve)}
        ),
        "size_invariant_mae": py_sod_metrics.SizeInvarianceMAE,
    }[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", RuntimeWarning)
        try:
            measure.step(prediction, mask.astype(np.uint8) * 255)
            results = measure.get_results()
        except (AssertionError, RuntimeWarning, np.linalg.LinAlgError):
            return float("nan")
    result: Any = next(iter(results.values()))
    while isinstance(result, dict):
        result = next(iter(result.values()))
    return float(np.mean(result))


def multiscale_iou(prediction: ByteArray, mask: BoolArray) -> float:
    measure: Any = py_sod_metrics.MSIoU(with_dynamic=False, with_adaptive=False, with_binary=True)
    values, inside = prepare_data(prediction, mask.astype(np.uint8) * 255)
    edges = [measure.get_edge(pixels.astype(np.float64)) for pixels in (values > 0.5, inside)]
    ratios = measure.multi_scale_iou(*edges)
    return float(np.sum(ratios) - (ratios[0] + ratios[-1]) / 2) / 9


def assert_equals_reference(prediction: ByteArray, mask: BoolArray, skipped: tuple[str, ...] = ()) -> None:
    scores = further_scores(_HAND_MADE, prediction, mask, Protocol())
    for name in set(_HAND_MADE) - set(skipped):
        if not np.isnan(expected := reference(name, prediction, mask)):
            assert scores[name] == pytest.approx(expected, rel=1e-6, abs=1e-6), name
        assert np.isfinite(scores[name]), name


def is_line(mask: BoolArray) -> bool:
    """Return whether an object is so thin that its covariance matrix has no inverse, but for rounding."""
    points = np.argwhere(mask)
    if len(points) < 2:
        return False
    covariance = np.cov(points, rowvar=False)
    return bool(np.linalg.det(covariance) < 1e-9 * max(1.0, float(np.trace(covariance))) ** 2)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_measures_equal_the_reference(case: tuple[ByteArray, BoolArray]) -> None:
    assert_equals_reference(*case, skipped=("context",) if is_line(case[1]) else ())


def test_measures_equal_the_reference_for_many_objects_of_all_sizes() -> None:
    generator = np.random.default_rng(3)
    y, x = np.mgrid[:200, :300]
    mask = np.zeros((200, 300), dtype=np.bool_)
    for size in (1, 2, 4, 6, 9, 14, 25, 40):
        row, column = generator.uniform(0, 200), generator.uniform(0, 300)
        mask |= np.hypot(y - row, x - column) < size
    prediction = (mask * 160 + generator.integers(0, 95, mask.shape)).astype(np.uint8)
    assert_equals_reference(prediction, mask)


def test_a_perfect_prediction_has_the_best_scores() -> None:
    mask = np.zeros((60, 80), dtype=np.bool_)
    mask[20:40, 30:55] = True
    photograph = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    labels = mask.astype(np.uint8)
    scores = further_scores(list(FURTHER), labels * 255, labels, Protocol(), photograph)
    assert scores["balanced_error"] == scores["size_invariant_mae"] == scores["correction_effort"] == 0
    assert scores["multiscale_iou"] == 1
    assert scores["size_invariant_f"] > 0.99  # at threshold 0 all is object
    empty = further_scores(["context", "camouflage_context"], np.zeros_like(labels), labels, Protocol(), photograph)
    for name, of_nothing in empty.items():
        assert 0 == of_nothing < 0.7 < scores[name] <= 1


def test_two_small_objects_weigh_as_much_as_a_large_one() -> None:
    """A small object that is missed costs MAE next to nothing, but its size-invariant sibling as much as any."""
    mask = np.zeros((100, 100), dtype=np.bool_)
    mask[10:70, 10:70] = mask[90:98, 90:98] = True
    only_large = mask.copy()
    only_large[90:98, 90:98] = False
    scores = further_scores(["size_invariant_mae"], only_large.astype(np.uint8) * 255, mask, Protocol())
    rest_share = (100 * 100 - 60 * 60 - 8 * 8) / (60 * 60 + 8 * 8)
    assert scores["size_invariant_mae"] == pytest.approx(1 / (2 + rest_share))
    assert scores["size_invariant_mae"] > 10 * (only_large != mask).mean()


def test_objects_on_a_line_have_a_context() -> None:
    mask = np.eye(30, dtype=np.bool_)
    right, wrong = (
        further_scores(["context"], found.astype(np.uint8) * 255, mask, Protocol())["context"]
        for found in (mask, np.fliplr(mask))
    )
    assert 0 <= wrong < right <= 1


def test_pixels_that_do_not_count_are_background_whatever_was_predicted_there() -> None:
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[10:20, 10:20], labels[30:, :] = 1, 2
    prediction = np.random.default_rng(1).integers(0, 256, labels.shape).astype(np.uint8)
    other = np.where(labels == 2, 255, prediction).astype(np.uint8)
    first, second = (
        further_scores(_HAND_MADE, found, labels, Protocol(stretch=False)) for found in (prediction, other)
    )
    assert first == second


def test_the_camouflage_context_needs_the_photograph() -> None:
    mask = np.ones((8, 8), dtype=np.bool_)
    with pytest.raises(ValueError, match=r"needs the photograph"):
        further_scores(["camouflage_context"], mask.astype(np.uint8), mask, Protocol())
