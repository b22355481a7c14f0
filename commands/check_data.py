"""``check-data``: list what is wrong with a dataset, file by file, before a run meets it."""

import shlex
import sys
import time
from collections.abc import Collection, Container, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import is_exclude_file, is_json_with, require_own
from data.inspection import (
    KINDS,
    SIZE_BINS,
    MaskGroup,
    PairFacts,
    Report,
    assess,
    pairs_to_inspect,
    start_inspection,
    survey_groups,
)
from data.layouts import (
    Pair,
    Split,
    Subset,
    by_name,
    find_subsets,
    leave_out,
    split_validation,
    training_pairs,
)
from data.survey import AUTO
from runtime.files import write_json, write_text

_SHOWN = 10  # findings of a kind in the table
_BAR = 30  # characters, longest bar of the histogram


def check_data(
    root: Path, json_file: Path | None, exclude_file: Path | None, num_workers: int, include_noncam: bool,
    mask_values: str = AUTO,
) -> int:  # fmt: skip
    """Print the report, and write it to the files that are given.

    Args:
        root: folder of the dataset.
        json_file: file for the whole report; None for none.
        exclude_file: file for the training images to leave out; None for none.
        num_workers: processes that read; 0 to read in this one.
        include_noncam: take COD10K's images without camouflaged objects too.
        mask_values: how masks are read: as their values suggest (auto), or in one of the other ways.

    Returns:
        exit code: 0 for no findings, 1 for findings, 130 if interrupted.

    Raises:
        ValueError: the folder is missing, has no known layout or no usable pair, or a file cannot be written.
    """
    if not root.is_dir():
        raise ValueError(f"--dataset-path {root}: no such folder; name the dataset's folder")
    for file in (json_file, exclude_file):
        if file is not None:
            require_writable(file)
    if json_file is not None and exclude_file is not None and json_file.resolve() == exclude_file.resolve():
        raise ValueError(f"{json_file}: is named twice; give --json and --write-exclude a file each")
    if json_file is not None:
        require_own([json_file], is_json_with("findings", "usable_pairs"), "check-data", f"--json {json_file}")
    if exclude_file is not None:
        require_own([exclude_file], is_exclude_file, "check-data", f"--write-exclude {exclude_file}")
    start = time.perf_counter()
    try:
        subsets = find_subsets(root, include_noncam)
        pairs = pairs_to_inspect(subsets)
        groups = survey_groups(subsets, pairs, mask_values)
        facts = _inspect([pair for pair, _ in pairs], num_workers, groups)
        report = assess(root, subsets, pairs, facts, groups)
    except KeyboardInterrupt:
        print_lines(["interrupted: nothing was written"], to_stderr=True)
        return 130
    seconds = time.perf_counter() - start
    training = by_name([pair for pair, split in pairs if split == "train"], root)
    print_lines(_table(root, report, seconds))
    try:
        if json_file is not None:
            write_json(json_file, _as_json(root, report, seconds))
        if exclude_file is not None:
            write_text(exclude_file, _exclude_text(root, report, training))
    except OSError as error:
        names = " or ".join(str(file) for file in (json_file, exclude_file) if file is not None)
        raise ValueError(f"{names}: cannot be written ({error.strerror}); choose another place") from error
    if not report.num_usable:
        raise ValueError(f"{root}: no image with a mask can be used; see the findings above")
    refusal = _refusal(root, subsets, report.exclude)
    print_lines(
        ["", f"Training would refuse it: {refusal}" if refusal else _next_step(root, report, exclude_file, mask_values)]
    )
    return 1 if report.findings or (training and refusal) else 0


def _inspect(pairs: Sequence[Pair], num_workers: int, groups: Sequence[MaskGroup]) -> list[PairFacts]:
    results = start_inspection(pairs, num_workers, groups)  # before the bar starts a thread: they must fork without one
    facts = []
    with progress_bar(2 * len(pairs), "file", "Reading") as bar:
        for fact in results:
            facts.append(fact)
            bar.update(2)
    return facts


