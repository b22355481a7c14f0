"""The charts of a report, as plotly's figures with their numbers as tables; colours suit a light and a dark page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reporting.history import EPOCH_FILE, RunHistory, WindowPoint, label, number, whole
from runtime.folder import BEST

MOST_POINTS = 3000  # per line: no screen shows more, and more make the page slow
_TABLE_ROWS = 40  # at most, in the table behind a chart of windows
_MEAN_OVER = 50  # windows
_MOST_TRIANGLES = 30  # marks of checkpoints in a chart; more are drawn as thin ticks
_MOST_TICKS = 120
_HEIGHT = 320  # pixels
_LEGEND_LINE = 12  # pixels added for each name in the legend: on a phone each takes a line of its own
# Contrast of at least 3:1 on white and on the dark page.
COLOURS = ("#3b82f6", "#d97706", "#0d9488", "#a855f7", "#db2777", "#65a30d", "#0891b2", "#b45309")
INCIDENT, CHECKPOINT, LIMIT = "#ef4444", "#16a34a", "#8b8f98"
_DASHES = ("solid", "dash")  # decoder, backbone

FloatArray = NDArray[np.float64]
Trace = dict[str, Any]
NamedRuns = Sequence[tuple[RunHistory, str]]


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart, with its description and table for readers who cannot see it or want the numbers."""

    key: str  # of its ids in the page
    title: str
    description: str
    figure: dict[str, Any]  # plotly's "data" and "layout"
    table: Table


def charts_of(runs: Sequence[RunHistory], names: Sequence[str]) -> list[Chart]:
    """Return the charts of a run, or of several runs overlaid; empty charts are left out."""
    named = list(zip(runs, names, strict=True))
    scores = {"iou": "IoU", "dice": "Dice", "s_measure": "S-measure"}
    if len(runs) == 1:
        charts = [_epoch_chart(named, "scores", "Validation scores", scores, "Means over images, 0 to 1.")]
    else:
        charts = [
            _epoch_chart(named, key, f"Validation {title}", {key: title}, "Mean over images.")
            for key, title in scores.items()
        ]
    speed = {"images_per_second": "images/s"}
    charts += [
        _epoch_chart(named, "epoch-loss", "Loss by epoch", {"loss": "loss"}, "Mean over applied windows."),
        _loss_chart(named),
        _norm_chart(named),
        _learning_rate_chart(named),
        _scale_chart(named),
        _epoch_chart(named, "throughput", "Throughput", speed, "During training, without validation."),
    ]
    return [chart for chart in charts if chart is not None]


