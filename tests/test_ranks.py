"""Several ranks: the same run as in one process, through faults, signals and losses of ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import differing_tensors
from launching import Launch, read_events

from data.sampler import Share
from runtime.heartbeat import meet
from runtime.ranks import Ranks


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "flags"), [(1, ("--accumulation-steps", "6")), (3, ("--accumulation-steps", "2"))])
def test_any_number_of_ranks_has_the_losses_and_scores_of_two(
    ranks: int, flags: tuple[str, ...], two_ranks: Launch, odd_dataset: Path, tmp_path: Path
) -> None:
    launch = Launch(odd_dataset, tmp_path)
    code, _, err = launch.run(ranks, *flags)
    assert code == 0, err
    assert launch.applied().keys() == two_ranks.applied().keys() == set(range(1, 7))
    for number, loss in launch.applied().items():
        assert loss == pytest.approx(two_ranks.applied()[number], abs=1e-5)
    for one, other in zip(
        read_events(launch.directory, "epoch"), read_events(two_ranks.directory, "epoch"), strict=True
    ):
        for score in ("iou", "dice", "mae", "s_measure"):
            assert one[score] == pytest.approx(other[score], abs=1e-5)  # a grey level of 255 may tip over
    assert launch.samples_of_epochs().keys() == {0, 1}
    assert all(sorted(samples) == list(range(15)) for samples in launch.samples_of_epochs().values())


@pytest.mark.slow
def test_the_same_weights_have_exactly_the_same_scores_on_any_number_of_ranks(
    odd_dataset: Path, tmp_path: Path
) -> None:
    """Resume a run stopped at an epoch's end, which is only validated then: 7 images on one, two and three ranks."""
    stopped = Launch(odd_dataset, tmp_path / "stopped")
    flags = ("--accumulation-steps", "6", "--epochs", "1", "--stage1-epochs", "0")
    assert stopped.run(1, *flags, signal_at="0:3:SIGTERM")[0] == 143
    scores = []
    for ranks in (1, 2, 3):
        launch = Launch(odd_dataset, tmp_path / str(ranks))
        shutil.copytree(stopped.directory, launch.directory)
        code, _, err = launch.run(ranks, *flags, "--resume", "auto")
        assert code == 0, err
        (event,) = read_events(launch.directory, "epoch")
        scores.append([event[score] for score in ("iou", "dice", "mae", "s_measure")])
    assert scores[0] == scores[1] == scores[2]


def test_ranks_meet_whatever_earlier_ones_have_left_behind() -> None:
    """Three ranks, one of them late, meet twice in one store; the first meeting leaves its numbers and a stale one."""
    store, gatherings = dist.HashStore(), []
    for _ in range(2):
        with ThreadPoolExecutor(3) as ranks:
            late = ranks.submit(lambda: (time.sleep(0.3), meet(store, 2, 3, "c"))[1])
            meetings = [*(ranks.submit(meet, store, rank, 3, name) for rank, name in enumerate("ab")), late]
            found = [meeting.result() for meeting in meetings]
        assert all(one == found[0] for one in found)
        assert found[0][1] == ["a", "b", "c"]
        gatherings.append(found[0][0])
        store.set("drawn 1", "of a process that was killed")
    assert gatherings[0] != gatherings[1]


@pytest.mark.slow
def test_only_rank_0_writes(two_ranks: Launch) -> None:
    files = {path.name for path in two_ranks.directory.iterdir()}
    checkpoints = {"epoch_0001.pth", "epoch_0002.pth", "best_model.pth"}
    assert files == {*checkpoints, "config.json", "metrics.jsonl", "report.html", "tensorboard"}
    assert len(list((two_ranks.directory / "tensorboard").iterdir())) == 1
    assert len(read_events(two_ranks.directory, "run_start")) == 1


