"""The report of a run, or of several, as one HTML file."""

import logging
from collections.abc import Sequence
from pathlib import Path

from reporting.charts import charts_of
from reporting.history import RunHistory, read_run, unique_names
from reporting.page import render
from reporting.pictures import Gallery, galleries
from runtime.files import first_line, write_text

REPORT = "report.html"
COMPARISON = "comparison.html"  # of several runs; does not replace the report of any

logger = logging.getLogger("train_ultimate")


def galleries_or_reason(
    run: RunHistory,
    epochs: Sequence[int],
    few: bool = False,
    errors: tuple[type[Exception], ...] = (ValueError, OSError, RuntimeError),
) -> list[Gallery]:
    """Return ``galleries(run, epochs, few)``, or if one of the errors is raised, an empty gallery that says why."""
    try:
        return galleries(run, epochs, few)
    except errors as error:
        return [Gallery("Validation images", f"No pictures: {first_line(error)}", [])]


def write_report(runs: Sequence[RunHistory], pictures: Sequence[Sequence[Gallery]], output: Path) -> None:
    """Write the page of one or several runs, in one step.

    Raises:
        ValueError: plotly is not installed.
        OSError: the file cannot be written.
    """
    names = unique_names(runs)
    page = render(runs, names, charts_of(runs, names), pictures, plotly_script())
    write_text(output, page)


def plotly_script() -> str:
    """Return the JavaScript of plotly.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError("plotly is not installed, and charts need it: pip install plotly") from error
    return get_plotlyjs()


def write_final_report(directory: Path, with_pictures: bool) -> None:
    """Write the report at the end of a run, in seconds, and log its path. Errors, even bugs, are only logged.

    Args:
        directory: folder of the run.
        with_pictures: show a few validation images.
    """
    try:
        run = read_run(directory)
        pictures = galleries_or_reason(run, [], few=True, errors=(Exception,)) if with_pictures else []
        write_report([run], [pictures], directory / REPORT)
    except Exception as error:
        again = f"python train_ultimate.py report {directory}"
        logger.warning("No report written (%s); later: %s", first_line(error), again)
    else:
        logger.info("Report: %s", directory / REPORT)
