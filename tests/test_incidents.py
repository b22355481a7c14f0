"""Incident folders: what is written, what is kept, what is refused."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from training.incidents import IncidentRecord, IncidentStore, read_incident


def record(**changes: Any) -> IncidentRecord:
    """Return a record, with other values than usual in ``changes``."""
    values: dict[str, Any] = {
        **{"verdict": "nonfinite_loss", "stage": 2, "epoch": 3, "window": 7, "loss": math.nan, "grad_norm": math.inf},
        **{"loss_scale": 1.0, "precision": "bf16", "samples": ["Imgs/a.jpg"]},
    }
    return IncidentRecord(**{**values, **changes})


def test_incident_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path / "incidents")
    folder = store.open(record(), {"model": {"weight": torch.tensor([1.0, math.nan])}})
    assert folder.name == "000001"
    assert store.open(record(), {}).name == "000002"
    again, payload = read_incident(folder)
    assert math.isnan(again.loss)
    assert again.grad_norm == math.inf
    assert again.samples == ["Imgs/a.jpg"]
    assert payload["model"]["weight"][0] == 1
    assert json.loads((folder / "incident.json").read_text())["loss"] == "nan"


def test_newest_incidents_are_kept(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, most=5)
    for _ in range(12):
        store.open(record(), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:06d}" for number in range(8, 13)]


def test_total_size_is_bounded_by_dropping_old_payloads_and_the_records_stay(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=8 * 2**20)
    folders = [store.open(record(), {"model": torch.zeros(500_000)}) for _ in range(5)]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) <= 8 * 2**20
    assert len(list(tmp_path.glob("*/incident.json"))) == 5
    assert [path.parent.name for path in sorted(tmp_path.glob("*/replay.pt"))] == ["000004", "000005"]
    read_incident(folders[-1])
    with pytest.raises(ValueError, match="removed to make room"):
        read_incident(tmp_path / "000001")


def test_payload_that_is_too_large_is_not_written_and_removes_no_other(tmp_path: Path) -> None:
    store = IncidentStore(tmp_path, max_bytes=5_000_000)
    small = store.open(record(), {"model": torch.zeros(10)})
    large = store.open(record(), {"model": torch.zeros(2_000_000)})
    assert [path.name for path in large.iterdir()] == ["incident.json"]
    read_incident(small)
    with pytest.raises(ValueError, match="too large to keep"):
        read_incident(large)


def test_leftover_of_a_killed_write_is_removed(tmp_path: Path) -> None:
    folder = IncidentStore(tmp_path).open(record(), {})
    leftover = folder / ".replay.pt.unfinished"
    leftover.write_bytes(b"half")
    IncidentStore(tmp_path)
    assert not leftover.exists()
    read_incident(folder)


def test_disk_that_fills_up_during_a_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    monkeypatch.setattr(torch, "save", half)
    folder = IncidentStore(tmp_path).open(record(), {})
    assert [path.name for path in folder.iterdir()] == ["incident.json"]
    assert "cannot be replayed later" in caplog.text


def test_full_disk_costs_the_folder_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(Path, "write_text", full)
    IncidentStore(tmp_path).open(record(), {})
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING] * 2
    assert all("No space left on device" in entry.getMessage() for entry in caplog.records)


def test_folders_that_hold_no_incident_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no incident\.json there"):
        read_incident(tmp_path)
    (tmp_path / "incident.json").write_text("{}")
    with pytest.raises(ValueError, match="not a record of this program"):
        read_incident(tmp_path)
    folder = IncidentStore(tmp_path / "store").open(record(), {})
    (folder / "replay.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"replay\.pt: not readable"):
        read_incident(folder)
    torch.save({"weights": 1}, folder / "replay.pt")
    with pytest.raises(ValueError, match="not written by this program"):
        read_incident(folder)
