"""Figures of ``compare`` for papers, as SVG or PDF: the grid of images, masks and predictions, and the curves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reporting.charts import COLOURS
from reporting.comparison import CURVES, MethodDetails
from reporting.score_table import MADE_BY

SUFFIXES = (".svg", ".pdf")
CELL = (480, 480)  # pixels of a picture in the grid, at most
_CELL_WIDTH, _PANEL_WIDTH, _PANEL_HEIGHT = 1.3, 2.7, 2.2  # inches
_STYLE: Any = {"font.size": 8, "font.family": "serif", "svg.hashsalt": MADE_BY, "pdf.fonttype": 42}
_DASHES = ("-", "--", ":")  # more methods than colours


@dataclass(frozen=True)
class GridRow:
    """A row of the grid: pictures, each with the title of its column."""

    name: str
    pictures: Sequence[tuple[str, Image.Image]]


def require_drawing(files: Sequence[Path]) -> None:
    """Check that files can be drawn.

    Raises:
        ValueError: matplotlib is missing, or a file's ending is another.
    """
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{file}: name a {' or '.join(SUFFIXES)} file")
    if files and find_spec("matplotlib") is None:
        raise ValueError(f"{files[0]}: figures need matplotlib: pip install matplotlib")


def draw_grid(rows: Sequence[GridRow], suffix: str) -> bytes:
    """Return the figure of rows of pictures, all with the same columns.

    Args:
        rows: at least one.
        suffix: of ``SUFFIXES``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    titles = [title for title, _ in rows[0].pictures]
    heights = [min(max(image.height / image.width, 0.4), 1.6) for image in (row.pictures[0][1] for row in rows)]
    with rc_context(_STYLE):
        figure = Figure((_CELL_WIDTH * len(titles), _CELL_WIDTH * sum(heights) + 0.25), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)  # pyright: ignore
        grid = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
        for row, axes in zip(rows, grid, strict=True):
            for (_, picture), own in zip(row.pictures, axes, strict=True):
                own.imshow(np.asarray(picture), interpolation="none")
                own.set_axis_off()
        for title, own in zip(titles, grid[0], strict=True):
            own.set_title(title, pad=3)
        return _saved(figure, suffix)


def draw_curves(methods: Sequence[MethodDetails], sets: Sequence[str], suffix: str) -> bytes:
    """Return the figure of precision and recall, F and E of each set, a row a set.

    Args:
        methods: those that were scored.
        sets: their names.
        suffix: of ``SUFFIXES``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        size = _PANEL_WIDTH * len(CURVES), _PANEL_HEIGHT * len(sets) + 0.2 * -(-len(methods) // 4)
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(sets), len(CURVES), squeeze=False)
        for set_name, row in zip(sets, grid, strict=True):
            for (key, _, axis, _), axes in zip(CURVES, row, strict=True):
                for number, method in enumerate(methods):
                    curves = method.curves[set_name]
                    x, y = (curves["recall"], curves["precision"]) if key == "pr" else (np.arange(256), curves[key])
                    dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
                    axes.plot(x, y, dash, color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=method.name)
                axes.set(xlabel="recall" if key == "pr" else "threshold", ylabel=axis, title=set_name)
                axes.grid(visible=True, linewidth=0.3)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return _saved(figure, suffix)


def _saved(figure: Any, suffix: str) -> bytes:
    """Return a figure as a file: the same for the same figure, whenever it is drawn."""
    data, dated = io.BytesIO(), {".svg": "Date", ".pdf": "CreationDate"}[suffix]
    figure.savefig(data, format=suffix[1:], metadata={"Creator": MADE_BY, dated: None}, dpi=300)
    return data.getvalue()
