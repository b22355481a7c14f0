"""Tables of methods by sets, in each format, and what their sentences claim."""

import csv
import io

import pytest

from evaluation.statistics import Difference
from reporting.score_table import Row, ScoreTable, comma_separated, latex, markdown, sentence, terminal_lines

MEASURES = {"s_measure": "S", "mae": "MAE"}


def table(**methods: tuple[list[float], list[float]]) -> ScoreTable:
    """Return a table of one set, with the runs' S and MAE of each method."""
    rows = [Row(name, {"CAMO": {"s_measure": s, "mae": mae}}) for name, (s, mae) in methods.items()]
    return ScoreTable({"CAMO": 250}, MEASURES, rows)


def test_the_best_has_the_highest_score_and_the_lowest_error() -> None:
    found = table(a=([0.8], [0.05]), b=([0.9], [0.07]), c=([0.7], [0.06])).ranks
    assert {(row, measure): place for (row, _, measure), place in found.items()} == {
        (1, "s_measure"): 1, (0, "s_measure"): 2, (0, "mae"): 1, (2, "mae"): 2,
    }  # fmt: skip


def test_what_is_printed_alike_is_equally_good() -> None:
    ranks = table(a=([0.80001], [0.1]), b=([0.80003], [0.2]), c=([0.7], [0.3])).ranks
    assert [ranks[row, "CAMO", "s_measure"] for row in range(3)] == [1, 1, 2]


def test_a_method_alone_is_not_the_best() -> None:
    assert table(a=([0.8], [0.1])).ranks == {}


def test_runs_become_a_mean_and_a_standard_deviation() -> None:
    text = "\n".join(terminal_lines(table(a=([0.8, 0.9], [0.1, 0.1]), b=([0.7], [0.2]))))
    assert "CAMO, 250 images" in text
    assert "0.850 ± 0.071*" in text
    assert "0.700+" in text
    assert "| **0.850 ± 0.071** |" in markdown(table(a=([0.8, 0.9], [0.1, 0.1]), b=([0.7], [0.2])))


def test_numbers_that_a_paper_does_not_have_are_left_empty() -> None:
    rows = [Row("paper", {"CAMO": {"s_measure": [0.9]}}, "its page 7"), Row("own", {"CAMO": {"mae": [0.1]}})]
    mixed = ScoreTable({"CAMO": 250, "NC4K": 4121}, MEASURES, rows)
    assert "| paper | 0.900 |  |  |  |" in markdown(mixed)
    assert "paper: its page 7." in markdown(mixed)
    assert "paper & 0.900 & -- & -- & -- \\\\" in latex(mixed)
    assert "% paper: its page 7" in latex(mixed)


def test_names_with_signs_of_latex_and_markdown_are_printed_as_they_are() -> None:
    odd = table(**{"a_b|c & 50%~": ([0.9], [0.1])})
    assert r"a\_b|c \& 50\%\textasciitilde{} & 0.900" in latex(odd)
    assert r"| a_b\|c & 50%~ | 0.900" in markdown(odd)


def test_csv_has_a_line_for_each_run_with_all_digits() -> None:
    lines = list(csv.DictReader(io.StringIO(comma_separated(table(a=([1 / 3, 0.9], [0.1, 0.2]))))))
    assert [(line["method"], line["set"], line["images"], line["run"]) for line in lines] == [
        ("a", "CAMO", "250", "1"), ("a", "CAMO", "250", "2"),
    ]  # fmt: skip
    assert float(lines[0]["s_measure"]) == 1 / 3


def found(mean: float, low: float, high: float, higher: int, lower: int) -> Difference:
    return Difference(mean, low, high, higher, lower, 100, None)


@pytest.mark.parametrize(
    ("difference", "p", "lower", "start", "end"),
    [
        (found(0.016, 0.007, 0.025, 70, 30), 0.0004, False, "a is better than b on CAMO: S +.016 [+.007, +.025]",
         ", p < .001; better on 70 of 100 images, worse on 30"),
        (found(0.016, 0.007, 0.025, 70, 30), 0.03, True, "a is worse than b on CAMO: ",
         ", p = .030; better on 30 of 100 images, worse on 70"),
        (found(0.016, -0.007, 0.025, 60, 40), 0.2, False, "a and b do not differ on CAMO beyond chance: ",
         "p = .200; better on 60 of 100 images, worse on 40"),
        (found(0.001, -0.007, 0.025, 90, 10), 0.001, False, "a is better than b on most images of CAMO, but not by its "
         "mean: ", "worse on 10"),
        (found(-0.01, -0.02, -0.001, 40, 60), None, False, "a is worse than b on CAMO: S -.010 [-.020, -.001]; ", ""),
        (found(0.01, -0.02, 0.04, 60, 40), None, False, "a and b do not differ on CAMO beyond chance: ", ""),
        (found(1.5, 1.2, 2.0, 60, 40), 1.0, False, "a and b do not differ", ", p = 1.000; better on 60 of 100 images, "
         "worse on 40"),
    ],
)  # fmt: skip
def test_a_sentence_says_no_more_than_the_numbers_do(
    difference: Difference, p: float | None, lower: bool, start: str, end: str
) -> None:
    text = sentence("a", "b", "CAMO", "S", difference, p, lower)
    assert text.startswith(start)
    assert text.endswith(end)
