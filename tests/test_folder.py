"""The folder of a run: its lock, and whether another run can have it."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.files import write_json
from runtime.folder import LEASE, FolderLock, FolderLostError, Lease, config_begun, read_json, require_free


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    ready, report = os.pipe()
    if (child := os.fork()) == 0:
        FolderLock(tmp_path)
        os.write(report, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(ValueError, match="another run is writing there"):
        FolderLock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)
    lock.release()


def test_worker_that_outlives_its_killed_main_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    ready, report = os.pipe()
    if (main := os.fork()) == 0:
        FolderLock(tmp_path)
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.write(report, str(worker).encode())
        signal.pause()
    worker = int(os.read(ready, 20))
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    lock = FolderLock(tmp_path)
    lock.release()
    os.kill(worker, signal.SIGKILL)


def test_unlocked_folder_is_free_again(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}: another run is writing there"):
        require_free(tmp_path)
    lock.release()
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


# File systems without locks


def no_locks(_descriptor: int, _operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def holding(tmp_path: Path) -> int:
    """Fork a process that holds the folder by a lease. Return its process id."""
    ready, report = os.pipe()
    if (child := os.fork()) == 0:
        try:
            lock = FolderLock(tmp_path, no_locks)
            os.write(report, b"x" if lock.is_lease else b"-")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    return child


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_locks_a_second_process_is_refused_and_a_killed_one_is_no_obstacle(tmp_path: Path) -> None:
    child = holding(tmp_path)
    with pytest.raises(ValueError, match="another run is writing there"):
        FolderLock(tmp_path, no_locks)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path, no_locks)
    assert lock.still_there
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_of_processes_that_begin_at_once_without_locks_one_has_the_folder(tmp_path: Path) -> None:
    results, report = os.pipe()
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                _lock = FolderLock(tmp_path, no_locks)
                os.write(report, b"1")
                time.sleep(3)
            except ValueError:
                os.write(report, b"0")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(os.read(results, 10)) == sorted(b"1000")


@pytest.mark.parametrize("is_renewed", [True, False])
def test_a_lease_of_another_host_holds_as_long_as_it_is_renewed(tmp_path: Path, is_renewed: bool) -> None:
    (tmp_path / LEASE).write_text("elsewhere 1 abc")
    ended = threading.Event()

    def renew() -> None:
        while is_renewed and not ended.wait(0.05):
            os.utime(tmp_path / LEASE)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        if is_renewed:
            with pytest.raises(ValueError, match="held"):
                Lease(tmp_path, beat=0.5)
        else:
            Lease(tmp_path, beat=0.5).release()
    finally:
        ended.set()
        thread.join()


def test_a_process_that_has_lost_its_lease_learns_of_it_and_leaves_it_alone(tmp_path: Path) -> None:
    lease = Lease(tmp_path, beat=0.05)
    (tmp_path / LEASE).write_text("elsewhere 1 abc")
    wait_until(lambda: lease.lost)
    lease.release()
    assert (tmp_path / LEASE).read_text() == "elsewhere 1 abc"


def test_a_lease_that_was_removed_is_written_again(tmp_path: Path) -> None:
    lease = Lease(tmp_path, beat=0.05)
    (tmp_path / LEASE).unlink()
    wait_until((tmp_path / LEASE).exists)
    lease.release()


# Folders that are removed


def test_a_lock_notices_that_its_folder_was_replaced_and_can_be_renewed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    assert lock.still_there
    folder.rename(tmp_path / "old")
    assert not lock.still_there
    folder.mkdir()
    assert not lock.still_there
    lock = lock.renewed()
    assert lock.still_there
    with pytest.raises(ValueError, match="another run is writing there"):
        FolderLock(folder)
    lock.release()


def test_a_folder_that_another_run_has_in_the_meantime_stays_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    folder.rename(tmp_path / "old")
    folder.mkdir()
    others = FolderLock(folder)
    with pytest.raises(FolderLostError, match="another run is writing there"):
        lock.renewed()
    others.release()