@pytest.mark.slow
def test_run_resumes_on_fewer_and_more_ranks_at_the_same_sample(
    two_ranks: Launch, odd_dataset: Path, tmp_path: Path
) -> None:
    """2 -> 1 -> 3 ranks, stopped mid-epoch twice, always with the same command."""
    launch = Launch(odd_dataset, tmp_path)
    same = ("--accumulation-steps", "3", "--resume", "auto")
    assert launch.run(2, *same, signal_at="1:1:SIGTERM")[0] != 0
    (launch.samples / "signalled").unlink()
    code, out, err = launch.run(1, *same, signal_at="0:4:SIGTERM")
    assert code == 143, err
    assert "Windows of 6 images, as before, on 1 rank" in out
    code, out, err = launch.run(3, *same)
    assert code == 0, err
    assert {epoch: sorted(samples) for epoch, samples in launch.samples_of_epochs().items()} == {
        0: list(range(15)),
        1: list(range(15)),
    }
    for number, loss in launch.applied().items():
        assert loss == pytest.approx(two_ranks.applied()[number], abs=1e-4)


@pytest.mark.slow
def test_more_ranks_than_samples_in_a_step_are_refused(odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    assert launch.run(2, "--accumulation-steps", "1", "--epochs", "1", "--stage1-epochs", "0")[0] == 0
    code, _, err = launch.run(3, "--accumulation-steps", "1", "--epochs", "2", "--resume", "auto")
    assert code != 0
    assert err.count("error: 3 ranks for steps of 2 images") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["nan-loss", "inf-grad", "nan-weight", "bad-sample"],
)
def test_all_ranks_answer_a_fault_on_one_of_them_alike(kind: str, odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    code, _, err = launch.run(2, "--accumulation-steps", "3", "--drill", f"{kind}@4x9r1", "--checkpoint-every", "1")
    assert code == 0, err
    incidents = read_events(launch.directory, "incident")
    assert incidents
    assert incidents[0]["window"] == (2 if kind == "nan-weight" else 1)  # a NaN weight shows in the next window
    assert incidents[0]["epoch"] == 2
    lines = [
        [json.loads(line) for line in (launch.samples / f"{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    assert [(line["window"], line["again"]) for line in lines[0]] == [
        (line["window"], line["again"]) for line in lines[1]
    ]


@pytest.mark.slow
def test_signal_to_one_rank_makes_all_save_once_and_end(two_ranks: Launch, odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    code, _, err = launch.run(2, "--accumulation-steps", "3", signal_at="1:2:SIGTERM")
    assert code != 0
    assert err.count("stopped by SIGTERM; saved") == 1
    assert [event["exit_code"] for event in read_events(launch.directory, "run_end")] == [143]
    assert len(list(launch.directory.glob("step_*.pth"))) == 1
    assert launch.run(2, "--accumulation-steps", "3", "--resume", "auto")[0] == 0
    assert differing_tensors(launch.final(), two_ranks.final()) == []


@pytest.mark.slow
def test_killed_rank_ends_the_others_and_the_launcher_restarts_them(
    two_ranks: Launch, odd_dataset: Path, tmp_path: Path
) -> None:
    launch = Launch(odd_dataset, tmp_path)
    flags = ("--accumulation-steps", "3", "--checkpoint-every", "1", "--resume", "auto")
    code, _, err = launch.run(2, *flags, launcher=("--max-restarts=1",), signal_at="1:4:SIGKILL")
    assert code == 0, err
    assert len(read_events(launch.directory, "resume")) == 1
    assert differing_tensors(launch.final(), two_ranks.final()) == []


@pytest.mark.slow
def test_kills_of_a_rank_at_twenty_random_instants_leave_no_trace_in_the_weights(
    odd_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while ranks start, find each other, train, save or end; the launcher restarts them by itself."""
    flags = ("--accumulation-steps", "3", "--checkpoint-every", "1", "--resume", "auto", "--epochs", "12")
    undisturbed = Launch(odd_dataset, tmp_path / "undisturbed")
    code, _, err = undisturbed.run(2, *flags)
    assert code == 0, err
    chance, kills, runs, windows_at_kill = random.Random(5), 0, 0, []
    while kills < 20:
        runs += 1
        launch = Launch(odd_dataset, tmp_path / str(runs))
        with launch.start(2, *flags, launcher=("--max-restarts=30",), output=subprocess.DEVNULL) as process:
            while kills < 20 and process.poll() is None:
                time.sleep(chance.uniform(1, 16))
                ranks = children_of(process.pid)
                if len(ranks) == 2:
                    os.kill(chance.choice(ranks), signal.SIGKILL)
                    kills += 1
                    log = launch.directory / "metrics.jsonl"
                    windows_at_kill.append(len(read_events(launch.directory, "window")) if log.exists() else 0)
            assert process.wait(timeout=120) == 0
        assert differing_tensors(launch.final(12), undisturbed.final(12)) == []
    with capsys.disabled():
        sys.stdout.write(f"{kills} kills in {runs} runs of 36 windows; windows done by then: {windows_at_kill}\n")
    assert sum(windows > 0 for windows in windows_at_kill) >= 10  # not all of them while ranks start


def children_of(process: int) -> list[int]:
    """Return the process ids of the ranks that a launcher has started so far."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed if b"ranks.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_rank_that_falls_silent_is_named_and_the_others_end(odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    flags = ("--accumulation-steps", "2", "--rank-timeout", "5", "--epochs", "200")
    with launch.start(3, *flags, signal_at="1:3:SIGSTOP") as process:
        deadline = time.monotonic() + 120
        while not (launch.samples / "signalled").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stopped, ranks, lines = time.monotonic(), children_of(process.pid), []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if sum("has been silent for" in other for other in lines) == 2:  # by each of the two others
                break
        taken = time.monotonic() - stopped
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait(timeout=60)
    assert any("error: rank 1 (process" in line for line in lines)
    assert taken < 20


@pytest.mark.slow
def test_ranks_that_would_compute_in_different_precisions_agree_on_one(
    two_ranks: Launch, odd_dataset: Path, tmp_path: Path
) -> None:
    launch = Launch(odd_dataset, tmp_path)
    flags = ("--accumulation-steps", "3", "--precision", "auto")
    code, _, err = launch.run(2, *flags, fault="0:no-bf16,1:bf16")
    assert code == 0, err
    assert differing_tensors(launch.final(), two_ranks.final()) == []  # both in fp32


@pytest.mark.slow
def test_dataset_that_differs_between_machines_is_refused(
    odd_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is relative, and rank 1 runs in another folder, where one photograph is larger."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(odd_dataset, "data")
    shutil.copytree(odd_dataset, "another-disk/data")
    with (tmp_path / "another-disk/data/TrainDataset/Imgs/scene_00003.jpg").open("ab") as file:
        file.write(b"more")
    launch = Launch(Path("data"), tmp_path)
    code, _, err = launch.run(2, "--accumulation-steps", "3", fault="1:another-disk")
    assert code != 0
    assert "on the machine of rank 1, files are missing or have other sizes" in err
    assert not launch.directory.exists()


@pytest.mark.slow
def test_without_a_compiler_on_one_rank_none_compiles(two_ranks: Launch, odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    code, out, err = launch.run(2, "--accumulation-steps", "3", "--compile", fault="1:no-compiler")
    assert code == 0, err
    assert "Warning: --compile failed (on rank 1: no compiler here)" in out
    assert differing_tensors(launch.final(), two_ranks.final()) == []


@pytest.mark.slow
def test_ranks_wait_for_a_save_that_takes_longer_than_the_rank_timeout(odd_dataset: Path, tmp_path: Path) -> None:
    launch = Launch(odd_dataset, tmp_path)
    flags = ("--accumulation-steps", "3", "--rank-timeout", "5")
    code, _, err = launch.run(2, *flags, signal_at="1:2:SIGTERM", fault="0:slow-disk")
    assert code != 0
    assert "silent" not in err
    assert [event["exit_code"] for event in read_events(launch.directory, "run_end")] == [143]
    assert len(list(launch.directory.glob("step_*.pth"))) == 1


def test_slices_of_a_window_are_nearly_equal_and_leave_nothing_out() -> None:
    for total in range(40):
        for size in range(1, 9):
            slices = [Share(rank, size).of(total) for rank in range(size)]
            assert [index for part in slices for index in part] == list(range(total))
            assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_single_rank_sends_nothing() -> None:
    ranks, numbers = Ranks(), (torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.0))
    *agreed, requests = ranks.agree(*numbers, [0.0, 1.0, 0.0])
    assert all(one is other for one, other in zip(agreed, numbers, strict=True))
    assert requests is None
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first(lambda: 3) == 3
    assert ranks.all(True)
    assert not ranks.all(False)
