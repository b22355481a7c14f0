"""Copies between host and a CUDA device: late, from pinned memory, and read only when they have arrived."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nullcuda
import pytest
import torch
from conftest import Argv, differing_tensors, final_state, prepare_run, tiny_arguments
from nullcuda.emulate import Emulation

from runtime.checkpoint import HostCopy
from runtime.tensors import named_tensors
from train_ultimate import begin_stage

pytestmark = [pytest.mark.rehearsal, pytest.mark.gpu]
null_only = pytest.mark.skipif(not nullcuda.is_active(), reason="only a null device counts them: -m rehearsal")


@pytest.fixture
def lazy() -> Iterator[None]:
    """Copies to and from pinned memory are as late as CUDA allows."""
    if nullcuda.is_active():
        nullcuda.Runtime().set_lazy(True)
    yield
    if nullcuda.is_active():
        nullcuda.Runtime().set_lazy(False)


def test_copy_is_what_the_state_was_when_it_was_asked_for(lazy: None, arithmetic: Emulation | None) -> None:
    state = {"model": {"w": torch.ones(5, 3, device="cuda"), "n": torch.tensor(7, device="cuda")}, "epoch": 3}
    complete = HostCopy().take(state)
    state["model"]["w"] += 1  # queued behind the copy
    copied = complete()
    assert copied["epoch"] == 3
    assert torch.equal(copied["model"]["w"], torch.ones(5, 3))
    assert copied["model"]["n"] == 7


@null_only
def test_checkpoint_takes_few_pinned_allocations_and_snapshots_none(
    tiny_argv: Argv, arithmetic: Emulation | None
) -> None:
    run = prepare_run(tiny_argv("--device", "cuda"))
    begin_stage(run, run.stages[0])
    runtime = nullcuda.Runtime()
    before = runtime.pinned_allocations
    for _ in range(2):
        run.folder.store.save_step(1, run.checkpoint())
        run.folder.store.wait()
    assert runtime.pinned_allocations - before == 1
    for _ in range(3):
        run.recovery._take_snapshot({})
    assert runtime.pinned_allocations - before == 1
    for snapshot in run.recovery._snapshots:
        assert not any(tensor.is_pinned() for _, tensor in named_tensors(snapshot.model))


def command(dataset: Path, folder: Path, *extra: str) -> list[str]:
    """Return a command that trains in fp16 on a CUDA device, a null one if this process has one."""
    program = ["-m", "tests.nullcuda", "--"] if nullcuda.is_active() else ["train_ultimate.py"]
    flags = "--device", "cuda", "--precision", "fp16", "--checkpoint-every", "1", "--deterministic", *extra
    return [sys.executable, *program, *tiny_arguments(dataset, folder, *flags)]


def run_lazily(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "NULLCUDA_LAZY": "1"},
    )  # fmt: skip


def test_run_killed_with_late_copies_resumes_to_the_same_weights(tiny_dataset: Path, tmp_path: Path) -> None:
    """A save each window, kill -9 in the middle, and a resumed run: bitwise as if undisturbed, without one race."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with run_lazily(command(tiny_dataset, undisturbed)) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert not nullcuda.is_active() or " 0 races" in output

    with run_lazily(command(tiny_dataset, killed)) as process:
        while not list(killed.glob("step_*6.pth")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    with run_lazily(command(tiny_dataset, killed, "--resume", "auto")) as process:
        output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "Resumed" in output
    assert differing_tensors(final_state(killed), final_state(undisturbed)) == []
