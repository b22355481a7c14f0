"""Checkpoint files: a verified one is there whatever fails, and nothing in them is believed or run."""

import builtins
import errno
import itertools
import logging
import math
import os
import pickle
import re
import shutil
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runtime.checkpoint import (
    FORMAT,
    CheckpointError,
    CheckpointStore,
    HostCopy,
    find_checkpoint,
    read_checkpoint,
    read_weights,
    write_checkpoint,
)
from runtime.files import remove_leftovers


def payload(global_window: int, fill: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((64, 64), fill)}, "progress": {"global_window": global_window}}


def save(store: CheckpointStore, epoch: int, value: dict[str, Any], is_best: bool = False) -> None:
    store.save_epoch(epoch, value, is_best)
    store.wait()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


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
        store.wait()
        assert [name for name in names(tmp_path) if name.startswith("step")] == [f"step_{epoch * 10 - 2:08d}.pth"]
        save(store, epoch, payload(epoch * 10))
    assert names(tmp_path) == ["epoch_0003.pth", "epoch_0004.pth"]


def test_epochs_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    """As text, epoch_10000.pth comes before epoch_9999.pth."""
    store = CheckpointStore(tmp_path, keep=2)
    for epoch in (9998, 9999, 10000, 10001):
        save(store, epoch, payload(epoch))
        assert [path.name for path in store.files()][-1] == f"epoch_{epoch:04d}.pth"
    assert names(tmp_path) == ["epoch_10000.pth", "epoch_10001.pth"]


