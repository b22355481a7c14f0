"""Scores against pysodmetrics, the reference of the field, and against their definitions."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py_sod_metrics import sod_metrics
from py_sod_metrics.fmeasurev2 import DICEHandler, FmeasureV2, IOUHandler

from evaluation.metrics import BoolArray, ByteArray, MeanScores, Protocol, quick_scores, score_image, values_of

CURVES = ("e_curve", "f_curve", "precision", "recall")


def reference(prediction: ByteArray, mask: BoolArray) -> dict[str, Any]:
    """Return every score by pysodmetrics, whose curves run from the highest threshold to the lowest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f, s, e = sod_metrics.Fmeasure(), sod_metrics.Smeasure(), sod_metrics.Emeasure()
        weighted, error = sod_metrics.WeightedFmeasure(), sod_metrics.MAE()
        handlers = {
            "iou": IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
            "dice": DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
        }
        binary = FmeasureV2(handlers)
        for measure in (f, s, e, weighted, error, binary):
            measure.step(prediction, mask.astype(np.uint8) * 255)
    f_results, e_results, overlap = f.get_results(), e.get_results()["em"], binary.get_results()
    return {
        "s_measure": s.get_results()["sm"],
        "weighted_f": weighted.get_results()["wfm"],
        "mae": error.get_results()["mae"],
        "adaptive_e": e_results["adp"],
        "adaptive_f": f_results["fm"]["adp"],
        "e_curve": e_results["curve"][::-1],
        "f_curve": f_results["fm"]["curve"][::-1],
        "precision": f_results["pr"]["p"][::-1],
        "recall": f_results["pr"]["r"][::-1],
        "iou": overlap["iou"]["binary"],
        "dice": overlap["dice"]["binary"],
    }


