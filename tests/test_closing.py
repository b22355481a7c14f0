"""The last lines of a run: what there was too little of, and what would be enough."""

import math
import re
from dataclasses import replace

import pytest
from conftest import ROOT, Argv, prepare_run

from reporting.closing import closing_lines
from training.rules import FEW_WINDOWS, enough_epochs
from training.run import Run


@pytest.fixture
def run(tiny_argv: Argv) -> Run:
    """A run with 20 images in 4 windows an epoch, and 2 images to validate on."""
    return prepare_run(tiny_argv())


def test_too_few_windows_are_answered_with_the_epochs_that_are_enough_for_this_dataset(run: Run) -> None:
    run.state.progress.global_window = 16
    first = closing_lines(run)[0]
    assert first.startswith("Only 16 windows (optimizer steps) were trained, too few to learn much: with 20 training")
    assert "--epochs 150 is enough" in first
    assert enough_epochs(20, 6) * 4 == 600
    run.state.progress.global_window = FEW_WINDOWS
    assert not any(line.startswith(f"Only {FEW_WINDOWS}") for line in closing_lines(run))


@pytest.mark.parametrize(("number", "error"), [(2, "0.18"), (8, "0.09"), (29, "0.05"), (30, None)])
def test_few_validation_images_are_answered_with_the_standard_error_of_their_mean(
    run: Run, number: int, error: str | None
) -> None:
    run.data = replace(run.data, validation=["image.jpg"] * number)
    lines = [line for line in closing_lines(run) if "validate on" in line]
    expected = f"Only {number} images to validate on: the standard error of their mean IoU is about {error}; smaller"
    assert [line[: len(expected)] for line in lines] == ([expected] if error else [])


def test_the_table_of_the_recipe_has_the_epochs_of_the_closing_line() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| ([\d,]+) \|", text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["50", "200", "1,000", "4,000"]
    for photographs, epochs, windows in rows:
        num_training = round(0.9 * int(photographs.replace(",", "")))
        assert int(epochs) == enough_epochs(num_training, 8)
        assert int(windows.replace(",", "")) == int(epochs) * math.ceil(num_training / 8)
