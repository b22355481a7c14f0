"""The page of a report: one HTML file that needs no other, for any width, dark and light, with and without eyes.

``page.html`` is its frame and style; the empty icon there keeps browsers from asking for a file. ``page.js`` draws the
charts in the page's colours, and lets a click on an incident's mark lead to its entry.
"""

import json
import math
import shlex
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from reporting.charts import Chart, Table
from reporting.history import RunHistory, differing_settings, duration, interval, label, number, whole
from reporting.pictures import Gallery, Panel
from runtime.folder import INCIDENTS, LOG
from training.rules import too_few_validated, too_few_windows

_VERSIONS = ("git_commit", "python", "torch", "torchvision", "timm", "numpy", "pillow")
_MOST_LISTED = 12  # images of a window, unreadable images
_RIGHT = ' class="number"'
_NO_SCALE = '<p class="soft">No chart of the loss scale: it is 1 in every window, as always without fp16.</p>'


def render(
    runs: Sequence[RunHistory],
    names: Sequence[str],
    charts: Sequence[Chart],
    pictures: Sequence[Sequence[Gallery]],
    plotly: str,
) -> str:
    """Return the page as HTML.

    Args:
        runs: one run, or several to compare.
        names: a different name for each run.
        charts: charts of all runs together.
        pictures: galleries of each run.
        plotly: plotly's JavaScript.
    """
    several = len(runs) > 1
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    links = [("summary", "Summary"), ("charts", "Charts")]
    body = [_comparison(runs, names) if several else _summary(runs[0]), _charts(charts)]
    for run, name, galleries in zip(runs, names, pictures, strict=True):
        prefix = f"{name}: " if several else ""
        tag = f"{len(links)}-" if several else ""
        for key, heading, content in (
            ("incidents", "Incidents and recovery", _incidents(run, several)),
            ("pictures", "Validation images", _pictures(galleries)),
            ("data", "Data", _data(run)),
            ("settings", "Settings, versions, command", _settings(run)),
        ):
            ident = f"{tag}{key}"
            links.append((ident, prefix + heading))
            body.append(section(ident, prefix + heading, content))
    return document(f"{title}: training report", f"Training report: {title}", links, "".join(body), charts, plotly)


def document(
    title: str, heading: str, links: Sequence[tuple[str, str]], body: str, charts: Sequence[Chart], plotly: str
) -> str:
    """Return a page as HTML.

    Args:
        title: of the browser's window.
        heading: the first line.
        links: (id, text) of each section.
        body: the sections as HTML, see ``section``.
        charts: drawn in their places of the body, see ``chart_section``.
        plotly: plotly's JavaScript.
    """
    figures = {chart.key: chart.figure for chart in charts}
    return Template(_beside("page.html")).substitute(
        title=escape(title),
        heading=escape(heading),
        written=_when(time.time()),
        navigation="".join(f'<li><a href="#{ident}">{escape(text)}</a></li>' for ident, text in links),
        body=body,
        figures=json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        drawing=f"<script>{plotly}</script><script>\n{_beside('page.js')}</script>" if charts else "",
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def section(ident: str, heading: str, content: str) -> str:
    """Return a section of the page; its content is HTML."""
    title = f'<h2 id="{ident}-title">{escape(heading)}</h2>'
    return f'<section id="{ident}" aria-labelledby="{ident}-title">{title}{content}</section>'


def _summary(run: RunHistory) -> str:
    cards = [("State", run.state, f"last event {_when(run.last_time)}")]
    if run.best is not None:
        iou, epoch = run.best
        cards.insert(0, ("Best validation IoU", f"{iou:.4f}", f"in epoch {epoch}{interval(run.epochs[epoch])}"))
    newest = max(run.epochs, default=0)
    total = run.settings.get("epochs")
    cards.append(("Epochs", f"{newest} of {total}" if total else str(newest), _unfinished(run, newest)))
    recovery = run.recovery()
    recovered = f"{_num_skipped(recovery)} skipped, {recovery.get('rollbacks', 0)} rollbacks"
    cards.append(("Windows", str(len(run.windows)), recovered))
    cards.append(("Incidents", str(len(run.incidents)), "see below" if run.incidents else ""))
    if run.end is not None and not math.isnan(run.began):
        cards.append(("Time", duration(run.last_time - run.began), _forecast_time(run)))
    if run.num_starts > 1:
        cards.append(("Resumed", f"{run.num_starts - 1} times" if run.num_starts > 2 else "once", ""))
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}<span class="small">{escape(more)}</span></dd></div>'
        for name, value, more in cards
    )
    few = "".join(f"<p>{escape(text)}.</p>" for text in _too_few(run))
    empty = "" if run.windows else "<p>No window has been trained yet.</p>"
    spoilt = f" {run.num_spoilt} lines of its log hold no event: half-written or damaged." if run.num_spoilt else ""
    return section("summary", "Summary", f'<dl class="cards">{items}</dl>{few}{empty}<p class="soft">{spoilt}</p>')


