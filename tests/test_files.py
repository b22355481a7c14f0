"""Files replaced in one step: readers see the old content or the new, and nothing is left behind."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

from runtime.files import first_line, json_safe, remove_leftovers, replacing, sync_directory, write_json, write_text


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_file_has_its_old_content_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.parent == tmp_path  # a rename across file systems would be a copy
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("no such thing"), OSError(28, "No space left"), KeyboardInterrupt()])
def test_failing_block_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_block_that_fails_before_it_writes_raises_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at once"), replacing(tmp_path / "a.txt"):
        raise ValueError("at once")
    assert names(tmp_path) == []


def test_block_that_writes_nothing_is_an_error_and_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "one").write_text("1")
        assert not path.exists()
    assert (path / "one").read_text() == "1"
    assert names(tmp_path) == ["folder"]


def test_folder_that_is_half_written_is_removed_with_its_files(tmp_path: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "folder") as unfinished:
            (unfinished / "below").mkdir(parents=True)
            (unfinished / "below" / "one").write_text("1")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write()
    assert names(tmp_path) == []


def test_folder_that_is_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "mine").write_text("1")

    def write() -> None:
        with replacing(path) as unfinished:
            unfinished.mkdir()

    with pytest.raises(OSError, match="not empty"):
        write()
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["mine"]


@pytest.mark.parametrize("character", ["a", "ä", "€", "\N{GRINNING FACE}", os.fsdecode(b"\xff")])
def test_names_as_long_as_the_file_system_takes_them(tmp_path: Path, character: str) -> None:
    size = len(os.fsencode(character))
    path = tmp_path / (character * (255 // size - 5) + ".json")
    with replacing(path, ".suffix") as unfinished:
        unfinished.write_text("new")
    assert names(tmp_path) == [path.name]


def test_temporary_name_has_the_ending_that_a_writer_needs(tmp_path: Path) -> None:
    with replacing(tmp_path / "network.onnx", ".onnx") as unfinished:
        assert unfinished.suffix == ".onnx"
        unfinished.touch()
    assert names(tmp_path) == ["network.onnx"]


def test_two_processes_write_one_file_without_mixing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as unfinished:
        unfinished.write_text("parent")
        if (child := os.fork()) == 0:
            with replacing(path) as other:
                other.write_text("child")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.read_text() == "child"
    assert path.read_text() == "parent"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("suffix", ["", ".onnx"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_leftovers_of_a_killed_writer_are_removed_and_other_files_stay(
    tmp_path: Path, suffix: str, is_folder: bool
) -> None:
    if (child := os.fork()) == 0:
        with replacing(tmp_path / "best_model", suffix) as unfinished:
            if is_folder:
                unfinished.mkdir()
                (unfinished / "config.json").write_text("half")
            else:
                unfinished.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "epoch_0001.pth").touch()
    (tmp_path / ".hidden").touch()
    assert len(names(tmp_path)) == 3
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "epoch_0001.pth"]


def test_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    sync_directory(tmp_path / "missing")


def test_json_file_is_strict_json_and_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for value in (1, 2):
        write_json(path, {"value": value, "loss": math.nan})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"value": 2, "loss": "nan"}
    assert path.read_text().endswith("}\n")
    assert names(tmp_path) == ["config.json"]


def test_text_keeps_the_bytes_of_names_that_are_not_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "exclude.txt", os.fsdecode(b"Imgs/f\xfcnf.jpg\n") + "fünf\n")
    assert (tmp_path / "exclude.txt").read_bytes() == b"Imgs/f\xfcnf.jpg\n" + "fünf\n".encode()


def test_numbers_that_json_lacks_become_text_at_any_depth() -> None:
    value = {"a": [math.inf, (-math.inf, 1.5)], "b": {"c": math.nan, "d": None, "e": True}}
    assert json_safe(value) == {"a": ["inf", ["-inf", 1.5]], "b": {"c": "nan", "d": None, "e": True}}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (ValueError("x" * 300), "x" * 200),
        (ValueError(), "ValueError"),
        (RuntimeError("  \n"), "RuntimeError"),
    ],
)
def test_error_in_one_line(error: Exception, expected: str) -> None:
    assert first_line(error) == expected