def thin(values: FloatArray, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """Return the positions of at most ``most`` values that draw the same curve: minimum and maximum of each span.

    The first and the last value are kept, and one non-finite value of each span that has any.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for span in np.array_split(np.arange(len(values)), (most - 2) // 3):
        finite = span[np.isfinite(values[span])]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if len(finite) < len(span):
            kept.add(int(span[~np.isfinite(values[span])][0]))
    return np.array(sorted(kept), dtype=np.intp)


def _epoch_chart(runs: NamedRuns, key: str, title: str, series: dict[str, str], description: str) -> Chart | None:
    """Return a chart of some fields of the epoch events.

    Args:
        runs: one or several, with their names.
        key: see ``Chart``.
        title: see ``Chart``.
        series: field -> its name in the chart.
        description: see ``Chart``.
    """
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for index, (run, name) in enumerate(runs):
        epochs = sorted(run.epochs)
        for position, (field, title_of_field) in enumerate(series.items()):
            values = [number(run.epochs[epoch], field) for epoch in epochs]
            shown = name if len(runs) > 1 else title_of_field
            hover = f"{shown} %{{y:.4g}}<extra></extra>"
            traces.append(_line(epochs, values, shown, _colour(runs, index, position), hover=hover, dots=True))
        for epoch in epochs:
            rows.append([*_run_cell(runs, name), str(epoch), *(_text(number(run.epochs[epoch], f)) for f in series)])
        if key == "scores":
            traces += _saved_epochs(run)
    if not rows:
        return None
    layout = layout_of("epoch", ", ".join(series.values()) if len(series) == 1 else "score")
    if key == "throughput":
        layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"] |= {"tickformat": "d", **({"dtick": 1} if len(rows) <= 12 * len(runs) else {})}
    columns = [*_run_cell(runs, "run"), "epoch", *series.values()]
    return Chart(key, title, description, with_legend(traces, layout), Table(title, columns, rows))


def _saved_epochs(run: RunHistory) -> list[Trace]:
    """Return marks below the curves for the checkpoints of epochs, and a star on the best IoU."""
    saved = {epoch: file for file, (epoch, _) in run.checkpoints.items() if EPOCH_FILE.fullmatch(file)}
    traces = [_marks(list(saved), list(saved.values()), "checkpoints", "triangle-up", CHECKPOINT, 0.02)]
    if run.best is not None:
        iou, epoch = run.best
        best = {"type": "scatter", "mode": "markers", "name": "best IoU", "x": [epoch], "y": [rounded(iou)]}
        star = {"symbol": "star", "size": 15, "color": COLOURS[0], "line": {"width": 1, "color": "#ffffff"}}
        traces.append({**best, "marker": star, "hovertemplate": f"best: {iou:.4f} in epoch {epoch}<extra></extra>"})
    return [trace for trace in traces if trace["x"]]


def _loss_chart(runs: NamedRuns) -> Chart | None:
    description = (
        "Each window (the batches of one optimizer step) by its number in the run, and the mean over those applied "
        f"among the last {_MEAN_OVER}. Gaps are losses that were not finite."
    )
    return _window_chart(runs, "window-loss", "Loss by window", "loss", lambda p: p.loss, description, mean=True)


def _norm_chart(runs: NamedRuns) -> Chart | None:
    """Return the chart of gradient norms; for a single run with its clip and spike limits."""
    key, title, description = "gradient-norm", "Gradient norm by window", "Before clipping, on a logarithmic scale."
    chart = _window_chart(runs, key, title, "norm", lambda p: p.grad_norm, description, mean=True, log=True)
    if chart is None or len(runs) > 1:
        return chart
    run, traces = runs[0][0], chart.figure["data"]
    numbers = [point.number for point in run.points]
    clip = number(run.settings, "grad_clip")
    if not math.isnan(clip):
        ends = [numbers[0], numbers[-1]]
        for height, name, dash in ((clip, "--grad-clip", "dash"), (5 * clip, "5 x --grad-clip: warning", "dot")):
            traces.append(_line(ends, [height] * 2, name, LIMIT, dash, hover=f"{name}: {height:g}<extra></extra>"))
    limits = np.array([point.spike_limit for point in run.points])
    if np.isfinite(limits).any():
        description += " Above the spike limit, a window is skipped or clipped, as --spike-policy says."
        chosen = thin(limits, MOST_POINTS // 2)
        x = [numbers[i] for i in chosen]
        hover = "spike limit %{y:.3g}<extra></extra>"
        traces.append(_line(x, limits[chosen], "spike limit", INCIDENT, "dot", hover=hover))
    return replace(chart, description=description, figure=with_legend(traces, chart.figure["layout"]))


def _learning_rate_chart(runs: NamedRuns) -> Chart | None:
    """Return the chart of learning rates: the decoder's is logged, the backbone's is computed from it."""
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for index, (run, name) in enumerate(runs):
        scale = number(run.settings, "backbone_lr_scale")
        decoder = np.array([point.lr for point in run.points])
        backbone = np.array([0.0 if point.stage == 1 else point.lr * scale for point in run.points])
        for position, (part, values) in enumerate((("decoder", decoder), ("backbone", backbone))):
            chosen = thin(values)
            x = [run.points[i].number for i in chosen]
            shown = f"{name}, {part}" if len(runs) > 1 else part
            hover = f"{shown} %{{y:.3g}}<extra></extra>"
            colour = _colour(runs, index, position)
            traces.append(_line(x, values[chosen], shown, colour, _DASHES[position], hover=hover))
        for span in _spans(run):
            windows = f"{run.points[span[0]].number} to {run.points[span[-1]].number}"
            rates = [_text(float(values[i])) for values in (decoder, backbone) for i in (span[0], span[-1])]
            rows.append([*_run_cell(runs, name), windows, *rates])
    if not rows:
        return None
    columns = ["windows", "decoder, first", "decoder, last", "backbone, first", "backbone, last"]
    table = Table("Learning rates", [*_run_cell(runs, "run"), *columns], rows)
    layout = layout_of("window", "learning rate")
    layout["yaxis"] |= {"exponentformat": "e", "rangemode": "tozero"}
    description = "Decoder and backbone. The backbone is frozen in stage 1."
    return Chart("learning-rates", "Learning rates", description, with_legend(traces, layout), table)


def _scale_chart(runs: NamedRuns) -> Chart | None:
    """Return the chart of the loss scale; None without fp16, when it is 1 in every window."""
    if all(point.loss_scale == 1 for run, _ in runs for point in run.points):
        return None
    description = "Used by fp16: halved at each overflow, raised after many windows without one."
    return _window_chart(runs, "loss-scale", "Loss scale", "scale", lambda p: p.loss_scale, description, log=True)


def _window_chart(
    runs: NamedRuns,
    key: str,
    title: str,
    axis: str,
    value: Callable[[WindowPoint], float],
    description: str,
    mean: bool = False,
    log: bool = False,
) -> Chart | None:
    """Return a chart of one number of each window; for a single run with its incidents and checkpoints.

    Args:
        runs: one or several, with their names.
        key: see ``Chart``.
        title: see ``Chart``.
        axis: title of the vertical axis.
        value: returns the number of a window.
        description: see ``Chart``.
        mean: add a running mean over applied windows.
        log: make the vertical axis logarithmic.
    """
    traces: list[Trace] = []
    rows: list[list[str]] = []
    annotations: list[dict[str, Any]] = []
    for index, (run, name) in enumerate(runs):
        points = run.points
        values = np.array([value(point) for point in points], dtype=np.float64)
        applied = np.array([point.applied for point in points], dtype=bool)
        smooth = None
        if mean and len(values) > 2 * _MEAN_OVER:
            smooth = _running_mean(np.where(applied, values, np.nan))
        chosen = thin(values)
        shown = name if len(runs) > 1 else axis
        x = [points[i].number for i in chosen]
        hover = f"{shown} %{{y:.4g}}<br>%{{text}}<extra></extra>"
        line = _line(x, values[chosen], shown, _colour(runs, index, 0), hover=hover)
        places = [f"epoch {points[i].epoch}, window {points[i].window}" for i in chosen]
        traces.append({**line, "text": places, "opacity": 0.45 if smooth is not None else 1.0})
        if smooth is not None:
            chosen = thin(smooth, MOST_POINTS // 2)
            x = [points[i].number for i in chosen]
            mean_of = f"{shown}, mean over {_MEAN_OVER}"
            hover = f"{mean_of} %{{y:.4g}}<extra></extra>"
            traces.append(_line(x, smooth[chosen], mean_of, _colour(runs, index, 1), hover=hover))
        rows += [[*_run_cell(runs, name), *_summary(points, values, span)] for span in _spans(run)]
        if len(runs) == 1:
            incidents, annotations = _incident_marks(run)
            traces += [*incidents, *_saved_windows(run)]
    if not rows:
        return None
    layout = layout_of("window", axis, annotations)
    if log:
        layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1 if _decades(traces) > 1 else "D2"}
    columns = [*_run_cell(runs, "run"), "windows", "epochs", "minimum", "mean", "maximum", "not finite"]
    return Chart(key, title, description, with_legend(traces, layout), Table(title, columns, rows))


def _incident_marks(run: RunHistory) -> tuple[list[Trace], list[dict[str, Any]]]:
    """Return a mark above the curve for each incident, and its number, a link to its entry in the page."""
    incidents = []
    for folder, record in run.incidents.items():
        at = run.window_number(whole(record, "epoch"), number(record, "window"))
        if not math.isnan(at):
            incidents.append((at, folder, f"{label(record.get('verdict', ''))}: {record.get('action', '')}"))
    incidents.sort()
    if not incidents:
        return [], []
    x, folders, texts = (list(column) for column in zip(*incidents, strict=True))
    marks = _marks(x, texts, "incidents", "triangle-down", INCIDENT, 0.97)
    marks["customdata"] = [f"incident-{folder}" for folder in folders]
    reach = 0.08 * max(1, run.points[-1].number - run.points[0].number)  # incidents closer than this share a link
    groups: list[list[int]] = []
    for index, at in enumerate(x):
        if groups and at - x[groups[-1][0]] < reach:
            groups[-1].append(index)
        else:
            groups.append([index])
    annotations = []
    for group in groups:
        first, last = (folders[group[position]].lstrip("0") for position in (0, -1))
        shown = str(first) if first == last else f"{first}, …"
        entry = f"incident-{folders[group[0]]}"
        link = f'<a href="#{entry}" target="_self">{shown}</a>'
        place = {"x": x[group[0]], "y": 1.0, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        annotations.append({"name": entry, "text": link, **place, "font": {"color": INCIDENT, "size": 13}})
    return [marks], annotations


def _saved_windows(run: RunHistory) -> list[Trace]:
    saved = sorted((at, file) for file, at in run.saved.items() if not math.isnan(at) and file != BEST)
    if not saved:
        return []
    chosen = sorted({*range(0, len(saved), -(-len(saved) // _MOST_TICKS)), len(saved) - 1})
    x, files = zip(*(saved[index] for index in chosen), strict=True)
    return [_marks(list(x), list(files), "checkpoints", "triangle-up", CHECKPOINT, 0.02)]


def _marks(x: Sequence[float], texts: Sequence[str], name: str, symbol: str, colour: str, height: float) -> Trace:
    """Return marks on an axis of their own: at a height from 0 to 1 of the chart, whatever the curve's values."""
    marker: dict[str, Any] = {"symbol": symbol, "size": 11, "color": colour}
    if symbol == "triangle-up" and len(x) > _MOST_TRIANGLES:
        marker |= {"symbol": "line-ns", "size": 8, "line": {"width": 1, "color": colour}}
    wrapped = ["<br>".join(_wrapped(text)) for text in texts]
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": [height] * len(x), "yaxis": "y2",
        "text": wrapped, "hovertemplate": "%{text}<extra></extra>", "marker": marker,
    }  # fmt: skip


