"""Images to be predicted: found by file, folder or pattern, each with the name its prediction gets."""

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath

# What is tried of a folder's files. Those that Pillow cannot read (.heic without a plug-in) are here to be named.
# fmt: off
PHOTOGRAPH_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".jpx", ".avif", ".heic", ".heif",
))
# fmt: on


@dataclass(frozen=True)
class Source:
    path: Path
    root: Path  # absolute; the folder that was given, a pattern's part without wildcards, or a file's folder
    relative: PurePath  # below it

    @property
    def absolute(self) -> Path:
        return self.root / self.relative


@dataclass
class Sources:
    images: list[Source] = field(default_factory=list)  # each path once, in order of the inputs, of names below them
    problems: list[str] = field(default_factory=list)  # what was asked for and cannot be read, and why
    num_repeated: int = 0  # asked for more than once


def find_sources(inputs: Iterable[str], output: Path) -> Sources:
    """The images that files, folders and patterns name.

    A folder counts with all below it, links to folders included, each folder once; hidden files and folders, other
    files than images (by ``PHOTOGRAPH_SUFFIXES``) and what is below ``output`` are passed over. A pattern (``*``,
    ``?``, ``[...]``, ``**`` for folders at any depth) stands for what it matches, as if that were in a folder. A file
    that is named is taken whatever its name.
    """
    found, seen = Sources(), set[Path]()
    output = _real(output)
    for text in inputs:
        for source in _expand(text, output, found.problems):
            if source.absolute in seen:
                found.num_repeated += 1
                continue
            seen.add(source.absolute)
            found.images.append(source)
    return found


def name_predictions(sources: Sequence[Source], suffix: str = ".png") -> list[PurePath]:
    """A path for each prediction below the output folder, no two alike, letter case aside.

    It is the image's below the folder it was found by, with another suffix. Where two would be alike: for images of
    one folder (a.jpg, a.png) the suffix is kept before the new one; otherwise all of both folders go into folders of
    their names, of their parents' too where they need be.
    """
    extra = {source.root: 0 for source in sources}  # folders above the root that are part of the name
    whole, numbers = set[int](), dict[int, int]()
    while True:
        names = []
        for index, source in enumerate(sources):
            own = source.relative.name if index in whole else source.relative.stem
            number = f"-{numbers[index]}" if index in numbers else ""
            above = source.root.parts[1:]
            folders = [*above[len(above) - extra[source.root] :], *source.relative.parent.parts]
            names.append(PurePath(*folders, f"{own}{number}{suffix}"))
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(str(name).casefold(), []).append(index)
        alike = [group for group in groups.values() if len(group) > 1]
        parents = {str(parent).casefold() for name in names for parent in name.parents}
        alike += [group for name, group in groups.items() if name in parents and len(group) == 1]  # x.jpg beside x.png/
        if not alike:
            return names
        for group in alike:
            roots = {sources[index].root for index in group}
            deeper = [root for root in roots if len(roots) > 1 and extra[root] < len(root.parts) - 1]
            if deeper:
                extra.update({root: extra[root] + 1 for root in deeper})
            elif not whole.issuperset(group):
                whole.update(group)
            else:  # A.jpg and a.jpg, which some file systems cannot tell apart
                later = group[1:] or group
                numbers.update({index: numbers.get(index, 1) + n for n, index in enumerate(later, start=1)})


def _expand(text: str, output: Path, problems: list[str]) -> Iterator[Source]:
    path = Path(text)
    if not text:
        problems.append("an input without a name: an empty variable of the shell?")
    elif _is_folder(path):
        if _real(path) == output:
            problems.append(f"{path}: is the folder that predictions are written to")
        else:
            yield from _walk(path, _absolute(path), output, problems)
    elif not glob.has_magic(text) or os.path.lexists(path):  # a[1].jpg may well be a file's name
        yield from _readable(Source(path, _absolute(path.parent), PurePath(path.name)), problems)
    else:
        matches = {source.absolute: source for source in _match(text, output, problems)}
        if not matches:
            problems.append(f"{path}: no image matches")
        yield from matches.values()


def _match(pattern: str, output: Path, problems: list[str]) -> Iterator[Source]:
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    fixed = Path(*parts[:first])
    root = _absolute(fixed)
    if "**" in parts:  # glob's own goes round and round in links that lead back

        def wanted(relative: PurePath) -> bool:
            whole = relative.parts
            return any(_fits(whole[:length], parts[first:]) for length in range(1, len(whole) + 1))

        yield from _walk(fixed, root, output, problems, wanted)
        return
    for path in map(Path, sorted(glob.iglob(pattern))):  # noqa: PTH207  # Path.glob takes no absolute one
        if _is_folder(path):
            yield from _walk(path, root, output, problems)
        elif _is_photograph(path) and output not in _real(path).parents:
            yield from _readable(Source(path, root, _absolute(path).relative_to(root)), problems)


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or (len(path) > 0 and _fits(path[1:], pattern))
    return len(path) > 0 and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _walk(
    folder: Path,
    root: Path,
    output: Path,
    problems: list[str],
    wanted: Callable[[PurePath], bool] = lambda relative: True,
) -> Iterator[Source]:
    """Links to folders come last, so that what is there twice is found by its own path."""
    seen = {output}
    waiting, links = [folder], deque[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.popleft()
        if (real := _real(here)) in seen:
            continue
        seen.add(real)
        folders: list[Path] = []
        try:
            with os.scandir(here) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda one: one.name)
        except OSError as error:
            problems.append(f"{here}: {error.strerror}")
            continue
        for path, entry in ((here / entry.name, entry) for entry in entries):
            if _is_folder(path):
                (links if entry.is_symlink() else folders).append(path)
            elif _is_photograph(path) and wanted(relative := _absolute(path).relative_to(root)):
                yield from _readable(Source(path, root, relative), problems)
        waiting += reversed(folders)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises for what it may not look at


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in PHOTOGRAPH_SUFFIXES


def _readable(source: Source, problems: list[str]) -> Iterator[Source]:
    """The source, unless its file cannot be opened, or never should be: opening a FIFO waits for a writer."""
    path, problem = source.path, ""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            problem = "not a file but a pipe, socket or device"
        elif not os.access(path, os.R_OK):
            problem = "Permission denied"
    except OSError as error:
        problem = str(error.strerror)
        with suppress(OSError):
            problem = f"a link to {path.readlink()}, which cannot be read ({problem})"
    if problem:
        problems.append(f"{path}: {problem}")
    else:
        yield source


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself


def _absolute(path: Path) -> Path:
    """Links are kept, ``..`` is not: what is found once by two spellings is one."""
    return Path(os.path.normpath(path.absolute()))
