import json
import math
from pathlib import Path
from typing import Any

import pytest

from reporting.history import differing_settings, read_run, unique_names


def log_of(directory: Path, *events: dict[str, Any], tail: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"time": 1000.0 + index, **event}) + "\n" for index, event in enumerate(events)]
    (directory / "metrics.jsonl").write_text("".join(lines) + tail)
    return directory


def start(
    event: str = "run_start", epoch: int = 0, window: int = 0, number: int = 0, **settings: Any
) -> dict[str, Any]:
    progress = {"epoch": epoch, "window": window, "global_window": number}
    return {"event": event, "settings": {"epochs": 4, "grad_clip": 0.5, **settings}, "progress": progress}


def window(epoch: int, number: int, loss: float | str = 1.0, verdict: str = "applied", **more: Any) -> dict[str, Any]:
    numbers = {"loss": loss, "grad_norm": 0.5, "loss_scale": 1.0, "lr": 0.001}
    return {"event": "window", "stage": 1, "epoch": epoch, "window": number, "verdict": verdict, **numbers, **more}


def epoch(number: int, iou: float | str) -> dict[str, Any]:
    return {"event": "epoch", "stage": 1, "epoch": number, "loss": 1.0, "iou": iou, "dice": iou, "s_measure": iou}


def saved(file: str) -> dict[str, Any]:
    return {"event": "checkpoint", "file": file}


def test_of_a_window_that_came_twice_the_later_counts(tmp_path: Path) -> None:
    events = [start(), window(1, 1, "nan", "nonfinite_loss"), window(1, 1, 2.0), window(1, 2), window(1, 3)]
    resumed = [start("resume", window=1, number=1), window(1, 2, 5.0)]
    run = read_run(log_of(tmp_path / "run", *events, *resumed))
    assert [(point.number, point.loss, point.applied) for point in run.points] == [(1, 2.0, True), (2, 5.0, True)]
    assert run.num_starts == 2


def test_what_a_resume_has_given_up_is_forgotten(tmp_path: Path) -> None:
    events = [start(), window(1, 1), epoch(1, 0.3), saved("epoch_0001.pth"), window(2, 1), epoch(2, 0.9)]
    later = [saved("best_model.pth"), saved("epoch_0002.pth"), saved("step_00000002.pth")]
    run = read_run(log_of(tmp_path / "run", *events, *later, start("resume", epoch=1, number=1)))
    assert run.best == (0.3, 1)
    assert list(run.checkpoints) == ["epoch_0001.pth"]


def test_a_resume_with_larger_windows_forgets_none_that_counts(tmp_path: Path) -> None:
    """Eight windows of an epoch were trained; in windows of twice the size, that is the fourth of this epoch."""
    before = [window(1, number, global_window=number) for number in range(1, 9)]
    after = [start("resume", epoch=0, window=4, number=8), window(1, 5, global_window=9)]
    run = read_run(log_of(tmp_path / "run", start(), *before, *after))
    assert [point.number for point in run.points][-1] == 9
    assert len(run.points) == 9


def test_numbers_of_a_damaged_log_cost_no_report(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "\n"
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1, time=1e300, loss=10**400), tail=deep))
    assert run.num_spoilt == 1
    assert math.isnan(run.points[0].loss)


def test_windows_are_numbered_over_epochs_where_the_log_does_not_tell(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), *(window(e, w) for e in (1, 2) for w in (1, 2, 3))))
    assert [point.number for point in run.points] == [1, 2, 3, 4, 5, 6]
    assert run.window_number(2, 1) == 4
    assert run.window_number(1) == 3
    assert math.isnan(run.window_number(0))


def test_checkpoints_have_their_place_and_the_best_is_that_of_the_epoch_file_behind_it(tmp_path: Path) -> None:
    events = [window(1, 1), window(1, 2), epoch(1, 0.5), saved("best_model.pth"), saved("epoch_0001.pth")]
    run = read_run(log_of(tmp_path / "run", start(), *events, window(2, 1), saved("step_00000003.pth")))
    assert run.saved == {"best_model.pth": 2, "epoch_0001.pth": 2, "step_00000003.pth": 3}


def test_scores_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), epoch(1, 0.2), epoch(2, "nan"), epoch(3, 0.2)))
    assert run.best == (0.2, 1)


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "finished"), (3, "diverged"), (130, "stopped by Ctrl-C"), (143, "SIGTERM"), (9, "exit code 9")],
)
def test_state_is_that_of_the_exit_code(tmp_path: Path, code: int, state: str) -> None:
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1), {"event": "run_end", "exit_code": code}))
    assert state in run.state


def test_a_run_that_goes_on_has_no_end(tmp_path: Path) -> None:
    events = [start(), window(1, 1), {"event": "run_end", "exit_code": 143}, start("resume", window=1, number=1)]
    run = read_run(log_of(tmp_path / "run", *events))
    assert "still going" in run.state
    assert len(run.windows) == 1


def test_half_a_line_is_left_out_and_counted(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1), tail='{"event": "window", "epo'))
    assert (len(run.points), run.num_spoilt) == (1, 1)


def test_recovery_of_a_run_without_an_end_is_counted(tmp_path: Path) -> None:
    incident = {"event": "incident", "folder": "000001", "epoch": 1, "window": 2, "culprits": ["a.jpg"]}
    events = [start(), window(1, 1), window(1, 2, 9.0, "spike"), {**incident, "action": "rolled back by 3 windows"}]
    recovery = read_run(log_of(tmp_path / "run", *events)).recovery()
    assert recovery == {"applied": 1, "skipped": {"spike": 1}, "rollbacks": 1, "quarantined": {"a.jpg": 1}}


def test_incidents_are_read_from_their_folders_too(tmp_path: Path) -> None:
    run = log_of(tmp_path / "run", start(), {"event": "incident", "folder": "000002", "epoch": 1, "window": 2})
    (run / "incidents" / "000003").mkdir(parents=True)
    (run / "incidents" / "000003" / "incident.json").write_text('{"verdict": "spike", "action": "under way"}')
    assert list(read_run(run).incidents) == ["000002", "000003"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "is empty, no run has written here yet"),
        ({"notes.txt": "x"}, "is no run's folder, there is no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "not one event"),
        ({"metrics.jsonl": '{"step": 1}\nhello\n[1]\n'}, "not one event"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_run(folder)
    assert str(folder) in str(error.value)
    assert "--checkpoint-dir of a run" in str(error.value)


def test_runs_of_one_name_are_told_apart_by_their_paths_and_settings_by_what_differs(tmp_path: Path) -> None:
    runs = [
        read_run(log_of(tmp_path / parent / "run", start(lr=lr, seed=1))) for parent, lr in (("a", 0.1), ("b", 0.2))
    ]
    assert unique_names(runs) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    assert differing_settings(runs) == {"lr": [0.1, 0.2]}
