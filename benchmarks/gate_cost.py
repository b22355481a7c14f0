"""What a window costs with gate, detector and recovery's bookkeeping, against the bare loop: alternating, one process.

    python benchmarks/gate_cost.py [--backbone NAME] [--img-size PX] [--batch-size N] [--windows N] [--device cpu|cuda]

Both sides run the same forward and backward pass on the same batch in the same precision (bf16 or fp32), clip, and step
the same fused AdamW; neither averages weights. On CUDA every window is timed to the end of its work, and it is asserted
that nothing in it waits for the device but the snapshot of every 50th.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.loading import training_loader
from train_ultimate import begin_stage
from training.batchnorm import BufferGuard
from training.feed import epoch_windows
from training.gate import PendingOutcome, StepVerdict, gated_step, should_skip
from training.optim import gradient_norm, set_learning_rates
from training.run import Run
from training.setup import prepare
from training.window import Window, accumulate_gradients

GRAD_CLIP, LR = 0.5, 1e-5


def bare(run: Run, window: Window) -> None:
    accumulate_gradients(run.state.model, window)
    parameters = [parameter for parameter in run.state.model.parameters() if parameter.requires_grad]
    clip_grad_norm_(parameters, GRAD_CLIP, foreach=True)
    run.state.optimizer.step()
    run.state.optimizer.zero_grad(set_to_none=True)


def gated(run: Run, guard: BufferGuard) -> Callable[[Run, Window], None]:
    """The window of ``train_epoch``, one verdict late, with ladder, snapshots and log."""
    parameters = [parameter for parameter in run.state.model.parameters() if parameter.requires_grad]
    pending: list[PendingOutcome] = []

    def step(run: Run, window: Window) -> None:
        state = run.state
        guard.begin_window()
        loss = accumulate_gradients(state.model, window)
        if pending:
            outcome = pending.pop().read()
            assert outcome.verdict is StepVerdict.APPLIED
            with waiting_allowed(run.device):  # a snapshot, every 50 windows
                assert run.recovery.answer(window, outcome, guard) is None
            run.log.event("window", **asdict(outcome))
        window.scaler.unscale_(state.optimizer)
        grad_norm = gradient_norm(parameters)
        found_inf, loss_scale = window.scaler.found_inf(state.optimizer, loss), window.scaler.current_scale(loss)
        spike, highest = state.detector.examine(loss, grad_norm, found_inf)
        relative_norm = grad_norm * (GRAD_CLIP / highest.clamp(max=GRAD_CLIP))
        clip_grads_with_norm_(parameters, GRAD_CLIP, relative_norm, foreach=True)
        skip = should_skip(loss, grad_norm, found_inf, spike)
        gated_step(state.optimizer, skip)
        guard.end_window(skip)
        window.scaler.update_after(loss, found_inf)
        state.optimizer.zero_grad(set_to_none=True)
        pending.append(PendingOutcome(loss, grad_norm, found_inf, spike, loss_scale))

    return step


@contextlib.contextmanager
def waiting_allowed(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode("error")


@contextlib.contextmanager
def timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = prepare([
            *("train", "--dataset-path", "synthetic", "--checkpoint-dir", directory, "--no-pretrained"),
            *("--backbone", options.backbone, "--img-size", str(options.img_size), "--device", options.device),
            *("--batch-size", str(options.batch_size), "--accumulation-steps", "1", "--num-workers", "0"),
        ])  # fmt: skip
        stage = run.stages[1]
        run.state.model.train()
        begin_stage(run, stage)
        loader = training_loader(run.train_pairs, options.img_size, options.batch_size, 0, 0, pin_memory=False)
        run.state.progress.epoch = stage.first_epoch
        guard = BufferGuard(run.state.model)
        window = next(epoch_windows(run, stage, loader, len(loader), guard))
        set_learning_rates(run.state.optimizer, LR, 1.0)
        step = gated(run, guard)
        times: dict[str, list[float]] = {"on": [], "off": []}
        for number in range(options.windows + 5):
            for name, function in (("on", step), ("off", bare)) if number % 2 else (("off", bare), ("on", step)):
                if name == "off":  # left set by the gate, the flag would be looked at again
                    run.state.optimizer.found_inf = None  # type: ignore[attr-defined]
                with timed(run.device, times[name]):
                    function(run, window)
        on, off = (sorted(times[name][5:]) for name in ("on", "off"))
        ratio = statistics.median(on) / statistics.median(off)
        print(
            f"{options.backbone}, {options.img_size} px, batch {options.batch_size}, {run.precision.name}, {run.device}"
        )
        for name, values in (("on", on), ("off", off)):
            quartiles = statistics.quantiles(values, n=4)
            print(f"{name:>4}: median {1000 * quartiles[1]:.1f} ms, quartiles {1000 * quartiles[0]:.1f} to "
                  f"{1000 * quartiles[2]:.1f}, {len(values)} windows")  # fmt: skip
        pairs = [a / b for a, b in zip(times["on"][5:], times["off"][5:], strict=True)]
        print(f"ratio of medians {ratio:.4f}; median of the ratios of neighbours {statistics.median(pairs):.4f}")


if __name__ == "__main__":
    main()
