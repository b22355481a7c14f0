"""Runs stopped by a signal, or killed, and resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Argv, differing_tensors, final_state, signal_at_step, train
from launching import read_events
from torch import Tensor

import train_ultimate
from losses import deep_supervision_loss
from runtime.log import Listener
from training.run import Run


def start(argv: list[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it
    with open(log, "ab") as file:
        command = [sys.executable, train_ultimate.__file__, *argv]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_with_9_and_resumed_a_run_ends_in_the_same_weights(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    directory, log = tmp_path / "killed", tmp_path / "log"
    for after_epoch in (1, 3):
        process = start(tiny_argv("--resume", "auto", checkpoint_dir=directory), log)
        wait_until((directory / f"epoch_{after_epoch:04d}.pth").exists, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(["train", "--resume", "auto", "--checkpoint-dir", str(directory)], log).wait(120) == 0
    assert differing_tensors(final_state(directory), final_state(finished)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "exit_code", "after_epoch"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)]
)
def test_signal_to_the_process_group_saves_and_exits_and_the_resumed_run_is_bitwise_the_same(
    finished: Path, tiny_argv: Argv, tmp_path: Path, signal_number: int, exit_code: int, after_epoch: int
) -> None:
    """A terminal, ``timeout`` and Slurm signal the loader's workers too. Once in each stage."""
    directory, log = tmp_path / "stopped", tmp_path / "stopped.log"
    process = start(tiny_argv("--num-workers", "1", checkpoint_dir=directory), log)
    wait_until((directory / f"epoch_{after_epoch:04d}.pth").exists, process)
    os.killpg(process.pid, signal_number)
    assert process.wait(60) == exit_code
    text = log.read_text()
    assert "Traceback" not in text
    assert "Go on with: python" in text
    assert list(directory.glob("step_*.pth"))
    assert start(["train", "--resume", "auto", "--checkpoint-dir", str(directory)], log).wait(120) == 0
    assert differing_tensors(final_state(directory), final_state(finished)) == []


def assert_resumes_like(finished: Path, directory: Path) -> None:
    """Resume a stopped run, and compare its weights and the log's epochs with those of an undisturbed one."""
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(directory)]) == 0
    assert differing_tensors(final_state(directory), final_state(finished)) == []
    resumed = {event["epoch"]: event for event in read_events(directory, "epoch")}
    for event in read_events(finished, "epoch"):
        assert all(resumed[event["epoch"]][key] == event[key] for key in ("loss", "lr", "backbone_lr", "mae"))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="stage 1", marks=pytest.mark.slow),
        pytest.param(8, id="end of stage 1"),
        pytest.param(9, id="start of stage 2", marks=pytest.mark.slow),
        pytest.param(10, id="stage 2", marks=pytest.mark.slow),
        pytest.param(12, id="end of an epoch"),
    ],
)
def test_stopped_at_any_step_the_resumed_run_is_bitwise_the_same(
    finished: Path, tiny_argv: Argv, tmp_path: Path, step: int
) -> None:
    """Stage 2 trains BatchNorm here, whose statistics have moved on by the time a window is settled."""
    with signal_at_step(step):
        assert train(tiny_argv()) == 143
    assert_resumes_like(finished, tmp_path / "run")


def test_stopped_in_validation_the_resumed_run_is_bitwise_the_same(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    def validate(*args: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return train_ultimate.validate(*args)

    assert train(tiny_argv(), validate=validate) == 143
    assert read_events(tmp_path / "run", "epoch") == []
    assert_resumes_like(finished, tmp_path / "run")


def test_signal_while_a_run_is_still_beginning_saves_it_too(finished: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """TensorBoard and the report's packages are imported then, which takes a second."""

    def listeners_of(_run: Run) -> list[Listener]:
        os.kill(os.getpid(), signal.SIGTERM)
        return []

    assert train(tiny_argv(), listeners_of=listeners_of) == 143
    assert list((tmp_path / "run").glob("step_*.pth"))
    assert_resumes_like(finished, tmp_path / "run")


def test_second_signal_stops_at_once(tiny_argv: Argv) -> None:
    def loss(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on after the second signal")

    assert train(tiny_argv(), loss=loss) == 130


@pytest.mark.parametrize(
    ("signals", "exit_code"),
    [
        ((signal.SIGHUP,), 129),
        ((signal.SIGTERM, signal.SIGUSR1), 143),
        ((signal.SIGUSR1, signal.SIGTERM), 143),
        ((signal.SIGINT, signal.SIGUSR1), 130),
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2), 143),
    ],
    ids=lambda value: "+".join(one.name for one in value) if isinstance(value, tuple) else None,
)
def test_signals_in_any_order_and_number_stop_the_run_saved_once(
    finished: Path, tiny_argv: Argv, tmp_path: Path, signals: tuple[signal.Signals, ...], exit_code: int
) -> None:
    sent = False

    def loss(*args: Any) -> Tensor:
        nonlocal sent
        for number in () if sent else signals:
            os.kill(os.getpid(), number)
        sent = True
        return deep_supervision_loss(*args)

    assert train(tiny_argv(), loss=loss) == exit_code
    assert [event["file"] for event in read_events(tmp_path / "run", "checkpoint")] == ["step_00000001.pth"]
    assert_resumes_like(finished, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_request_to_save_saves_and_the_run_goes_on(tiny_argv: Argv, tmp_path: Path, number: signal.Signals) -> None:
    with signal_at_step(2, signal_number=number):
        assert train(tiny_argv("--keep-checkpoints", "9")) == 0
    files = [event["file"] for event in read_events(tmp_path / "run", "checkpoint")]
    assert files[0].startswith("step_")
    assert "epoch_0004.pth" in files


def test_a_closed_terminal_means_nothing_to_a_run_that_ignores_it(tiny_argv: Argv) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signal_at_step(2, signal_number=signal.SIGHUP):
            assert train(tiny_argv()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_run_ends_with_its_time_and_goes_on_to_the_same_weights(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A session of two seconds, half of which is kept back, is too short for four epochs."""
    long = "--epochs", "4", "--keep-checkpoints", "9"
    begun = time.monotonic()
    assert train(tiny_argv(*long, "--max-hours", str(2 / 3600))) == 0
    assert time.monotonic() - begun < 30
    stopped = capsys.readouterr()
    assert "stopped by --max-hours 0.000555556; saved " in stopped.err
    assert "Go on with: " in stopped.err
    assert "Done" not in stopped.out
    assert not (tmp_path / "run/epoch_0004.pth").exists()
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert differing_tensors(final_state(tmp_path / "run"), final_state(finished)) == []
