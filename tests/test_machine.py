import pytest
import torch

from runtime.machine import LossScaler, Precision, ScalerSettings, resolve_device, resolve_precision


def overflow(scaler: LossScaler, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """One window whose gradient overflows, as the loop runs it."""
    optimizer.zero_grad()
    scaler.scale((parameter * float("inf")).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.update()


@pytest.fixture
def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3))


def test_scale_never_falls_below_one(parameter: torch.nn.Parameter) -> None:
    """200 overflows in a row: the stock scaler is at 2^-184 then, where NaN gets past its check."""
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


def test_resume_takes_the_scale_and_keeps_the_stages_settings(parameter: torch.nn.Parameter) -> None:
    optimizer = torch.optim.AdamW([parameter], fused=True)
    before = LossScaler("cpu", ScalerSettings(init_scale=2.0**16, growth_interval=7), enabled=True)
    overflow(before, parameter, optimizer)
    after = LossScaler("cpu", ScalerSettings(2.0**10, 1.5, 0.25, 1000), enabled=True)
    after.resume(before.state_dict())
    state = after.state_dict()
    assert state["scale"] == 2.0**15
    assert (state["growth_factor"], state["backoff_factor"], state["growth_interval"]) == (1.5, 0.25, 1000)


def test_resume_from_a_run_without_scaling_and_into_one() -> None:
    enabled = LossScaler("cpu", ScalerSettings(init_scale=64.0), enabled=True)
    disabled = LossScaler("cpu", ScalerSettings(), enabled=False)
    enabled.resume(disabled.state_dict())
    assert enabled.get_scale() == 64
    disabled.resume(enabled.state_dict())
    assert not disabled.is_enabled()


def test_auto_precision_is_bf16_only_where_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_precision("auto", torch.device("cpu")).name == expected


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_the_chosen_format(name: str, dtype: torch.dtype) -> None:
    with resolve_precision(name, torch.device("cpu")).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(("loss", "scale"), [(1.0, 512.0), (float("nan"), 1024.0), (float("inf"), 1024.0)])
def test_overflow_halves_the_scale_and_a_loss_that_is_not_finite_leaves_it_alone(loss: float, scale: float) -> None:
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


def test_an_overflow_that_only_another_rank_has_seen_halves_the_scale_here_too() -> None:
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
