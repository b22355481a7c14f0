"""Several CUDA devices: what travels between them in a window, and a launched run."""

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nullcuda
import pytest
import torch
import torch.distributed as dist
from conftest import Argv, tiny_arguments
from launching import LAUNCHER, read_events
from nullcuda.emulate import Emulation

from commands import cli
from data.loading import training_loader
from data.synthetic import write_synthetic_dataset
from runtime.ranks import Ranks
from train_ultimate import begin_stage, train_epoch
from training.recovery import Recovery
from training.run import Run
from training.setup import Parts, prepare

pytestmark = pytest.mark.rehearsal

T = TypeVar("T")


class AloneOfEight(Ranks):
    """Rank 0 of eight whose others are silent: NCCL sends nothing on a null device, and answers "done"."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=8)

    def gather(self, value: T) -> list[T]:
        return [value] * self.size

    def total(self, numbers: Sequence[float]) -> list[float]:
        return [number * self.size for number in numbers]

    def from_first(self, call: Callable[[], T]) -> T:
        return call()

    def from_rank(self, rank: int, value: T) -> T:
        return value


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A group of NCCL with eight ranks, of which only this process exists."""
    if not nullcuda.is_active():
        pytest.skip("only a null device needs no other rank: -m rehearsal")
    dist.init_process_group("nccl", rank=0, world_size=8, store=dist.HashStore())
    compares_shapes = "torch.nn.parallel.distributed._verify_param_shape_across_processes"
    monkeypatch.setattr(compares_shapes, lambda *_, **__: None)  # with those of the others
    yield AloneOfEight()
    dist.destroy_process_group()


class Unchecked(Recovery):
    """Recovery that takes all weights for finite: without arithmetic, they are arbitrary."""

    def _weights_finite(self) -> bool:
        return True


def windows_of(
    argv: list[str], ranks: Ranks, emulation: Emulation, **parts: Any
) -> tuple[Run, list[list[tuple[str, int]]]]:
    """Train the first epoch. Return the run and what was sent in each of its windows."""
    run = prepare(cli.parse(argv).given, ranks, parts=Parts(**parts))
    begin_stage(run, run.stages[0])
    return run, sent_in_first_epoch(run, emulation)


def sent_in_first_epoch(run: Run, emulation: Emulation) -> list[list[tuple[str, int]]]:
    loader = training_loader(
        run.data.train_pairs, 64, run.runner.batch_size, 0, num_workers=0, pin_memory=True,
        window_size=run.data.window_size, share=run.share,
    )  # fmt: skip
    sent: list[list[tuple[str, int]]] = []
    backward = run.runner.backward

    def counted(*args: Any) -> Any:
        sent.append([])
        emulation.sent = sent[-1]
        return backward(*args)

    run.runner.backward = counted  # type: ignore[method-assign]
    train_epoch(run, run.stages[0], loader)
    return sent


@pytest.fixture
def argv_of_eight(tmp_path: Path, tiny_argv: Argv) -> list[str]:
    root = tmp_path / "data"
    write_synthetic_dataset(root, num_train=54, num_test=1, img_size=64, seed=7)
    return tiny_argv(
        *("--dataset-path", str(root), "--device", "cuda", "--backbone", "resnet10t", "--batch-size", "1"),
        *("--accumulation-steps", "2", "--epochs", "1", "--stage1-epochs", "0", "--precision", "fp16"),
    )


def test_gradients_travel_once_a_window_and_everything_else_in_one_packet(
    argv_of_eight: list[str], eight: Ranks, arithmetic: Emulation
) -> None:
    run, sent = windows_of(argv_of_eight, eight, arithmetic)
    gradients = 4 * sum(parameter.numel() for parameter in run.state.model.parameters() if parameter.requires_grad)
    assert {name for name, _ in sent[-1]} == {"c10d::allreduce_"}
    *buckets, (_, packet) = sent[-1]
    assert sum(size for _, size in buckets) == gradients
    assert len(buckets) == 2  # of up to 25 MiB, the first smaller
    statistics = sum(b.numel() for name, b in run.state.model.named_buffers() if "running" in name)
    assert packet == 4 * (4 + len(run.signals.received()) + statistics)  # loss, norm, overflow, weight


