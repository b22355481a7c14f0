"""The page of ``compare``: tables to sort, curves, groups, methods image by image, and where they differ most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from reporting.charts import COLOURS, LIMIT, Chart, FloatArray, Table, Trace, layout_of, rounded, with_legend
from reporting.page import chart_section, document, figure, section
from reporting.pictures import Panel
from reporting.score_table import LOWER_IS_BETTER, ScoreTable

CURVES = (  # key, title, title of the axis, description
    ("pr", "Precision and recall", "precision", "At thresholds from 0 to 255, means over images."),
    ("f", "F-measure by threshold", "F", "Mean over images; its mean and maximum are meanF and maxF."),
    ("e", "E-measure by threshold", "E", "Mean over images; its mean and maximum are meanE and maxE."),
)
_DASHES = ("solid", "dash", "dot")  # more methods than colours


@dataclass(frozen=True)
class MethodDetails:
    """What the page shows of a method beside its scores, for each set.

    Attributes:
        name: of the method.
        curves: set -> e, f, precision, recall, each (256,).
        groups: set -> kind of group -> group -> mean S.
        images: set -> image's name -> S.
    """

    name: str
    curves: Mapping[str, Mapping[str, FloatArray]]
    groups: Mapping[str, Mapping[str, Mapping[str, float]]]
    images: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Disputed:
    """An image on which methods differ much: its place, and the panels image, mask and each method's prediction."""

    name: str
    scores: Mapping[str, float]  # method -> S
    panels: Sequence[Panel]


def render_comparison(
    table: ScoreTable, sentences: Sequence[str], methods: Sequence[MethodDetails], disputed: Sequence[Disputed],
    plotly: str,
) -> str:  # fmt: skip
    """Return the page as HTML.

    Args:
        table: scores of all methods.
        sentences: on the differences to a baseline; none without one.
        methods: those that were scored, not only cited.
        disputed: images on which they differ most.
        plotly: plotly's JavaScript.
    """
    charts = {
        "curves": [_curve_chart(methods, name, *curve) for name in table.sets for curve in CURVES],
        "groups": [
            _group_chart(methods, name, kind)
            for name in table.sets
            for kind in methods[0].groups[name]
            if len(methods[0].groups[name][kind]) > 1
        ],
        "images": [_image_chart(methods[0], methods[1], name) for name in table.sets] if len(methods) > 1 else [],
    }
    parts = [("scores", "Scores", "".join(_sortable(table, name) for name in table.sets) + _sources(table))]
    if sentences:
        items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
        parts.append(("differences", "Differences", f"<ul>{items}</ul>"))
    if disputed:
        parts.append(("disputed", "Where methods differ most", _pictures(disputed)))
    titles = {"curves": "Curves", "groups": "Groups of images", "images": "Image by image"}
    body = [section(key, title, content) for key, title, content in parts]
    body += [chart_section(key, titles[key], found) for key, found in charts.items() if found]
    links = [(key, title) for key, title, _ in parts] + [(key, titles[key]) for key, found in charts.items() if found]
    every = [chart for found in charts.values() for chart in found]
    title = f"{len(table.rows)} methods on {', '.join(table.sets)}"
    return document(title, f"Comparison: {title}", links, "".join(body), every, plotly)


