import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import dice, iou, mae, s_measure

pysodmetrics = pytest.importorskip("py_sod_metrics")


def random_case(height: int, width: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width), dtype=np.uint8), rng.random((height, width)) < share


def ours(metric: Callable[..., torch.Tensor], prediction: np.ndarray, mask: np.ndarray) -> float:
    as_tensors = torch.from_numpy(prediction / 255.0)[None, None], torch.from_numpy(mask)[None, None].double()
    return metric(*as_tensors).item()


@settings(deadline=None, max_examples=200)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    constant=st.sampled_from([None, 0, 127, 255]),
    seed=st.integers(0, 10_000),
)
def test_s_measure_and_mae_equal_the_reference(
    height: int, width: int, share: float, constant: int | None, seed: int
) -> None:
    prediction, mask = random_case(height, width, share, seed)
    if constant is not None:
        prediction[:] = constant
    structure, error = pysodmetrics.Smeasure(), pysodmetrics.MAE()
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        structure.step(prediction / 255.0, mask, normalize=False)
    error.step(prediction / 255.0, mask, normalize=False)
    expected = structure.get_results()["sm"]
    if np.isnan(expected):  # the centroid lies in the last row or column, and the reference averages an empty region
        assert 0 <= ours(s_measure, prediction, mask) <= 1
    else:
        assert ours(s_measure, prediction, mask) == pytest.approx(expected, abs=1e-9)
    assert ours(mae, prediction, mask) == pytest.approx(error.get_results()["mae"], abs=1e-9)


@given(share=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_iou_and_dice_count_pixels_above_one_half(share: float, seed: int) -> None:
    prediction, mask = random_case(12, 15, share, seed)
    predicted = prediction / 255.0 > 0.5
    both, either = (predicted & mask).sum(), (predicted | mask).sum()
    assert ours(iou, prediction, mask) == pytest.approx(both / either if either else 1.0)
    assert ours(dice, prediction, mask) == pytest.approx(2 * both / (both + either) if either else 1.0)


def test_scores_are_per_image() -> None:
    probabilities, masks = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    masks[1] = 1
    probabilities[2], masks[2, :, :2] = 1, 1
    assert iou(probabilities, masks).tolist() == [1.0, 0.0, 0.5]
    assert dice(probabilities, masks).tolist() == pytest.approx([1.0, 0.0, 2 / 3])
    assert mae(probabilities, masks).tolist() == [0.0, 1.0, 0.5]
    assert s_measure(probabilities, masks).shape == (3,)