def _table(root: Path, report: Report, seconds: float) -> list[str]:
    num_pairs = sum(folder.pairs for folder in report.folders)
    where = f"{len(report.folders)} folders" if len(report.folders) > 1 else "one folder"
    lines = [f"{root}: {num_pairs} pairs in {where}, read in {seconds:.1f} s"]
    name_width = max(len(folder.name) for folder in report.folders)
    for folder in report.folders:
        published = ""
        if folder.published is not None:
            same = "as published" if folder.published == folder.pairs else f"published: {folder.published}"
            published = f"   {folder.published_as}, {same}"
        use = f"for {folder.split}ing"
        lines.append(f"   {folder.name:{name_width}}   {use:12}   {folder.pairs:5} pairs{published}")
    lines.append("")
    lines.append(f"Findings: {len(report.findings)}" if report.findings else "Findings: none")
    for kind, group in groupby(report.findings, key=lambda finding: finding.kind):
        findings = list(group)
        lines.append(f"   {kind}: {KINDS[kind]} ({len(findings)})")
        for finding in findings[:_SHOWN]:
            other = f" [{finding.other}]" if finding.other else ""
            lines.append(f"      {finding.file}: {finding.reason}{other}")
        if len(findings) > _SHOWN:
            lines.append(f"      ... and {len(findings) - _SHOWN} more (--json FILE has all)")
    lines += ["", *_histogram(report.object_sizes)]
    if report.notes:
        lines += ["", "Notes", *(f"   {note}" for note in report.notes)]
    return lines


def _histogram(sizes: dict[Split, list[int]]) -> list[str]:
    """Return a histogram of the pairs by the object's share of the image, with a column for each split."""
    shown = {split: counts for split, counts in sizes.items() if any(counts)}
    if not shown:
        return ["Object's share of the image: no mask could be read"]
    lines = ["Object's share of the image" + "".join(f"   {split + 'ing':<{_BAR + 7}}" for split in shown)]
    for number, label in enumerate(_bin_labels()):
        line = f"   {label:24}"
        for counts in shown.values():
            bar = "#" * round(_BAR * counts[number] / max(counts))
            line += f"   {counts[number]:5}  {bar:{_BAR}}"
        lines.append(line)
    return [line.rstrip() for line in lines]


def _bin_labels() -> list[str]:
    ends = [f"{end * 100:g}" for end in SIZE_BINS]
    between = [f"{low} to {high} %" for low, high in pairwise(ends)]
    return [f"below {ends[0]} %", *between, f"above {ends[-1]} %"]


def _refusal(root: Path, subsets: Sequence[Subset], exclude: Collection[str]) -> str:
    """Return why ``train`` would refuse the dataset, without the excluded images; empty if it would not."""
    try:
        pairs, _ = leave_out(training_pairs(subsets, root), root, exclude)
        split_validation(pairs, fraction=0.1, seed=0)
    except ValueError as error:
        return str(error)
    return ""


def _next_step(root: Path, report: Report, exclude_file: Path | None, mask_values: str) -> str:
    program = ["python", sys.argv[0]]
    data = ["--dataset-path", str(root), *(["--mask-values", mask_values] if mask_values != AUTO else [])]
    train = [*program, "train", *data]
    if not report.exclude:
        return f"Training can use every pair. Next: {shlex.join(train)}"
    if exclude_file is not None:
        leave_out = shlex.join([*train, "--exclude", str(exclude_file)])
        return f"{exclude_file} names {len(report.exclude)} training images to leave out. Next: {leave_out}"
    write = shlex.join([*program, "check-data", *data, "--write-exclude", "exclude.txt"])
    return f"Training is better without {len(report.exclude)} of its images. Next: {write}"


def _exclude_text(root: Path, report: Report, training: Container[str]) -> str:
    """Return the text of an exclude file. Images without an object may be there on purpose: they are comments in it."""
    lines = [
        f"# Training images of {root.resolve().name!r} to leave out, for train --exclude FILE. Written by check-data.",
        "# One path a line, relative to the dataset's folder; lines that begin with # are comments.",
    ]
    for file, reason in sorted(report.exclude.items()):
        lines += [f"# {reason}", file]
    empty = {finding.other for finding in report.findings if finding.kind == "empty-mask"}
    if negatives := sorted(file for file in empty - report.exclude.keys() if file in training):
        lines += [
            "# Not left out: images whose masks are empty, perhaps on purpose. If not, remove the # before them.",
            *(f"#{file}" for file in negatives),
        ]
    return "\n".join(lines) + "\n"


def _as_json(root: Path, report: Report, seconds: float) -> dict[str, Any]:
    return {
        "dataset": str(root),
        "seconds": round(seconds, 3),
        "usable_pairs": report.num_usable,
        "folders": [asdict(folder) for folder in report.folders],
        "findings": [asdict(finding) for finding in report.findings],
        "notes": report.notes,
        "object_sizes": {"bins": _bin_labels(), **report.object_sizes},
        "exclude": report.exclude,
    }
