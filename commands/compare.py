"""``compare``: many methods on many test sets, in one table, with what their differences mean.

A method is a folder of predictions or a trained network; several runs of it (seeds) become a mean and a deviation.
"""

import argparse
import csv
import hashlib
import json
import logging
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from commands.cli import ALL_MEASURES
from commands.evaluate import cases_of_networks
from commands.methods import Method, Source, find_methods
from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import contains, is_json_with, is_report, require_own
from commands.scoring import (
    Case,
    MaskSet,
    SetReport,
    about_empty,
    cases_in_folder,
    mask_sets,
    masks_alone,
    protocol_of,
    scored_by,
    scored_groups,
    test_sets,
)
from data.cache import default_directory
from data.decoding import decode_mask
from data.layouts import size_and_time
from evaluation import further, metrics
from evaluation.figures import thumbnail
from evaluation.further import FURTHER, NEED_PHOTOGRAPHS, require_packages
from evaluation.metrics import ByteArray, Protocol
from evaluation.statistics import Difference, difference, holm
from reporting.comparison import Disputed, render_comparison
from reporting.paper_figures import CELL, GridRow, draw_curves, draw_grid, require_drawing
from reporting.pictures import panel
from reporting.report import plotly_script
from reporting.score_table import (
    CSV_HEADER,
    LOWER_IS_BETTER,
    MADE_BY,
    Row,
    ScoreTable,
    comma_separated,
    latex,
    markdown,
    sentence,
    terminal_lines,
)
from runtime.files import write_bytes, write_json, write_text
from runtime.folder import best_weights, read_json
from runtime.log import environment

_NUM_DISPUTED = 12  # images on the page
_NUM_GRID_ROWS = 6  # of the figure
_CODE = [Path(file).read_text(encoding="utf-8") for file in (metrics.__file__, further.__file__)]  # scores depend on it
_FORMAT = "2"  # of the cache's files: raise it whenever the same files give other scores
_PAIRED = tuple(name for name in ALL_MEASURES if not name.startswith("max_"))  # an image has no maximum of mean curves
_OUTPUTS = {  # flag -> whether compare wrote a file
    "json": is_json_with("methods", "differences"),
    "markdown": contains(f"<!-- {MADE_BY} -->".encode()),
    "latex": contains(f"% {MADE_BY}".encode()),
    "csv": contains(",".join(CSV_HEADER).encode()),
    "page": is_report,
    "figure": contains(MADE_BY.encode()),
    "curves": contains(MADE_BY.encode()),
}

logger = logging.getLogger("train_ultimate")


