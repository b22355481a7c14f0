"""What was found in a photograph, in numbers."""

import numpy as np
import pytest

from evaluation.objects import CSV_COLUMNS, Found, describe


def found(*rectangles: tuple[int, int, int, int], level: int = 255, shape: tuple[int, int] = (100, 200)) -> Found:
    """Return an answer with objects at left, top, width and height."""
    levels = np.zeros(shape, dtype=np.uint8)
    for left, top, width, height in rectangles:
        levels[top : top + height, left : left + width] = level
    return Found(levels, levels >= 128)


def test_boxes_are_those_of_the_objects_largest_first() -> None:
    finding = describe(found((10, 20, 5, 6), (100, 50, 40, 30)), least=0)
    assert finding.boxes == ((100, 50, 40, 30), (10, 20, 5, 6))
    assert finding.object_share == pytest.approx((30 + 1200) / 20_000)
    assert (finding.width, finding.height, finding.presence, finding.doubt) == (200, 100, 1, 0)


def test_pixels_that_touch_at_a_corner_are_one_object() -> None:
    assert describe(found((10, 10, 5, 5), (15, 15, 5, 5)), least=0).boxes == ((10, 10, 10, 10),)


def test_an_object_smaller_than_the_least_has_no_box() -> None:
    answer = found((10, 20, 5, 4), (100, 50, 40, 30))
    assert len(describe(answer, least=20 / 20_000).boxes) == 2
    assert len(describe(answer, least=21 / 20_000).boxes) == 1


def test_a_faint_object_is_more_doubtful_than_a_clear_one_and_nothing_is_as_doubtful_as_it_looks() -> None:
    """Expected Dice of pixels with probability p, all of which are taken for object, is 2p / (1 + p)."""
    doubts = [describe(found((0, 0, 10, 10), level=level), least=0).doubt for level in (255, 204, 153)]
    assert doubts == pytest.approx([1 - 2 * p / (1 + p) for p in (1, 0.8, 0.6)])
    nothing = describe(found((0, 0, 10, 10), level=51), least=0)
    assert (nothing.boxes, nothing.object_share, nothing.doubt) == ((), 0, pytest.approx(0.2))


def test_a_row_has_a_value_for_each_column() -> None:
    row = describe(found((10, 20, 5, 6), (100, 50, 40, 30)), least=0).row("a, b.jpg")
    assert len(row) == len(CSV_COLUMNS)
    assert row[:3] == ["a, b.jpg", "200", "100"]
    assert row[5:7] == ["2", "100 50 40 30; 10 20 5 6"]