@pytest.mark.parametrize("stage1_epochs", ["0", "1"])
def test_trial_needs_the_memory_of_windows_with_ddps_buckets(
    stage1_epochs: str, argv_of_eight: list[str], eight: Ranks, arithmetic: Emulation
) -> None:
    """A batch that only just fits must not run out of memory in a window, where the other ranks wait for it."""
    peaks: list[int] = []
    replicate = eight.replicate

    def after_the_trial(*args: Any) -> Any:
        peaks.append(torch.cuda.max_memory_allocated())
        return replicate(*args)

    eight.replicate = after_the_trial  # type: ignore[method-assign]
    run = prepare(cli.parse([*argv_of_eight, "--stage1-epochs", stage1_epochs]).given, eight)
    gc.collect()  # else memory of earlier runs is freed amid this one
    torch.cuda.reset_peak_memory_stats()
    begin_stage(run, run.stages[0])
    torch.cuda.reset_peak_memory_stats()
    sent_in_first_epoch(run, arithmetic)
    peaks.append(torch.cuda.max_memory_allocated())
    gradients = 4 * sum(parameter.numel() for parameter in run.state.model.parameters() if parameter.requires_grad)
    margin = 2**20  # of batches, norms, verdicts
    assert -margin < peaks[0] - peaks[1] < 2 * gradients + margin


def test_sharded_window_adds_one_packet_to_what_fsdp_sends(
    argv_of_eight: list[str], eight: Ranks, arithmetic: Emulation
) -> None:
    arithmetic.computes = False  # FSDP's own operations have no counterpart on the CPU
    _, sent = windows_of([*argv_of_eight, "--shard"], eight, arithmetic, recovery=Unchecked)
    counts = Counter(name for name, _ in sent[-1])
    assert counts.keys() == {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allreduce_"}
    assert counts["c10d::allreduce_"] == 1


def launched(*command: str, check: bool = True, devices: int = 2) -> "subprocess.CompletedProcess[str]":
    """Start two processes by torchrun that see this many GPUs each."""
    done = subprocess.run(
        [*LAUNCHER, "--nproc-per-node=2", *command], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        timeout=300, env={**os.environ, "NULLCUDA_DEVICES": str(devices), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def test_parameters_that_no_gradient_reaches_are_left_out(
    argv_of_eight: list[str], eight: Ranks, arithmetic: Emulation
) -> None:
    """DDP would wait for them in the second window: timm's pit has a norm that its features do not pass."""
    argv = [*argv_of_eight, "--backbone", "pit_ti_224", "--precision", "fp32"]
    run, sent = windows_of(argv, eight, arithmetic)
    assert len(sent) > 2
    frozen = [name for name, parameter in run.state.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.body.body.norm.weight", "backbone.body.body.norm.bias"]


def test_process_that_sees_one_gpu_uses_it_as_its_own(tiny_dataset: Path, tmp_path: Path) -> None:
    """Slurm's --gpus-per-task=1: rank 1 is the machine's second process, and its GPU is the first that it sees."""
    if not nullcuda.is_active():
        pytest.skip("only null devices are certain to be there: -m rehearsal")
    flags = "--device", "cuda", "--epochs", "1", "--stage1-epochs", "1"
    arguments = tiny_arguments(tiny_dataset, tmp_path / "run", *flags)
    program = " ".join([sys.executable, "-m", "tests.nullcuda", *arguments])
    launched("--no-python", "bash", "-c", f"CUDA_VISIBLE_DEVICES=$LOCAL_RANK exec {program}", devices=1)
    refused = launched("-m", "tests.nullcuda", "--", *arguments, check=False, devices=1)
    assert "ranks 0 and 1 have the same GPU" in refused.stderr


def test_more_processes_than_gpus_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    if not nullcuda.is_active():
        pytest.skip("only null devices are certain to be there: -m rehearsal")
    third = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "NULLCUDA_DEVICES": "2"}
    arguments = tiny_arguments(tiny_dataset, tmp_path / "run", "--device", "cuda")
    done = subprocess.run(
        [sys.executable, "-m", "tests.nullcuda", "--", *arguments], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[1], env={**os.environ, **third},
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.endswith("has 2 GPUs, and rank 2 is number 3 there; give torchrun --nproc-per-node=gpu")


@pytest.mark.gpu2
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_launched_ranks_train_to_the_losses_of_cpu_ranks(precision: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """Two processes by torchrun, over NCCL. On null devices, gloo sends what NCCL would."""
    if torch.cuda.device_count() < 2 and not nullcuda.is_active():
        pytest.skip("needs two GPUs")
    losses = {}
    for device in ("cuda", "cpu"):
        null = device == "cuda" and nullcuda.is_active()
        program = ("-m", "tests.nullcuda", "--") if null else ("train_ultimate.py",)
        flags = ("--device", device, "--precision", precision, "--epochs", "2", "--stage1-epochs", "1")
        launched(*program, *tiny_arguments(tiny_dataset, tmp_path / device, *flags))
        losses[device] = [event["loss"] for event in read_events(tmp_path / device, "window")]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3 if precision == "fp32" else 3e-2)
