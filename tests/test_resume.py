"""Runs interrupted in every way: there is always a checkpoint, and they end in the same weights, bit for bit."""

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
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, failing, prepare_run, signal_at_step, tiny_arguments, train
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from launching import read_events
from torch import Tensor, nn

import train_ultimate
from losses import deep_supervision_loss
from models.network import CamouflageSegmenter, build_network
from runtime.checkpoint import CheckpointStore, read_checkpoint, write_checkpoint
from runtime.log import Listener
from runtime.signals import Signals
from train_ultimate import validate
from training.run import Run
from training.window import Loss


def final(directory: Path) -> dict[str, Any]:
    state = read_checkpoint(directory / "epoch_0004.pth")
    return {key: state[key] for key in ("model", "ema", "optimizer", "scaler", "detector")}


def resume(directory: Path, *flags: str, **parts: Any) -> int:
    return train(["train", "--resume", "auto", "--checkpoint-dir", str(directory), *flags], **parts)


def with_dropout(*args: Any) -> CamouflageSegmenter:
    """Build a network with dropout in the decoder and stochastic depth in the backbone."""
    model = build_network(*args)
    for name, layer in (("decoder.context.fuse", nn.Dropout(0.3)), ("backbone.body.blocks", DropPath())):
        layers = model.get_submodule(name)
        assert isinstance(layers, nn.Sequential)
        layers.append(layer)
    return model


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, features: Tensor) -> Tensor:
        return (
            features * torch.bernoulli(torch.full((len(features), 1, 1, 1), 0.8)) / 0.8 if self.training else features
        )


