"""Interrupted in every way, a run goes on to the same weights, bit for bit, from a checkpoint that is always there."""

import contextlib
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, SignalAt, differing_tensors, tiny_arguments
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launching import read_events
from torch import Tensor, nn

import train_ultimate
import training.window as window_module
from models import network
from models.network import CamouflageSegmenter
from runtime.checkpoint import CheckpointStore, read_checkpoint
from runtime.folder import unlock_directory
from runtime.signals import StopRequest
from train_ultimate import main
from training import setup as builders


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert main(tiny_arguments(tiny_dataset, directory)) == 0
    return directory


def final(directory: Path) -> dict[str, Any]:
    state = read_checkpoint(directory / "epoch_0004.pth")
    return {key: state[key] for key in ("model", "ema", "optimizer", "scaler", "detector")}


def resume(directory: Path, *flags: str) -> int:
    return main(["train", "--resume", "auto", "--checkpoint-dir", str(directory), *flags])


@pytest.fixture
def dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks with dropout in the decoder and stochastic depth in the backbone."""
    original = network.build_model

    def build(backbone: str, *args: Any, **options: Any) -> CamouflageSegmenter:
        model = original(backbone, *args, **options)
        model.decoder.context.fuse.append(nn.Dropout(0.3))
        model.backbone.body.blocks.append(DropPath()) if hasattr(model.backbone.body, "blocks") else None
        return model

    monkeypatch.setattr(network, "build_model", build)


class DropPath(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return (
            features * torch.bernoulli(torch.full((len(features), 1, 1, 1), 0.8)) / 0.8 if self.training else features
        )


@pytest.fixture(scope="module")
def whole_runs(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.mark.usefixtures("dropout")
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    stops=st.lists(st.integers(1, 16), min_size=1, max_size=3, unique=True),
    workers=st.lists(st.sampled_from([0, 1, 2]), min_size=4, max_size=4),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_stopped_at_random_windows_several_times_the_final_state_is_bitwise_the_same(
    tiny_dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
    whole_runs: dict[str, Path],
    stops: list[int],
    workers: list[int],
    precision: str,
) -> None:
    """Accumulation 3 with a short last window; dropout and drop-path; worker counts mixed."""
    if precision not in whole_runs:
        whole_runs[precision] = tmp_path_factory.mktemp("whole")
        assert main(tiny_arguments(tiny_dataset, whole_runs[precision], "--precision", precision)) == 0
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        SignalAt(patch, "gated_step", *stops)
        exit_code = main(tiny_arguments(tiny_dataset, directory, "--precision", precision))
        for number in workers[: len(stops)]:
            assert exit_code == 143
            exit_code = resume(directory, "--num-workers", str(number))
    assert exit_code == 0
    assert differing_tensors(final(directory), final(whole_runs[precision])) == []


@pytest.mark.usefixtures("dropout")
def test_dropout_is_active_in_these_tests(tiny_argv: Argv, tmp_path: Path, undisturbed: Path) -> None:
    assert main(tiny_argv()) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) != []


def test_every_mid_epoch_checkpoint_resumes_to_bitwise_the_same_weights(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    original = CheckpointStore._remove_outdated

    def keep(self: CheckpointStore, written: Path) -> None:
        if written.name.startswith("step_"):
            shutil.copy(written, kept)
        original(self, written)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_remove_outdated", keep)
        assert main(tiny_argv("--checkpoint-every", "3")) == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) == []
    steps = sorted(path.name for path in kept.iterdir())
    assert steps == [f"step_{window:08d}.pth" for window in (3, 7, 11, 15)]  # an epoch's file counts, too
    for name in steps:
        directory = tmp_path / name[:-4]
        directory.mkdir()
        shutil.copy(kept / name, directory)
        assert resume(directory) == 0
        assert differing_tensors(final(directory), final(undisturbed)) == []


def test_sigusr1_saves_and_training_goes_on(undisturbed: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        SignalAt(patch, "gated_step", 6, signal_number=signal.SIGUSR1)
        assert main(tiny_argv()) == 0
    saved = [event["file"] for event in read_events(tmp_path / "run", "checkpoint")]
    assert "step_00000006.pth" in saved
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) == []


@pytest.mark.parametrize(("name", "call"), [("accumulate_gradients", 7), ("accumulate_gradients", 14), ("validate", 3)])
def test_uncaught_error_costs_no_window(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, call: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        module = train_ultimate if name == "validate" else window_module
        original, calls = getattr(module, name), 0

        def broken(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                original(*args)  # its marks on gradients and statistics included
                raise ZeroDivisionError("a bug")
            return original(*args)

        patch.setattr(module, name, broken)
        assert main(tiny_argv()) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert f"(saved {saved})" in error
    assert saved.name == f"step_{call - 1 if name == 'accumulate_gradients' else 12:08d}.pth"
    assert resume(tmp_path / "run") == 0
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) == []


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_settings(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, train_ultimate.__file__, *tiny_argv("--drill", "kill@1")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not list((tmp_path / "run").glob("*.pth"))
    assert resume(tmp_path / "run") == 0
    assert "what is not given is as in the run that was begun here" in capsys.readouterr().out
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) == []


def test_under_a_launcher_a_second_signal_changes_nothing() -> None:
    """It passes on what the process has received by itself."""
    with StopRequest(launched=True) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_checkpoint_folder_that_cannot_be_made_is_told_before_the_data_is_read(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "run"
    assert main(tiny_argv(checkpoint_dir=path)) == 2
    printed = capsys.readouterr()
    assert f"--checkpoint-dir {path}: " in printed.err
    assert "Data:" not in printed.out


def test_second_run_in_the_same_directory_is_refused(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = builders.prepare(tiny_argv())
    assert main(tiny_argv()) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert run.lock is not None
    unlock_directory(run.lock)
    assert main(tiny_argv("--epochs", "1", "--stage1-epochs", "1")) == 0


def test_bare_weights_are_taken_with_a_warning(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = read_checkpoint(undisturbed / "epoch_0004.pth")["model"]
    torch.save(weights, tmp_path / "weights.pth")
    run = builders.prepare(tiny_argv("--resume", str(tmp_path / "weights.pth")))
    assert "holds weights alone" in capsys.readouterr().out
    assert differing_tensors(run.state.model.state_dict(), weights) == []
    assert run.state.ema is not None
    assert differing_tensors(run.state.ema.module.state_dict(), weights) == []
    assert run.state.progress.epoch == 0
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    assert main(tiny_argv("--resume", str(tmp_path / "other.pth"), checkpoint_dir=tmp_path / "other")) == 2
    assert "do not fit this network" in capsys.readouterr().err


def test_checkpoint_that_would_run_code_is_refused(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": "train_ultimate/2", "model": Payload()}, tmp_path / "evil.pth")
    assert main(tiny_argv("--resume", str(tmp_path / "evil.pth"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "evil.pth: refused" in line
    assert not (tmp_path / "executed").exists()


# Full disk, kill -9


def forked(function: Callable[[], int]) -> int:
    """Process id of a child that runs the function. Forked, so that it need not import torch again."""
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(function())
    return child


def test_full_disk_costs_warnings_and_no_training(undisturbed: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """Files are limited to 100 kB, which no checkpoint fits in: the run trains to its end and exits with 1."""
    script = [sys.executable, train_ultimate.__file__]
    full = subprocess.run(
        [*script, *tiny_argv()],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert full.returncode == 1, full.stderr
    assert full.stdout.count("could not be saved") >= 4
    assert "Traceback" not in full.stderr
    assert "not saved" in full.stderr
    assert len(read_events(tmp_path / "run", "epoch")) == 4
    assert not list((tmp_path / "run").glob("*.pth"))
    assert not list((tmp_path / "run").glob(".*"))


def test_when_there_is_room_again_saving_goes_on_and_nothing_is_lost(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    """No file may grow beyond 100 kB during epochs 2 and 3. Killed after that, the run has all but those two files."""
    finish_epoch = train_ultimate.finish_epoch

    def life() -> int:
        def limited(run: builders.Run, *rest: Any) -> None:
            full = run.state.progress.epoch in (1, 2)
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            run.store.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else unlimited, unlimited))
            finish_epoch(run, *rest)

        train_ultimate.finish_epoch = limited
        return main(tiny_argv())

    _, status = os.waitpid(forked(life), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    saved = [event["file"] for event in read_events(tmp_path / "run", "checkpoint")]
    assert [name for name in saved if name.startswith("epoch")] == ["epoch_0001.pth", "epoch_0004.pth"]
    assert differing_tensors(final(tmp_path / "run"), final(undisturbed)) == []


def test_ctrl_c_on_a_terminal_saves_and_the_resumed_run_is_bitwise_the_same(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    """A real terminal, which sends SIGINT to the loader's worker, too."""
    directory = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, train_ultimate.__file__, *tiny_argv("--num-workers", "1")]
        os.execvp("env", ["env", "OMP_NUM_THREADS=1", *command])
    output, typed = b"", False
    with contextlib.suppress(OSError):  # end of file, on a terminal
        while chunk := os.read(terminal, 4096):
            output += chunk
            if not typed and (directory / "epoch_0001.pth").exists():
                typed = bool(os.write(terminal, b"\x03"))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130, output.decode()
    assert b"Traceback" not in output
    assert b"Go on with: python" in output
    assert len(list(directory.glob("step_*.pth"))) == 1
    assert resume(directory) == 0
    assert differing_tensors(final(directory), final(undisturbed)) == []