def test_mid_epoch_files_are_kept_by_number_too(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for window in (99_999_999, 100_000_000):
        store.save_step(window, payload(window))
        store.wait()
        assert names(tmp_path) == [f"step_{window}.pth"]


def test_newest_of_five_digit_epochs_is_resumed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for epoch in (9999, 10000):
        save(store, epoch, payload(epoch * 10, fill=epoch))
    path, checkpoint = find_checkpoint("auto", tmp_path)
    assert path == tmp_path / "epoch_10000.pth"
    assert checkpoint is not None
    assert checkpoint["model"]["weight"].unique().tolist() == [10000.0]
    assert [path.name for path in store.set_aside_after(99990)] == ["epoch_10000.pth.superseded"]
    assert find_checkpoint("auto", tmp_path)[0] == tmp_path / "epoch_9999.pth"


def test_files_with_other_names_are_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for name in ("epoch_best.pth", "epoch_0001.pth.old", "my_epoch_0001.pth", "step_x.pth"):
        (tmp_path / name).write_bytes(b"mine")
    before = names(tmp_path)
    save(store, 1, payload(1))
    save(store, 2, payload(2))
    assert names(tmp_path) == sorted([*before, "epoch_0002.pth"])
    assert [path.name for path in store.files()] == ["epoch_0002.pth"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_get_a_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, payload(1), is_best=True)
    save(store, 2, payload(2, fill=bad), is_best=True)
    (warning,) = warnings_in(caplog)
    assert re.match(r"best_model.pth and epoch_0002.pth could not .* model\.weight is not finite", warning)
    assert isinstance(store.failure, CheckpointError)
    assert store.failure.__traceback__ is None  # it would keep the frames of training alive, with loaders and windows
    assert names(tmp_path) == ["best_model.pth", "epoch_0001.pth"]
    assert read_checkpoint(tmp_path / "best_model.pth")["progress"]["global_window"] == 1


def test_a_tensor_in_a_list_that_is_not_finite_is_found_too(tmp_path: Path) -> None:
    lists = {"deep": [{"inside": (torch.ones(2), [torch.tensor([1.0, math.nan])])}]}
    with pytest.raises(CheckpointError, match="is not finite"):
        write_checkpoint(tmp_path / "epoch_0001.pth", {**payload(1), **lists})
    assert names(tmp_path) == []


def test_the_folder_is_flushed_after_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power could take the name back after older files have been removed."""
    flushed: list[list[str]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            flushed.append(names(tmp_path))

    monkeypatch.setattr(os, "fsync", watched)
    write_checkpoint(tmp_path / "epoch_0001.pth", payload(1))
    assert flushed == [["epoch_0001.pth"]]


def test_saved_state_is_that_of_the_moment_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while the file is written, in the same tensors."""
    may_write, write = threading.Event(), torch.save

    def slow_disk(*args: Any) -> None:
        assert may_write.wait(10)
        write(*args)

    monkeypatch.setattr(torch, "save", slow_disk)
    store, state = CheckpointStore(tmp_path, keep=3), payload(1, fill=1.0)
    store.save_epoch(1, state, is_best=False)
    assert store.is_writing
    state["model"]["weight"].fill_(2.0)
    state["progress"]["global_window"] = 9
    assert not list(tmp_path.glob("*.pth"))
    may_write.set()
    store.wait()
    assert not store.is_writing
    saved = read_checkpoint(tmp_path / "epoch_0001.pth")
    assert saved["model"]["weight"].unique().tolist() == [1.0]
    assert saved["progress"]["global_window"] == 1
    save(store, 2, state)
    assert read_checkpoint(tmp_path / "epoch_0002.pth")["model"]["weight"].unique().tolist() == [2.0]


def test_each_copied_tensor_is_a_storage_of_its_own_in_the_layout_of_its_source(tmp_path: Path) -> None:
    """Tensors that shared one would all be written whenever one of them is saved."""
    sources = {
        "kernel": torch.rand(8, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        "step": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "expanded": torch.rand(2, 1).expand(2, 1000),
        "halves": torch.rand(5).to(torch.bfloat16),
    }
    copies = HostCopy()
    first = copies.take(sources)()
    for name, source in sources.items():
        assert torch.equal(first[name], source), name
        assert first[name].dtype == source.dtype
        assert first[name].untyped_storage().nbytes() == first[name].numel() * first[name].element_size()
    assert first["kernel"].is_contiguous(memory_format=torch.channels_last)
    torch.save(first["step"], tmp_path / "step.pth")
    assert (tmp_path / "step.pth").stat().st_size < 2000


def test_second_copy_of_the_same_layout_takes_no_memory() -> None:
    copies, state = HostCopy(), {"weights": torch.ones(1000), "step": torch.zeros(())}
    before = [value.data_ptr() for value in copies.take(state)().values()]
    after = copies.take({name: value + 1 for name, value in state.items()})()
    assert [value.data_ptr() for value in after.values()] == before
    assert after["step"] == 1
    assert len(copies.take({"weights": torch.ones(3)})()["weights"]) == 3


def test_saved_files_are_reported_when_they_are_there(tmp_path: Path) -> None:
    reported: list[tuple[str, bool]] = []
    store = CheckpointStore(tmp_path, 1, on_saved=lambda name: reported.append((name, (tmp_path / name).exists())))
    save(store, 1, payload(1), is_best=True)
    assert reported == [("best_model.pth", True), ("epoch_0001.pth", True)]


def test_save_is_reported_once_without_waiting_for_the_next(tmp_path: Path) -> None:
    reported: list[str] = []
    store = CheckpointStore(tmp_path, 1, on_saved=reported.append)
    store.report()
    store.save_step(7, payload(7))
    deadline = time.monotonic() + 10
    while not reported and time.monotonic() < deadline:
        store.report()
        time.sleep(0.01)
    store.report()
    store.wait()
    assert reported == ["step_00000007.pth"]


def test_store_of_another_rank_keeps_count_and_writes_nothing(tmp_path: Path) -> None:
    reported: list[str] = []
    store = CheckpointStore(tmp_path, keep=1, on_saved=reported.append, writes=False)
    store.save_step(5, payload(5))
    save(store, 1, payload(7), is_best=True)
    assert store.last_window == 7
    assert (names(tmp_path), reported, store.failure) == ([], [], None)


def test_failed_write_leaves_the_old_file_and_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, payload(1))

    def read_only(value: object, file: Any) -> None:
        file.write(b"half a checkpoi")
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", read_only)
        save(store, 2, payload(2))
    (warning,) = warnings_in(caplog)
    assert "Read-only file system" in warning
    assert names(tmp_path) == ["epoch_0001.pth"]
    read_checkpoint(tmp_path / "epoch_0001.pth")
    save(store, 3, payload(3))
    assert store.failure is None
    assert names(tmp_path) == ["epoch_0003.pth"]


@pytest.mark.parametrize("oldest", [1, 9998])
def test_full_disk_costs_the_oldest_epoch_files_first(
    oldest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for three files: the next one takes the place of all but the newest, which stays while it is written."""
    store = CheckpointStore(tmp_path, keep=5)
    files = [f"epoch_{epoch:04d}.pth" for epoch in range(oldest, oldest + 4)]
    for epoch in range(oldest, oldest + 3):
        save(store, epoch, payload(epoch))
    original = torch.save

    def room_for_three(value: object, file: Any) -> None:
        if len(list(tmp_path.glob("epoch_*.pth"))) == 3:
            file.write(b"half a checkpoi")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert names(tmp_path)[1:] == [files[2]]
        original(value, file)

    monkeypatch.setattr(torch, "save", room_for_three)
    save(store, oldest + 3, payload(oldest + 3))
    assert store.failure is None
    assert names(tmp_path) == sorted(files[2:])
    assert warnings_in(caplog) == [f"the disk is full; {files[0]}, {files[1]} removed to make room"]


def test_directory_that_vanished_is_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep=1)
    save(store, 1, payload(1))
    shutil.rmtree(tmp_path / "run")
    save(store, 2, payload(2))
    assert names(tmp_path / "run") == ["epoch_0002.pth"]


def test_killed_before_or_after_any_system_call_a_verified_checkpoint_is_there(tmp_path: Path) -> None:
    """A forked process saves two epochs and the best; SIGKILL comes before or after its nth call, for every n."""
    directory = tmp_path / "run"
    store = CheckpointStore(directory, keep=1)
    kills = 0
    for boundary in itertools.count(1):
        shutil.rmtree(directory, ignore_errors=True)
        save(store, 1, payload(1))
        if (child := os.fork()) == 0:
            kill_at(boundary)
            again = CheckpointStore(directory, keep=1)
            save(again, 2, payload(2), is_best=True)
            again.save_step(3, payload(3))
            again.wait()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        newest = store.newest()
        assert newest is not None
        assert newest[1]["progress"]["global_window"] in (1, 2, 3)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        remove_leftovers(directory)
        assert not list(directory.glob(".*"))
    assert kills > 30


def kill_at(boundary: int) -> None:
    """Kill this process before or after its nth file operation."""
    calls = itertools.count(1)

    def die_at_boundary() -> None:
        if next(calls) == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            die_at_boundary()
            result = original(*args, **options)
            die_at_boundary()
            return result

        setattr(owner, name, watched)

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
        (os, "open"),
        (torch, "save"),
        (builtins, "open"),
    ):
        watch(owner, name)


def test_bytes_changed_on_the_way_to_the_disk_are_found_before_the_old_file_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, payload(1))

    def faulty_disk(descriptor: int) -> None:
        unfinished = next(tmp_path.glob(".*.unfinished"))
        content = bytearray(unfinished.read_bytes())
        content[len(content) // 2] ^= 1
        unfinished.write_bytes(content)

    monkeypatch.setattr(os, "fsync", faulty_disk)
    save(store, 2, payload(2))
    assert isinstance(store.failure, CheckpointError)
    assert "damaged" in str(store.failure)
    assert names(tmp_path) == ["epoch_0001.pth"]


def test_newest_is_the_furthest_of_epoch_and_step_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert store.newest() is None
    save(store, 1, payload(10))
    save(store, 2, payload(20), is_best=True)
    store.save_step(25, payload(25))
    store.wait()
    newest = store.newest()
    assert newest is not None
    assert newest[0].name == "step_00000025.pth"


def test_damaged_files_are_skipped_by_name_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for epoch in range(1, 6):
        save(store, epoch, payload(epoch * 10))
    files = {epoch: tmp_path / f"epoch_{epoch:04d}.pth" for epoch in range(1, 6)}
    (tmp_path / "epoch_0006.pth").mkdir()
    files[5].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:-100])
    content = bytearray(files[3].read_bytes())
    content[content.index(b"\x00\x00\x80\x3f") + 400] ^= 1  # one bit of the weights
    files[3].write_bytes(content)
    newest = store.newest()
    assert newest is not None
    assert newest[0] == files[2]
    warnings = "\n".join(warnings_in(caplog))
    assert re.search(r"skipped .*epoch_0006\.pth: no such file but a folder", warnings)
    assert re.search(r"skipped .*epoch_0005\.pth: not a checkpoint, or cut short", warnings)
    assert re.search(r"skipped .*epoch_0004\.pth", warnings)
    assert re.search(r"skipped .*epoch_0003\.pth: damaged \(checksum", warnings)


def test_going_back_sets_later_files_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for epoch in range(1, 4):
        save(store, epoch, payload(epoch * 10))
    store.set_aside_after(10)
    assert names(tmp_path) == ["epoch_0001.pth", "epoch_0002.pth.superseded", "epoch_0003.pth.superseded"]


def test_pickle_that_would_run_code_is_refused_unrun(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": FORMAT, "model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: refused: .* could run code"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_foreign_and_damaged_files_have_different_errors(tmp_path: Path) -> None:
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


def test_bare_weights_are_recognized_and_lose_the_prefix_of_parallel_training(tmp_path: Path) -> None:
    torch.save({"module.layer.weight": torch.ones(2), "module.layer.bias": torch.zeros(2)}, tmp_path / "weights.pth")
    loaded = read_checkpoint(tmp_path / "weights.pth")
    assert loaded.keys() == {"model"}
    assert loaded["model"].keys() == {"layer.weight", "layer.bias"}
    shutil.copy(tmp_path / "weights.pth", tmp_path / "epoch_0009.pth")
    assert CheckpointStore(tmp_path, keep=1).newest() is None


def test_weights_of_other_programs_are_found_in_their_entries_and_under_their_prefixes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Lightning, segmentation repositories, parallel training and torch.compile save them, in any order."""
    caplog.set_level(logging.INFO)
    weights, path = {"backbone.weight": torch.ones(2), "decoder.bias": torch.zeros(2)}, tmp_path / "other.pth"
    other = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}

    def prefixed(prefix: str) -> dict[str, torch.Tensor]:
        return {prefix + name: weight for name, weight in weights.items()}

    for content, dropped in [
        ({"state_dict": weights}, "all but its entry state_dict"),
        ({**other, "model_state_dict": weights}, "all but its entry model_state_dict (epoch, optimizer)"),
        ({"net": weights}, "all but its entry net"),
        ({"network": weights}, "all but its entry network"),
        ({"params": {"model": weights}}, "all but its entry params and all but its entry model"),
        (
            {"state_dict": weights, "model_ema": prefixed("module.")},
            "entry model_ema (state_dict) and the prefix module.",
        ),
        (prefixed("_orig_mod."), "the prefix _orig_mod. of all names"),
        (prefixed("module._orig_mod."), "the prefix module._orig_mod. of all names"),
        ({"state_dict": prefixed("model._orig_mod.module.")}, "the prefix model._orig_mod.module. of all names"),
    ]:
        torch.save(content, path)
        caplog.clear()
        for found in (read_checkpoint(path)["model"], read_weights(path)):
            assert {name: tensor.tolist() for name, tensor in found.items()} == {
                "backbone.weight": [1, 1], "decoder.bias": [0, 0]
            }  # fmt: skip
        first, second = caplog.messages
        assert first == second
        assert first.startswith(f"{path}: weights of another program, without ")
        assert dropped in first


def test_names_that_only_some_weights_begin_with_are_no_prefix(tmp_path: Path) -> None:
    save_file({"model.a": torch.ones(2), "head": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert read_weights(tmp_path / "weights.safetensors").keys() == {"model.a", "head"}


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    nested["model"] = nested
    contents = {"itself": nested, "numbers": {"state_dict": {"a": 1}}, "list": [torch.ones(2)], "empty": {}}
    for content in contents.values():
        torch.save(content, tmp_path / "a.pth")
        for read in (read_checkpoint, read_weights):
            with pytest.raises(CheckpointError, match=r"not a checkpoint of this program .* and no weights"):
                read(tmp_path / "a.pth")
    torch.save({"format": "train_ultimate/1", **payload(1)}, tmp_path / "older.pth")
    with pytest.raises(CheckpointError, match=r"older\.pth: not a checkpoint of this version"):
        read_checkpoint(tmp_path / "older.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, problem in (("text.safetensors", "not readable"), ("nowhere.pth", "no such file")):
        with pytest.raises(CheckpointError, match=problem):
            read_weights(tmp_path / name)


def test_every_cut_and_every_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    original = tmp_path / "epoch_0001.pth"
    write_checkpoint(original, payload(1, fill=0.37))
    content = original.read_bytes()
    damaged = tmp_path / "damaged.pth"
    generator = torch.Generator().manual_seed(5)
    for length in torch.randint(0, len(content), (20,), generator=generator).tolist():
        damaged.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(damaged)
    harmless = 0
    for position in torch.randint(0, 8 * len(content), (200,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        try:
            loaded = read_checkpoint(damaged)
        except CheckpointError:
            continue
        harmless += 1  # for example in the padding between records
        assert torch.equal(loaded["model"]["weight"], torch.full((64, 64), 0.37))
        assert loaded["progress"] == {"global_window": 1}
    assert harmless < 40
