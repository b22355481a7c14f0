"""``compare``: many methods on many test sets, in one table, with what their differences mean.

A method is a folder of predictions or a trained network; several runs of it (seeds) become a mean and a deviation.
"""

import argparse
import csv
import hashlib
import json
import logging
import re
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from commands.evaluate import cases_of_networks
from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import contains, is_json_with, require_own
from commands.scoring import (
    COLUMNS,
    PREDICTION_SUFFIXES,
    Case,
    MaskSet,
    SetReport,
    cases_in_folder,
    mask_sets,
    masks_alone,
    scored_cases,
    test_sets,
)
from data.cache import default_directory
from data.layouts import size_and_time
from data.listing import files_by_stem, subfolders
from evaluation import metrics
from evaluation.statistics import Difference, FloatArray, difference, holm
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
from runtime.files import write_json, write_text
from runtime.folder import best_weights, read_json
from runtime.log import environment

logger = logging.getLogger("train_ultimate")

_NETWORK_SUFFIXES = (".pth", ".pt")
_DEEPEST = 2  # folders of methods, and in them folders of runs
_SEED = re.compile(r"(seed|run|fold)?[-_ ]?\d+", re.IGNORECASE)
_FORMAT = "1"  # of the cache's files: raise it whenever the same files give other scores
_PAIRED = tuple(name for name in COLUMNS if not name.startswith("max_"))  # an image has no maximum of mean curves


@dataclass(frozen=True)
class Source:
    """Predictions of one run of a method.

    Attributes:
        path: folder or checkpoint that was named.
        folders: predictions of each set by its name; empty for a trained network.
    """

    path: Path
    folders: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Method:
    name: str
    sources: list[Source]
    reports: list[dict[str, SetReport]] = field(default_factory=list)  # of each source, by set

    def image_scores(self, set_name: str, measure: str) -> FloatArray:
        """Return a score of each image of a set, by the images' names: the mean over runs."""
        by_name = [{image["name"]: image[measure] for image in report[set_name].images} for report in self.reports]
        return np.mean([[scores[name] for name in sorted(scores)] for scores in by_name], axis=0)

    def row(self) -> Row:
        scores = {
            set_name: {
                measure: [report[set_name].totals.means()[measure] for report in self.reports] for measure in COLUMNS
            }
            for set_name in self.reports[0]
        }
        return Row(self.name, scores)


def compare(args: argparse.Namespace, num_processes: int) -> int:
    """Print the table and the differences to a baseline, and write the files that the flags ask for.

    Returns:
        exit code 0.

    Raises:
        ValueError, OSError: a folder or checkpoint cannot be used, or an image of a method cannot be scored: a method
            must not be compared on other images than the rest.
    """
    outputs = {
        "json": is_json_with("methods", "differences"),
        "markdown": contains(f"<!-- {MADE_BY} -->".encode()),
        "latex": contains(f"% {MADE_BY}".encode()),
        "csv": contains(",".join(CSV_HEADER).encode()),
    }
    for name, is_own in outputs.items():
        if (file := getattr(args, name)) is not None:
            require_writable(file)
            require_own([file], is_own, "compare", f"--{name} {file}")
    found = masks_alone(args.masks) if args.masks else test_sets(args.dataset_path, args.include_noncam)
    sets, rules = mask_sets(found, args.mask_values)
    methods = find_methods(args.methods, sets)
    baseline = _named(methods, args.baseline)
    score(methods, sets, args, num_processes)
    sizes = {masks.name: len(masks.pairs) for masks in sets}
    published, left_out = ([], []) if args.published is None else published_rows(args.published, sizes)
    table = ScoreTable(
        sizes, {name: COLUMNS[name] for name in args.measures}, [*published, *(m.row() for m in methods)]
    )
    print_lines(["", *terminal_lines(table), "", "* best, + second best" + _about_runs(methods)])
    print_lines(left_out)
    differences = [] if baseline is None else differences_to(baseline, methods, list(sizes), args.measures)
    first = [one["sentence"] for one in differences if one["measure"] == args.measures[0]]
    print_lines(["", *first] if first else [])
    if len(first) < len(differences):
        others = ", ".join(COLUMNS[name] for name in args.measures[1:] if name in _PAIRED)
        print_lines([f"The same by {others}: {args.json or 'in --json FILE'}"])
    if any(one["p"] is None for one in differences):
        print_lines(["p-values need scipy: pip install scipy"])
    if baseline is None and len(methods) > 1:
        print_lines([f"--baseline {methods[0].name}: whether the others differ from it beyond chance"])
    if args.json is not None:
        content = {
            "masks": rules, "stretch": args.stretch, **environment(Path(__file__), ("numpy", "pillow", "scipy")),
            "methods": [_as_json(method) for method in methods],
            "published": [asdict(row) for row in published],
            "baseline": args.baseline, "differences": differences,
        }  # fmt: skip
        write_json(args.json, content)
    for file, write in ((args.markdown, markdown), (args.latex, latex), (args.csv, comma_separated)):
        if file is not None:
            write_text(file, write(table))
    written = [str(file) for name in outputs if (file := getattr(args, name)) is not None]
    print_lines([f"Written: {', '.join(written)}"] if written else [])
    return 0


