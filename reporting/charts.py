"""The charts of a report, as plotly's figures with the numbers behind them. Colours hold on dark paper and on light."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reporting.history import RunHistory, WindowPoint, number, whole
from runtime.folder import BEST

MOST_POINTS = 3000  # of a line; more do not show on any screen and make the page slow
_TABLE_ROWS = 40  # of the table behind a chart of windows
_MEAN_OVER = 50  # windows
_MOST_TRIANGLES, _MOST_TICKS = 30, 120  # marks of checkpoints; more than the first are drawn as thin ticks
_HEIGHT, _LEGEND_LINE = 320, 12  # pixels; the second for each line of the legend, of which a phone has as many as names
# Each at least 3:1 against white and against the dark paper.
COLOURS = ("#3b82f6", "#d97706", "#0d9488", "#a855f7", "#db2777", "#65a30d", "#0891b2", "#b45309")
INCIDENT, CHECKPOINT, LIMIT = "#ef4444", "#16a34a", "#8b8f98"
_DASHES = ("solid", "dash", "dot", "dashdot")

FloatArray = NDArray[np.float64]
Trace = dict[str, Any]


@dataclass(frozen=True)
class Table:
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chart:
    """A chart with what a reader who does not see it, or wants the numbers, needs."""

    key: str  # for ids in the page
    title: str
    description: str
    figure: dict[str, Any]  # plotly's "data" and "layout"
    table: Table


def charts_of(runs: Sequence[RunHistory], names: Sequence[str]) -> list[Chart]:
    """Of one run, or of several on top of each other. A chart that would be empty is left out."""
    labelled = list(zip(runs, names, strict=True))
    together: list[Chart | None] = []
    if len(runs) == 1:
        scores = {"iou": "IoU", "dice": "Dice", "s_measure": "S-measure"}
        together.append(_epoch_chart(labelled, "scores", "Validation scores", scores, "Means over images, 0 to 1."))
    else:
        for key, title in (("iou", "IoU"), ("dice", "Dice"), ("s_measure", "S-measure")):
            together.append(_epoch_chart(labelled, key, f"Validation {title}", {key: title}, "Mean over images."))
    together += [
        _epoch_chart(labelled, "epoch-loss", "Loss by epoch", {"loss": "loss"}, "Mean over applied windows."),
        _loss_chart(labelled),
        _norm_chart(labelled),
        _learning_rate_chart(labelled),
        _scale_chart(labelled),
        _epoch_chart(
            labelled, "throughput", "Throughput", {"images_per_second": "images/s"}, "Training alone, by epoch."
        ),
    ]
    return [chart for chart in together if chart is not None]


def thin(values: FloatArray, most: int = MOST_POINTS) -> NDArray[np.intp]:
    """Positions of at most so many values that look like all of them: the least and the largest of each span.

    The first and the last one are among them, and one value that is not finite of each span that has any.
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


def _epoch_chart(
    runs: Sequence[tuple[RunHistory, str]], key: str, title: str, series: dict[str, str], description: str
) -> Chart | None:
    traces: list[Trace] = []
    rows = []
    for index, (run, name) in enumerate(runs):
        epochs = sorted(run.epochs)
        for position, (field, label) in enumerate(series.items()):
            values = [number(run.epochs[epoch], field) for epoch in epochs]
            colour = COLOURS[(index if len(runs) > 1 else position) % len(COLOURS)]
            shown = name if len(runs) > 1 else label
            traces.append(_line(epochs, values, shown, colour, hover=f"{shown} %{{y:.4g}}<extra></extra>", dots=True))
        rows += [
            [*([name] if len(runs) > 1 else []), str(epoch), *(_text(number(run.epochs[epoch], f)) for f in series)]
            for epoch in epochs
        ]
        if key == "scores":
            traces += _saved_epochs(run)
    if not rows:
        return None
    layout = _layout("epoch", ", ".join(series.values()) if len(series) == 1 else "score")
    if key == "throughput":
        layout["yaxis"]["rangemode"] = "tozero"
    layout["xaxis"] |= {"tickformat": "d", **({"dtick": 1} if len(rows) <= 12 * len(runs) else {})}
    columns = [*(["run"] if len(runs) > 1 else []), "epoch", *series.values()]
    return Chart(key, title, description, _figure(traces, layout), Table(title, columns, rows))


