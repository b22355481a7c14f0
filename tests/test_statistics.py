"""Differences between methods: intervals and tests, and how often they call equal methods different."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from evaluation.statistics import SIGNIFICANT, auroc, difference, holm

scores = st.lists(st.floats(0, 1), min_size=6, max_size=40)


@settings(deadline=None, max_examples=30)
@given(first=scores, data=st.data())
def test_the_mean_lies_in_its_interval_and_exchanged_methods_have_the_opposite_difference(
    first: list[float], data: st.DataObject
) -> None:
    second = data.draw(st.lists(st.floats(0, 1), min_size=len(first), max_size=len(first)))
    found = difference([np.array(first)], [np.array(second)], resamples=50)
    back = difference([np.array(second)], [np.array(first)], resamples=50)
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second), abs=1e-12)
    assert (found.mean, found.low, found.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)
    assert (found.num_higher, found.num_lower) == (back.num_lower, back.num_higher)
    assert found.num_higher + found.num_lower <= found.num_images == len(first)


def test_over_sets_each_set_counts_alike_and_the_test_takes_all_images() -> None:
    generator = np.random.default_rng(1)
    first, second = [generator.random(size) for size in (10, 90)], [generator.random(size) for size in (10, 90)]
    found = difference(first, second)
    gaps = [a - b for a, b in zip(first, second, strict=True)]
    assert found.mean == pytest.approx(np.mean([gap.mean() for gap in gaps]))
    assert found.p == np.asarray(wilcoxon(np.concatenate(gaps)))[1]
    assert found.num_images == 100


def test_equal_methods_do_not_differ() -> None:
    found = difference([np.full(20, 0.5)], [np.full(20, 0.5)])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(("first", "second"), [([3], [4]), ([3, 4], [3]), ([0], [0]), ([], [])])
def test_other_images_cannot_be_compared(first: list[int], second: list[int]) -> None:
    with pytest.raises(ValueError, match="only on the same images"):
        difference([np.zeros(size) for size in first], [np.zeros(size) for size in second])


def test_without_scipy_there_is_an_interval_and_no_p_value() -> None:
    code = (
        "import sys; sys.modules['scipy'] = None; import numpy as np; from evaluation.statistics import difference; "
        "found = difference([np.arange(9.0)], [np.zeros(9)]); print(found.p, found.low > 0)"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "None True\n"


def test_holms_correction_is_that_of_his_paper() -> None:
    """The smallest of four counts fourfold, the next threefold, and none less than one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_corrected_p_values_keep_their_order_and_are_no_smaller(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [corrected[index] for index in order] == sorted(corrected)


def share_called_different(num_images: int, gain: float, pairs: int, seed: int = 0) -> float:
    """Return the share of simulated pairs of methods whose p-value is significant.

    An image is hard or easy for both; what one method has over the other scatters as between two runs of one network.
    """
    generator, called = np.random.default_rng(seed), 0
    for _ in range(pairs):
        common = generator.beta(5, 2, num_images)
        first, second = (common + generator.normal(0, 0.05, num_images) for _ in range(2))
        found = difference([first + gain], [second], resamples=2)
        called += found.p is not None and found.p < SIGNIFICANT
    return called / pairs


@pytest.mark.parametrize(("num_images", "pairs"), [(60, 200), pytest.param(124, 2000, marks=pytest.mark.slow)])
def test_equal_methods_are_called_different_as_often_as_promised(num_images: int, pairs: int) -> None:
    """Within three standard errors of 5 %."""
    share = share_called_different(num_images, 0.0, pairs)
    assert abs(share - SIGNIFICANT) < 3 * np.sqrt(SIGNIFICANT * (1 - SIGNIFICANT) / pairs)


def test_a_difference_is_found_more_often_with_more_images() -> None:
    shares = [share_called_different(num_images, 0.01, 50) for num_images in (60, 124, 1000)]
    assert shares == sorted(shares)
    assert shares[-1] > 0.95


@pytest.mark.slow
def test_the_intervals_miss_the_truth_about_as_often_as_promised() -> None:
    """Three standard errors of 5 %, and a point that percentile intervals of 124 images miss by."""
    generator, missed = np.random.default_rng(2), 0
    for _ in range(1000):
        found = difference([generator.normal(0.01, 0.07, 124)], [np.zeros(124)], resamples=400)
        missed += not found.low <= 0.01 <= found.high
    assert abs(missed / 1000 - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 1000) + 0.01


def test_auroc_is_the_share_of_pairs_in_order_and_equal_ones_count_half() -> None:
    generator = np.random.default_rng(0)
    positives, negatives = generator.integers(2, 9, 40) / 8, generator.integers(0, 7, 25) / 8
    pairs = [(a > b) + 0.5 * (a == b) for a in positives for b in negatives]
    assert auroc(positives, negatives) == pytest.approx(np.mean(pairs))
    assert auroc(np.ones(3), np.ones(4)) == 0.5
