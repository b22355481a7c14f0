"""Images to be predicted: found by file, folder or pattern, each with the name its prediction gets."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

# What is tried of a folder's files. Those that Pillow cannot read (.heic without a plug-in) are here to be named.
PHOTOGRAPH_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .webp .tif .tiff .gif .ppm .pgm .pbm .pnm .tga .jp2 .j2k .jpx .mpo .avif "
    ".heic .heif".split()
)


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
    output = output.resolve()
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
                numbers.update({index: numbers.get(index, 1) + n for n, index in enumerate(group[1:], start=1)})


def _expand(text: str, output: Path, problems: list[str]) -> Iterator[Source]:
    path = Path(text)
    if path.is_dir():
        if path.resolve() == output:
            problems.append(f"{path}: is the folder that predictions are written to")
        else:
            yield from _walk(path, _absolute(path), output, problems)
    elif not glob.has_magic(text) or os.path.lexists(path):  # a[1].jpg may well be a file's name
        if problem := _problem_of(path):
            problems.append(problem)
        else:
            yield Source(path, _absolute(path.parent), PurePath(path.name))
    else:
        yield from _match(text, output, problems)


def _match(pattern: str, output: Path, problems: list[str]) -> Iterator[Source]:
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root, num_found = _absolute(Path(*parts[:first])), 0
    for name in sorted(glob.iglob(pattern, recursive=True)):
        path = Path(name)
        if path.is_dir():
            sources: Iterable[Source] = _walk(path, root, output, problems)
        else:
            is_written = output in path.resolve().parents
            sources = [] if is_written or not _is_photograph(path) else _visible(path, root, problems)
        for source in sources:
            num_found += 1
            yield source
    if not num_found:
        problems.append(f"{pattern}: no image matches")


def _walk(folder: Path, root: Path, output: Path, problems: list[str]) -> Iterator[Source]:
    """Links to folders after folders, so that what is there twice is found by its own path."""
    seen = {output}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        real = here.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(here) as scan:
                entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda one: one.name)
        except OSError as error:
            problems.append(f"{here}: {error.strerror}")
            continue
        folders = [entry for entry in entries if _is_folder(entry)]
        for entry in entries:
            if entry not in folders and _is_photograph(path := here / entry.name):
                yield from _visible(path, root, problems)
        waiting[:0] = [here / entry.name for entry in reversed(folders) if entry.is_symlink()]
        waiting += [here / entry.name for entry in reversed(folders) if not entry.is_symlink()]


def _visible(path: Path, root: Path, problems: list[str]) -> Iterator[Source]:
    if problem := _problem_of(path):
        problems.append(problem)
    else:
        yield Source(path, root, _absolute(path).relative_to(root))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in PHOTOGRAPH_SUFFIXES


def _problem_of(path: Path) -> str:
    """Why a file cannot be opened, or never should be: opening a FIFO waits for a writer."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            return f"{path}: a link to {os.readlink(path)}, which cannot be read ({error.strerror})"
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(mode):
        return f"{path}: not a file (a pipe, socket or device)"
    return "" if os.access(path, os.R_OK) else f"{path}: Permission denied"


def _absolute(path: Path) -> Path:
    """Links are kept, ``..`` is not: what is found once by two spellings is one."""
    return Path(os.path.normpath(path.absolute()))
