import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from training import checkpoint as checkpoint_module
from training.checkpoint import CheckpointError, CheckpointStore, read_checkpoint, write_checkpoint


def payload(global_window: int, fill: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((64, 64), fill)}, "progress": {"global_window": global_window}}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", payload(3, fill=0.25))
    loaded = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(loaded["model"]["weight"], torch.full((64, 64), 0.25))
    assert loaded["progress"]["global_window"] == 3


def test_newest_epoch_files_are_kept_and_mid_epoch_files_go_when_an_epoch_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for epoch in range(1, 5):
        store.save_step(epoch * 10 - 5, payload(epoch * 10 - 5))
        store.save_step(epoch * 10 - 2, payload(epoch * 10 - 2))
        assert [name for name in names(tmp_path) if name.startswith("step")] == [f"step_{epoch * 10 - 2:08d}.pth"]
        store.save_epoch(epoch, payload(epoch * 10))
    assert names(tmp_path) == ["epoch_0003.pth", "epoch_0004.pth"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_get_a_name(tmp_path: Path, bad: float) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save_best(payload(1))
    with pytest.raises(CheckpointError, match=r"model\.weight is not finite"):
        store.save_best(payload(2, fill=bad))
    assert names(tmp_path) == ["best_model.pth"]
    assert read_checkpoint(tmp_path / "best_model.pth")["progress"]["global_window"] == 1


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save_epoch(1, payload(1))

    def disk_full(value: object, file: Any) -> None:
        file.write(b"half a checkpoi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        store.save_epoch(2, payload(2))
    assert names(tmp_path) == ["epoch_0001.pth"]
    read_checkpoint(tmp_path / "epoch_0001.pth")


def test_bytes_changed_on_the_way_to_the_disk_are_found_before_the_old_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save_epoch(1, payload(1))

    def faulty_disk(descriptor: int) -> None:
        unfinished = next(tmp_path.glob(".*.unfinished"))
        content = bytearray(unfinished.read_bytes())
        content[len(content) // 2] ^= 1
        unfinished.write_bytes(content)

    monkeypatch.setattr(os, "fsync", faulty_disk)
    with pytest.raises(CheckpointError, match="damaged"):
        store.save_epoch(2, payload(2))
    assert names(tmp_path) == ["epoch_0001.pth"]


def test_leftovers_of_a_killed_write_are_removed_at_start(tmp_path: Path) -> None:
    (tmp_path / ".epoch_0001.pth.unfinished").write_bytes(b"half")
    CheckpointStore(tmp_path, keep=1)
    assert names(tmp_path) == []


def test_newest_is_the_furthest_of_epoch_and_step_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert store.newest() is None
    store.save_best(payload(20))
    store.save_epoch(1, payload(10))
    store.save_epoch(2, payload(20))
    store.save_step(25, payload(25))
    newest = store.newest()
    assert newest is not None
    assert newest[0].name == "step_00000025.pth"


def test_damaged_files_are_passed_over_by_name_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for epoch in range(1, 6):
        store.save_epoch(epoch, payload(epoch * 10))
    files = {epoch: tmp_path / f"epoch_{epoch:04d}.pth" for epoch in range(1, 6)}
    files[5].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:-100])
    content = bytearray(files[3].read_bytes())
    content[content.index(b"\x00\x00\x80\x3f") + 400] ^= 1  # one bit, amid the weights
    files[3].write_bytes(content)
    newest = store.newest()
    assert newest is not None
    assert newest[0] == files[2]
    printed = capsys.readouterr().out
    assert re.search(r"Passed over .*epoch_0005\.pth: not a checkpoint, or cut short", printed)
    assert re.search(r"Passed over .*epoch_0004\.pth", printed)
    assert re.search(r"Passed over .*epoch_0003\.pth: damaged \(checksum", printed)


def test_going_back_sets_later_files_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for epoch in range(1, 4):
        store.save_epoch(epoch, payload(epoch * 10))
    store.set_aside_after(10)
    assert names(tmp_path) == ["epoch_0001.pth", "epoch_0002.pth.superseded", "epoch_0003.pth.superseded"]


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": checkpoint_module.FORMAT, "model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_foreign_files_are_told_apart_from_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}))
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "text.pth")
    for name, reason in [
        ("nowhere.pth", "no such file"),
        ("text.pth", "not a checkpoint, or cut short"),
        ("pickle.pth", "not a checkpoint, or cut short"),
        ("archive.zip", "not a readable checkpoint"),
        ("other.pth", "not a checkpoint of this program"),
    ]:
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: {reason}"):
            read_checkpoint(tmp_path / name)
