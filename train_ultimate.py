"""Train camouflaged-object segmentation models, and do not lose the run.

    python train_ultimate.py demo                                   about two minutes on two CPU cores, no download
    python train_ultimate.py train --dataset-path data/COD10K-v3    the real thing
    python train_ultimate.py train --resume auto                    after a crash, a kill, a pre-emption

Read it from main() upwards: main -> prepare -> train -> run_stage -> train_epoch. Stage 1 trains the decoder on a
frozen backbone, stage 2 everything; both are rows of build_stages() and go through the same code. A window is one
optimizer step's worth of batches.
"""

import argparse
import math
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

import cli
import metrics
from data.dataset import Batch, require_image_headers
from data.layouts import Pair, describe, find_subsets, fingerprint, split_as_before, split_validation, training_pairs
from data.loading import UnreadableDataError, decoded, to_device, training_loader, validation_loader, windows
from data.synthetic import write_synthetic_dataset
from losses import deep_supervision_loss
from models import CamouflageSegmenter, build_model
from training.checkpoint import CheckpointError, CheckpointStore, find_checkpoint
from training.interrupt import StopRequest
from training.optim import Ema, build_optimizer, gradient_norm, set_learning_rates
from training.precision import Precision, resolve_device, resolve_precision, use_deterministic_algorithms
from training.runlog import RunLog, environment, write_json
from training.stability import (
    BufferGuard,
    PendingWindow,
    SpikeDetector,
    StepVerdict,
    WindowOutcome,
    gated_step,
    should_skip,
)
from training.stages import CONSERVATIVE_SCALER, Stage, cosine_ramp, learning_rate
from training.state import EpochStats, TrainState, resume

SYNTHETIC_TRAIN_IMAGES, SYNTHETIC_TEST_IMAGES = 640, 64


