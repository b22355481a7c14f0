"""Tables of methods by test sets, as papers print them: for the terminal, Markdown, LaTeX and spreadsheets."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.statistics import SIGNIFICANT, Difference

LOWER_IS_BETTER = frozenset({"mae", "balanced_error", "size_invariant_mae", "correction_effort"})
MADE_BY = "train_ultimate compare"  # in each file, so that it may be replaced
CSV_HEADER = ("method", "set", "images", "run", "source")  # then the measures
_BEST, _SECOND = 1, 2


@dataclass(frozen=True)
class Row:
    """Scores of a method.

    Attributes:
        name: of the method.
        scores: set -> measure -> a number for each run (seed) of the method. A measure may be missing.
        source: where numbers from a paper come from; "" for those scored here.
    """

    name: str
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    source: str = ""


@dataclass(frozen=True)
class ScoreTable:
    """Methods by sets and measures.

    Attributes:
        sets: name -> number of images.
        measures: name -> title.
        rows: the methods.
        ranks: place of the best and second best: (row, set, measure) -> 1 or 2. Equal as printed is equally good.
    """

    sets: Mapping[str, int]
    measures: Mapping[str, str]
    rows: Sequence[Row]
    ranks: Mapping[tuple[int, str, str], int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", self._ranks())

    def values(self, row: Row, set_name: str, measure: str) -> Sequence[float]:
        return row.scores.get(set_name, {}).get(measure, ())

    def text(self, row: Row, set_name: str, measure: str, plus_minus: str) -> str:
        """Return the mean of a method's runs, with their standard deviation if there are several; "" for none."""
        values = self.values(row, set_name, measure)
        if not values:
            return ""
        mean = f"{statistics.fmean(values):.3f}"
        return mean if len(values) == 1 else f"{mean}{plus_minus}{statistics.stdev(values):.3f}"

    def _ranks(self) -> dict[tuple[int, str, str], int]:
        ranks = {}
        for set_name in self.sets:
            for measure in self.measures:
                printed = {
                    number: round(statistics.fmean(values), 3)
                    for number, row in enumerate(self.rows)
                    if (values := self.values(row, set_name, measure)) and not math.isnan(statistics.fmean(values))
                }
                order = sorted(set(printed.values()), reverse=measure not in LOWER_IS_BETTER)
                if len(printed) < 2:
                    continue
                for number, value in printed.items():
                    place = order.index(value) + 1
                    if place in (_BEST, _SECOND):
                        ranks[number, set_name, measure] = place
        return ranks


def terminal_lines(table: ScoreTable) -> list[str]:
    """Return a block of lines for each set. The best is marked with ``*``, the second best with ``+``."""
    width = max(12, *(len(row.name) for row in table.rows))
    lines = []
    for set_name, num_images in table.sets.items():
        cells = [
            [
                table.text(row, set_name, measure, " ± ")
                + {_BEST: "*", _SECOND: "+"}.get(table.ranks.get((number, set_name, measure), 0), " ")
                for measure in table.measures
            ]
            for number, row in enumerate(table.rows)
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(table.measures))]
        widths = [max(own, len(title) + 1) for own, title in zip(widths, table.measures.values(), strict=True)]
        titles = "".join(f"  {title:>{own - 1}} " for title, own in zip(table.measures.values(), widths, strict=True))
        lines += [f"{set_name}, {num_images} images", f"{'':{width}}{titles}".rstrip()]
        for row, line in zip(table.rows, cells, strict=True):
            if any(cell.strip() for cell in line):
                values = "".join(f"  {cell:>{own}}" for cell, own in zip(line, widths, strict=True))
                lines.append(f"{row.name:{width}}{values}".rstrip())
        lines.append("")
    return lines[:-1]