def _forecast_time(run: RunHistory) -> str:
    """Return how long ``plan`` expected the run to take."""
    forecast = run.config.get("forecast")
    seconds = number(forecast, "seconds") if isinstance(forecast, dict) else math.nan
    return "" if math.isnan(seconds) else f"forecast: {duration(seconds)}"


def _too_few(run: RunHistory) -> list[str]:
    """Say what a finished run had too little of."""
    num_images, window_size = whole(run.config, "training_pairs"), whole(run.config, "window_size")
    validation = run.config.get("validation")
    texts = []
    if run.end is not None and num_images and window_size:
        texts.append(too_few_windows(len(run.windows), num_images, window_size))
    if isinstance(validation, list) and run.settings.get("folds") is None:
        texts.append(too_few_validated(len(validation)))
    return [*filter(None, texts)]


def _unfinished(run: RunHistory, newest: int) -> str:
    """Return where a run without an end stands in the epoch after the newest finished one."""
    if run.end is None and run.points and run.points[-1].epoch > newest:
        return f"unfinished: epoch {run.points[-1].epoch}, window {run.points[-1].window}"
    return ""


def _num_skipped(recovery: dict[str, Any]) -> int:
    return sum((recovery.get("skipped") or {}).values())


def _comparison(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        iou, epoch = (f"{run.best[0]:.4f}", str(run.best[1])) if run.best else ("-", "-")
        done = f"{max(run.epochs, default=0)} of {run.settings.get('epochs', '?')}"
        rows.append([name, run.state, iou, epoch, done, str(len(run.windows)), str(len(run.incidents))])
    columns = ("run", "state", "best IoU", "in epoch", "epochs", "windows", "incidents")
    table = _table(Table("The runs", columns, rows))
    differing = differing_settings(runs)
    same = "<p>All settings, versions and devices are the same.</p>"
    settings = [[key, *map(_value, values)] for key, values in differing.items()]
    other = _table(Table("Settings, versions and devices that differ", ("setting", *names), settings))
    return section("summary", "Summary", table + (other if differing else same))


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return section("charts", "Charts", "<p>Nothing to draw yet: no epoch and no window has been logged.</p>")
    scale = "" if any(chart.key == "loss-scale" for chart in charts) else _NO_SCALE
    return chart_section("charts", "Charts", charts, scale)


def chart_section(ident: str, heading: str, charts: Sequence[Chart], below: str = "") -> str:
    """Return a section with the places of charts, each with its numbers as a table, and more HTML below them."""
    figures = "".join(
        f'<figure aria-labelledby="{chart.key}-title"><h3 id="{chart.key}-title">{escape(chart.title)}</h3>'
        f"<figcaption>{escape(chart.description)}</figcaption>"
        f'<div class="chart" id="chart-{chart.key}" role="group" aria-label="Chart: {escape(chart.title)}"></div>'
        f"<details><summary>Data table: {escape(chart.title)}</summary>{_table(chart.table)}</details></figure>"
        for chart in charts
    )
    return section(ident, heading, f'<div class="charts">{figures}</div>{below}')


def _table(table: Table) -> str:
    """Return a table in a region that scrolls by itself if the table is too large, by keyboard, too."""
    numeric = [all(_is_number(row[index]) for row in table.rows) for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_RIGHT if right else ""}>{escape(column)}</th>'
        for right, column in zip([False, *numeric[1:]], table.columns, strict=True)
    )
    rows = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(
            f"<td{_RIGHT if right else ''}>{escape(cell)}</td>"
            for right, cell in zip(numeric[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    caption = escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="Table: {caption}" tabindex="0">'
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell == "-"
    return True


def _incidents(run: RunHistory, several: bool) -> str:
    recovery = run.recovery()
    skipped = recovery.get("skipped") or {}
    verdicts = ", ".join(f"{count} {label(verdict)}" for verdict, count in skipped.items())
    facts = {
        "Windows applied": str(recovery.get("applied", "-")),
        "Windows skipped": f"{_num_skipped(recovery)}" + (f" ({verdicts})" if verdicts else ""),
        "Overflows": str(run.verdicts["overflow"]) if run.verdicts["overflow"] else "",
        "Rollbacks": f"{recovery.get('rollbacks', 0)}"
        + (f", learning rates now x {recovery['lr_factor']:g}" if recovery.get("lr_factor", 1) != 1 else ""),
        "Quarantined": ", ".join(recovery.get("quarantined") or {}) or "none",
        "Time lost to recovery": f"{recovery['seconds_lost']} s" if "seconds_lost" in recovery else "",
    }
    entries = "".join(_incident(run, folder, record, several) for folder, record in run.incidents.items())
    return _facts(facts) + (entries or "<p>No incidents.</p>")


def _incident(run: RunHistory, folder: str, record: dict[str, Any], several: bool) -> str:
    shown = int(folder) if folder.isdigit() else folder
    place = f"epoch {record.get('epoch', '?')}, window {record.get('window', '?')}"
    title = f"{shown}: {label(record.get('verdict', ''))}, {place}"
    samples = [str(name) for name in record.get("samples") or []]
    facts = {
        "What was done": str(record.get("action", "")),
        "Cause": str(record.get("cause", "")),
        "First not finite": str(record.get("first_nonfinite", "")),
        "At fault": ", ".join(map(str, record.get("culprits") or [])),
        "Fire drill": str(record.get("drill", "")),
        "Loss, gradient norm": f"{_value(record.get('loss'))}, {_value(record.get('grad_norm'))}",
        "Precision, loss scale": f"{record.get('precision', '')}, {_value(record.get('loss_scale'))}",
    }
    more = ""
    attempts = [attempt for attempt in record.get("attempts") or [] if isinstance(attempt, dict)]
    if attempts:
        columns = ("precision", "loss", "grad_norm")
        rows = [
            [str(index), label(_value(attempt.get("verdict"))), *(_value(attempt.get(column)) for column in columns)]
            for index, attempt in enumerate(attempts, start=1)
        ]
        more += _table(Table("Attempts", ("attempt", "verdict", "precision", "loss", "gradient norm"), rows))
    worst = record.get("worst_parameters") or {}
    if isinstance(worst, dict) and worst:
        rows = [[str(name), _value(norm)] for name, norm in worst.items()]
        more += _table(Table("Largest or non-finite gradients", ("parameter", "norm"), rows))
    if samples:
        listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in samples[:_MOST_LISTED])
        left = f"<li>and {len(samples) - _MOST_LISTED} more</li>" if len(samples) > _MOST_LISTED else ""
        more += f"<p>Images of the window:</p><ul>{listed}{left}</ul>"
    path = run.directory / INCIDENTS / folder
    command = shlex.join(["python", "train_ultimate.py", "replay", str(path)])
    replay = f"<p>Run it again:</p><pre>{escape(command)}</pre>" if (path / "replay.pt").exists() else ""
    details = f"<details><summary>Attempts, gradients, images</summary>{more}</details>" if more else ""
    ident = "" if several else f' id="incident-{escape(folder)}" tabindex="-1"'
    return f'<article class="incident"{ident}><h3>{escape(title)}</h3>{_facts(facts)}{replay}{details}</article>'


def _pictures(galleries: Sequence[Gallery]) -> str:
    parts = []
    for gallery in galleries:
        cells = []
        for example in gallery.examples:
            scores = f"IoU {example.scores['iou']:.3f}, S {example.scores['s_measure']:.3f}"
            caption = f"<strong>{example.rank}</strong>: {scores}. <code>{escape(example.name)}</code>"
            cells.append(figure(example.panels, caption))
        legend = " In the error map, orange is a false alarm, blue is missed." if cells else ""
        parts.append(f"<h3>{escape(gallery.title)}</h3><p>{escape(gallery.note + legend)}</p>")
        parts.append(f'<div class="pictures">{"".join(cells)}</div>' if cells else "")
    return "".join(parts) or "<p>None in this report.</p>"


def figure(panels: Sequence[Panel], caption: str) -> str:
    """Return pictures side by side, with a caption that is HTML."""
    pictures = "".join(
        f'<div><img src="{panel.data_uri}" alt="{escape(panel.alt)}" width="{panel.width}" '
        f'height="{panel.height}" decoding="async"><span>{escape(panel.title)}</span></div>'
        for panel in panels
    )
    return f'<figure><div class="panels">{pictures}</div><figcaption>{caption}</figcaption></figure>'


def _data(run: RunHistory) -> str:
    validation = run.config.get("validation") or []
    facts = {
        "Dataset": str(run.settings.get("dataset_path", "")),
        "Training pairs": _value(run.config.get("training_pairs")),
        "Validation images": str(len(validation)) if validation else "",
        "Excluded": str(len(run.config.get("excluded") or [])),
        "Images per window": _value(run.config.get("window_size")),
        "Fingerprint": str(run.config.get("data", "")),
        "Unreadable": str(len(run.unreadable)),
    }
    rows = [[image, reason] for image, reason in list(run.unreadable.items())[:_MOST_LISTED]]
    left = len(run.unreadable) - len(rows)
    caption = "Images that cannot be read" + (f"; {left} more in {LOG}" if left else "")
    return _facts(facts) + (_table(Table(caption, ("image", "reason"), rows)) if rows else "")


def _settings(run: RunHistory) -> str:
    command = str(run.config.get("command", ""))
    rows = [[key, _value(value)] for key, value in sorted(run.settings.items())]
    machine = {"precision in use": run.config.get("precision"), "device": run.config.get("device")}
    machine |= {key: run.config.get(key) for key in _VERSIONS}
    known = [[key, _value(value)] for key, value in machine.items() if value not in (None, "")]
    shown = f"<pre>{escape(command)}</pre>" if command else "<p>No command recorded.</p>"
    return (
        f"<p>Last started with:</p>{shown}"
        + _table(Table("Machine and versions", ("what", "value"), known))
        + f"<details><summary>All {len(rows)} settings</summary>{_table(Table('Settings', ('setting', 'value'), rows))}"
        "</details>"
    )


def _facts(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{items}</dl>'


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return _listed(value)
    return str(value)


def _listed(values: Iterable[Any]) -> str:
    return " ".join(map(_value, values)) or "-"


def _when(seconds: float) -> str:
    moment = number({"time": seconds}, "time")
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(moment))
    except (ValueError, OverflowError):  # NaN if nothing was logged; any number in a damaged log
        return "never"