def _wrapped(text: str, width: int = 44) -> list[str]:
    lines = [""]
    for word in text.replace("&", "&amp;").replace("<", "&lt;").split():
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _line(
    x: Sequence[float],
    y: Sequence[float] | FloatArray,
    name: str,
    colour: str,
    dash: str = "solid",
    hover: str = "",
    dots: bool = False,
) -> Trace:
    return {
        "type": "scatter", "mode": "lines+markers" if dots and len(x) <= 60 else "lines", "name": name,
        "x": [int(value) for value in x], "y": [rounded(value) for value in y], "hovertemplate": hover,
        "line": {"color": colour, "dash": dash, "width": 2 if dots or dash != "solid" else 1.5}, "connectgaps": False,
    }  # fmt: skip


def layout_of(x_title: str, y_title: str, annotations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the layout of a chart, in colours for light and dark pages."""
    axis = {"automargin": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)", "linecolor": LIMIT}
    return {
        "height": _HEIGHT,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#80848c"},
        "xaxis": {**axis, "title": {"text": x_title, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": y_title, "standoff": 6}},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "annotations": list(annotations),
    }


def with_legend(traces: list[Trace], layout: dict[str, Any]) -> dict[str, Any]:
    """Return the figure, with a legend and room for it if it has more than one trace."""
    if len(traces) > 1:
        layout |= {"showlegend": True, "height": _HEIGHT + _LEGEND_LINE * len(traces)}
    return {"data": traces, "layout": layout}


def _running_mean(values: FloatArray) -> FloatArray:
    """Return the mean of the finite ones among the last ``_MEAN_OVER`` values; NaN if there are none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    first = np.maximum(np.arange(len(values)) + 1 - _MEAN_OVER, 0)
    last = np.arange(len(values)) + 1
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _spans(run: RunHistory) -> list[NDArray[np.intp]]:
    """Return the positions of the windows, split into one span of neighbours for each row of a table."""
    count = len(run.points)
    return np.array_split(np.arange(count), min(_TABLE_ROWS, count)) if count else []


def _run_cell(runs: NamedRuns, text: str) -> list[str]:
    """Return the first cell of a table's row, which names the run if there are several."""
    return [text] if len(runs) > 1 else []


def _colour(runs: NamedRuns, run: int, series: int) -> str:
    """Return a colour for each run if there are several, else for each series."""
    return COLOURS[(run if len(runs) > 1 else series) % len(COLOURS)]


def _summary(points: Sequence[WindowPoint], values: FloatArray, span: NDArray[np.intp]) -> list[str]:
    first, last, part = points[span[0]], points[span[-1]], values[span]
    finite = part[np.isfinite(part)]
    figures = [finite.min(), finite.mean(), finite.max()] if len(finite) else [math.nan] * 3
    windows = f"{first.number} to {last.number}" if len(span) > 1 else str(first.number)
    epochs = str(first.epoch) if first.epoch == last.epoch else f"{first.epoch} to {last.epoch}"
    return [windows, epochs, *(_text(float(figure)) for figure in figures), str(len(part) - len(finite))]


def _decades(traces: Sequence[Trace]) -> float:
    """Return how many powers of ten the lines span."""
    values = [y for trace in traces if trace.get("yaxis") != "y2" for y in trace["y"] if y is not None and y > 0]
    return math.log10(max(values) / min(values)) if values else 0


def rounded(value: float) -> float | None:
    """Return a value to six digits, which keeps the page small; None, a gap in the line, if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"