def compare(args: argparse.Namespace, num_processes: int) -> int:
    """Print the table and the differences to a baseline, and write the files that the flags ask for.

    Returns:
        exit code 0.

    Raises:
        ValueError, OSError: a folder or checkpoint cannot be used, or an image of a method cannot be scored: a method
            must not be compared on other images than the rest.
    """
    outputs = {name: file for name in _OUTPUTS if (file := getattr(args, name)) is not None}
    for name, file in outputs.items():
        require_writable(file)
        require_own([file], _OUTPUTS[name], "compare", f"--{name} {file}")
    plotly = "" if args.page is None else plotly_script()
    require_drawing([file for file in (args.figure, args.curves) if file is not None])
    require_packages(args.measures)
    if args.masks is not None and (need := NEED_PHOTOGRAPHS & set(args.measures)):
        raise ValueError(f"--measures {min(need)} needs the photographs: give --dataset-path instead of --masks")
    found = masks_alone(args.masks) if args.masks else test_sets(args.dataset_path, args.include_noncam)
    sets, rules = mask_sets(found, args.mask_values)
    methods = find_methods(args.methods, sets)
    baseline = _named(methods, args.baseline)
    attributes = {} if args.attributes is None else read_attributes(args.attributes, sets)
    sizes = {masks.name: len(masks.pairs) for masks in sets}
    published, left_out = ([], []) if args.published is None else published_rows(args.published, sizes)
    named = images_called(args.figure_rows, sets)
    score(methods, sets, args, num_processes)
    disputed = widest_spread(methods, sets)
    table = ScoreTable(
        sizes, {name: ALL_MEASURES[name] for name in args.measures}, [*published, *(m.row() for m in methods)]
    )
    print_lines(["", *terminal_lines(table), "", "* best, + second best" + _about_runs(methods), *left_out])
    for name in sizes:
        for method in methods[:1] if args.stretch else methods:
            title = name if args.stretch else f"{method.name} on {name}"
            print_lines(about_empty(title, method.reports[0][name].presence(), args.stretch))
    differences = [] if baseline is None else differences_to(baseline, methods, list(sizes), args.measures)
    print_lines(_about_differences(differences, methods, baseline, args))
    if args.json is not None:
        content = {
            "masks": rules, **scored_by(args), **environment(Path(__file__), ("numpy", "pillow", "scipy")),
            "methods": [_as_json(method) for method in methods],
            "published": [asdict(row) for row in published],
            "baseline": args.baseline, "differences": differences,
        }  # fmt: skip
        write_json(args.json, content)
    for file, write in ((args.markdown, markdown), (args.latex, latex), (args.csv, comma_separated)):
        if file is not None:
            write_text(file, write(table))
    if args.page is not None:
        sentences = [one["sentence"] for one in differences]
        shown = disputed_images(methods, disputed) if len(methods) > 1 else []
        details = [method.details(attributes) for method in sorted(methods, key=lambda method: method is not baseline)]
        write_text(args.page, render_comparison(table, sentences, details, shown, plotly))
    if args.figure is not None:
        write_bytes(
            args.figure, draw_grid(grid_rows(methods, named or disputed[:_NUM_GRID_ROWS]), args.figure.suffix.lower())
        )
    if args.curves is not None:
        details = [method.details({}) for method in methods]
        write_bytes(args.curves, draw_curves(details, list(sizes), args.curves.suffix.lower()))
    print_lines([f"Written: {', '.join(map(str, outputs.values()))}"] if outputs else [])
    return 0


def _about_differences(
    differences: Sequence[Mapping[str, Any]],
    methods: Sequence[Method],
    baseline: Method | None,
    args: argparse.Namespace,
) -> list[str]:
    """Return the sentences on the first measure, and where the others are."""
    if baseline is None:
        return [f"--baseline {methods[0].name}: whether the others differ beyond chance"] if len(methods) > 1 else []
    first = [one["sentence"] for one in differences if one["measure"] == args.measures[0]]
    lines = ["", *first] if first else []
    if len(first) < len(differences):
        others = ", ".join(ALL_MEASURES[name] for name in args.measures[1:] if name in _PAIRED)
        lines.append(f"The same by {others}: {args.json or args.page or 'in --json FILE or --page FILE'}")
    return [
        *lines,
        *(["p-values need scipy: pip install scipy"] if any(one["p"] is None for one in differences) else []),
    ]


def _named(methods: Sequence[Method], name: str | None) -> Method | None:
    if name is None:
        return None
    found = [method for method in methods if method.name == name]
    if not found:
        raise ValueError(f"--baseline {name}: the methods are {', '.join(method.name for method in methods)}")
    return found[0]


