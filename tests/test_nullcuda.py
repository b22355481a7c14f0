"""The null CUDA runtime: it computes what a CPU computes, and notices what rehearsals are there to find."""

import nullcuda
import pytest
import torch
from nullcuda.emulate import Emulation
from torch import Tensor, nn

pytestmark = [
    pytest.mark.rehearsal,
    pytest.mark.skipif(not nullcuda.is_active(), reason=nullcuda.why_not() or "runs with -m rehearsal"),
]


def five_steps(device: str) -> tuple[float, Tensor]:
    """Train a small network, then predict in bf16. Return the last loss and the predictions' mean."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 1, 3), nn.GroupNorm(1, 1)]
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    images = torch.randn(2, 3, 16, 16).to(device)
    loss = torch.zeros(())
    for _ in range(5):
        loss = (model(images) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
        return loss.item(), model(images).float().cpu()


def test_training_and_inference_give_the_results_of_a_cpu(arithmetic: Emulation) -> None:
    loss, predictions = five_steps("cuda")
    expected_loss, expected = five_steps("cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (predictions - expected).abs().max() < 0.05  # of a standard deviation of 1; bf16 has 8 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_has_the_gradients_of_a_cpu(arithmetic: Emulation, dtype: torch.dtype) -> None:
    """Half precision takes the flash kernel on this capability, float32 the memory-efficient one."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 4, 8, 16, generator=generator).to(dtype) for _ in range(3)]
    outputs = {}
    for device in ("cuda", "cpu"):
        query, key, value = (tensor.to(device).requires_grad_() for tensor in inputs)
        result = nn.functional.scaled_dot_product_attention(query, key, value)
        result.float().square().sum().backward()
        outputs[device] = [result, query.grad, key.grad, value.grad]
    tolerance = 0.01 if dtype == torch.float16 else 1e-5
    for found, expected in zip(outputs["cuda"], outputs["cpu"], strict=True):
        assert found is not None
        assert torch.allclose(found.detach().cpu().float(), expected.detach().float(), rtol=tolerance, atol=tolerance)


def test_operation_that_the_cpu_does_not_have_is_no_silent_zero(arithmetic: Emulation) -> None:
    with pytest.raises(NotImplementedError):
        torch.ops.aten._cudnn_init_dropout_state(0.1, True, 1, dtype=torch.uint8, device="cuda")


def test_memory_has_a_limit() -> None:
    runtime, limit = nullcuda.Runtime(), torch.cuda.get_device_properties(0).total_memory
    runtime.set_memory(10**9)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 * 10**9, dtype=torch.uint8, device="cuda")
    finally:
        runtime.set_memory(limit)


def test_tensors_on_two_devices_are_a_mistake(arithmetic: Emulation) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.add(torch.ones(3, device="cuda"), torch.ones(3))


def test_host_sync_is_an_error_if_asked_for(arithmetic: Emulation) -> None:
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copy_from_pageable_memory_is_noted(arithmetic: Emulation) -> None:
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert arithmetic.pageable["to device"] == []
    torch.ones(3).to("cuda", non_blocking=True)
    assert arithmetic.pageable["to device"] == [12]


def test_early_read_and_overwritten_source_of_a_copy_are_noticed(arithmetic: Emulation) -> None:
    runtime, before = nullcuda.Runtime(), nullcuda.Runtime().races
    value = torch.ones(3, device="cuda")
    runtime.set_lazy(True)
    try:
        on_host = torch.empty(3, pin_memory=True).copy_(value, non_blocking=True)
        assert on_host.isnan().all()
        torch.cuda.synchronize()
        assert on_host.tolist() == [1, 1, 1]

        source = torch.ones(3).pin_memory()
        source.to("cuda", non_blocking=True)
        source.zero_()
        assert runtime.races == before + 1
    finally:
        runtime.set_lazy(False)