def _saved_epochs(run: RunHistory) -> list[Trace]:
    """A mark below the curves for each checkpoint of an epoch, a star on the best IoU."""
    saved = {epoch: file for file, (epoch, _) in run.checkpoints.items() if epoch and file.startswith("epoch_")}
    traces = [_marks(list(saved), list(saved.values()), "checkpoints", "triangle-up", CHECKPOINT, 0.02)]
    if run.best is not None:
        iou, epoch = run.best
        best = {"type": "scatter", "mode": "markers", "name": "best IoU", "x": [epoch], "y": [_rounded(iou)]}
        star = {"symbol": "star", "size": 15, "color": COLOURS[0], "line": {"width": 1, "color": "#ffffff"}}
        traces.append({**best, "marker": star, "hovertemplate": f"best: {iou:.4f} in epoch {epoch}<extra></extra>"})
    return [trace for trace in traces if trace["x"]]


def _loss_chart(runs: Sequence[tuple[RunHistory, str]]) -> Chart | None:
    description = (
        "Each window (one optimizer step's worth of batches) by its number in the run, and the mean of "
        f"those applied among the last {_MEAN_OVER}. Gaps are losses that were not finite."
    )
    return _window_chart(runs, "window-loss", "Loss by window", "loss", lambda p: p.loss, description, mean=True)