def score(methods: Sequence[Method], sets: Sequence[MaskSet], args: argparse.Namespace, num_processes: int) -> None:
    """Score the methods whose scores are not in the cache, in one stream of images, and keep their scores there.

    Raises:
        ValueError: an image cannot be scored.
    """
    folder = (args.cache_dir or default_directory()) / "scores"
    names = [masks.name for masks in sets]
    files: list[Path] = []  # in the cache, of each source
    saved: dict[Path, Sequence[Case]] = {}  # of sources to score: predictions in files ...
    networks: dict[Path, Callable[[], Iterator[Case | str]]] = {}  # ... and those yet to be made
    reports: dict[Path, dict[str, SetReport]] = {}
    protocol = protocol_of(args, sorted(FURTHER.keys() & set(args.measures)))
    common: list[Any] = [_FORMAT, *_CODE, astuple(protocol)]
    common += [(masks.name, str(masks.reading), *(_fingerprint(pair.mask) for pair in masks.pairs)) for masks in sets]
    for method, source in [(each, source) for each in methods for source in each.sources]:
        cases, key = _cases_and_key(source, sets, args, num_processes, protocol, common)
        if not callable(cases):
            method.cases = method.cases or {(case.set_name, case.row_name): case for case in cases}
        files.append(file := folder / f"{key}.json")
        kept = read_json(file)
        if list(kept) == names:
            reports[file] = {name: SetReport.of(state) for name, state in kept.items()}
            continue
        reports[file] = {name: SetReport() for name in names}
        if callable(cases):
            networks[file] = cases
        else:
            saved[file] = cases
    waiting: deque[Path] = deque()  # of each image that is being scored

    def stream() -> Iterator[Sequence[Case | str]]:
        for of_mask in zip(*saved.values(), strict=True):  # so that a mask is read once for all methods
            waiting.extend(saved)
            yield of_mask
        for file, cases in networks.items():
            for case in cases():
                waiting.append(file)
                yield [case]

    failures: list[str] = []
    missing = [*saved, *networks]
    with progress_bar(len(missing) * sum(len(masks.pairs) for masks in sets), "image") as bar:
        for result in scored_groups(stream(), num_processes):
            bar.update()
            file = waiting.popleft()
            if isinstance(result, str):
                failures.append(result)
            else:
                case, scored = result
                reports[file][case.set_name].add(case, scored)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise ValueError(f"{failures[0]}{more}; methods are compared only if all their images can be scored")
    try:
        for file in missing:
            file.parent.mkdir(parents=True, exist_ok=True)
            state = {name: report.state() for name, report in reports[file].items()}
            write_text(file, json.dumps(state))  # with NaN and infinity, which a degenerate image may have
    except OSError as error:
        logger.warning(f"{folder}: scores are not kept for the next call ({error})")
    of_source = iter(files)
    for method in methods:
        method.reports = [reports[next(of_source)] for _ in method.sources]
    resized = {method.name: sum(r.num_resized for one in method.reports for r in one.values()) for method in methods}
    print_lines(
        f"Warning: {number} predictions of {name} were resized to their masks' size"
        for name, number in resized.items()
        if number
    )


def _cases_and_key(
    source: Source,
    sets: Sequence[MaskSet],
    args: argparse.Namespace,
    num_processes: int,
    protocol: Protocol,
    common: Sequence[Any],
) -> tuple[list[Case] | Callable[[], Iterator[Case | str]], str]:
    """Return a run's cases, or of a network a function that makes them; and a key of all that its scores depend on.

    ``common`` is what the scores of all runs depend on.
    """
    facts = [*common]
    if source.folders:
        cases = [
            case for masks in sets for case in cases_in_folder(source.folders[masks.name], masks, protocol, is_own=True)
        ]
        facts += [(str(case.prediction_reading), _fingerprint(Path(str(case.prediction)))) for case in cases]
        return cases, _key(facts)

    if args.masks is not None:
        raise ValueError(f"{source.path}: a network needs photographs: give --dataset-path instead of --masks")

    from evaluation.predictor import load_network  # torch: scoring files does not need it

    files = best_weights(source.path) if source.path.is_dir() else [source.path]
    facts += [args.img_size, args.tta, args.precision, args.device, *map(_fingerprint, files)]
    facts += [_fingerprint(pair.image) for masks in sets for pair in masks.pairs]

    def predicted() -> Iterator[Case | str]:
        network = load_network(source.path, args.device, args.precision, args.img_size, args.tta)
        pairs = [pair for masks in sets for pair in masks.pairs]
        return cases_of_networks([(network, pairs)], sets, args.batch_size, protocol, num_processes)

    return predicted, _key(facts)


def _fingerprint(file: Path) -> tuple[str, Any]:
    return str(file.resolve()), size_and_time(file)


