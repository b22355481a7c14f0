"""The page of a report: one HTML file that needs nothing else, for any width, dark and light, with and without eyes."""

import json
import shlex
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from reporting.charts import Chart, Table
from reporting.history import RunHistory, differing_settings, number
from reporting.pictures import Gallery

_VERSIONS = ("git_commit", "python", "torch", "torchvision", "timm", "numpy", "pillow")
_SAMPLES_SHOWN = 12  # of an incident's window, and of unreadable images

_RIGHT = ' class="number"'
_NO_SCALE = '<p class="soft">Loss scale: 1 in every window, as it is without fp16; no chart of it.</p>'

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --raised: #f4f5f7; --ink: #1b1e24; --soft: #565c66;
  --line: #d9dce1; --link: #1d5fd1; --bad: #c02626; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --raised: #1e2127; --ink: #e6e8eb; --soft: #a3a9b3;
  --line: #363b44; --link: #86b0ff; --bad: #ff8a80; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem clamp(0.75rem, 3vw, 2rem) 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.75rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
h3 { font-size: 1.05rem; margin: 0 0 0.25rem; }
p { margin: 0.25rem 0 0.75rem; max-width: 70ch; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 0.5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(9.5rem, 100%), 1fr));
  gap: 0.75rem; margin: 1rem 0; }
.cards > div { background: var(--raised); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.cards dt { color: var(--soft); font-size: 0.85rem; }
.cards dd { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.3; }
.cards .small { display: block; color: var(--soft); font-size: 0.85rem; font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
.charts > figure { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.8rem; }
.chart { min-height: 320px; width: 100%; }
.chart a { cursor: pointer; }
.scroll { overflow: auto; max-height: 26rem; margin: 0.5rem 0 1rem; }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--link); padding: 0.2rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: 0.25rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
thead th { overflow-wrap: normal; vertical-align: bottom; }
.incident { border-left: 4px solid var(--bad); background: var(--raised); border-radius: 0.25rem;
  padding: 0.6rem 0.9rem; margin: 0.75rem 0; }
.incident:target { outline: 3px solid var(--link); }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.15rem 1rem; margin: 0.5rem 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; min-width: 0; }
@media (max-width: 30rem) { .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: 0.4rem; } }
code, pre { font-family: ui-monospace, monospace; font-size: 0.88em; }
pre { background: var(--raised); border-radius: 0.25rem; padding: 0.6rem; white-space: pre-wrap; margin: 0.5rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 1.5rem; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.35rem; }
@media (max-width: 30rem) { .panels { grid-template-columns: repeat(2, 1fr); } }
.panels img { width: 100%; height: auto; display: block; border-radius: 0.2rem; }
.panels span { font-size: 0.8rem; color: var(--soft); }
"""

# Draws the figures, keeps their ink that of the page, and lets a click on an incident's mark lead to its entry.
_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const scheme = matchMedia("(prefers-color-scheme: dark)");
function ink() {
  const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
  return { "font.color": of("--soft"), "hoverlabel.bgcolor": of("--raised"), "hoverlabel.bordercolor": of("--line"),
           "hoverlabel.font.color": of("--ink") };
}
function link(chart) {  // plotly takes the addresses of links away where the page is a file
  for (const note of chart.querySelectorAll(".annotation")) {
    const { name } = chart.layout.annotations[note.dataset.index], anchor = note.querySelector("text a");
    anchor.setAttribute("href", "#" + name);
    anchor.setAttribute("aria-label", "Incident " + Number(name.split("-")[1]));
  }
}
const charts = [];
for (const [key, figure] of Object.entries(figures)) {
  const chart = document.getElementById("chart-" + key);
  if (matchMedia("(pointer: coarse)").matches) figure.layout.dragmode = false;  // a finger scrolls the page
  Plotly.newPlot(chart, figure.data, figure.layout, { responsive: true, displayModeBar: false })
    .then(() => Plotly.relayout(chart, ink()))
    .then(() => { link(chart); chart.dataset.drawn = "yes"; });
  chart.on("plotly_click", (event) => {
    const target = event.points.map((point) => point.customdata).find((id) => typeof id === "string");
    if (target) location.hash = target;
  });
  chart.on("plotly_afterplot", () => link(chart));
  charts.push(chart);
}
scheme.addEventListener("change", () => charts.forEach((chart) => Plotly.relayout(chart, ink())));
"""