@pytest.mark.slow
def test_killed_at_a_hundred_random_instants_the_run_ends_in_the_same_weights(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL, many of them while a file is being written, which is made slow. Work lost: one interval at most."""
    directory = tmp_path / "run"
    instants = random.Random(11)
    kills = kills_in_writes = 0
    most_lost = 0
    original = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.15)
        original(descriptor)

    def life() -> int:
        torch.set_num_threads(1)
        os.fsync = slow_fsync
        return main(tiny_argv("--resume", "auto", "--checkpoint-every", "1"))

    while kills < 100:
        shutil.rmtree(directory, ignore_errors=True)
        exit_code = None
        while exit_code is None and kills < 100:
            child = forked(life)
            deadline = time.monotonic() + instants.uniform(0.3, 3.0)
            while time.monotonic() < deadline and exit_code is None:
                done, status = os.waitpid(child, os.WNOHANG)
                exit_code = os.waitstatus_to_exitcode(status) if done else None
                time.sleep(0.005)
            if exit_code is None:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                kills_in_writes += bool(list(directory.glob(".*.unfinished")))
                newest, events = CheckpointStore(directory, keep=1).newest(), read_events(directory, "window")
                done_windows = [event["window"] + 4 * (event["epoch"] - 1) for event in events]
                saved = newest[1]["progress"]["global_window"] if newest is not None else 0
                most_lost = max(most_lost, (done_windows[-1] if done_windows else 0) - saved)
        if exit_code is None:
            assert os.waitstatus_to_exitcode(os.waitpid(forked(life), 0)[1]) == 0
        else:
            assert exit_code == 0
        assert differing_tensors(final(directory), final(undisturbed)) == []
    with capsys.disabled():
        print(f"{kills} kills, {kills_in_writes} of them during a write; at most {most_lost} windows trained again")
    assert kills_in_writes >= 30
    assert most_lost <= 2  # the interval is one window, and one write may be under way
