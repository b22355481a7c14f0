"""Checkpoints that were crafted or belong to other programs: refused in one line, and passed over by --resume auto."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.checkpoint import CheckpointError, CheckpointStore, read_checkpoint, write_checkpoint
from runtime.folder import require_free

GOOD = {"model": {"weight": torch.ones(3)}, "progress": {"global_window": 5}, "config": {}}


def referring_to_itself() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    nested["a"] = nested["b"] = nested
    return nested


def doubled(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


CRAFTED: dict[str, Callable[[], dict[str, Any]]] = {
    "more elements than are stored": lambda: {"model": {"weight": torch.ones(1).expand(10**11)}},
    "meta": lambda: {"model": {"weight": torch.ones(3, device="meta")}},
    "sparse": lambda: {"model": {"weight": torch.ones(3).to_sparse()}},
    "complex NaN": lambda: {"model": {"weight": torch.full((2,), complex("nan"))}},
    "NaN in a list": lambda: {"model": [torch.ones(1), torch.tensor([float("nan")])]},
    "no progress": lambda: {"progress": None},
    "progress without a number": lambda: {"progress": {"global_window": "many"}},
}


def save(path: Path, **changes: Any) -> None:
    torch.save({"format": "train_ultimate/2", **GOOD, **changes}, path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_file_is_skipped_for_an_older_intact_one(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "epoch_0001.pth", progress={"global_window": 1})
    save(tmp_path / "epoch_0002.pth", **CRAFTED[kind]())
    newest = CheckpointStore(tmp_path, keep=3).newest()
    assert newest is not None
    assert newest[0].name == "epoch_0001.pth"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.message.startswith(f"skipped {tmp_path / 'epoch_0002.pth'}: ")


@pytest.mark.parametrize("value", [referring_to_itself(), doubled(60)], ids=["itself", "doubled"])
def test_a_file_that_refers_to_itself_is_read_in_no_time(tmp_path: Path, value: Any) -> None:
    save(tmp_path / "epoch_0001.pth", extra=value)
    assert torch.equal(read_checkpoint(tmp_path / "epoch_0001.pth")["model"]["weight"], torch.ones(3))


def test_a_folder_whose_name_is_not_utf_8_is_resumed(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    write_checkpoint(folder / "epoch_0001.pth", GOOD)
    newest = CheckpointStore(folder, keep=3).newest()
    assert newest is not None
    assert newest[1]["progress"] == {"global_window": 5}


def test_what_is_read_back_comes_from_the_disk(tmp_path: Path) -> None:
    """Pages that were just written are in memory: reading those would verify nothing."""
    if not Path("/proc/self/io").exists():
        pytest.skip("counts bytes by /proc/self/io")

    def read_from_device() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))

    probe = tmp_path / "probe"
    probe.write_bytes(os.urandom(2**20))
    with open(probe, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_from_device()
        file.read()
    if read_from_device() == before:
        pytest.skip("this file system counts no bytes, or drops no pages")
    before = read_from_device()
    write_checkpoint(tmp_path / "epoch_0001.pth", {**GOOD, "model": {"weight": torch.randn(2**21)}})
    assert read_from_device() - before >= (tmp_path / "epoch_0001.pth").stat().st_size


def test_on_a_full_disk_the_best_weights_and_the_furthest_checkpoint_are_kept(tmp_path: Path) -> None:
    def kept(**windows: int) -> set[str]:
        for path in tmp_path.glob("*"):
            path.unlink()
        for name, number in windows.items():
            save(tmp_path / f"{name}.pth", progress={"global_window": number})
        (tmp_path / "epoch_0007.pth.superseded").touch()
        assert CheckpointStore(tmp_path, keep=3)._make_room()
        return {path.stem for path in tmp_path.glob("*.pth")}

    assert kept(epoch_0001=10, epoch_0002=20, best_model=10) == {"epoch_0002", "best_model"}
    assert kept(epoch_0001=10, best_model=20) == {"best_model"}
    assert kept(epoch_0001=10, step_00000015=15, best_model=10) == {"step_00000015", "best_model"}
    assert kept(best_model=10) == {"best_model"}


def test_a_link_to_nowhere_as_checkpoint_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a link to .*nowhere, which does not exist; create it"):
        require_free(tmp_path / "run")


def test_a_tensor_of_an_intact_file_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weight: Tensor = torch.tensor([1.0, float("inf")])
    save(tmp_path / "epoch_0001.pth", ema={"model": {"head": weight}})
    with pytest.raises(CheckpointError, match=r"ema\.model\.head is not finite"):
        read_checkpoint(tmp_path / "epoch_0001.pth")