def _norm_chart(runs: Sequence[tuple[RunHistory, str]]) -> Chart | None:
    description = "Before clipping, on a logarithmic scale."
    if len(runs) == 1 and runs[0][0].settings.get("spike_policy") != "off":
        description += (
            " Above the spike limit, recomputed here from the norms before it, a window is skipped or clipped, "
        )
        description += "as --spike-policy says."
    chart = _window_chart(
        runs,
        "gradient-norm",
        "Gradient norm by window",
        "norm",
        lambda p: p.grad_norm,
        description,
        mean=True,
        log=True,
    )
    if chart is None or len(runs) > 1:
        return chart
    (run, _), traces = runs[0], chart.figure["data"]
    numbers = [point.number for point in run.points]
    clip = number(run.settings, "grad_clip")
    ends = [numbers[0], numbers[-1]]
    if not math.isnan(clip):
        for height, name, dash in ((clip, "--grad-clip", "dash"), (5 * clip, "5 x --grad-clip: warned of", "dot")):
            traces.append(_line(ends, [height] * 2, name, LIMIT, dash, hover=f"{name}: {height:g}<extra></extra>"))
    if run.settings.get("spike_policy") != "off":
        limits = np.array(run.spike_limits)
        chosen = thin(limits, MOST_POINTS // 2)
        hover = "spike limit %{y:.3g}<extra></extra>"
        x = [numbers[index] for index in chosen]
        traces.append(_line(x, limits[chosen], "spike limit", INCIDENT, "dot", hover=hover))
    return replace(chart, figure=_figure(traces, chart.figure["layout"]))


def _learning_rate_chart(runs: Sequence[tuple[RunHistory, str]]) -> Chart | None:
    """The decoder's as logged; the backbone's is a fixed multiple of it, and 0 while it is frozen, in stage 1."""
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for index, (run, name) in enumerate(runs):
        scale = number(run.settings, "backbone_lr_scale")
        decoder = np.array([point.lr for point in run.points])
        backbone = np.array([0.0 if point.stage == 1 else point.lr * scale for point in run.points])
        for position, (part, values) in enumerate((("decoder", decoder), ("backbone", backbone))):
            chosen = thin(values)
            x = [run.points[i].number for i in chosen]
            colour = COLOURS[(index if len(runs) > 1 else position) % len(COLOURS)]
            shown = f"{name}, {part}" if len(runs) > 1 else part
            hover = f"{shown} %{{y:.3g}}<extra></extra>"
            traces.append(_line(x, values[chosen], shown, colour, _DASHES[position], hover=hover))
        for span in _spans(run):
            first, last = run.points[span[0]], run.points[span[-1]]
            run_column = [name] if len(runs) > 1 else []
            rates = [_text(float(values[i])) for values in (decoder, backbone) for i in (span[0], span[-1])]
            rows.append([*run_column, f"{first.number} to {last.number}", *rates])
    if not rows:
        return None
    columns = ["windows", "decoder, first", "decoder, last", "backbone, first", "backbone, last"]
    columns = [*(["run"] if len(runs) > 1 else []), *columns]
    layout = _layout("window", "learning rate")
    layout["yaxis"] |= {"exponentformat": "e", "rangemode": "tozero"}
    description = "Of the decoder and of the backbone, which is frozen in stage 1."
    title = "Learning rates"
    return Chart("learning-rates", title, description, _figure(traces, layout), Table(title, columns, rows))


def _scale_chart(runs: Sequence[tuple[RunHistory, str]]) -> Chart | None:
    """Only where there is one: without fp16 it is 1 throughout."""
    if all(point.loss_scale == 1 for run, _ in runs for point in run.points):
        return None
    description = "Of fp16: halved by each overflow, raised after many windows without one."
    return _window_chart(runs, "loss-scale", "Loss scale", "scale", lambda p: p.loss_scale, description, log=True)


def _window_chart(
    runs: Sequence[tuple[RunHistory, str]], key: str, title: str, axis: str,
    value: Callable[[WindowPoint], float], description: str, mean: bool = False, log: bool = False,
) -> Chart | None:  # fmt: skip
    traces: list[Trace] = []
    rows: list[list[str]] = []
    annotations: list[dict[str, Any]] = []
    for index, (run, name) in enumerate(runs):
        points = run.points
        values = np.array([value(point) for point in points], dtype=np.float64)
        applied = np.array([point.applied for point in points], dtype=bool)
        steps = np.where(applied, values, np.nan)  # a window that was skipped, by a spike for one, has moved nothing
        smooth = _running_mean(steps) if mean and len(values) > 2 * _MEAN_OVER else None
        chosen = thin(values)
        shown = name if len(runs) > 1 else axis
        x, where = (
            [points[i].number for i in chosen],
            [f"epoch {points[i].epoch}, window {points[i].window}" for i in chosen],
        )
        hover = f"{shown} %{{y:.4g}}<br>%{{text}}<extra></extra>"
        colour = COLOURS[index % len(COLOURS)]
        line = _line(x, values[chosen], shown, colour, hover=hover)
        traces.append({**line, "text": where, "opacity": 0.45 if smooth is not None else 1.0})
        if smooth is not None:
            few = thin(smooth, MOST_POINTS // 2)
            label = f"{shown}, mean over {_MEAN_OVER}"
            hover = f"{label} %{{y:.4g}}<extra></extra>"
            mean_colour = colour if len(runs) > 1 else COLOURS[1]
            traces.append(_line([points[i].number for i in few], smooth[few], label, mean_colour, hover=hover))
        for span in _spans(run):
            rows.append([*([name] if len(runs) > 1 else []), *_summary(points, values, span)])
        if len(runs) == 1:
            found, annotations = _incident_marks(run)
            traces += [*found, *_saved_windows(run)]
    if not rows:
        return None
    layout = _layout("window", axis, annotations)
    if log:
        layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1 if _decades(traces) > 1 else "D2"}
    columns = [*(["run"] if len(runs) > 1 else []), "windows", "epochs", "least", "mean", "largest", "not finite"]
    return Chart(key, title, description, _figure(traces, layout), Table(title, columns, rows))


def _incident_marks(run: RunHistory) -> tuple[list[Trace], list[dict[str, Any]]]:
    """A mark above the curve for each incident, and beside it its number, a link to its entry in the page."""
    incidents = []
    for folder, record in run.incidents.items():
        at = run.window_number(whole(record, "epoch"), number(record, "window"))
        if not math.isnan(at):
            incidents.append((at, folder, f"{record.get('verdict', '')}: {record.get('action', '')}".replace("_", " ")))
    incidents.sort()
    if not incidents:
        return [], []
    x, folders, texts = (list(column) for column in zip(*incidents, strict=True))
    marks = _marks(x, texts, "incidents", "triangle-down", INCIDENT, 0.97)
    marks["customdata"] = [f"incident-{folder}" for folder in folders]
    reach = 0.08 * max(1, run.points[-1].number - run.points[0].number)  # closer ones share a link to the first
    groups: list[list[int]] = []
    for index, at in enumerate(x):
        if groups and at - x[groups[-1][0]] < reach:
            groups[-1].append(index)
        else:
            groups.append([index])
    annotations = []
    for group in groups:
        first, last = (folders[group[position]].lstrip("0") for position in (0, -1))
        label = str(first) if first == last else f"{first}, …"
        entry = f"incident-{folders[group[0]]}"
        link = f'<a href="#{entry}" target="_self">{label}</a>'
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
    """Marks at a height of the chart, from 0 to 1, whatever its values are: on an axis of their own."""
    marker: dict[str, Any] = {"symbol": symbol, "size": 11, "color": colour}
    if symbol == "triangle-up" and len(x) > _MOST_TRIANGLES:
        marker |= {"symbol": "line-ns", "size": 8, "line": {"width": 1, "color": colour}}
    wrapped = ["<br>".join(_wrapped(text)) for text in texts]
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": [height] * len(x), "yaxis": "y2",
        "text": wrapped, "hovertemplate": "%{text}<extra></extra>",
        "marker": marker,
    }  # fmt: skip


