"""Several processes, started by PyTorch's launcher as a user starts them, talking by gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import differing_tensors, read_events

from data.sampler import Share
from data.synthetic import write_synthetic_dataset
from training.distributed import Ranks

PROGRAM = Path(__file__).with_name("ranks.py")
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 training scenes; at --val-fraction 0.3, 15 to train on and 7 to validate on: numbers that nothing divides."""
    root = tmp_path_factory.mktemp("ranks") / "tiny"
    write_synthetic_dataset(root, num_train=22, num_test=3, img_size=64, seed=7)
    return root


class Launch:
    """A run of several processes, or of one, with the samples of each."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.dataset, self.directory, self.samples = dataset, folder / "run", folder / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)

    def command(self, ranks: int, *flags: str, launcher: tuple[str, ...] = ()) -> list[str]:
        start = [*LAUNCHER, f"--nproc-per-node={ranks}", *launcher] if ranks > 1 else [sys.executable]
        return [
            *(*start, str(PROGRAM), "train", "--dataset-path", str(self.dataset)),
            *("--checkpoint-dir", str(self.directory), "--val-fraction", "0.3", "--img-size", "64", "--device", "cpu"),
            *("--backbone", "test_convnext", "--no-pretrained", "--decoder-channels", "16", "--precision", "fp32"),
            *("--epochs", "2", "--stage1-epochs", "1", "--lr", "0.002", "--num-workers", "0", "--batch-size", "1"),
            *flags,
        ]

    def environment(self, signal_at: str = "") -> dict[str, str]:
        told = {"TEST_SIGNAL": signal_at} if signal_at else {}
        return {**os.environ, "OMP_NUM_THREADS": "1", "TEST_SAMPLES": str(self.samples), **told}

    def start(self, ranks: int, *flags: str, launcher: tuple[str, ...] = (), signal_at: str = "") -> Any:
        command = self.command(ranks, *flags, launcher=launcher)
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment(signal_at), start_new_session=True, **pipes)

    def run(self, ranks: int, *flags: str, launcher: tuple[str, ...] = (), signal_at: str = "") -> tuple[int, str, str]:
        with self.start(ranks, *flags, launcher=launcher, signal_at=signal_at) as process:
            try:
                out, err = process.communicate(timeout=240)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            return process.returncode, out, err

    def applied(self) -> dict[int, float]:
        """Window of the run -> its loss; of those that came twice, the later."""
        events = read_events(self.directory, "window")
        return {number: event["loss"] for number, event in enumerate(events, start=1)}

    def samples_of_epochs(self) -> dict[int, list[int]]:
        lines = [json.loads(line) for path in self.samples.glob("*.jsonl") for line in path.read_text().splitlines()]
        epochs: dict[int, list[int]] = {}
        for line in lines:
            epochs.setdefault(line["epoch"], []).extend(line["samples"])
        return epochs

    def final(self) -> dict[str, Any]:
        return load(self.directory / "epoch_0002.pth")


def load(path: Path) -> dict[str, Any]:
    """What a run computes; without what tells how it was started and how long it took."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"], checkpoint["epoch_stats"]
    checkpoint["ladder"].pop("seconds_lost")
    return checkpoint


@pytest.fixture(scope="session")
def two_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """An undisturbed run of two ranks: 2 epochs of 3 windows of 6, 6 and 3 samples."""
    launch = Launch(dataset, tmp_path_factory.mktemp("two"))
    code, _, err = launch.run(2, "--accumulation-steps", "3")
    assert code == 0, err
    return launch


@pytest.mark.parametrize(("ranks", "flags"), [(1, ("--accumulation-steps", "6")), (3, ("--accumulation-steps", "2"))])
def test_any_number_of_ranks_has_the_losses_and_scores_of_two(
    ranks: int, flags: tuple[str, ...], two_ranks: Launch, dataset: Path, tmp_path: Path
) -> None:
    launch = Launch(dataset, tmp_path)
    code, _, err = launch.run(ranks, *flags)
    assert code == 0, err
    assert launch.applied().keys() == two_ranks.applied().keys() == set(range(1, 7))
    for number, loss in launch.applied().items():
        assert loss == pytest.approx(two_ranks.applied()[number], abs=1e-5)
    for one, other in zip(
        read_events(launch.directory, "epoch"), read_events(two_ranks.directory, "epoch"), strict=True
    ):
        for score in ("iou", "dice", "mae", "s_measure"):
            assert one[score] == pytest.approx(other[score], abs=1e-6)
    assert launch.samples_of_epochs().keys() == {0, 1}
    assert all(sorted(samples) == list(range(15)) for samples in launch.samples_of_epochs().values())