def _sortable(table: ScoreTable, set_name: str) -> str:
    """Return the table of a set, which a click on a column's title sorts."""
    best = {1: "<strong>{}</strong>", 2: "<u>{}</u>"}
    heads = "".join(
        f'<th scope="col" class="number"><button type="button">{escape(title)}'
        f"{' ↓' if measure in LOWER_IS_BETTER else ''}</button></th>"
        for measure, title in table.measures.items()
    )
    rows = []
    for number, row in enumerate(table.rows):
        cells = []
        for measure in table.measures:
            text = escape(table.text(row, set_name, measure, " ± "))
            rank = table.ranks.get((number, set_name, measure), 0)
            cells.append(f'<td class="number">{best.get(rank, "{}").format(text)}</td>')
        rows.append(f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>')
    caption = escape(f"{set_name}, {table.sets[set_name]} images")
    head = f'<thead><tr><th scope="col">method</th>{heads}</tr></thead>'
    return (
        f'<div class="scroll" role="region" aria-label="Table: {caption}" tabindex="0"><table class="sortable">'
        f"<caption>{caption}</caption>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sources(table: ScoreTable) -> str:
    lines = [f"{row.name}: {row.source}" for row in table.rows if row.source]
    legend = "Bold: best; underlined: second best. MAE: lower is better. A column's title sorts."
    return f'<p class="soft">{escape(legend)}</p>' + "".join(f'<p class="soft">{escape(text)}</p>' for text in lines)


def _pictures(disputed: Sequence[Disputed]) -> str:
    figures = []
    for image in disputed:
        scores = ", ".join(f"{escape(name)} {value:.3f}" for name, value in image.scores.items())
        figures.append(figure(image.panels, f"<strong>S</strong>: {scores}. <code>{escape(image.name)}</code>"))
    titles = {panel.title for image in disputed for panel in image.panels}
    note = "The images whose S scatters most from method to method."
    if unseen := [name for name in disputed[0].scores if name not in titles]:
        note += f" Predictions of {', '.join(unseen)} were not saved (evaluate --save-predictions)."
    return f'<p>{escape(note)}</p><div class="pictures">{"".join(figures)}</div>'


def _trace(number: int, name: str, x: Sequence[float], y: Sequence[float]) -> Trace:
    style = {"color": COLOURS[number % len(COLOURS)], "dash": _DASHES[number // len(COLOURS) % len(_DASHES)]}
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": [rounded(value) for value in x],
        "y": [rounded(value) for value in y], "line": {**style, "width": 2},
        "hovertemplate": "%{x:.3g}, %{y:.3f}<extra>%{fullData.name}</extra>",
    }  # fmt: skip


def _curve_chart(
    methods: Sequence[MethodDetails], set_name: str, key: str, title: str, axis: str, description: str
) -> Chart:
    traces, rows = [], []
    for number, method in enumerate(methods):
        curves = method.curves[set_name]
        y = curves["precision" if key == "pr" else key]
        x = curves["recall"] if key == "pr" else np.arange(256.0)
        traces.append(_trace(number, method.name, x.tolist(), y.tolist()))
        best = int(np.argmax(y))
        rows.append([method.name, f"{np.mean(y):.3f}", f"{y[best]:.3f}", f"{x[best]:.3g}"])
    layout = layout_of("recall" if key == "pr" else "threshold", axis)
    columns = ["method", f"mean {axis}", f"highest {axis}", "at " + ("recall" if key == "pr" else "threshold")]
    ident = f"{key}-{_ident(set_name)}"
    shown = f"{set_name}: {title[0].lower() + title[1:] if key == 'pr' else title}"
    return Chart(ident, shown, description, with_legend(traces, layout), Table(shown, columns, rows))


def _group_chart(methods: Sequence[MethodDetails], set_name: str, kind: str) -> Chart:
    groups = list(methods[0].groups[set_name][kind])
    traces: list[dict[str, Any]] = []
    rows = []
    for number, method in enumerate(methods):
        values = [method.groups[set_name][kind][group] for group in groups]
        colour = {"color": COLOURS[number % len(COLOURS)]}
        hover = "%{x}: %{y:.3f}<extra>%{fullData.name}</extra>"
        bars = {"type": "bar", "name": method.name, "x": groups, "y": [rounded(value) for value in values]}
        traces.append({**bars, "marker": colour, "hovertemplate": hover})
        rows.append([method.name, *(f"{value:.3f}" for value in values)])
    title = f"{set_name}: S by {kind}"
    chart = with_legend(traces, {**layout_of("", "S"), "barmode": "group"})
    return Chart(
        f"{_ident(kind)}-{_ident(set_name)}", title, "Mean S-measure of each group of images.", chart,
        Table(title, ["method", *groups], rows),
    )  # fmt: skip


def _image_chart(first: MethodDetails, second: MethodDetails, set_name: str) -> Chart:
    """Return a chart with a dot for each image: above the line, the second method is better."""
    x, y = first.images[set_name], second.images[set_name]
    names = sorted(x)
    dots = {
        "type": "scatter", "mode": "markers", "name": "images", "x": [rounded(x[name]) for name in names],
        "y": [rounded(y[name]) for name in names], "text": [escape(name) for name in names],
        "marker": {"size": 6, "color": COLOURS[0], "opacity": 0.6},
        "hovertemplate": "%{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
    }  # fmt: skip
    line = {"type": "scatter", "mode": "lines", "name": "equal", "x": [0, 1], "y": [0, 1], "hoverinfo": "skip"}
    traces = [{**line, "line": {"color": LIMIT, "dash": "dot", "width": 1}}, dots]
    layout = layout_of(f"S of {first.name}", f"S of {second.name}")
    widest = sorted(names, key=lambda name: -abs(x[name] - y[name]))[:20]
    rows = [[name, f"{x[name]:.3f}", f"{y[name]:.3f}", f"{y[name] - x[name]:+.3f}"] for name in widest]
    title = f"{set_name}: {second.name} against {first.name}"
    table = Table(f"{title}, the largest differences", ["image", first.name, second.name, "difference"], rows)
    better = sum(y[name] > x[name] for name in names)
    described = f"Above the line, {second.name} is better: {better} of {len(names)} images."
    return Chart(f"images-{_ident(set_name)}", title, described, {"data": traces, "layout": layout}, table)


def _ident(text: str) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in text.lower())