def _key(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def published_rows(file: Path, sizes: Mapping[str, int]) -> tuple[list[Row], list[str]]:
    """Return rows of numbers from papers, for the sets that have as many images as theirs.

    Args:
        file: CSV with the columns method, set, images, source, and measures by name.
        sizes: set -> number of images.

    Returns:
        the rows, and lines that say which sets were left out.

    Raises:
        ValueError: the file is no such table.
    """
    _, entries = _read_table(file, f"--published {file}", {"method", "set", "images", "source"})
    by_name = {name.lower(): name for name in sizes}
    scores: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    left_out: dict[str, str] = {}
    for line, entry in enumerate(entries, start=2):
        if (set_name := by_name.get(entry["set"].lower())) is None:
            continue
        try:
            number = int(entry["images"])
            values = {name: [float(entry[name])] for name in ALL_MEASURES if entry.get(name)}
        except ValueError as error:
            raise ValueError(f"--published {file}, line {line}: {error}") from error
        if number != sizes[set_name]:
            left_out[set_name] = (
                f"No published numbers for {set_name}: they are for {number} images, and there are {sizes[set_name]}"
            )
            continue
        scores.setdefault((entry["method"], entry["source"]), {})[set_name] = values
    return [Row(method, by_set, source) for (method, source), by_set in scores.items()], list(left_out.values())


def read_attributes(file: Path, sets: Sequence[MaskSet]) -> dict[str, dict[str, str]]:
    """Return the groups that images belong to: attribute -> mask's file name -> group.

    Args:
        file: CSV with a column ``name``, of masks or photographs, with ending or without, and a column an attribute.
        sets: the masks.

    Raises:
        ValueError: the file is no such table, or none of its names is that of a mask.
    """
    columns, entries = _read_table(file, f"--attributes {file}", {"name"})
    pairs = {name: pair for masks in sets for name, pair in masks.by_row_name().items()}
    known = {name.removesuffix(pair.mask.suffix): name for name, pair in pairs.items()}
    known |= {name: name for name in pairs} | {pair.image.name: name for name, pair in pairs.items()}
    found = {known[entry["name"]]: entry for entry in entries if entry["name"] in known}
    if not found:
        raise ValueError(f"--attributes {file}: none of its names, such as {entries[0]['name']}, is that of a mask")
    if missing := pairs.keys() - found.keys():
        logger.warning(f"--attributes {file}: nothing about {len(missing)} images, such as {min(missing)}")
    return {
        attribute: {name: (entry[attribute] or "").strip() for name, entry in found.items()}
        for attribute in columns
        if attribute != "name"
    }


def _read_table(file: Path, flag: str, needed: set[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and lines of a CSV.

    Raises:
        ValueError: it cannot be read, or lacks a column.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns, entries = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{flag}: cannot be read ({error})") from error
    if not entries or not needed <= set(columns):
        raise ValueError(f"{flag}: needs a first line with {', '.join(sorted(needed))}, and lines below it")
    return columns, entries


def differences_to(
    baseline: Method, methods: Sequence[Method], sets: Sequence[str], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what differs from the baseline, by set and over all sets, with a sentence each.

    p-values are corrected for the number of methods and sets, for each measure by itself.
    """
    places = [[name] for name in sets] + ([list(sets)] if len(sets) > 1 else [])
    others = [method for method in methods if method is not baseline]
    found: list[dict[str, Any]] = []
    for measure in (name for name in measures if name in _PAIRED):
        scores = [
            {name: np.array([*method.image_scores(name, measure).values()]) for name in sets}
            for method in (baseline, *others)
        ]
        results: list[tuple[Method, list[str], Difference]] = [
            (method, where, difference([own[name] for name in where], [scores[0][name] for name in where]))
            for method, own in zip(others, scores[1:], strict=True)
            for where in places
        ]
        p_values = [result.p for _, _, result in results if result.p is not None]
        corrected = holm(p_values) if len(p_values) == len(results) else [None] * len(results)
        for (method, where, result), p in zip(results, corrected, strict=True):
            text = sentence(
                method.name, baseline.name, where[0] if len(where) == 1 else "all sets", ALL_MEASURES[measure], result,
                p, measure in LOWER_IS_BETTER,
            )  # fmt: skip
            found.append(
                {"method": method.name, "sets": where, "measure": measure, **asdict(result), "p_corrected": p,
                 "sentence": text}
            )  # fmt: skip
    return found


def images_called(names: Sequence[str], sets: Sequence[MaskSet]) -> list[tuple[MaskSet, str]]:
    """Return images by their masks' or photographs' names, with ending or without, in the order of the names.

    Raises:
        ValueError: no image, or several, have a name.
    """
    chosen: list[tuple[MaskSet, str]] = []
    for text in names:
        found = [
            (masks, row_name)
            for masks in sets
            for row_name, pair in masks.by_row_name().items()
            if text in {form for path in (pair.mask, pair.image) for form in (path.name, path.stem)}
            or text in (row_name, f"{masks.name}/{row_name}", f"{masks.name}/{row_name.removesuffix(pair.mask.suffix)}")
        ]
        if not found:
            raise ValueError(f"--figure-rows {text}: no mask or photograph has this name")
        if len(found) > 1:
            several = ", ".join(f"{masks.name}/{name}" for masks, name in found[:3])
            raise ValueError(f"--figure-rows {text}: {several} have this name; name one of them")
        chosen += found
    return chosen


def widest_spread(methods: Sequence[Method], sets: Sequence[MaskSet]) -> list[tuple[MaskSet, str]]:
    """Return all images, those first whose S scatters most from method to method."""
    spread: list[tuple[float, MaskSet, str]] = []
    for masks in sets:
        scores = [method.image_scores(masks.name, "s_measure") for method in methods]
        spread += [(statistics.pstdev(of_method[name] for of_method in scores), masks, name) for name in scores[0]]
    spread.sort(key=lambda entry: -entry[0])
    return [(masks, name) for _, masks, name in spread]


def disputed_images(methods: Sequence[Method], images: Sequence[tuple[MaskSet, str]]) -> list[Disputed]:
    """Return the first images for the page, with the saved predictions of each method."""
    shown = []
    for masks, name in images[:_NUM_DISPUTED]:
        scores = {method.name: method.image_scores(masks.name, "s_measure")[name] for method in methods}
        pictures = _pictures(methods, masks, name)
        panels = [panel(title, f"{title} of {name}", thumbnail(picture)) for title, picture in pictures]
        shown.append(Disputed(f"{masks.name}/{name}", scores, panels))
    return shown


def grid_rows(methods: Sequence[Method], images: Sequence[tuple[MaskSet, str]]) -> list[GridRow]:
    """Return the rows of the figure; methods without saved predictions are named in a warning."""
    if unseen := [method.name for method in methods if not method.cases]:
        logger.warning(
            f"not in the figure: {', '.join(unseen)}, no predictions were saved (evaluate --save-predictions)"
        )
    return [
        GridRow(name, [(title, thumbnail(picture, CELL)) for title, picture in _pictures(methods, masks, name)])
        for masks, name in images
    ]


def _pictures(methods: Sequence[Method], masks: MaskSet, name: str) -> list[tuple[str, Path | ByteArray]]:
    """Return an image, its mask, and its saved predictions, each with a title; networks have none."""
    pair = masks.by_row_name()[name]
    labels = decode_mask(pair.mask, masks.reading)
    pictures: list[tuple[str, Path | ByteArray]] = [] if pair.image == pair.mask else [("image", pair.image)]
    pictures.append(("mask", (labels == 1).astype(np.uint8) * 255))
    for method in methods:
        if (case := method.cases.get((masks.name, name))) is not None:
            pictures.append((method.name, case.grey_levels()))
    return pictures


def _about_runs(methods: Sequence[Method]) -> str:
    several = [f"{method.name} of {len(method.sources)}" for method in methods if len(method.sources) > 1]
    return f"; means and standard deviations over runs: {', '.join(several)}" if several else ""


def _as_json(method: Method) -> dict[str, Any]:
    """Return a method's scores: means over runs, and each run's with its images."""
    row = method.row()
    means = {
        set_name: {measure: statistics.fmean(values) for measure, values in scores.items()}
        for set_name, scores in row.scores.items()
    }
    runs = [
        {"path": str(source.path), "sets": {name: report.to_json() for name, report in reports.items()}}
        for source, reports in zip(method.sources, method.reports, strict=True)
    ]
    return {"name": method.name, "scores": means, "runs": runs}
