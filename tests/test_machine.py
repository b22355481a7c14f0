"""What a run computes on: device and precision, the same on all ranks, and fp16 loss scaling."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runtime.machine import (
    LossScaler,
    Machine,
    Precision,
    PrecisionName,
    ScalerSettings,
    gain_of_bf16,
    memory_errors,
    resolve_device,
    resolve_precision,
)
from runtime.ranks import Ranks


class FakeRanks(Ranks):
    """Two ranks, of which the other one answers every gathering with a changed copy of this one's value."""

    def __init__(self, others: Callable[[Any], Any]) -> None:
        super().__init__(rank=0, size=2)
        self._others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, self._others(value)]


def overflow(scaler: LossScaler, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Run a window whose gradient overflows, as the training loop does."""
    optimizer.zero_grad()
    scaler.scale((parameter * float("inf")).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.update()


@pytest.fixture
def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


def test_scale_never_falls_below_one(parameter: torch.nn.Parameter) -> None:
    """200 overflows in a row: they take the stock scaler to 2^-184, where NaN gets past its check."""
    optimizer = torch.optim.AdamW([parameter], fused=True)
    scaler = LossScaler("cpu", ScalerSettings(init_scale=2.0**16), enabled=True)
    for _ in range(200):
        overflow(scaler, parameter, optimizer)
        assert scaler.get_scale() >= 1
    assert scaler.get_scale() == 1


def test_overflow_flag_is_readable_after_unscale(parameter: torch.nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([parameter], fused=True)
    scaler = LossScaler("cpu", ScalerSettings(), enabled=True)
    like = torch.zeros(())
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    assert scaler.found_inf(optimizer, like) == 0
    scaler.update()
    optimizer.zero_grad()
    scaler.scale((parameter * float("inf")).sum()).backward()
    scaler.unscale_(optimizer)
    assert scaler.found_inf(optimizer, like) == 1


def test_disabled_scaler_reports_no_overflow_and_scale_one(parameter: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu", ScalerSettings(), enabled=False)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    assert scaler.found_inf(optimizer, torch.zeros(())) == 0
    assert scaler.current_scale(torch.zeros(())) == 1
    scaler.update()


def test_resumed_scaler_has_the_saved_scale_and_its_own_settings(parameter: torch.nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([parameter], fused=True)
    before = LossScaler("cpu", ScalerSettings(init_scale=2.0**16, growth_interval=7), enabled=True)
    overflow(before, parameter, optimizer)
    after = LossScaler("cpu", ScalerSettings(2.0**10, 1.5, 0.25, 1000), enabled=True)
    after.resume(before.state_dict())
    state = after.state_dict()
    assert state["scale"] == 2.0**15
    assert (state["growth_factor"], state["backoff_factor"], state["growth_interval"]) == (1.5, 0.25, 1000)


@pytest.mark.parametrize(("name", "expected"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")])
def test_products_of_float32_are_rounded_only_if_asked_for(name: PrecisionName, expected: str) -> None:
    kinds: tuple[Any, ...] = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    with Precision(name, "cuda").products():
        assert [kind.fp32_precision for kind in kinds] == [expected, expected]
    assert [kind.fp32_precision for kind in kinds] == before


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="--precision tf32: only GPUs have it"):
        resolve_precision("tf32", torch.device("cpu"))
    assert resolve_precision("tf32", torch.device("cuda")).full().name == "fp32"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_every_kind_of_no_memory_is_one_error(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_errors():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal") as raised, memory_errors():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError), memory_errors():
        torch.empty(2**45)  # the CPU's allocator


def test_scaler_resumes_from_a_run_without_scaling_and_into_one() -> None:
    enabled = LossScaler("cpu", ScalerSettings(init_scale=64.0), enabled=True)
    disabled = LossScaler("cpu", ScalerSettings(), enabled=False)
    enabled.resume(disabled.state_dict())
    assert enabled.get_scale() == 64
    disabled.resume(enabled.state_dict())
    assert not disabled.is_enabled()


def test_auto_precision_is_bf16_only_if_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_precision("auto", torch.device("cpu")).name == expected


@pytest.mark.parametrize("slow", ["fp32", "bf16"])
def test_gain_of_bf16_is_what_a_step_takes_in_each_without_the_first_time(slow: str) -> None:
    runs: Counter[str] = Counter()

    def step(precision: Precision) -> None:
        runs[precision.name] += 1
        first = runs[precision.name] == 1
        time.sleep(0.3 if first else 0.08 if precision.name == slow else 0.02)  # long enough for a busy machine

    gain = gain_of_bf16(step, seconds=0.8)
    assert gain > 2 if slow == "fp32" else gain < 0.5


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_the_chosen_format(name: str, dtype: torch.dtype) -> None:
    with resolve_precision(name, torch.device("cpu")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_without_a_device() -> None:
    with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_ranks_of_one_precision_use_it() -> None:
    machine = Machine.of("cpu", "bf16", False, False, FakeRanks(lambda value: value))
    assert machine.precision == Precision("bf16", "cpu")


def test_ranks_that_resolve_auto_differently_use_what_all_can_compute_in() -> None:
    machine = Machine.of("cpu", "bf16", False, False, FakeRanks(lambda value: ("fp32", value[1])))
    assert machine.precision == Precision("fp32", "cpu")


def test_different_versions_of_torch_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Machine.of("cpu", "fp32", False, False, FakeRanks(lambda value: (value[0], "0.1")))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"rank 0: {torch.__version__}, rank 1: 0.1" in record.getMessage()


@pytest.mark.parametrize(("num_ranks", "shards"), [(1, False), (2, True)])
def test_only_several_ranks_shard(num_ranks: int, shards: bool) -> None:
    ranks = Ranks() if num_ranks == 1 else FakeRanks(lambda value: value)
    assert Machine.of("cpu", "fp32", False, True, ranks).ranks.shards is shards


def test_network_is_placed_in_the_memory_layout_of_the_run() -> None:
    for channels_last in (False, True):
        machine = Machine.of("cpu", "fp32", channels_last, False, Ranks())
        weight = machine.place(nn.Conv2d(4, 8, 3)).weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.mark.parametrize(("loss", "scale"), [(1.0, 512.0), (float("nan"), 1024.0), (float("inf"), 1024.0)])
def test_overflow_halves_the_scale_unless_the_loss_is_not_finite(loss: float, scale: float) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = Precision("fp16", "cpu").new_scaler(ScalerSettings(init_scale=1024.0))
    scaler.scale(weight.sum()).backward()
    weight.grad = torch.full((3,), float("inf"))
    scaler.unscale_(optimizer)
    scaler.update_after(torch.tensor(loss), torch.tensor(1.0))
    assert scaler.get_scale() == scale
    scaler.scale(weight.sum())  # the next window begins as usual
    scaler.unscale_(optimizer)
    scaler.update_after(torch.tensor(1.0), torch.tensor(1.0))


def test_overflow_on_another_rank_halves_the_scale_here_too() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    scaler = Precision("fp16", "cpu").new_scaler(ScalerSettings(init_scale=1024.0))
    for agreed, scale in ((0.0, 1024.0), (1.0, 512.0)):
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        loss = torch.tensor(1.0)
        assert scaler.found_inf(optimizer, loss) == 0
        scaler.update_after(loss, torch.tensor(agreed))
        assert scaler.get_scale() == scale