def test_only_the_first_rank_prints_and_writes(two_ranks: Launch) -> None:
    files = {path.name for path in two_ranks.directory.iterdir()}
    assert files == {"epoch_0001.pth", "epoch_0002.pth", "best_model.pth", "config.json", "metrics.jsonl"}
    assert len(read_events(two_ranks.directory, "run_start")) == 1


def test_a_run_goes_on_with_fewer_and_more_ranks_at_the_same_sample(
    two_ranks: Launch, dataset: Path, tmp_path: Path
) -> None:
    """2 -> 1 -> 3 ranks, each stopped in the midst of an epoch, with the command that it was started with."""
    launch = Launch(dataset, tmp_path)
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


def test_more_ranks_than_samples_in_a_step_are_refused(dataset: Path, tmp_path: Path) -> None:
    launch = Launch(dataset, tmp_path)
    assert launch.run(2, "--accumulation-steps", "1", "--epochs", "1", "--stage1-epochs", "0")[0] == 0
    code, _, err = launch.run(3, "--accumulation-steps", "1", "--epochs", "2", "--resume", "auto")
    assert code != 0
    assert err.count("error: 3 ranks for steps of 2 images") == 1


@pytest.mark.parametrize("kind", ["nan-loss", "inf-grad", "nan-weight", "bad-sample"])
def test_a_fault_on_one_rank_is_answered_by_all_alike(kind: str, dataset: Path, tmp_path: Path) -> None:
    launch = Launch(dataset, tmp_path)
    code, _, err = launch.run(2, "--accumulation-steps", "3", "--drill", f"{kind}@4x9r1", "--checkpoint-every", "1")
    assert code == 0, err
    incidents = read_events(launch.directory, "incident")
    assert incidents
    assert incidents[0]["window"] == (2 if kind == "nan-weight" else 1)  # that shows when it is used
    assert incidents[0]["epoch"] == 2
    lines = [
        [json.loads(line) for line in (launch.samples / f"{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]
    assert [(line["window"], line["again"]) for line in lines[0]] == [
        (line["window"], line["again"]) for line in lines[1]
    ]


def test_a_signal_to_one_rank_has_all_save_once_and_end(two_ranks: Launch, dataset: Path, tmp_path: Path) -> None:
    launch = Launch(dataset, tmp_path)
    code, _, err = launch.run(2, "--accumulation-steps", "3", signal_at="1:2:SIGTERM")
    assert code != 0
    assert err.count("stopped by a signal; saved") == 1
    assert [event["exit_code"] for event in read_events(launch.directory, "run_end")] == [143]
    assert len(list(launch.directory.glob("step_*.pth"))) == 1
    assert launch.run(2, "--accumulation-steps", "3", "--resume", "auto")[0] == 0
    assert differing_tensors(launch.final(), two_ranks.final()) == []


def test_a_killed_rank_ends_the_others_and_the_launcher_starts_them_again(
    two_ranks: Launch, dataset: Path, tmp_path: Path
) -> None:
    launch = Launch(dataset, tmp_path)
    flags = ("--accumulation-steps", "3", "--checkpoint-every", "1", "--resume", "auto")
    code, _, err = launch.run(2, *flags, launcher=("--max-restarts=1",), signal_at="1:4:SIGKILL")
    assert code == 0, err
    assert len(read_events(launch.directory, "resume")) == 1
    assert differing_tensors(launch.final(), two_ranks.final()) == []


def test_a_rank_that_falls_silent_is_named_and_the_others_end(dataset: Path, tmp_path: Path) -> None:
    launch = Launch(dataset, tmp_path)
    flags = ("--accumulation-steps", "2", "--rank-timeout", "5", "--epochs", "200")
    with launch.start(3, *flags, signal_at="1:3:SIGSTOP") as process:
        deadline = time.monotonic() + 120
        while not (launch.samples / "signalled").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stopped = time.monotonic()
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if sum("has been silent for" in other for other in lines) == 2:  # by each of the two others
                break
        taken = time.monotonic() - stopped
        os.killpg(process.pid, signal.SIGTERM)
        subprocess.run(["pkill", "-KILL", "-f", str(launch.directory)], check=False)
        process.wait()
    assert any("error: rank 1 (process" in line for line in lines)
    assert taken < 20


def test_slices_of_a_window_are_nearly_equal_and_leave_nothing_out() -> None:
    for total in range(40):
        for size in range(1, 9):
            slices = [Share(rank, size).of(total) for rank in range(size)]
            assert [index for part in slices for index in part] == list(range(total))
            assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_alone_nothing_is_sent() -> None:
    ranks, numbers = Ranks(), (torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.0))
    *agreed, requests = ranks.agree(*numbers, [0.0, 1.0, 0.0])
    assert all(one is other for one, other in zip(agreed, numbers, strict=True))
    assert requests is None
    assert ranks.gather("x") == ["x"]
    assert ranks.from_first(lambda: 3) == 3
    assert ranks.all(True)
    assert not ranks.all(False)
