"""Methods to compare, found in folders of any layout: predictions, runs of a method, trained networks."""

import logging
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from commands.cli import ALL_MEASURES
from commands.scoring import CURVES, PREDICTION_SUFFIXES, Case, MaskSet, SetReport
from data.listing import files_by_stem, subfolders
from reporting.comparison import MethodDetails
from reporting.score_table import Row
from runtime.folder import best_weights

_NETWORK_SUFFIXES = (".pth", ".pt")
_DEEPEST = 2  # folders of methods, and in them folders of runs
_SEED = re.compile(r"(seed|run|fold)?[-_ ]?\d+", re.IGNORECASE)

Attributes = Mapping[str, Mapping[str, str]]  # attribute -> mask's file name -> group

logger = logging.getLogger("train_ultimate")


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
    """A method, and once it is scored, its scores.

    Attributes:
        name: to print.
        sources: its runs.
        reports: of each run, by set.
        cases: saved predictions of the first run, by set and mask's file name; none of a network.
    """

    name: str
    sources: list[Source]
    reports: list[dict[str, SetReport]] = field(default_factory=list)
    cases: dict[tuple[str, str], Case] = field(default_factory=dict)

    def image_scores(self, set_name: str, measure: str) -> dict[str, float]:
        """Return a score of each image of a set, by the images' names in order: the mean over runs."""
        by_name = [{image["name"]: image[measure] for image in report[set_name].images} for report in self.reports]
        return {name: statistics.fmean(scores[name] for scores in by_name) for name in sorted(by_name[0])}

    def details(self, attributes: Attributes) -> MethodDetails:
        """Return what the page shows: means over runs."""
        curves, groups = {}, {}
        for name in self.reports[0]:
            reports = [report[name] for report in self.reports]
            means = np.mean([one.totals.curve_sums / one.totals.num_images for one in reports], axis=0)
            curves[name] = dict(zip(CURVES, means, strict=True))
            groups[name] = {
                "object size": _mean_s([one.by_size() for one in reports]),
                "superclass": _mean_s([one.by_superclass() for one in reports]),
                **{kind: _mean_s([one.by_group(group_of) for one in reports]) for kind, group_of in attributes.items()},
            }
        images = {name: self.image_scores(name, "s_measure") for name in curves}
        return MethodDetails(self.name, curves, groups, images)

    def row(self) -> Row:
        """Return the scores of each run, for the tables."""
        scores = {
            set_name: {
                measure: [means[measure] for means in of_runs] for measure in ALL_MEASURES if measure in of_runs[0]
            }
            for set_name in self.reports[0]
            if (of_runs := [report[set_name].totals.means() for report in self.reports])
        }
        return Row(self.name, scores)


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
    path = path.resolve() if path.name in ("", "..") else path.absolute()  # a link is called like itself
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


def _mean_s(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean S of each group over runs; groups by size have the same names in all."""
    return {group: statistics.fmean(run[group]["s_measure"] for run in runs) for group in runs[0]}