def find_methods(given: Sequence[str], sets: Sequence[MaskSet]) -> list[Method]:
    """Return the methods that were named, each by a path or as NAME=PATH.

    A path is a checkpoint, a run's folder, or a folder of predictions with a folder for each set (of one set, also the
    predictions themselves). Folders of these, called by numbers or seeds, are runs of one method; by other names, they
    are methods. So are the folders in a folder of each set.

    Raises:
        ValueError: a path has no predictions for some set, or two methods have the same name.
    """
    methods: list[Method] = []
    for text in given:
        name, path = _name_and_path(text)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; name a method's predictions, or a checkpoint")
        found = _methods_at(path, sets, _DEEPEST)
        if not found:
            raise ValueError(_nothing_at(path, sets))
        if len(found) == 1:
            found[0].name = name or found[0].name
        elif name:
            raise ValueError(f"{text}: {path} holds several methods: {', '.join(method.name for method in found)}")
        methods += found
    names = [method.name for method in methods]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two methods are called {repeated[0]}: give them names, as in OTHER={given[-1]}")
    return methods


def _methods_at(path: Path, sets: Sequence[MaskSet], depth: int) -> list[Method]:
    """Return the methods at a path or in folders below it; a folder without any is named in a warning."""
    if (source := _source_at(path, sets)) is not None:
        return [Method(_name_of(path), [source])]
    if in_sets := _methods_in_sets(path, sets):
        return [Method(name, [source]) for name, source in in_sets.items()]
    children = sorted(subfolders(path)) if path.is_dir() and depth else []
    by_child = {child: _methods_at(child, sets, depth - 1) for child in children}
    below = [method for methods in by_child.values() for method in methods]
    if below and depth == _DEEPEST:
        for child in (child for child, methods in by_child.items() if not methods):
            logger.warning(f"left out: {_nothing_at(child, sets)}")
    if below and all(_SEED.fullmatch(child.name) for child, methods in by_child.items() if methods):
        return [Method(_name_of(path), [source for method in below for source in method.sources])]
    return below


def _name_and_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and name and not Path(text).exists() else ("", Path(text))


def _name_of(path: Path) -> str:
    """Return a name for a method at a path: of a checkpoint that of its run's folder."""
    path = path.resolve()
    return path.parent.name if path.suffix in _NETWORK_SUFFIXES else path.name


def _source_at(path: Path, sets: Sequence[MaskSet]) -> Source | None:
    """Return the run of a method at a path; None if there is none, but perhaps below it."""
    if path.is_file() or best_weights(path)[0].is_file():
        return Source(path)
    folders = _folders_of_sets(path, sets)
    if len(folders) == len(sets) and not _methods_in_sets(path, sets):
        return Source(path, folders)
    if len(sets) == 1 and files_by_stem(path, PREDICTION_SUFFIXES):
        return Source(path, {sets[0].name: path})
    return None


def _folders_of_sets(path: Path, sets: Sequence[MaskSet]) -> dict[str, Path]:
    """Return the folders that are called like sets."""
    children = {child.name.lower(): child for child in subfolders(path)}
    return {masks.name: children[masks.name.lower()] for masks in sets if masks.name.lower() in children}


def _methods_in_sets(path: Path, sets: Sequence[MaskSet]) -> dict[str, Source]:
    """Return the methods in folders of each set, those that all sets have. Masks may be in folders, too: of classes."""
    folders = _folders_of_sets(path, sets)
    if len(folders) < len(sets):
        return {}
    of_masks = {pair.mask.parent.name for masks in sets for pair in masks.pairs}
    common = set.intersection(*({child.name for child in subfolders(folder)} for folder in folders.values()))
    names = sorted(name for name in common - of_masks if not name.startswith("overlays"))
    return {name: Source(path, {each: folder / name for each, folder in folders.items()}) for name in names}


