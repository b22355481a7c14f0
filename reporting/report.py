"""The report of a run, or of several, written as one HTML file."""

from collections.abc import Sequence
from pathlib import Path

from reporting.charts import charts_of
from reporting.history import RunHistory, read_run, unique_names
from reporting.page import render
from reporting.pictures import Gallery, galleries
from runtime.files import first_line, write_text

REPORT, COMPARISON = "report.html", "comparison.html"  # the second never takes the place of a run's own

NO_PLOTLY = "plotly is not installed, and reports need it for their charts: pip install plotly"


def _galleries(run: RunHistory, epochs: Sequence[int]) -> list[Gallery]:
    """A checkpoint that cannot be used costs the pictures, not the report."""
    try:
        return galleries(run, epochs)
    except (ValueError, OSError, RuntimeError) as error:
        return [Gallery("Validation images", f"No pictures: {first_line(error)}", [])]


def write_report(runs: Sequence[RunHistory], pictures: Sequence[Sequence[Gallery]], output: Path) -> None:
    """Write the page of these runs, in one step.

    Raises:
        ValueError: plotly is not installed.
        OSError: the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ValueError(NO_PLOTLY) from error
    names = unique_names(runs)
    page = render(runs, names, charts_of(runs, names), pictures, get_plotlyjs())
    write_text(output, page)


def write_final_report(directory: Path, with_pictures: bool) -> str:
    """The report at a run's end, from what is at hand in seconds; returns the line to print. Never raises an Exception.

    Args:
        directory: of the run.
        with_pictures: of a few validation images.
    """
    try:
        run = read_run(directory)
        try:
            own = galleries(run, [], few=True) if with_pictures else []
        except Exception as error:  # the charts do not need them
            own = [Gallery("Validation images", f"No pictures: {first_line(error)}", [])]
        write_report([run], [own], directory / REPORT)
    except Exception as error:
        again = f"later: python train_ultimate.py report {directory}"
        return f"Warning: no report written ({str(error) or type(error).__name__}); {again}"
    return f"Report: {directory / REPORT}"
