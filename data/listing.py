"""Pictures in a folder: the files to read, by name, and those left out, with the reason.

Every file of a dataset is listed here before anything opens it: opening a pipe would wait for a writer forever.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.pairing import PICTURE_SUFFIXES

MAX_DEPTH = 4  # folders below the one that is searched
NO_FILE = "not a file but a pipe, socket or device"
_NOT_READ = "in a format that is not read; convert to .jpg or .png"
_SHARED_NAME = "two files of one name, but for the ending; remove one of them"
_UNREAD_SUFFIXES = (
    ".heic", ".heif", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".svg", ".psd", ".exr",
    ".hdr", ".npy", ".npz", ".mat",
)  # fmt: skip
_IGNORED_FOLDERS = frozenset(("__macosx", "@eadir"))  # made by macOS's archiver and by network disks


@dataclass(frozen=True)
class Listing:
    """Pictures of a folder.

    Attributes:
        files: path below the folder, without ending -> file; sorted by file name.
        left_out: file that looks like a picture -> why it is not read.
    """

    files: dict[str, Path]
    left_out: dict[Path, str]


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Map stem to path for the folder's visible files with one of the suffixes, sorted by name.

    Raises:
        ValueError: two of them share a stem.
    """
    return by_stem(folder, (name for name in _scan(folder)[0] if _has_suffix(name, suffixes)))


def by_stem(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Map the stems of file names to their paths.

    Raises:
        ValueError: two of them share a stem.
    """
    files: dict[str, Path] = {}
    for path in (folder / name for name in names):
        if path.stem in files:
            raise ValueError(f"{folder}: {files[path.stem].name} and {path.name} share a stem; remove one of them")
        files[path.stem] = path
    return files


def list_pictures(folder: Path, suffixes: Sequence[str]) -> Listing:
    """List a folder's pictures, without its sub-folders.

    Args:
        folder: the folder.
        suffixes: usual formats. Pictures in others are read if their stem is not that of a usual one.

    Raises:
        ValueError: two files in usual formats share a stem.
    """
    names, special = _scan(folder)
    files = by_stem(folder, (name for name in names if _has_suffix(name, suffixes)))
    left_out = {folder / name: NO_FILE for name in special if _has_suffix(name, PICTURE_SUFFIXES)}
    others: dict[str, list[Path]] = defaultdict(list)
    for path in (folder / name for name in names if _has_suffix(name, PICTURE_SUFFIXES)):
        if path.stem not in files:
            others[path.stem].append(path)
    for stem, paths in others.items():
        if len(paths) == 1:
            files[stem] = paths[0]
        else:
            left_out |= dict.fromkeys(paths, _SHARED_NAME)
    unread = [folder / name for name in names if _has_suffix(name, _UNREAD_SUFFIXES)]
    left_out |= {path: _NOT_READ for path in unread if path.stem not in files}
    return Listing(dict(sorted(files.items(), key=lambda item: item[1].name)), left_out)


def list_tree(folder: Path, suffixes: Sequence[str], skip: Collection[Path] = ()) -> Listing:
    """List the pictures of a folder and of the folders below it, except for those below ``skip``.

    Raises:
        ValueError: two files in usual formats share a folder and a stem.
    """
    files: dict[str, Path] = {}
    left_out: dict[Path, str] = {}
    for directory, _ in walk(folder, skip):
        try:
            listing = list_pictures(directory, suffixes)
        except PermissionError:
            left_out[directory] = "a folder without permission to read it"
            continue
        files |= {(path.parent.relative_to(folder) / stem).as_posix(): path for stem, path in listing.files.items()}
        left_out |= listing.left_out
    return Listing(files, left_out)


def picture_names(folder: Path) -> list[str]:
    """Return the names of a folder's pictures in any format, sorted; none if the folder is not readable."""
    try:
        return [name for name in _scan(folder)[0] if _has_suffix(name, PICTURE_SUFFIXES)]
    except PermissionError:
        return []


def walk(root: Path, skip: Collection[Path] = ()) -> Iterator[tuple[Path, int]]:
    """Yield a folder and those below it, at most four levels down, with their depth; none that is in ``skip``."""
    pending = [(root, 0)]
    while pending:
        directory, depth = pending.pop()
        yield directory, depth
        if depth < MAX_DEPTH:
            pending.extend((child, depth + 1) for child in reversed(subfolders(directory)) if child not in skip)


def subfolders(directory: Path) -> list[Path]:
    """Return visible subfolders, sorted by name; none if the directory is not readable (``lost+found``)."""
    try:
        with os.scandir(directory) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            names = sorted(entry.name for entry in visible if _kind(entry) == "folder")
    except PermissionError:
        return []
    return [directory / name for name in names if name.lower() not in _IGNORED_FOLDERS]


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of visible files, broken links included, and of pipes, sockets and devices; both sorted."""
    names: dict[str, list[str]] = {"file": [], "folder": [], "special": []}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                names[_kind(entry)].append(entry.name)
    return sorted(names["file"]), sorted(names["special"])


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        entry.stat()
    except OSError:  # a broken link, which opening will report
        return "file"
    return "special"


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    stem, _, ending = name.rpartition(".")
    return stem != "" and f".{ending.lower()}" in suffixes
