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


def test_the_last_attempt_of_a_window_counts(tmp_path: Path) -> None:
    events = [start(), window(1, 1, "nan", "nonfinite_loss"), window(1, 1, 2.0), window(1, 2), window(1, 3)]
    resumed = [start("resume", window=1, number=1), window(1, 2, 5.0)]
    run = read_run(log_of(tmp_path / "run", *events, *resumed))
    assert [(point.number, point.loss, point.applied) for point in run.points] == [(1, 2.0, True), (2, 5.0, True)]
    assert run.num_starts == 2


def test_what_a_resume_has_replaced_is_forgotten(tmp_path: Path) -> None:
    events = [start(), window(1, 1), epoch(1, 0.3), saved("epoch_0001.pth"), window(2, 1), epoch(2, 0.9)]
    later = [saved("best_model.pth"), saved("epoch_0002.pth"), saved("step_00000002.pth")]
    run = read_run(log_of(tmp_path / "run", *events, *later, start("resume", epoch=1, number=1)))
    assert run.best == (0.3, 1)
    assert list(run.checkpoints) == ["epoch_0001.pth"]


def test_a_resume_with_larger_windows_keeps_the_windows_before_it(tmp_path: Path) -> None:
    """Eight windows were trained in the epoch: four of twice the size."""
    before = [window(1, number, global_window=number) for number in range(1, 9)]
    after = [start("resume", epoch=0, window=4, number=8), window(1, 5, global_window=9)]
    run = read_run(log_of(tmp_path / "run", start(), *before, *after))
    assert [point.number for point in run.points][-1] == 9
    assert len(run.points) == 9


def test_absurd_numbers_in_a_damaged_log_are_survived(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "\n"
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1, time=1e300, loss=10**400), tail=deep))
    assert run.num_spoilt == 1
    assert math.isnan(run.points[0].loss)


def test_spike_limits_are_read_from_the_log_which_may_have_none(tmp_path: Path) -> None:
    events = [window(1, 1), window(1, 2, spike_limit="inf"), window(1, 3, spike_limit=4.5)]
    points = read_run(log_of(tmp_path / "run", start(), *events)).points
    assert math.isnan(points[0].spike_limit)
    assert [point.spike_limit for point in points[1:]] == [math.inf, 4.5]


def test_windows_are_numbered_over_epochs_if_the_log_has_no_numbers(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), *(window(e, w) for e in (1, 2) for w in (1, 2, 3))))
    assert [point.number for point in run.points] == [1, 2, 3, 4, 5, 6]
    assert run.window_number(2, 1) == 4
    assert run.window_number(1) == 3
    assert math.isnan(run.window_number(0))


def test_checkpoints_know_their_window_and_the_best_one_that_of_the_epoch_file_logged_after_it(tmp_path: Path) -> None:
    events = [window(1, 1), window(1, 2), epoch(1, 0.5), saved("best_model.pth"), saved("epoch_0001.pth")]
    run = read_run(log_of(tmp_path / "run", start(), *events, window(2, 1), saved("step_00000003.pth")))
    assert run.saved == {"best_model.pth": 2, "epoch_0001.pth": 2, "step_00000003.pth": 3}


def test_non_finite_scores_are_never_the_best(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), epoch(1, 0.2), epoch(2, "nan"), epoch(3, 0.2)))
    assert run.best == (0.2, 1)


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "finished"), (3, "diverged"), (130, "stopped by Ctrl-C"), (143, "SIGTERM"), (9, "exit code 9")],
)
def test_the_state_follows_from_the_exit_code(tmp_path: Path, code: int, state: str) -> None:
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1), {"event": "run_end", "exit_code": code}))
    assert state in run.state


def test_a_resumed_run_has_no_end(tmp_path: Path) -> None:
    events = [start(), window(1, 1), {"event": "run_end", "exit_code": 143}, start("resume", window=1, number=1)]
    run = read_run(log_of(tmp_path / "run", *events))
    assert "still going" in run.state
    assert len(run.windows) == 1


def test_half_a_line_is_skipped_and_counted(tmp_path: Path) -> None:
    run = read_run(log_of(tmp_path / "run", start(), window(1, 1), tail='{"event": "window", "epo'))
    assert (len(run.points), run.num_spoilt) == (1, 1)


def test_recovery_of_a_run_without_an_end_is_counted(tmp_path: Path) -> None:
    incident = {"event": "incident", "folder": "000001", "epoch": 1, "window": 2, "culprits": ["a.jpg"]}
    events = [
        start(),
        window(1, 1),
        window(1, 2, 9.0, "nonfinite_loss"),
        {**incident, "action": "rolled back by 3 windows"},
    ]
    recovery = read_run(log_of(tmp_path / "run", *events)).recovery()
    assert recovery == {"applied": 1, "skipped": {"nonfinite_loss": 1}, "rollbacks": 1, "quarantined": {"a.jpg": 1}}


def test_incidents_are_read_from_their_folders_too(tmp_path: Path) -> None:
    run = log_of(tmp_path / "run", start(), {"event": "incident", "folder": "000002", "epoch": 1, "window": 2})
    (run / "incidents" / "000003").mkdir(parents=True)
    (run / "incidents" / "000003" / "incident.json").write_text('{"verdict": "spike", "action": "under way"}')
    assert list(read_run(run).incidents) == ["000002", "000003"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "the folder is empty, no run has written to it"),
        ({"notes.txt": "x"}, "not the folder of a run, it has no metrics.jsonl"),
        ({"metrics.jsonl": ""}, "holds no event of a run"),
        ({"metrics.jsonl": '{"step": 1}\nhello\n[1]\n'}, "holds no event of a run"),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_run(folder)
    assert str(folder) in str(error.value)
    assert "--checkpoint-dir of a run" in str(error.value)


def test_runs_of_the_same_name_go_by_their_paths_and_only_differing_settings_are_listed(tmp_path: Path) -> None:
    runs = [
        read_run(log_of(tmp_path / parent / "run", start(lr=lr, seed=1))) for parent, lr in (("a", 0.1), ("b", 0.2))
    ]
    assert unique_names(runs) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    assert differing_settings(runs) == {"lr": [0.1, 0.2]}