def markdown(table: ScoreTable) -> str:
    """Return the table in Markdown. The best is bold, the second best underlined."""
    titles = [f"{set_name} {title}" for set_name in table.sets for title in table.measures.values()]
    lines = [f"<!-- {MADE_BY} -->", "", f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for number, row in enumerate(table.rows):
        cells = []
        for set_name in table.sets:
            for measure in table.measures:
                text = table.text(row, set_name, measure, " ± ")
                form = {_BEST: "**{}**", _SECOND: "<u>{}</u>"}.get(
                    table.ranks.get((number, set_name, measure), 0), "{}"
                )
                cells.append(form.format(text))
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    images = ", ".join(f"{name} {number}" for name, number in table.sets.items())
    lines += ["", f"Images: {images}. Bold: best; underlined: second best."]
    lines += [f"{row.name}: {row.source}." for row in table.rows if row.source]
    return "\n".join(lines) + "\n"


def latex(table: ScoreTable) -> str:
    """Return the table for LaTeX, for its package ``booktabs``. The best is bold, the second best underlined."""
    num_measures = len(table.measures)
    heads = [f"\\multicolumn{{{num_measures}}}{{c}}{{{_escaped(name)} ({num})}}" for name, num in table.sets.items()]
    rules = [
        f"\\cmidrule(lr){{{2 + number * num_measures}-{1 + (number + 1) * num_measures}}}"
        for number in range(len(table.sets))
    ]
    arrows = ["\\downarrow" if measure in LOWER_IS_BETTER else "\\uparrow" for measure in table.measures]
    titles = [f"{_escaped(t)} ${arrow}$" for t, arrow in zip(table.measures.values(), arrows, strict=True)]
    lines = [
        f"% {MADE_BY}: needs \\usepackage{{booktabs}}",
        f"\\begin{{tabular}}{{l{'c' * (num_measures * len(table.sets))}}}",
        "\\toprule",
        f" & {' & '.join(heads)} \\\\",
        "".join(rules),
        f"Method & {' & '.join(titles * len(table.sets))} \\\\",
        "\\midrule",
    ]
    for number, row in enumerate(table.rows):
        cells = []
        for set_name in table.sets:
            for measure in table.measures:
                text = table.text(row, set_name, measure, " $\\pm$ ")
                rank = table.ranks.get((number, set_name, measure), 0)
                form = {_BEST: "\\textbf{%s}", _SECOND: "\\underline{%s}"}.get(rank, "%s")
                cells.append(form % text if text else "--")
        lines.append(f"{_escaped(row.name)} & {' & '.join(cells)} \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"% {row.name}: {row.source}" for row in table.rows if row.source]
    return "\n".join(lines) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def _escaped(text: str) -> str:
    """Return a text as LaTeX prints it."""
    return "".join(_LATEX.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


def comma_separated(table: ScoreTable) -> str:
    """Return the table as CSV, a line for each run of a method on a set, with all digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_HEADER, *table.measures])
    for row in table.rows:
        for set_name, num_images in table.sets.items():
            scores = row.scores.get(set_name, {})
            for run in range(max((len(values) for values in scores.values()), default=0)):
                numbers = [scores[measure][run] if measure in scores else "" for measure in table.measures]
                writer.writerow([row.name, set_name, num_images, run + 1, row.source or "scored here", *numbers])
    return stream.getvalue()


def sentence(name: str, baseline: str, where: str, title: str, found: Difference, p: float | None, lower: bool) -> str:
    """Say in a sentence whether a method is better than another.

    Args:
        name, baseline: the methods.
        where: the set, or the sets.
        title: of the measure.
        found: the difference, method minus baseline.
        p: the p-value, corrected; None without scipy.
        lower: Lower scores are better.
    """
    excluded = found.low > 0 or found.high < 0
    significant = p < SIGNIFICANT if p is not None else excluded
    sign = -1 if lower else 1
    better = found.num_lower if lower else found.num_higher
    worse = found.num_higher if lower else found.num_lower
    chance = "" if p is None else ", p < .001" if p < 0.001 else f", p = {p:.3f}".replace("0.", ".")
    numbers = (
        f"{title} {_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}]{chance}; better on {better} of "
        f"{found.num_images} images, worse on {worse}"
    )
    if significant and excluded:
        return f"{name} is {'better' if sign * found.mean > 0 else 'worse'} than {baseline} on {where}: {numbers}"
    if significant:
        most = "better" if better > worse else "worse"
        return f"{name} is {most} than {baseline} on most images of {where}, but not by its mean: {numbers}"
    return f"{name} and {baseline} do not differ on {where} beyond chance: {numbers}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("0.", ".", 1)