class StoppedError(Exception):
    """The run ends before its last epoch, with its state saved: an exit code and a message for the user."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Run:
    """One training run. ``state`` changes; the rest is settled when the run is prepared."""

    args: argparse.Namespace
    config: dict[str, Any]  # the settings and the data's fingerprint, as saved
    device: torch.device
    precision: Precision
    memory_format: torch.memory_format
    stages: list[Stage]
    train_pairs: list[Pair]
    val_pairs: list[Pair]
    state: TrainState
    store: CheckpointStore
    log: RunLog
    stop: StopRequest

    def snapshot(self) -> dict[str, Any]:
        return {"config": self.config, **self.state.state_dict()}


def train_epoch(run: Run, stage: Stage, loader: DataLoader[Batch]) -> None:
    """Train what is left of the epoch under way, or up to a stop request; sums go to ``state.epoch_stats``.

    The host waits for the device once a window, for numbers one window old: see ``PendingWindow``.

    Raises:
        StoppedError: a loss or gradient norm is not finite and loss scaling does not explain it.
        UnreadableDataError: an image or mask cannot be decoded.
    """
    state, progress, stats = run.state, run.state.progress, run.state.epoch_stats
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    windows_per_epoch = math.ceil(len(loader) / stage.accumulation_steps)
    first_window_of_epoch = (progress.epoch - stage.first_epoch) * windows_per_epoch
    state.model.train()
    guard = BufferGuard(state.model)
    pending: PendingWindow | None = None
    start = time.perf_counter()
    bar = tqdm(desc=f"Epoch {progress.epoch + 1}/{run.args.epochs}", total=windows_per_epoch, initial=progress.window,
               unit="window", disable=None)  # fmt: skip
    for batches in windows(loader, stage.accumulation_steps, progress.epoch, progress.window):
        lr = learning_rate(stage, first_window_of_epoch + progress.window, stage.num_epochs * windows_per_epoch)
        set_learning_rates(state.optimizer, lr, stage.backbone_lr_scale)
        uncertainty_weight = cosine_ramp((progress.epoch + progress.window / windows_per_epoch) / run.args.epochs)
        samples = [index for batch in batches for index in batch.indices.tolist()]
        guard.begin_window()
        loss = torch.zeros((), device=run.device)
        for batch in batches:
            images, masks = to_device(batch, run.device, run.memory_format)
            with run.precision.autocast():
                side_logits = state.model(images)
            # Divided by the samples this window really has: the short last one, too, equals one large batch.
            batch_loss = deep_supervision_loss(side_logits, masks, uncertainty_weight) * (len(images) / len(samples))
            state.scaler.scale(batch_loss).backward()
            loss += batch_loss.detach()

        if pending is not None:  # before the step: the average takes in the weights as that window left them
            settle_window(run, stage, pending, guard, bar)

        state.scaler.unscale_(state.optimizer)
        grad_norm = gradient_norm(parameters)
        found_inf, loss_scale = state.scaler.found_inf(state.optimizer, loss), state.scaler.current_scale(loss)
        spike, highest = state.detector.examine(loss, grad_norm, found_inf)
        # Clips to the lower of --grad-clip and the detector's height, which is on the device: a float would be a sync.
        relative_norm = grad_norm * (run.args.grad_clip / highest.clamp(max=run.args.grad_clip))
        clip_grads_with_norm_(parameters, run.args.grad_clip, relative_norm, foreach=True)
        skip = should_skip(loss, grad_norm, found_inf, spike)
        gated_step(state.optimizer, skip)
        guard.end_window(skip)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)

        progress.window += 1
        progress.global_window += 1
        progress.samples_seen += len(samples)
        stats.num_samples += len(samples)
        pending = PendingWindow(loss, grad_norm, found_inf, spike, loss_scale, progress.window, lr, samples)
        bar.update()
        if run.stop.signal_number is not None:
            break
    if pending is not None:
        guard.begin_window()
        settle_window(run, stage, pending, guard, bar)
    bar.close()
    stats.seconds += time.perf_counter() - start


def settle_window(run: Run, stage: Stage, pending: PendingWindow, guard: BufferGuard, bar: "tqdm[NoReturn]") -> None:
    """Act on a window's verdict: update the weight average, count and log; stop on what must not be trained through."""
    state, stats, outcome = run.state, run.state.epoch_stats, pending.read()
    stats.add(outcome, large_norm=5 * run.args.grad_clip)
    stats.lr = pending.lr
    if outcome.verdict is StepVerdict.APPLIED and state.ema is not None:
        state.ema.update(state.model, guard.at_start)
    shown = {"loss": f"{outcome.loss:.2f}", "grad": f"{outcome.grad_norm:.3f}"}
    bar.set_postfix(shown | ({"overflows": stats.num_overflows} if stats.num_overflows else {}), refresh=False)
    where = {"stage": stage.number, "epoch": state.progress.epoch + 1, "window": pending.number}
    run.log.event("window", **where, lr=pending.lr, **asdict(outcome))
    if outcome.verdict is StepVerdict.SPIKE:
        bar.write(f"Window {pending.number} skipped: gradient norm {outcome.grad_norm:.4g} is far above its history")
    if outcome.verdict in (StepVerdict.NONFINITE_LOSS, StepVerdict.NONFINITE_GRAD):
        bar.close()
        stop_on_nonfinite(run, pending, outcome, where)


def stop_on_nonfinite(run: Run, pending: PendingWindow, outcome: WindowOutcome, where: dict[str, int]) -> NoReturn:
    """Save the state, which the window did not touch, and end the run with everything a user needs to go on."""
    images = [str(run.train_pairs[index].image) for index in pending.sample_indices]
    try:
        last_good = run.store.save_step(run.state.progress.global_window, run.snapshot())
    except CheckpointError as error:  # the weights themselves are not finite, so an older file has to do
        print(f"Not saved: {error}", file=sys.stderr)
        last_good = max(run.store.files(), key=lambda path: path.stat().st_mtime, default=None)
    run.log.event("incident", **where, **asdict(outcome), samples=images, action=f"stopped; last good: {last_good}")
    raise StoppedError(
        3,
        f"{outcome.verdict.replace('_', ' ')} that loss scaling does not explain, in stage {where['stage']}, epoch "
        f"{where['epoch']}/{run.args.epochs}, window {where['window']}: loss {outcome.loss:.4g}, gradient norm "
        f"{outcome.grad_norm:.4g}, loss scale {outcome.loss_scale:g}. Its update was not applied; its batches: "
        f"{', '.join(images[:4])}{f' and {len(images) - 4} more' if len(images) > 4 else ''}\n"
        f"Last good checkpoint: {last_good or 'none yet'}. Go on from there with: {resume_command(run)}",
    )