def _wrapped(text: str, width: int = 44) -> list[str]:
    lines = [""]
    for word in text.replace("&", "&amp;").replace("<", "&lt;").split():
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _line(
    x: Sequence[float], y: Sequence[float] | FloatArray, name: str, colour: str, dash: str = "solid",
    hover: str = "", dots: bool = False,
) -> Trace:  # fmt: skip
    return {
        "type": "scatter", "mode": "lines+markers" if dots and len(x) <= 60 else "lines", "name": name,
        "x": [int(value) for value in x], "y": [_rounded(value) for value in y], "hovertemplate": hover,
        "line": {"color": colour, "dash": dash, "width": 2 if dots or dash != "solid" else 1.5}, "connectgaps": False,
    }  # fmt: skip


def _layout(x_title: str, y_title: str, annotations: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
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


def _figure(traces: list[Trace], layout: dict[str, Any]) -> dict[str, Any]:
    """With a legend where there is more than one thing to tell apart, and room for it."""
    if len(traces) > 1:
        layout |= {"showlegend": True, "height": _HEIGHT + _LEGEND_LINE * len(traces)}
    return {"data": traces, "layout": layout}


def _running_mean(values: FloatArray) -> FloatArray:
    """Over the last windows with a finite value; NaN before there is one."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    first = np.maximum(np.arange(len(values)) + 1 - _MEAN_OVER, 0)
    last = np.arange(len(values)) + 1
    number_of = counts[last] - counts[first]
    return np.where(number_of > 0, (sums[last] - sums[first]) / np.maximum(number_of, 1), np.nan)


def _spans(run: RunHistory) -> list[NDArray[np.intp]]:
    """Positions of the windows, in as many runs of neighbours as a table is to have rows."""
    count = len(run.points)
    return [span for span in np.array_split(np.arange(count), min(_TABLE_ROWS, count)) if len(span)] if count else []


def _summary(points: Sequence[WindowPoint], values: FloatArray, span: NDArray[np.intp]) -> list[str]:
    first, last, part = points[span[0]], points[span[-1]], values[span]
    finite = part[np.isfinite(part)]
    figures = [finite.min(), finite.mean(), finite.max()] if len(finite) else [math.nan] * 3
    windows = f"{first.number} to {last.number}" if len(span) > 1 else str(first.number)
    epochs = str(first.epoch) if first.epoch == last.epoch else f"{first.epoch} to {last.epoch}"
    return [windows, epochs, *(_text(float(figure)) for figure in figures), str(len(part) - len(finite))]


def _decades(traces: Sequence[Trace]) -> float:
    """That the values of the lines span."""
    values = [y for trace in traces if trace.get("yaxis") != "y2" for y in trace["y"] if y is not None and y > 0]
    return math.log10(max(values) / min(values)) if values else 0


def _rounded(value: float) -> float | None:
    """To six digits, for the page's size; None, a gap, for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _text(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"