def render(
    runs: Sequence[RunHistory], names: Sequence[str], charts: Sequence[Chart], pictures: Sequence[Sequence[Gallery]],
    script: str,
) -> str:  # fmt: skip
    """The whole page.

    Args:
        runs: one, or several to be compared.
        names: of the runs, each another.
        charts: of all of them together.
        pictures: of each run.
        script: plotly's.
    """
    several = len(runs) > 1
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    links = [("summary", "Summary"), ("charts", "Charts")]
    body = [_summary(runs[0])] if not several else [_comparison(runs, names)]
    body.append(_charts(charts))
    for run, name, own in zip(runs, names, pictures, strict=True):
        prefix = f"{name}: " if several else ""
        tag = f"{len(links)}-" if several else ""
        for key, heading, content in (
            ("incidents", "Incidents and recovery", _incidents(run, several)),
            ("pictures", "Validation images", _pictures(own)),
            ("data", "Data", _data(run)),
            ("settings", "Settings, versions, command", _settings(run)),
        ):
            ident = f"{tag}{key}"
            links.append((ident, prefix + heading))
            body.append(_section(ident, prefix + heading, content))
    nav = "".join(f'<li><a href="#{ident}">{escape(text)}</a></li>' for ident, text in links)
    figures = {chart.key: chart.figure for chart in charts}
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    drawing = f"<script>{script}</script><script>{_SCRIPT}</script>" if charts else ""
    written = _when(time.time())
    # An icon of nothing: browsers would otherwise ask for a file that is not there.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="train_ultimate">
