"""The folder of a run: its lock, and whether another run can have it."""

import os
import signal
import time
from pathlib import Path

import pytest

from runtime.files import write_json
from runtime.folder import config_begun, lock_directory, read_json, require_free, unlock_directory


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    ready, report = os.pipe()
    if (child := os.fork()) == 0:
        lock_directory(tmp_path)
        os.write(report, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(ValueError, match="another run is writing there"):
        lock_directory(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    descriptor = lock_directory(tmp_path)
    assert descriptor is not None
    unlock_directory(descriptor)


def test_worker_that_outlives_its_killed_main_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    ready, report = os.pipe()
    if (main := os.fork()) == 0:
        lock_directory(tmp_path)
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.write(report, str(worker).encode())
        signal.pause()
    worker = int(os.read(ready, 20))
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    descriptor = lock_directory(tmp_path)
    assert descriptor is not None
    unlock_directory(descriptor)
    os.kill(worker, signal.SIGKILL)


def test_unlocked_folder_is_free_again(tmp_path: Path) -> None:
    descriptor = lock_directory(tmp_path)
    assert descriptor is not None
    with pytest.raises(ValueError, match=f"{tmp_path}: another run is writing there"):
        require_free(tmp_path)
    unlock_directory(descriptor)
    require_free(tmp_path)


def test_folder_that_does_not_exist_is_free_and_not_created(tmp_path: Path) -> None:
    require_free(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=f"--checkpoint-dir {directory}: "):
            require_free(directory)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=f"{tmp_path} is read-only; choose another folder"):
        require_free(tmp_path / "run")


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", '"text"', b"\xff\xfe"])
def test_json_that_is_missing_or_damaged_reads_as_empty(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert read_json(path) == {}
    assert config_begun(tmp_path) is None


def test_configuration_of_a_run_without_a_checkpoint_is_read_if_it_has_settings(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"settings": {"epochs": 3}, "device": "cpu"})
    assert config_begun(tmp_path) == {"settings": {"epochs": 3}, "device": "cpu"}
    write_json(tmp_path / "config.json", {"settings": [3]})
    assert config_begun(tmp_path) is None
