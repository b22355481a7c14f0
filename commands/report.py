"""``report DIR``: a run, or several on top of each other, as one HTML file that can be read offline."""

import time
from collections.abc import Sequence
from pathlib import Path

from commands.output import print_lines, require_writable
from reporting.history import read_run
from reporting.report import COMPARISON, REPORT, _galleries, write_report


def report(directories: Sequence[Path], output: Path | None, epochs: Sequence[int]) -> int:
    """Write the page and say where it is.

    Args:
        directories: of the runs; several are compared.
        output: file to write; None: ``report.html`` in the run's folder, or ``comparison.html`` here for several.
        epochs: from 1, whose validation images are shown; none: the best one.

    Raises:
        ValueError, OSError: a folder holds no run, plotly is missing, or the file cannot be written.
    """
    begun = time.monotonic()
    if output is not None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {output}: a report is a page; name it {output.with_suffix('.html')}, say")
        require_writable(output)
    runs = [read_run(directory) for directory in directories]
    if output is None:
        output = directories[0] / REPORT if len(runs) == 1 else Path(COMPARISON)
        require_writable(output)
    pictures = [_galleries(run, epochs) for run in runs]
    write_report(runs, pictures, output)
    size, seconds = output.stat().st_size / 2**20, time.monotonic() - begun
    notes = [f"{run.directory}: {run.state}" for run in runs if run.end is None]
    notes += [f"{run.directory}: {gallery.note}" for run, own in zip(runs, pictures, strict=True) for gallery in own
              if not gallery.examples]  # fmt: skip
    print_lines([*notes, f"Report: {output} ({size:.1f} MB, {seconds:.1f} s)"])
    return 0
