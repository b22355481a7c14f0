"""Images to predict: found by file, folder or pattern, each with the name its prediction gets."""

import fnmatch
import glob
import itertools
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from data.listing import NO_FILE
from data.pairing import PICTURE_SUFFIXES

# Files of a folder to try. Formats that Pillow cannot read without a plug-in are here to be reported.
PHOTOGRAPH_SUFFIXES = frozenset((*PICTURE_SUFFIXES, ".heic", ".heif"))


@dataclass(frozen=True)
class Source:
    """An image to predict."""

    path: Path
    root: Path  # absolute: the folder that was given, the part of a pattern before its wildcards, or a file's folder
    relative: PurePath  # to the root

    @property
    def absolute(self) -> Path:
        return self.root / self.relative


@dataclass
class Sources:
    """Images found, and inputs that cannot be read."""

    images: list[Source] = field(default_factory=list)  # each path once, in the order of the inputs
    problems: list[str] = field(default_factory=list)
    num_repeated: int = 0  # images that several inputs name


def find_sources(inputs: Iterable[str], output: Path) -> Sources:
    """Find the images that files, folders and patterns name.

    A folder is searched with all folders below it, links included, each once. Hidden files and folders, files that are
    not images (by ``PHOTOGRAPH_SUFFIXES``) and everything below ``output`` are skipped. A pattern (``*``, ``?``,
    ``[...]``, ``**`` for folders at any depth) is searched the same way. A file is taken whatever its name.
    """
    sources, seen = Sources(), set[Path]()
    output = _real(output)
    for text in inputs:
        for found in _expand(text, output):
            if isinstance(found, str):
                sources.problems.append(found)
            elif found.absolute in seen:
                sources.num_repeated += 1
            else:
                seen.add(found.absolute)
                sources.images.append(found)
    return sources


def name_predictions(sources: Sequence[Source], suffix: str = ".png") -> list[PurePath]:
    """Return a path below the output folder for each prediction, no two of them equal even if letter case is ignored.

    It is the image's path below its root, with another suffix. If two would be equal: images of different roots go
    into folders named after their roots, and after the roots' parents where needed; images of one root (a.jpg, a.png)
    keep their suffix before the new one; what is then still equal (A.jpg, a.jpg) is numbered.
    """
    depths = {source.root: 0 for source in sources}  # last folders of a root's path that become part of its names
    whole = set[int]()  # images that keep their suffix
    while True:
        names = []
        for index, source in enumerate(sources):
            above = source.root.parts[1:]
            folders = above[len(above) - depths[source.root] :]
            name = source.relative.name if index in whole else source.relative.stem
            names.append(PurePath(*folders, *source.relative.parent.parts, name + suffix))
        groups: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(str(name).casefold(), []).append(index)
        taken = {str(parent).casefold() for name in names for parent in name.parents}  # a folder x.png rules out a file
        equal = [group for name, group in groups.items() if len(group) > 1 or name in taken]
        roots = [{sources[index].root for index in group} for group in equal]
        deeper = {root for group in roots if len(group) > 1 for root in group if depths[root] < len(root.parts) - 1}
        if deeper:
            depths.update({root: depths[root] + 1 for root in deeper})
        elif not whole.issuperset(itertools.chain(*equal)):
            whole.update(*equal)
        else:
            break
    keeping = [group[0] for group in equal if str(names[group[0]]).casefold() not in taken]
    taken |= groups.keys()
    for index in sorted({*itertools.chain(*equal)} - {*keeping}):
        stem = names[index].name.removesuffix(suffix)
        numbered = (names[index].with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))
        names[index] = next(name for name in numbered if str(name).casefold() not in taken)
        taken.add(str(names[index]).casefold())
    return names


def _expand(text: str, output: Path) -> Iterator[Source | str]:
    """Yield the images that an input names, and what is wrong with the others."""
    path = Path(text)
    if not text:
        yield "an input without a name: an empty variable of the shell?"
    elif _is_folder(path):
        if _real(path) == output:
            yield f"{path}: is the folder that predictions are written to"
        else:
            yield from _walk(path, _absolute(path), output)
    elif not glob.has_magic(text) or os.path.lexists(path):  # a[1].jpg may well be a file's name
        yield _checked(Source(path, _absolute(path.parent), PurePath(path.name)))
    else:
        matches = {found if isinstance(found, str) else found.absolute: found for found in _match(text, output)}
        yield from matches.values() or [f"{path}: no image matches"]


def _match(pattern: str, output: Path) -> Iterator[Source | str]:
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    folder = Path(*parts[:first])
    root = _absolute(folder)
    if "**" in parts:  # glob follows links in circles
        yield from _walk(folder, root, output, lambda relative: _fits(relative.parts, parts[first:]))
        return
    for path in map(Path, sorted(glob.iglob(pattern))):  # noqa: PTH207  # Path.glob takes no absolute pattern
        if _is_folder(path):
            yield from _walk(path, root, output)
        elif _is_photograph(path) and output not in _real(path).parents:
            yield _checked(Source(path, root, _absolute(path).relative_to(root)))


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path, or a folder that it is in, matches a pattern."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _fits(path, pattern[1:]) or (len(path) > 0 and _fits(path[1:], pattern))
    return len(path) > 0 and fnmatch.fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _walk(
    folder: Path, root: Path, output: Path, wanted: Callable[[PurePath], bool] = lambda relative: True
) -> Iterator[Source | str]:
    """Yield the images below a folder. Links to folders come last, so that each file is found by its own path."""
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
            yield f"{here}: {error.strerror}"
            continue
        for path, entry in ((here / entry.name, entry) for entry in entries):
            if _is_folder(path):
                (links if entry.is_symlink() else folders).append(path)
            elif _is_photograph(path) and wanted(relative := _absolute(path).relative_to(root)):
                yield _checked(Source(path, root, relative))
        waiting += reversed(folders)


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises if permission is denied


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in PHOTOGRAPH_SUFFIXES


def _checked(source: Source) -> Source | str:
    """Return the source, or why its file cannot be opened, or must not be: opening a FIFO waits for a writer."""
    path = source.path
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return f"{path}: {NO_FILE}"
        return source if os.access(path, os.R_OK) else f"{path}: Permission denied"
    except OSError as error:
        problem = str(error.strerror)
        with suppress(OSError):
            problem = f"a link to {path.readlink()}, which cannot be read ({problem})"
        return f"{path}: {problem}"


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a link to itself


def _absolute(path: Path) -> Path:
    """Return an absolute path without ``..`` but with its links: two spellings of a file become one."""
    return Path(os.path.normpath(path.absolute()))