<title>{escape(title)}: training report</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>Training report: {escape(title)}</h1>
<p class="soft">Written {written}.</p>
<nav aria-label="Contents"><ul>{nav}</ul></nav>
</header>
<main id="main" tabindex="-1">
<noscript><p>Charts need JavaScript. The data tables below them do not.</p></noscript>
{"".join(body)}
</main>
<script type="application/json" id="figures">{data}</script>
{drawing}
</body>
</html>
"""


def _section(ident: str, heading: str, content: str) -> str:
    title = f'<h2 id="{ident}-title">{escape(heading)}</h2>'
    return f'<section id="{ident}" aria-labelledby="{ident}-title">{title}{content}</section>'


def _summary(run: RunHistory) -> str:
    cards = [("State", run.state, f"last heard of {_when(run.last_time)}")]
    if run.best is not None:
        iou, epoch = run.best
        cards.insert(0, ("Best validation IoU", f"{iou:.4f}", f"in epoch {epoch}"))
    newest = max(run.epochs, default=0)
    total = run.settings.get("epochs")
    cards.append(("Epochs", f"{newest} of {total}" if total else str(newest), _under_way(run, newest)))
    cards.append(("Windows", str(len(run.windows)), f"{_recovered(run)}"))
    cards.append(("Incidents", str(len(run.incidents)), "see below" if run.incidents else ""))
    if run.num_starts > 1:
        cards.append(("Resumed", f"{run.num_starts - 1} times" if run.num_starts > 2 else "once", ""))
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}<span class="small">{escape(more)}</span></dd></div>'
        for name, value, more in cards
    )
    empty = "" if run.windows else "<p>No window has been trained yet.</p>"
    spoilt = f" {run.num_spoilt} lines of its log are no events: half-written, or damaged." if run.num_spoilt else ""
    return _section("summary", "Summary", f'<dl class="cards">{items}</dl>{empty}<p class="soft">{spoilt}</p>')


def _under_way(run: RunHistory, newest: int) -> str:
    if run.end is None and run.points and run.points[-1].epoch > newest:
        return f"epoch {run.points[-1].epoch} under way, window {run.points[-1].window}"
    return ""


def _recovered(run: RunHistory) -> str:
    recovery = run.recovery()
    skipped = recovery.get("skipped") or {}
    return f"{sum(skipped.values())} skipped, {recovery.get('rollbacks', 0)} rollbacks"


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
    return _section("summary", "Summary", table + (other if differing else same))


def _charts(charts: Sequence[Chart]) -> str:
    if not charts:
        return _section("charts", "Charts", "<p>Nothing to draw yet: no epoch and no window has been logged.</p>")
    figures = "".join(
        f'<figure aria-labelledby="{chart.key}-title"><h3 id="{chart.key}-title">{escape(chart.title)}</h3>'
        f"<figcaption>{escape(chart.description)}</figcaption>"
        f'<div class="chart" id="chart-{chart.key}" role="group" aria-label="Chart: {escape(chart.title)}"></div>'
        f"<details><summary>Data table: {escape(chart.title)}</summary>{_table(chart.table)}</details></figure>"
        for chart in charts
    )
    scale = "" if any(chart.key == "loss-scale" for chart in charts) else _NO_SCALE
    return _section("charts", "Charts", f'<div class="charts">{figures}</div>{scale}')


def _table(table: Table) -> str:
    """Scrolls by itself where it is too large, by keyboard, too."""
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
    verdicts = ", ".join(f"{count} {verdict.replace('_', ' ')}" for verdict, count in skipped.items())
    facts = {
        "Windows applied": str(recovery.get("applied", "-")),
        "Windows skipped": f"{sum(skipped.values())}" + (f" ({verdicts})" if verdicts else ""),
        "Overflows": str(run.verdicts["overflow"]) if run.verdicts["overflow"] else "",
        "Rollbacks": f"{recovery.get('rollbacks', 0)}"
        + (f", learning rates now x {recovery['lr_factor']:g}" if recovery.get("lr_factor", 1) != 1 else ""),
        "Quarantined": ", ".join(recovery.get("quarantined") or {}) or "none",
        "Time lost to recovery": f"{recovery['seconds_lost']} s" if "seconds_lost" in recovery else "",
    }
    entries = "".join(_incident(run, folder, record, several) for folder, record in run.incidents.items())
    return _facts(facts) + (entries or "<p>No incidents.</p>")


def _incident(run: RunHistory, folder: str, record: dict[str, Any], several: bool) -> str:
    verdict = str(record.get("verdict", "")).replace("_", " ")
    where = f"epoch {record.get('epoch', '?')}, window {record.get('window', '?')}"
    title = f"{int(folder) if folder.isdigit() else folder}: {verdict}, {where}"
    cause = str(record.get("cause", ""))
    samples = [str(name) for name in record.get("samples") or []]
    facts = {
        "What was done": str(record.get("action", "")),
        "Cause": cause,
        "First not finite": str(record.get("first_nonfinite", "")),
        "At fault": ", ".join(map(str, record.get("culprits") or [])),
        "Fire drill": str(record.get("drill", "")),
        "Loss, gradient norm": f"{_value(record.get('loss'))}, {_value(record.get('grad_norm'))}",
        "Precision, loss scale": f"{record.get('precision', '')}, {_value(record.get('loss_scale'))}",
    }
    more = ""
    attempts = [attempt for attempt in record.get("attempts") or [] if isinstance(attempt, dict)]
    if attempts:
        columns = ("verdict", "precision", "loss", "grad_norm")
        rows = [
            [str(index), *(_value(attempt.get(column)).replace("_", " ") for column in columns)]
            for index, attempt in enumerate(attempts, start=1)
        ]
        more += _table(Table("Attempts", ("attempt", "verdict", "precision", "loss", "gradient norm"), rows))
    worst = record.get("worst_parameters") or {}
    if isinstance(worst, dict) and worst:
        rows = [[str(name), _value(norm)] for name, norm in worst.items()]
        more += _table(Table("Largest gradients, or those that were not finite", ("parameter", "norm"), rows))
    if samples:
        listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in samples[:_SAMPLES_SHOWN])
        left = f"<li>and {len(samples) - _SAMPLES_SHOWN} more</li>" if len(samples) > _SAMPLES_SHOWN else ""
        more += f"<p>Images of the window:</p><ul>{listed}{left}</ul>"
    path = run.directory / "incidents" / folder
    command = shlex.join(["python", "train_ultimate.py", "replay", str(path)])
    replay = f"<p>Run it again:</p><pre>{escape(command)}</pre>" if (path / "replay.pt").exists() else ""
    details = f"<details><summary>Attempts, gradients, images</summary>{more}</details>" if more else ""
    ident = "" if several else f' id="incident-{escape(folder)}" tabindex="-1"'
    return f'<article class="incident"{ident}><h3>{escape(title)}</h3>{_facts(facts)}{replay}{details}</article>'


def _pictures(own: Sequence[Gallery]) -> str:
    parts = []
    for gallery in own:
        cells = []
        for example in gallery.examples:
            panels = "".join(
                f'<div><img src="{panel.data_uri}" alt="{escape(panel.alt)}" width="{panel.width}" '
                f'height="{panel.height}" decoding="async"><span>{escape(panel.title)}</span></div>'
                for panel in example.panels
            )
            scores = f"IoU {example.scores['iou']:.3f}, S {example.scores['s_measure']:.3f}"
            caption = f"<strong>{example.rank}</strong>: {scores}. <code>{escape(example.name)}</code>"
            cells.append(f'<figure><div class="panels">{panels}</div><figcaption>{caption}</figcaption></figure>')
        legend = " In the error map, orange is a false alarm, blue is missed." if cells else ""
        parts.append(f"<h3>{escape(gallery.title)}</h3><p>{escape(gallery.note + legend)}</p>")
        parts.append(f'<div class="pictures">{"".join(cells)}</div>' if cells else "")
    return "".join(parts) or "<p>None in this report.</p>"


def _data(run: RunHistory) -> str:
    validation = run.config.get("validation") or []
    facts = {
        "Data set": str(run.settings.get("dataset_path", "")),
        "Training pairs": _value(run.config.get("training_pairs")),
        "Validation images": str(len(validation)) if validation else "",
        "Excluded": str(len(run.config.get("excluded") or [])),
        "Images a window": _value(run.config.get("window_size")),
        "Fingerprint": str(run.config.get("data", "")),
        "Unreadable": str(len(run.unreadable)),
    }
    rows = [[image, reason] for image, reason in list(run.unreadable.items())[:_SAMPLES_SHOWN]]
    left = len(run.unreadable) - len(rows)
    caption = "Images that cannot be read" + (f"; {left} more in metrics.jsonl" if left else "")
    return _facts(facts) + (_table(Table(caption, ("image", "why"), rows)) if rows else "")


def _settings(run: RunHistory) -> str:
    command = str(run.config.get("command", ""))
    rows = [[key, _value(value)] for key, value in sorted(run.settings.items())]
    told = {"precision in use": run.config.get("precision"), "device": run.config.get("device")}
    versions = {**told, **{key: run.config.get(key) for key in _VERSIONS}}
    have = [[key, _value(value)] for key, value in versions.items() if value not in (None, "")]
    shown = f"<pre>{escape(command)}</pre>" if command else "<p>No command recorded.</p>"
    return (
        f"<p>As it was last started:</p>{shown}"
        + _table(Table("Machine and versions", ("what", "value"), have))
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
    except (ValueError, OverflowError):  # of NaN the first, of a damaged log both
        return "never"