def assert_equals_reference(prediction: ByteArray, mask: BoolArray) -> None:
    scores, expected = score_image(prediction, mask), reference(prediction, mask)
    if scores.iou == 1 and not mask.any():  # the reference scores an empty prediction of an empty mask 0
        expected |= {"iou": 1.0, "dice": 1.0}
    if np.isnan(expected["s_measure"]):  # it averages an empty region: the centroid is in the last row or column
        expected["s_measure"] = scores.s_measure
        assert 0 <= scores.s_measure <= 1
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(scores, name), value, rtol=1e-6, atol=1e-6, err_msg=name)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ByteArray, BoolArray]:
    """Draw images of 1 x 1 to 2000 x 3 pixels with masks and predictions of every kind: empty, blobs, noise, ..."""
    side = st.integers(1, 40)
    height, width = draw(
        st.one_of(st.tuples(side, side), st.sampled_from([(2000, 3), (3, 2000), (1, 300), (130, 250)]))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y, x = np.mgrid[:height, :width]
    centre = rng.random(2) * (height, width)
    blob = np.hypot(y - centre[0], (x - centre[1]) * rng.uniform(0.5, 2)) < rng.uniform(0.5, 0.6 * max(height, width))
    one_pixel = (y == int(centre[0])) & (x == int(centre[1]))
    masks = {
        "empty": blob & False,
        "full": blob | True,
        "one pixel": one_pixel,
        "all but one": ~one_pixel,
        "blob": blob,
        "noise": rng.random((height, width)) < rng.random(),
    }
    mask = masks[draw(st.sampled_from(sorted(masks)))]
    level, other = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    smooth = 255 / (1 + np.exp(-rng.normal(0, 1, (height, width)) - 3 * (2.0 * blob - 1)))
    predictions = {
        "constant": np.full((height, width), level),
        "two levels": np.where(rng.random((height, width)) < 0.5, level, other),
        "halves": np.where(x < width // 2, level, other),
        "the mask": mask * 255,
        "its opposite": ~mask * 255,
        "one pixel": one_pixel * level,
        "noise": rng.integers(0, 256, (height, width)),
        "soft": smooth,
        "weak": smooth / 9 + level / 2,
    }
    prediction = predictions[draw(st.sampled_from(sorted(predictions)))]
    return prediction.astype(np.uint8), mask


@settings(max_examples=300, deadline=None)
@given(cases())
def test_every_score_and_curve_equals_the_reference(case: tuple[ByteArray, BoolArray]) -> None:
    assert_equals_reference(*case)


@pytest.mark.parametrize("size", [(352, 352), (768, 1024), (1024, 300)])
def test_scores_equal_the_reference_for_errors_far_from_the_object(size: tuple[int, int]) -> None:
    """The object is in a corner: most of the image lies beyond the distances that are computed exactly."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: size[0], : size[1]]
    mask = np.hypot(y - 40, x - 50) < 30 + 8 * np.sin(np.arctan2(y - 40, x - 50) * 5)
    soft = 255 / (1 + np.exp((np.hypot(y - 45, x - 52) - 33) / 4))
    assert_equals_reference(
        (soft * rng.uniform(0.7, 1, size) + rng.integers(0, 40, size)).clip(0, 255).astype(np.uint8), mask
    )


def test_a_pixel_at_a_threshold_counts_as_object_as_in_the_reference_and_not_as_in_the_matlab_code() -> None:
    """MATLAB's E takes pixels above a threshold, of which there are none at the highest."""
    mask = np.zeros((8, 8), dtype=np.bool_)
    mask[2:6, 2:6] = True
    prediction = np.where(mask, 255, 0).astype(np.uint8)
    e_curve, expected = score_image(prediction, mask).e_curve, reference(prediction, mask)["e_curve"]
    nothing_found = score_image(np.zeros_like(prediction), mask).e_curve[255]
    assert e_curve[255] == pytest.approx(expected[255]) == pytest.approx(64 / 63)
    assert e_curve[255] > nothing_found + 0.5


def test_empty_prediction_of_an_empty_mask_has_iou_and_dice_of_one() -> None:
    """The only deviation from the reference, which gives 0."""
    nothing = np.zeros((8, 8), dtype=np.uint8)
    scores = score_image(nothing, nothing > 0)
    assert (scores.iou, scores.dice, scores.mae, scores.s_measure) == (1, 1, 0, 1)
    assert scores.weighted_f == 0
    assert reference(nothing, nothing > 0)["iou"] == 0


def test_a_faint_prediction_of_an_empty_mask_is_wrong_after_the_stretch_and_right_without() -> None:
    nothing, faint = np.zeros((10, 10), dtype=np.bool_), np.zeros((10, 10), dtype=np.uint8)
    faint[:, 7:] = 51  # a fifth of the range, on three tenths of the pixels
    as_it_is, stretched = score_image(faint, nothing, Protocol(stretch=False)), score_image(faint, nothing)
    for scores, iou, mean in ((as_it_is, 1, 0.06), (stretched, 0, 0.3)):
        assert (scores.iou, scores.dice, scores.weighted_f, scores.adaptive_f) == (iou, iou, 0, 0)
        assert (scores.mae, scores.s_measure) == (pytest.approx(mean), pytest.approx(1 - mean))
        assert not scores.f_curve.any()
    expected = np.where(np.arange(256) > 51, 100, 70)  # the pixels that are not found at each threshold
    expected[0] = 0
    np.testing.assert_allclose(as_it_is.e_curve, expected / 99)
    np.testing.assert_allclose(stretched.e_curve, np.where(np.arange(256) > 0, 70, 0) / 99)
    assert quick_scores(faint, nothing)["iou"] == 1


def test_quick_scores_do_not_stretch_a_faint_prediction() -> None:
    mask = np.zeros((20, 20), dtype=np.bool_)
    mask[5:15, 5:15] = True
    faint = np.where(mask, 60, 20).astype(np.uint8)
    assert quick_scores(faint, mask)["iou"] == 0
    assert score_image(faint, mask).iou == 1
    sharp = mask.astype(np.uint8) * 255
    whole = score_image(sharp, mask)
    quick = quick_scores(sharp, mask)
    assert quick == {name: getattr(whole, name) for name in quick}


def test_iou_and_dice_count_pixels_above_half() -> None:
    mask = np.array([[True, True, True, False, False, False]])
    prediction = np.array([[255, 128, 127, 200, 0, 0]], dtype=np.uint8)
    quick = quick_scores(prediction, mask)
    assert quick["iou"] == pytest.approx(2 / 4)
    assert quick["dice"] == pytest.approx(2 * 2 / 6)
    assert quick["mae"] == pytest.approx((0 + 127 + 128 + 200) / 255 / 6)


def test_different_sizes_and_images_without_pixels_are_refused() -> None:
    for prediction, mask in (((4, 4), (4, 5)), ((0, 4), (0, 4)), ((4,), (4,))):
        with pytest.raises(ValueError, match="cannot be compared"):
            score_image(np.zeros(prediction, dtype=np.uint8), np.zeros(mask, dtype=np.bool_))


def test_means_over_a_set_equal_the_reference() -> None:
    """Maxima are those of the mean curve, not means of each image's maximum."""
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (30, 40)).astype(np.uint8), rng.random((30, 40)) < 0.3) for _ in range(5)]
    total = MeanScores()
    for prediction, mask in images:
        total.add(score_image(prediction, mask))
    means, expected = total.means(), [reference(*image) for image in images]
    for name in ("s_measure", "weighted_f", "mae", "adaptive_e", "adaptive_f", "iou", "dice"):
        assert means[name] == pytest.approx(np.mean([scores[name] for scores in expected]))
    for name in ("e", "f"):
        curve = np.mean([scores[f"{name}_curve"] for scores in expected], axis=0)
        assert means[f"max_{name}"] == pytest.approx(curve.max())
        assert means[f"mean_{name}"] == pytest.approx(curve.mean())
    with pytest.raises(ValueError, match="no image"):
        MeanScores().means()


