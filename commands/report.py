"""The ``report`` command: writes a run, or several runs overlaid, as one HTML file to read offline."""

import time
from collections.abc import Sequence
from pathlib import Path

from commands.output import print_lines, require_writable
from commands.own_files import is_report, require_own
from reporting.history import read_run
from reporting.report import COMPARISON, REPORT, galleries_or_reason, write_report
from runtime.folder import folders_of


def report(directories: Sequence[Path], output: Path | None, epochs: Sequence[int]) -> int:
    """Write the page and print where it is.

    Args:
        directories: folders of the runs, or of the folds of one; several runs are compared.
        output: file to write; None for ``report.html`` in the run's folder, ``comparison.html`` in that of the folds,
            or here for several folders.
        epochs: epochs from 1 whose validation images are shown; empty for the best one.

    Raises:
        ValueError, OSError: a folder holds no run, plotly is missing, or the file cannot be written.
    """
    start = time.monotonic()
    if output is not None:
        if output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {output}: a report is an HTML page; try {output.with_suffix('.html')}")
        require_writable(output)
        require_own([output], is_report, "report", f"--output {output}")
    runs = [read_run(folder) for directory in directories for folder in folders_of(directory)]
    if output is None:
        folder = directories[0] if len(directories) == 1 else Path()
        output = folder / (REPORT if len(runs) == 1 else COMPARISON)
        require_writable(output)
        require_own([output], is_report, "report", "--output is not given")
    pictures = [galleries_or_reason(run, epochs) for run in runs]
    write_report(runs, pictures, output)
    notes = [f"{run.directory}: {run.state}" for run in runs if run.end is None]
    for run, own in zip(runs, pictures, strict=True):
        notes += [f"{run.directory}: {gallery.note}" for gallery in own if not gallery.examples]
    size, seconds = output.stat().st_size / 2**20, time.monotonic() - start
    print_lines([*notes, f"Report: {output} ({size:.1f} MB, {seconds:.1f} s)"])
    return 0