def stop_if_asked(run: Run) -> None:
    """End the run after a signal, saved where it stands; an epoch trained to its end is only validated on resume."""
    number = run.stop.signal_number
    if number is None:
        return
    saved = run.store.save_step(run.state.progress.global_window, run.snapshot())
    run.log.event("checkpoint", file=saved.name, reason=f"signal {number}")
    raise StoppedError(128 + number, f"stopped by a signal; saved {saved}. Go on with: {resume_command(run)}")


@torch.inference_mode()
def validate(run: Run, loader: DataLoader[Batch]) -> dict[str, float]:
    """Means over images, at the training size: IoU and Dice at 0.5, MAE and S-measure, of the averaged weights."""
    model = run.state.model_for_use.train().eval()  # train() first: some timm models cache weights when eval() begins
    scores: dict[str, list[Tensor]] = {"iou": [], "dice": [], "mae": [], "s_measure": []}
    for batch in decoded(loader):
        stop_if_asked(run)
        images, masks = to_device(batch, run.device, run.memory_format)
        with run.precision.autocast():
            logits = model(images)[-1]
        probabilities = logits.float().sigmoid()
        for name, values in scores.items():
            values.append(getattr(metrics, name)(probabilities, masks).cpu())  # a host sync, once a batch
    return {name: torch.cat(values).mean(dtype=torch.float64).item() for name, values in scores.items()}


def run_stage(run: Run, stage: Stage) -> None:
    """Train, validate and save every epoch of the stage that is still to come.

    Raises:
        StoppedError: by a signal, or by ``train_epoch``.
    """
    state, progress = run.state, run.state.progress
    assert isinstance(state.model, CamouflageSegmenter)
    state.model.set_backbone_frozen(stage.freeze_backbone)
    if progress.stage != stage.number:  # not resumed in its midst
        progress.stage = stage.number
        state.scaler = run.precision.new_scaler(stage.scaler)
        state.detector.reset(run.device)
    num_workers = cli.default_num_workers() if run.args.num_workers is None else run.args.num_workers
    workers = {"num_workers": num_workers, "pin_memory": run.device.type == "cuda"}
    train_loader = training_loader(run.train_pairs, run.args.img_size, stage.batch_size, run.args.seed, **workers)
    val_loader = validation_loader(run.val_pairs, run.args.img_size, stage.batch_size, **workers)
    backbone = "frozen" if stage.freeze_backbone else f"lr {stage.lr * stage.backbone_lr_scale:g}"
    epochs = f"epochs {stage.first_epoch + 1} to {stage.end_epoch}"
    print(f"Stage {stage.number}: {epochs}, lr {stage.lr:g}, backbone {backbone}")
    while progress.epoch < stage.end_epoch:
        stop_if_asked(run)
        train_epoch(run, stage, train_loader)
        stop_if_asked(run)
        finish_epoch(run, stage, validate(run, val_loader))