def _nothing_at(path: Path, sets: Sequence[MaskSet]) -> str:
    found = [child.name for child in subfolders(path)] if path.is_dir() else []
    there = f"; it has {', '.join(found[:4])}{' and more' if len(found) > 4 else ''}" if found else ""
    missing = [masks.name for masks in sets if masks.name.lower() not in {child.lower() for child in found}]
    return (
        f"{path}: neither a checkpoint, nor predictions with a folder for each set (missing: {', '.join(missing)})"
        f"{there}; put each set's predictions into {path / sets[0].name}, or leave sets without predictions out of "
        "--dataset-path"
    )


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
    missing: dict[Path, Callable[[], Iterator[Case | str]]] = {}
    reports: dict[Path, dict[str, SetReport]] = {}
    for source in (source for method in methods for source in method.sources):
        cases, key = _cases_and_key(source, sets, args, num_processes)
        files.append(file := folder / f"{key}.json")
        kept = read_json(file)
        if list(kept) == names:
            reports[file] = {name: SetReport.of(state) for name, state in kept.items()}
        else:
            missing[file], reports[file] = cases, {name: SetReport() for name in names}
    waiting: deque[Path] = deque()  # of each image that is being scored

    def stream() -> Iterator[Case | str]:
        for file, cases in missing.items():
            for case in cases():
                waiting.append(file)
                yield case

    failures: list[str] = []
    with progress_bar(len(missing) * sum(len(masks.pairs) for masks in sets), "image") as bar:
        for result in scored_cases(stream(), num_processes):
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
    for file in missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: report.state() for name, report in reports[file].items()}
        write_text(file, json.dumps(state))  # with NaN and infinity, which a degenerate image may have
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
    source: Source, sets: Sequence[MaskSet], args: argparse.Namespace, num_processes: int
) -> tuple[Callable[[], Iterator[Case | str]], str]:
    """Return a function that yields a run's cases, and a key of all that its scores depend on."""
    facts: list[Any] = [_FORMAT, Path(metrics.__file__).read_text(encoding="utf-8"), args.stretch]
    facts += [(masks.name, str(masks.reading), *map(_fingerprint, (p.mask for p in masks.pairs))) for masks in sets]
    if source.folders:
        cases = [
            case
            for masks in sets
            for case in cases_in_folder(source.folders[masks.name], masks, args.stretch, is_own=True)
        ]
        facts += [(str(case.prediction_reading), _fingerprint(Path(str(case.prediction)))) for case in cases]
        return lambda: iter(cases), _key(facts)

    if args.masks is not None:
        raise ValueError(f"{source.path}: a network needs photographs: give --dataset-path instead of --masks")

    from evaluation.predictor import load_network  # torch: scoring files does not need it

    files = best_weights(source.path) if source.path.is_dir() else [source.path]
    facts += [args.img_size, args.tta, args.precision, args.device, *map(_fingerprint, files)]
    facts += [_fingerprint(pair.image) for masks in sets for pair in masks.pairs]

    def predicted() -> Iterator[Case | str]:
        network = load_network(source.path, args.device, args.precision, args.img_size, args.tta)
        pairs = [pair for masks in sets for pair in masks.pairs]
        return cases_of_networks([(network, pairs)], sets, args.batch_size, args.stretch, num_processes)

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
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            entries = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--published {file}: cannot be read ({error})") from error
    wanted = {"method", "set", "images", "source"}
    if not entries or not wanted <= entries[0].keys():
        raise ValueError(f"--published {file}: needs a first line with {', '.join(sorted(wanted))}, and measures")
    by_name = {name.lower(): name for name in sizes}
    scores: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}
    left_out: dict[str, str] = {}
    for line, entry in enumerate(entries, start=2):
        if (set_name := by_name.get(entry["set"].lower())) is None:
            continue
        try:
            number = int(entry["images"])
            values = {name: [float(entry[name])] for name in COLUMNS if entry.get(name)}
        except ValueError as error:
            raise ValueError(f"--published {file}, line {line}: {error}") from error
        if number != sizes[set_name]:
            left_out[set_name] = (
                f"No published numbers for {set_name}: they are for {number} images, and there are {sizes[set_name]}"
            )
            continue
        scores.setdefault((entry["method"], entry["source"]), {})[set_name] = values
    return [Row(method, by_set, source) for (method, source), by_set in scores.items()], list(left_out.values())


def differences_to(
    baseline: Method, methods: Sequence[Method], sets: Sequence[str], measures: Sequence[str]
) -> list[dict[str, Any]]:
    """Return what differs from the baseline, by set and over all sets, with a sentence each.

    p-values are corrected for the number of methods and sets, for each measure by itself.
    """
    places = [[name] for name in sets] + ([list(sets)] if len(sets) > 1 else [])
    found: list[dict[str, Any]] = []
    for measure in (name for name in measures if name in _PAIRED):
        results: list[tuple[Method, list[str], Difference]] = []
        for method in (method for method in methods if method is not baseline):
            for where in places:
                first, second = ([one.image_scores(name, measure) for name in where] for one in (method, baseline))
                results.append((method, where, difference(first, second)))
        p_values = [result.p for _, _, result in results if result.p is not None]
        corrected = holm(p_values) if len(p_values) == len(results) else [None] * len(results)
        for (method, where, result), p in zip(results, corrected, strict=True):
            text = sentence(
                method.name, baseline.name, where[0] if len(where) == 1 else "all sets", COLUMNS[measure], result, p,
                measure in LOWER_IS_BETTER,
            )  # fmt: skip
            found.append(
                {"method": method.name, "sets": where, "measure": measure, **asdict(result), "p": result.p,
                 "p_corrected": p, "sentence": text}
            )  # fmt: skip
    return found


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