@pytest.fixture(scope="module")
def whole_runs(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.mark.slow
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
    """Mix worker counts, with accumulation 3, a short last window, dropout and stochastic depth."""
    parts: dict[str, Any] = {"build_network": with_dropout}
    if precision not in whole_runs:
        whole_runs[precision] = tmp_path_factory.mktemp("whole")
        assert train(tiny_arguments(tiny_dataset, whole_runs[precision], "--precision", precision), **parts) == 0
    directory = tmp_path_factory.mktemp("stopped")
    with signal_at_step(*stops):
        exit_code = train(tiny_arguments(tiny_dataset, directory, "--precision", precision), **parts)
        for number in workers[: len(stops)]:
            assert exit_code == 143
            exit_code = resume(directory, "--num-workers", str(number), **parts)
    assert exit_code == 0
    assert differing_tensors(final(directory), final(whole_runs[precision])) == []


def test_dropout_is_active_in_these_tests(tiny_argv: Argv, tmp_path: Path, finished: Path) -> None:
    assert train(tiny_argv(), build_network=with_dropout) == 0
    assert differing_tensors(final(tmp_path / "run"), final(finished)) != []


@pytest.mark.slow
def test_every_mid_epoch_checkpoint_resumes_to_bitwise_the_same_weights(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()

    def keeping(run: Run) -> list[Listener]:
        def keep(*_: Any) -> None:
            run.folder.store.wait()
            for saved in run.folder.path.glob("step_*.pth"):
                shutil.copy(saved, kept)

        run.state.optimizer.register_step_pre_hook(keep)
        return []

    assert train(tiny_argv("--checkpoint-every", "3"), listeners_of=keeping) == 0
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []
    steps = sorted(path.name for path in kept.iterdir())
    assert steps == [f"step_{window:08d}.pth" for window in (3, 7, 11, 15)]  # counted from an epoch's file, too
    for name in steps:
        directory = tmp_path / name[:-4]
        directory.mkdir()
        shutil.copy(kept / name, directory)
        assert resume(directory) == 0
        assert differing_tensors(final(directory), final(finished)) == []


def test_sigusr1_saves_and_training_goes_on(finished: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    with signal_at_step(6, signal_number=signal.SIGUSR1):
        assert train(tiny_argv()) == 0
    saved = [event["file"] for event in read_events(tmp_path / "run", "checkpoint")]
    assert "step_00000006.pth" in saved
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


# Errors


def acting_loss(call: int, act: Callable[[], object]) -> Loss:
    """Return the loss, with something that happens at its nth call: once a batch, reruns for diagnosis included."""
    calls = 0

    def loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return deep_supervision_loss(*args)

    return loss


def fail() -> None:
    raise ZeroDivisionError("a bug")


def last_batch(window: int) -> int:
    """Return the number of a window's last batch in an undisturbed run; an epoch's windows have 3, 3, 3 and 1."""
    epochs, position = divmod(window - 1, 4)
    return 10 * epochs + min(3 * (position + 1), 10)


@pytest.mark.parametrize(
    ("place", "number"), [pytest.param("window", 7, marks=pytest.mark.slow), ("window", 14), ("validation", 3)]
)
def test_uncaught_error_costs_no_window(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, number: int
) -> None:
    """It strikes in a window's last batch, with marks left on gradients and statistics, or after an epoch."""
    validations = 0

    def broken(*args: Any) -> dict[str, float]:
        nonlocal validations
        validations += 1
        scores = validate(*args)
        if validations == number:
            fail()
        return scores

    parts = {"loss": acting_loss(last_batch(number), fail)} if place == "window" else {"validate": broken}
    assert train(tiny_argv(), **parts) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert f"(saved {saved})" in error
    done = number - 1 if place == "window" else 12
    assert saved.name == f"step_{done:08d}.pth"
    assert read_checkpoint(saved)["ladder"]["num_applied"] == done
    assert read_checkpoint(saved)["epoch_stats"]["num_applied"] == (done % 4 or 4)
    assert resume(tmp_path / "run") == 0
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        pytest.param("nan-loss@6", False, marks=pytest.mark.slow),
        ("inf-grad@14", False),
        ("spike@6", True),
        pytest.param("spike@14", True, marks=pytest.mark.slow),
    ],
)
def test_an_error_while_a_fault_is_pending_leaves_the_weights_of_a_run_that_met_the_fault_alone(
    tiny_argv: Argv, tmp_path: Path, fault: str, counted: bool
) -> None:
    """The error strikes in the next window. A spike is skipped for good; other faults are rerun by the resumed run."""
    window = int(fault.split("@")[1])
    assert train(tiny_argv("--drill", fault, checkpoint_dir=tmp_path / "alone")) == 0
    error_after = acting_loss(last_batch(window + 1), fail)
    assert train(tiny_argv("--drill", fault), loss=error_after) == 1
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert saved.name == f"step_{window if counted else window - 1:08d}.pth"
    state = read_checkpoint(saved)
    assert state["ladder"]["skipped"] == ({"spike": 1} if counted else {})
    assert state["ladder"]["num_applied"] == window - 1
    assert state["epoch_stats"]["num_skipped"] == int(counted)
    assert resume(tmp_path / "run") == 0
    assert differing_tensors(final(tmp_path / "run"), final(tmp_path / "alone")) == []


def test_an_error_during_a_rerun_leaves_the_window_for_the_resumed_run(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    rerun = last_batch(7) + 3 + 1  # three batches are run for diagnosis
    assert train(tiny_argv("--drill", "nan-loss@6"), loss=acting_loss(rerun, fail)) == 1
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert saved.name == "step_00000005.pth"
    assert resume(tmp_path / "run") == 0
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


def test_data_that_disappears_costs_no_window(
    tiny_dataset: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is gone when window 12 is read, before the verdict on window 11 is; BatchNorm learns in this stage."""
    root, gone = tmp_path / "data", tmp_path / "gone"
    shutil.copytree(tiny_dataset, root)
    disappears = acting_loss(last_batch(11), lambda: root.rename(gone))
    assert train(tiny_arguments(root, tmp_path / "run"), loss=disappears) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (saved,) = (tmp_path / "run").glob("step_*.pth")
    assert f"(saved {saved})" in error
    assert saved.name == "step_00000011.pth"
    shutil.move(gone, root)
    assert resume(tmp_path / "run") == 0
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again_with_its_settings(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, train_ultimate.__file__, *tiny_argv("--drill", "kill@1")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not list((tmp_path / "run").glob("*.pth"))
    assert resume(tmp_path / "run") == 0
    assert "settings that are not given are those of the run begun here" in capsys.readouterr().out
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


def test_under_a_launcher_a_second_signal_changes_nothing() -> None:
    """The launcher forwards signals that the process has already received itself."""
    with Signals(launched=True) as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.signal_number == signal.SIGTERM


@pytest.mark.parametrize("kind", ["a file", "below a file"])
def test_a_checkpoint_folder_that_cannot_be_created_is_reported_before_the_data_is_read(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "run"
    assert train(tiny_argv(checkpoint_dir=path)) == 2
    printed = capsys.readouterr()
    assert f"--checkpoint-dir {path}: " in printed.err
    assert "Data:" not in printed.out


def test_second_run_in_the_same_directory_is_refused(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare_run(tiny_argv())
    assert "another run is writing there" in failing(tiny_argv(), capsys)
    run.folder.release()
    assert train(tiny_argv("--epochs", "1", "--stage1-epochs", "1")) == 0


def test_bare_weights_are_used_with_a_warning(
    finished: Path,
    tiny_argv: Argv,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = read_checkpoint(finished / "epoch_0004.pth")["model"]
    torch.save(weights, tmp_path / "weights.pth")
    run = prepare_run(tiny_argv("--resume", str(tmp_path / "weights.pth")))
    assert "holds only weights" in caplog.text
    assert differing_tensors(run.state.model.state_dict(), weights) == []
    assert run.state.ema is not None
    assert differing_tensors(run.state.ema.module.state_dict(), weights) == []
    assert run.state.progress.epoch == 0
    wrapped = {"epoch": 7, "state_dict": {f"module._orig_mod.{name}": weight for name, weight in weights.items()}}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    run = prepare_run(tiny_argv("--resume", str(tmp_path / "wrapped.pth"), checkpoint_dir=tmp_path / "wrapped"))
    assert differing_tensors(run.state.model.state_dict(), weights) == []
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    other = tiny_argv("--resume", str(tmp_path / "other.pth"), checkpoint_dir=tmp_path / "other")
    assert "do not fit this network; first difference: " in failing(other, capsys)


def with_another_shape(state: dict[str, Any]) -> None:
    for weights in (state["model"], state["ema"]["model"]):
        weights["decoder.blocks.3.head.weight"] = weights["decoder.blocks.3.head.weight"][:, :8].clone()


def with_another_layer(state: dict[str, Any]) -> None:
    for weights in (state["model"], state["ema"]["model"]):
        weights["decoder.attention.weight"] = torch.ones(3)


def with_another_moment(state: dict[str, Any]) -> None:
    moments = next(iter(state["optimizer"]["state"].values()))
    moments["exp_avg"] = moments["exp_avg"].flatten()[:1].clone()


def with_another_field(state: dict[str, Any]) -> None:
    state["progress"]["patience"] = 3


def without_a_detector(state: dict[str, Any]) -> None:
    del state["detector"]


def with_other_batches(state: dict[str, Any]) -> None:
    state["config"]["batches"] = "all"


def without_a_setting(state: dict[str, Any]) -> None:
    del state["config"]["settings"]["batch_size"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            with_another_shape,
            "decoder.blocks.3.head.weight has the shape (1, 8, 3, 3) in the file, not (1, 16, 3, 3)",
        ),
        (with_another_layer, "decoder.attention.weight is only in the file"),
        (with_another_moment, "exp_avg of parameter "),
        (with_another_field, "TypeError: Progress.__init__() got an unexpected keyword argument 'patience'"),
        (without_a_detector, "KeyError: 'detector'"),
        (without_a_setting, "its config has no batch_size"),
        (with_other_batches, "batches of all"),
    ],
)
def test_a_checkpoint_of_a_modified_copy_of_the_program_is_refused_with_the_first_difference(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[..., None], difference: str
) -> None:
    state = read_checkpoint(finished / "epoch_0003.pth")
    change(state)
    write_checkpoint(tmp_path / "epoch_0003.pth", state)
    error = failing(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path)], capsys)
    assert f"{tmp_path / 'epoch_0003.pth'} was made by a modified copy of this program" in error
    assert f"first difference: {difference}" in error


def test_checkpoint_that_would_run_code_is_refused(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"format": "train_ultimate/2", "model": Payload()}, tmp_path / "evil.pth")
    assert "evil.pth: refused" in failing(tiny_argv("--resume", str(tmp_path / "evil.pth")), capsys)
    assert not (tmp_path / "executed").exists()


# Full disks, Ctrl-C, kill -9


def forked(function: Callable[[], int], output: Path) -> int:
    """Fork a child that runs the function, without importing torch again. Return its process id.

    Args:
        function: returns the exit code.
        output: file that the child's output is appended to.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        sys.stdout = sys.stderr = open(output, "a", buffering=1, encoding="utf-8")
        try:
            exit_code = function()
        except BaseException:
            traceback.print_exc()
            exit_code = 70
        os._exit(exit_code)
    return child


def windows_logged(directory: Path) -> int:
    """Return how many windows, of 4 an epoch, a run has trained by its log; 0 if it was killed before it wrote one."""
    events = read_events(directory, "window") if (directory / "metrics.jsonl").exists() else []
    return events[-1]["window"] + 4 * (events[-1]["epoch"] - 1) if events else 0


def test_full_disk_costs_warnings_and_no_training(finished: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """Files are limited to 100 kB, too little for any checkpoint: the run trains to its end and exits with 1."""
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
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    """No file may grow beyond 100 kB at the end of epochs 2 and 3: all other files are there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(run: Run, *rest: Any) -> dict[str, float]:
        full = run.state.progress.epoch in (1, 2)
        run.folder.store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else limits[0], limits[1]))
        return validate(run, *rest)

    try:
        assert train(tiny_argv(), validate=limited) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    saved = [event["file"] for event in read_events(tmp_path / "run", "checkpoint")]
    assert [name for name in saved if name.startswith("epoch")] == ["epoch_0001.pth", "epoch_0004.pth"]
    assert differing_tensors(final(tmp_path / "run"), final(finished)) == []


def test_ctrl_c_on_a_terminal_saves_and_the_resumed_run_is_bitwise_the_same(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    """A real terminal sends SIGINT to the loader's worker, too."""
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
    assert differing_tensors(final(directory), final(finished)) == []


@pytest.mark.slow
def test_killed_at_a_hundred_random_instants_the_run_ends_in_the_same_weights(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing is slowed down, so that many kills strike during a write. At most one interval of work is lost.

    It needs a process of its own: once another test has started autograd's threads, torch refuses to train in a fork.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "--numprocesses", "0", __file__, "-k", "hundred"]
        again = subprocess.run(command, cwd=Path(__file__).parents[1], env=alone, capture_output=True, text=True)
        assert again.returncode == 0, again.stdout
        return
    directory, output = tmp_path / "run", tmp_path / "output.txt"
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
        return train(tiny_argv("--resume", "auto", "--checkpoint-every", "1"))

    while kills < 100:
        shutil.rmtree(directory, ignore_errors=True)
        exit_code = None
        while exit_code is None and kills < 100:
            child = forked(life, output)
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
                newest = CheckpointStore(directory, keep=1).newest()
                saved = newest[1]["progress"]["global_window"] if newest is not None else 0
                most_lost = max(most_lost, windows_logged(directory) - saved)
        if exit_code is None:
            exit_code = os.waitstatus_to_exitcode(os.waitpid(forked(life, output), 0)[1])
        assert exit_code == 0, output.read_text()[-5000:]
        assert differing_tensors(final(directory), final(finished)) == []
    with capsys.disabled():
        print(f"{kills} kills, {kills_in_writes} of them during a write; at most {most_lost} windows trained again")
    assert kills_in_writes >= 30
    assert most_lost <= 2  # the interval is one window, and a write may be unfinished