def all_scores(prediction: ByteArray, mask: BoolArray | ByteArray) -> dict[str, Any]:
    scores = score_image(prediction, mask)
    return {**quick_scores(prediction, mask), **scores.numbers(), **{name: getattr(scores, name) for name in CURVES}}


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_ignored_pixels_change_no_score(case: tuple[ByteArray, BoolArray], seed: int) -> None:
    prediction, mask = case
    rng = np.random.default_rng(seed)
    is_ignored = rng.random(mask.shape) < 0.3
    is_ignored[-1, -1] = False
    labels = np.where(is_ignored, 2, mask).astype(np.uint8)
    other = np.where(is_ignored, rng.integers(0, 256, mask.shape), prediction).astype(np.uint8)
    first, second = all_scores(prediction, labels), all_scores(other, labels)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_masks_of_zero_and_one_have_bitwise_the_scores_of_boolean_ones(case: tuple[ByteArray, BoolArray]) -> None:
    prediction, mask = case
    first, second = all_scores(prediction, mask), all_scores(prediction, mask.astype(np.uint8))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_scores_are_those_of_the_image_without_its_ignored_margin() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :160]
    mask = np.hypot(y - 50, x - 60) < 25
    prediction = (200 * (np.hypot(y - 52, x - 66) < 27) + rng.integers(0, 55, mask.shape)).astype(np.uint8)
    labels = mask.astype(np.uint8)
    labels[100:], labels[:, 140:] = 2, 2
    whole, cut = all_scores(prediction, labels), all_scores(prediction[:100, :140], mask[:100, :140])
    for name, value in whole.items():
        np.testing.assert_allclose(value, cut[name], rtol=1e-12, err_msg=name)


def test_a_mask_without_a_pixel_that_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="no pixel that counts"):
        score_image(np.zeros((4, 4), dtype=np.uint8), np.full((4, 4), 2, dtype=np.uint8))


def test_without_the_stretch_a_faint_prediction_is_scored_as_it_is() -> None:
    mask = np.zeros((20, 20), dtype=np.bool_)
    mask[5:15, 5:15] = True
    faint = np.where(mask, 60, 20).astype(np.uint8)
    assert score_image(faint, mask, Protocol(stretch=False)).iou == 0
    assert score_image(faint, mask, Protocol(stretch=False)).mae == pytest.approx(quick_scores(faint, mask)["mae"])
    assert score_image(faint, mask).iou == 1


@given(cases())
@settings(max_examples=100, deadline=None)
def test_by_the_convention_of_the_matlab_code_values_are_not_rounded_and_e_is_above_its_threshold(
    case: tuple[ByteArray, BoolArray],
) -> None:
    """Each threshold by itself, as that code does it; S, weighted F and MAE do not depend on the convention."""
    prediction, mask = case
    scores, pysod = score_image(prediction, mask, Protocol(convention="matlab")), score_image(prediction, mask)
    values, _ = values_of(prediction, mask, stretch=True)
    steps = np.arange(128) * (1 / 255)
    for number, threshold in enumerate([*steps, *(1 - steps)[::-1]]):
        found = values >= threshold
        hits = np.count_nonzero(found & mask)
        assert scores.precision[number] == (hits / found.sum() if hits else 0)
        assert scores.recall[number] == (hits / mask.sum() if hits else 0)
        if number % 17 == 0:  # of 256, the first and the last too
            above = (values > threshold).astype(np.uint8) * 255
            by_itself = score_image(above, mask, Protocol(stretch=False)).e_curve[128]
            np.testing.assert_allclose(scores.e_curve[number], by_itself, rtol=1e-12)
    assert (scores.s_measure, scores.weighted_f, scores.mae) == (pysod.s_measure, pysod.weighted_f, pysod.mae)