def finish_epoch(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """Report the epoch, move on to the next, write the checkpoints."""
    state, progress = run.state, run.state.progress
    report_epoch(run, stage, scores)
    progress.epoch += 1
    progress.window = 0
    state.epoch_stats = EpochStats()
    if scores["iou"] > progress.best_iou:  # False for NaN
        progress.best_iou, progress.best_epoch = scores["iou"], progress.epoch
        # Ahead of the epoch's own file: a kill between the two resumes from this one, which holds the same state.
        run.log.event("checkpoint", file=run.store.save_best(run.snapshot()).name, reason="best IoU")
    run.log.event("checkpoint", file=run.store.save_epoch(progress.epoch, run.snapshot()).name, reason="epoch")


def report_epoch(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """The epoch's lines on the terminal and its event in metrics.jsonl."""
    stats, epoch = run.state.epoch_stats, run.state.progress.epoch + 1
    backbone_lr = 0.0 if stage.freeze_backbone else stats.lr * stage.backbone_lr_scale
    run.log.event(
        "epoch",
        **{"stage": stage.number, "epoch": epoch, "loss": stats.loss, **scores},
        **{"grad_norm_avg": stats.grad_norm_avg, "grad_norm_max": stats.grad_norm_max},
        **{"lr": stats.lr, "backbone_lr": backbone_lr},  # of the last window
        **{"skipped": stats.num_skipped, "overflows": stats.num_overflows},
        **{"seconds": stats.seconds, "images_per_second": stats.images_per_second},
    )
    if not sys.stderr.isatty():  # no progress bar above these lines to tell the epoch
        print(f"Epoch {epoch}/{run.args.epochs}")
    print(f"Loss: {stats.loss:.4f} | IoU: {scores['iou']:.4f} | Dice: {scores['dice']:.4f}")
    print(f"   Gradient norm - Avg: {stats.grad_norm_avg:.3f}, Max: {stats.grad_norm_max:.3f}")
    if stats.num_overflows:
        print(
            f"   fp16 overflows: {stats.num_overflows} windows skipped; loss scale now {run.state.scaler.get_scale():g}"
        )
    if stats.num_large_norms:
        share, limit = f"{stats.num_large_norms} of {stats.num_applied} windows", 5 * run.args.grad_clip
        print(f"   Warning: {share} had a gradient norm above 5 x --grad-clip = {limit:g}; they were clipped")


def resume_command(run: Run) -> str:
    return shlex.join(["python", sys.argv[0], "train", "--resume", "auto", "--checkpoint-dir", run.args.checkpoint_dir])


def train(run: Run) -> None:
    """Run the stages that are left."""
    if run.state.progress.epoch >= run.args.epochs:
        print(f"All {run.args.epochs} epochs are done already; a larger --epochs goes on from here")
    for stage in run.stages:
        if run.state.progress.epoch < stage.end_epoch:
            run_stage(run, stage)


def build_stages(args: argparse.Namespace) -> list[Stage]:
    """Stage 1 trains the decoder, stage 2 everything; a stage without epochs is left out."""
    batch, split = (args.batch_size, args.accumulation_steps), args.stage1_epochs
    lr2, scale = args.lr * args.stage2_lr_scale, args.backbone_lr_scale
    stages = [
        Stage(1, 0, split, *batch, args.lr, scale, freeze_backbone=True),
        Stage(2, split, args.epochs - split, *batch, lr2, scale, freeze_backbone=False, scaler=CONSERVATIVE_SCALER),
    ]
    return [stage for stage in stages if stage.num_epochs > 0]


def build_network(args: argparse.Namespace, load_weights: bool) -> CamouflageSegmenter:
    """The network from the settings. Without ``load_weights`` its weights are random: a checkpoint brings its own."""
    torch.manual_seed(args.seed)
    return build_model(
        args.backbone,
        args.decoder_channels,
        args.img_size,
        pretrained=load_weights and args.pretrained,
        backbone_weights=Path(args.backbone_weights) if load_weights and args.backbone_weights else None,
        freeze_norm_statistics=args.pretrained or args.backbone_weights is not None,
    )


def build_pairs(args: argparse.Namespace, validation: list[str] | None) -> tuple[list[Pair], list[Pair], Path]:
    """Training pairs, the validation pairs carved out of them, and the data set's folder. Test folders are not touched.

    Args:
        args: the settings.
        validation: paths below the folder of the images that the run being resumed is validated on.
    """
    root = Path(args.dataset_path)
    if args.dataset_path == "synthetic":
        root = Path(args.checkpoint_dir) / "synthetic"
        print(f"Synthetic scenes: {SYNTHETIC_TRAIN_IMAGES} to train on, {SYNTHETIC_TEST_IMAGES} to test on, in {root}")
        write_synthetic_dataset(root, SYNTHETIC_TRAIN_IMAGES, SYNTHETIC_TEST_IMAGES, args.img_size, args.seed)
    subsets = find_subsets(root, args.include_noncam)
    pairs = training_pairs(subsets, root)
    require_image_headers(pairs)
    if validation is None:
        train_pairs, val_pairs = split_validation(pairs, args.val_fraction, args.seed)
    else:
        train_pairs, val_pairs = split_as_before(pairs, root, validation)
    print(f"Data: {root}, {len(train_pairs)} pairs to train on, {len(val_pairs)} to validate on")
    for line in describe(subsets, len(pairs)):
        print(f"   {line}")
    return train_pairs, val_pairs, root


def prepare(argv: Sequence[str] | None) -> Run:
    """From the command line to a run that is ready to train, new or resumed.

    A setting comes from the first of: the command line; the checkpoint being resumed; the defaults.

    Raises:
        ValueError, OSError: a mistake in the flags, the data or the checkpoint.
    """
    args = cli.parse(argv)
    directory = Path(args.checkpoint_dir)
    source, checkpoint = find_checkpoint(args.resume, directory)
    before = checkpoint["config"] if checkpoint is not None else None
    if before is not None:
        args = cli.parse(argv, saved=before["settings"])
    cli.check(args)
    store = CheckpointStore(directory, args.keep_checkpoints)
    if store.files() and (source is None or source.parent.resolve() != directory.resolve()):
        raise ValueError(
            f"{directory} holds a run already: go on with --resume auto, or choose another --checkpoint-dir"
        )
    if args.deterministic:
        use_deterministic_algorithms()
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    no_cuda = "" if torch.cuda.is_available() else " (no CUDA device found)"
    print(f"Device: {device}{no_cuda}, precision {precision.name}, backbone {args.backbone}")
    train_pairs, val_pairs, root = build_pairs(args, before["validation"] if before is not None else None)
    stages = build_stages(args)
    model = build_network(args, load_weights=checkpoint is None).to(device)
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch types no such overload
    optimizer = build_optimizer(model.decoder, model.backbone, args.weight_decay)
    ema = Ema(model, args.ema_decay) if args.ema_decay > 0 else None
    detector = SpikeDetector(args.spike_policy, device)
    state = TrainState(model, optimizer, precision.new_scaler(stages[0].scaler), detector, ema)
    config = {
        "settings": vars(args),
        "precision": precision.name,
        "data": fingerprint([*train_pairs, *val_pairs], root),
        "validation": [pair.image.relative_to(root).as_posix() for pair in val_pairs],
    }
    if checkpoint is not None:
        resume(state, checkpoint, config, stages, precision)
        print(f"Resumed {source}: {state.progress.epoch} epochs and {state.progress.window} windows done")
        for path in store.set_aside_after(state.progress.global_window):
            print(f"Set aside as {path}: further on than the checkpoint being resumed")
        if not store.best_path.exists():  # of another folder, or set aside: the best of what follows is the best
            state.progress.best_iou = -1.0
    directory.mkdir(parents=True, exist_ok=True)
    log = RunLog(directory)
    packages = environment(Path(__file__), ("torch", "torchvision", "timm", "numpy", "pillow"))
    facts = {"command": shlex.join(sys.argv), "device": str(device), **config, **packages}
    write_json(directory / "config.json", facts)
    log.event("run_start" if checkpoint is None else "resume", **facts, progress=asdict(state.progress))
    return Run(
        args, config, device, precision, memory_format, stages, train_pairs, val_pairs, state, store, log, StopRequest()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done; 1 a bug; 2 bad usage or input; 3 diverged; 130 / 143 stopped by a signal."""
    try:
        run = prepare(argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before training began", file=sys.stderr)
        return 130
    exit_code, message = 0, ""
    try:
        with run.stop:
            train(run)
    except StoppedError as stopped:
        exit_code, message = stopped.exit_code, str(stopped)
    except UnreadableDataError as error:
        exit_code, message = 2, f"{error} with: {resume_command(run)}"
    except KeyboardInterrupt:
        exit_code, message = 130, f"stopped at once. Go on from the newest checkpoint with: {resume_command(run)}"
    except Exception:
        traceback.print_exc()
        exit_code, message = 1, f"unexpected, see above. Go on from the newest checkpoint with: {resume_command(run)}"
    progress = run.state.progress
    run.log.event("run_end", exit_code=exit_code, best_iou=progress.best_iou, best_epoch=progress.best_epoch)
    run.log.close()
    if exit_code:
        print(f"error: {message}", file=sys.stderr)
    else:
        directory = run.store.directory
        print(f"Done: validation IoU {progress.best_iou:.4f}, reached at epoch {progress.best_epoch}")
        print(f"Weights: {directory / 'best_model.pth'}, curves: {directory / 'metrics.jsonl'}")
    return exit_code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a redirected log is to be read as it grows
    sys.exit(main())
