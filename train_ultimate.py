"""Train camouflaged-object segmentation models, and do not lose the run.

    python train_ultimate.py demo                                   about two minutes on two CPU cores, no download
    python train_ultimate.py train --dataset-path data/COD10K-v3    the real thing
    python train_ultimate.py train --resume auto                    after a crash, a kill, a pre-emption

Read it from main() upwards: main -> prepare -> train -> run_stage -> train_epoch. Stage 1 trains the decoder on a
frozen backbone, stage 2 everything; both are rows of build_stages() and go through the same code. A window is one
optimizer step's worth of batches.
"""

import math
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import commands
from data.processes import default_num_workers
from training.feed import epoch_windows, settle_window, take_in

if __name__ == "__main__":  # help, mistakes and the commands that do without torch answer before it is imported
    if (answered := commands.run()) is not None:
        sys.exit(answered)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not so in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main(): a traceback from amid imports would help nobody

import torch
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.dataset import Batch
from data.loading import sampler_of, to_device, training_loader, validation_loader
from data.unreadable import UnreadableDataError
from evaluation.metrics import quick_scores
from models.network import CamouflageSegmenter
from reporting.listeners import epoch_lines
from runtime.folder import unlock_directory
from runtime.sharding import whole_weights
from training.batchnorm import BufferGuard
from training.feed import WindowFeed
from training.gate import PendingOutcome, gated_step, should_skip
from training.ladder import LossHistory
from training.optim import fresh_moments, gradient_norm, set_learning_rates
from training.recovery import RecoverySpentError
from training.run import Run
from training.setup import prepare
from training.stages import Stage
from training.state import EpochStats
from training.window import Window


class StoppedError(Exception):
    """The run ends before its last epoch, with its state saved: an exit code and a message for the user."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train_epoch(run: Run, stage: Stage, loader: DataLoader[Batch]) -> None:
    """Train what is left of the epoch under way, or up to a stop request; sums go to ``state.epoch_stats``.

    The host waits for the device once a window, for numbers one window old: see ``PendingOutcome``. Where they show
    that a window was not applied, recovery may want it to be run again: then the gradient under way is dropped, and
    both windows come anew, in their order.

    Raises:
        RecoverySpentError: training does not get on, whatever recovery has tried.
        UnreadableDataError: too many images or masks cannot be decoded.
    """
    state, progress, stats = run.state, run.state.progress, run.state.epoch_stats
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    num_windows = sampler_of(loader).num_windows
    state.model.train()
    guard = BufferGuard(state.model)
    feed = WindowFeed(epoch_windows(run, stage, loader, num_windows, guard), run.drills)
    pending: tuple[Window, PendingOutcome] | None = None
    start = time.perf_counter()
    bar = tqdm(desc=f"Epoch {progress.epoch + 1}/{run.args.epochs}", total=num_windows, initial=progress.window,
               unit="window", disable=run.hides_bars)  # fmt: skip
    while True:
        now = time.perf_counter()
        guard.begin_window()
        try:
            window, loss = feed.take(hold=run.save_is_due or run.stop.signal_number is not None), None
            if window is not None:
                window, loss = run.runner.gradients(state.model, window, guard)
        except Exception:  # a bug, a lost worker: what has been trained so far can still be saved
            guard.restore()
            if pending is not None:
                take_in(run, stage, *pending, guard)
            raise
        if pending is not None:  # before the step: the average takes in the weights as that window left them
            again, pending = settle_window(run, stage, *pending, guard, bar), None
            if again is not None:
                feed.put_back([*again, *([window] if window is not None else [])])
                state.ladder.seconds_lost += time.perf_counter() - now
                continue
        if window is None or loss is None:
            if run.save_is_due:
                stats.seconds, start = stats.seconds + now - start, now
                save_step(run)
                continue
            break

        run.consistent = False
        if window.drill is not None:
            window.drill.strike(parameters)
        window.scaler.unscale_(state.optimizer)
        grad_norm = gradient_norm(parameters)
        found_inf, loss_scale = window.scaler.found_inf(state.optimizer, loss), window.scaler.current_scale(loss)
        loss, grad_norm, found_inf, requests = run.ranks.agree(  # of several processes: one verdict for all
            loss, grad_norm, found_inf, run.stop.told(), guard.statistics, window.num_samples
        )
        spike, highest = state.detector.examine(loss, grad_norm, found_inf)
        # Clips to the lower of --grad-clip and the detector's height, which is on the device: a float would be a sync.
        relative_norm = grad_norm * (run.args.grad_clip / highest.clamp(max=run.args.grad_clip))
        clip_grads_with_norm_(parameters, run.args.grad_clip, relative_norm, foreach=True)
        skip = should_skip(loss, grad_norm, found_inf, spike)
        set_learning_rates(state.optimizer, window.lr * state.ladder.lr_factor, stage.backbone_lr_scale)
        gated_step(state.optimizer, skip)
        guard.end_window(skip)
        window.scaler.update_after(loss, found_inf)
        state.optimizer.zero_grad(set_to_none=True)
        pending = window, PendingOutcome(loss, grad_norm, found_inf, spike, loss_scale, requests)
        if window.attempt == 0:
            progress.count(window.number, window.global_number, window.num_samples_everywhere)
            stats.num_samples += window.num_samples_everywhere
            bar.update()
        else:
            state.ladder.seconds_lost += time.perf_counter() - now
    bar.close()
    stats.seconds += time.perf_counter() - start


def stop_if_asked(run: Run) -> None:
    """End the run after a signal, saved where it stands; an epoch trained to its end is only validated on resume."""
    run.stop.hear(run.ranks.total(run.stop.told()))
    number = run.stop.signal_number
    if number is not None:
        told = f"stopped by {signal.Signals(number).name}; {save_and_wait(run)}. Go on with: {run.resume_command}"
        raise StoppedError(128 + number, told)


def save_step(run: Run) -> Path:
    """Begin a checkpoint in mid-epoch. Training waits for a copy of the state, not for the disk."""
    run.stop.saved()
    return run.store.save_step(run.state.progress.global_window, run.checkpoint())


def save_and_wait(run: Run, together: bool = True) -> str:
    """Save before the process ends; returns what to tell the user. Ranks wait ``together`` for the one that writes."""

    def written() -> str:
        run.store.wait()
        kept = "older checkpoints stay" if run.store.files() else "there is no older checkpoint"
        return f"saved {path}" if run.store.failure is None else f"not saved ({run.store.failure}); {kept}"

    path = save_step(run)
    told = run.ranks.from_first(written) if together else written()
    return told if run.ranks.is_first else ""


@torch.inference_mode()
def validate(run: Run, loader: DataLoader[Batch]) -> dict[str, float]:
    """Means over images, at the training size: IoU and Dice at 0.5, MAE and S-measure, of the averaged weights.

    Predictions are scored in 8 bits. Images that cannot be read are left out of the means. A network whose output is
    not finite has no score: NaN, which is never the best.

    Raises:
        UnreadableDataError: too many, or none at all can be read.
    """
    model = run.state.model_for_use.train().eval()  # train() first: some timm models cache weights when eval() begins
    scores: dict[int, dict[str, float]] = {}
    is_finite = True
    num_heard = 0 if run.ranks.shards else min(run.ranks.gather(len(loader)))  # batches that every rank has
    for number, batch in enumerate(loader):
        if number < num_heard:
            stop_if_asked(run)
        run.unreadable.meet({run.config["validation"][index]: reason for index, reason in batch.errors.items()})
        if not len(batch.images):
            continue
        images, _ = to_device(batch, run.device, run.memory_format)
        with run.precision_in_use.autocast():
            logits = model(images)[-1]
        probabilities = logits.float().sigmoid()
        if not torch.isfinite(probabilities).all():  # a host sync, once a batch, as is the copy below
            is_finite = False
            break
        predictions = (probabilities * 255).round().to(torch.uint8).cpu()
        pairs = zip(predictions[:, 0].numpy(), batch.masks[:, 0].numpy() > 0, strict=True)
        scores |= {
            index: quick_scores(prediction, mask)
            for index, (prediction, mask) in zip(batch.indices.tolist(), pairs, strict=True)
        }
    run.unreadable.agree(run.ranks.gather)
    if not run.ranks.all(is_finite):
        return dict.fromkeys(("iou", "dice", "mae", "s_measure"), math.nan)
    everywhere = {index: image for part in run.ranks.gather(scores) for index, image in part.items()}
    in_order = [everywhere[index] for index in sorted(everywhere)]  # for the same sums, however many ranks
    if not in_order:
        raise UnreadableDataError("not one image to validate on can be read: restore them")
    return {name: sum(image[name] for image in in_order) / len(in_order) for name in in_order[0]}


def begin_stage(run: Run, stage: Stage) -> None:
    """Make the run's state what the stage starts from, or goes on from where the run was resumed in its midst."""
    state, progress = run.state, run.state.progress
    assert isinstance(state.model, CamouflageSegmenter)
    state.model.set_backbone_frozen(stage.freeze_backbone)
    if progress.stage != stage.number:
        progress.stage = stage.number
        state.scaler = run.precision.new_scaler(stage.scaler)
        state.detector.reset(run.device)
        if not stage.freeze_backbone and not state.model.freeze_norm_statistics:
            state.ladder.losses = LossHistory()  # BatchNorm begins to learn its statistics: another level
    fresh_moments(state.optimizer, everywhere=False)
    run.runner.replicate(state.model.train(), run.ranks, run.args.img_size, run.precision_in_use, run.memory_format)
    run.recovery.begin_stage()


def run_stage(run: Run, stage: Stage) -> None:
    """Train, validate and save every epoch of the stage that is still to come.

    Raises:
        StoppedError: by a signal.
        RecoverySpentError, UnreadableDataError: see ``train_epoch``.
    """
    state, progress = run.state, run.state.progress
    begin_stage(run, stage)
    num_workers = default_num_workers() if run.args.num_workers is None else run.args.num_workers
    workers = {"num_workers": num_workers, "pin_memory": run.device.type == "cuda", "cache": run.cache}
    later = {"augment_on_device": run.args.augment_on == "device", "window_size": run.config["window_size"]}
    sizes = run.args.img_size, stage.batch_size
    train_loader = training_loader(run.train_pairs, *sizes, run.args.seed, share=run.share, **workers, **later)
    val_loader = validation_loader(run.val_pairs, *sizes, share=run.share, **workers)
    backbone = "frozen" if stage.freeze_backbone else f"lr {stage.lr * stage.backbone_lr_scale:g}"
    epochs = f"epochs {stage.first_epoch + 1} to {stage.end_epoch}"
    print(f"Stage {stage.number}: {epochs}, lr {stage.lr:g}, backbone {backbone}")
    if run.args.compile:
        run.runner.compile(state.model.train(), run.args.img_size, run.precision_in_use, run.memory_format)
    while progress.epoch < stage.end_epoch:
        stop_if_asked(run)
        train_epoch(run, stage, train_loader)
        run.unreadable.agree(run.ranks.gather)
        run.recovery.require_finite_weights()
        stop_if_asked(run)
        with whole_weights(state.model_for_use):
            scores = validate(run, val_loader)
        finish_epoch(run, stage, scores)


def finish_epoch(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """Report the epoch, move on to the next, write the checkpoints."""
    state, progress = run.state, run.state.progress
    report_epoch(run, stage, scores)
    progress.epoch += 1
    progress.window = 0
    state.epoch_stats = EpochStats()
    is_best = scores["iou"] > progress.best_iou  # False for NaN
    if is_best:
        progress.best_iou, progress.best_epoch = scores["iou"], progress.epoch
    run.store.save_epoch(progress.epoch, run.checkpoint(), is_best)


def report_epoch(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """The epoch's lines on the terminal and its event in metrics.jsonl."""
    stats, epoch = run.state.epoch_stats, run.state.progress.epoch + 1
    backbone_lr = 0.0 if stage.freeze_backbone else stats.lr * stage.backbone_lr_scale
    run.log.event(
        "epoch",
        **{"stage": stage.number, "epoch": epoch, **scores, **stats.summary(), "backbone_lr": backbone_lr},
        **{"unreadable": len(run.unreadable.reasons)},
    )
    if not sys.stderr.isatty():  # no progress bar above these lines to tell the epoch
        print(f"Epoch {epoch}/{run.args.epochs}")
    scale = run.state.scaler.get_scale()
    print(*epoch_lines(stats, scores, 5 * run.args.grad_clip, scale, warn=not run.norm_warned), sep="\n")
    run.norm_warned |= stats.num_large_norms > 0


def train(run: Run) -> None:
    """Run the stages that are left.

    Raises:
        StoppedError: by a signal, or because recovery has nothing left to try.
        UnreadableDataError: too many images or masks cannot be decoded.
    """
    progress = run.state.progress
    if run.state.ladder.spent:
        advice = f"with a lower learning rate, say: {run.resume_command} --lr {run.args.lr / 2:g}"
        raise StoppedError(3, f"diverged before, and the same command would again; go on {advice}")
    if progress.epoch >= run.args.epochs:
        print(f"All {run.args.epochs} epochs are done already; a larger --epochs goes on from here")
    for stage in run.stages:
        if progress.epoch < stage.end_epoch:
            try:
                run_stage(run, stage)
            except RecoverySpentError as error:
                saved = save_and_wait(run)
                raise StoppedError(
                    3,
                    f"diverged in epoch {progress.epoch + 1}/{run.args.epochs}, all recoveries spent: {error}. What "
                    f"happened: {run.recovery.incidents.directory}; a good state: {saved}\n"
                    f"Go on from it, say with a lower learning rate: {run.resume_command} "
                    f"--lr {run.args.lr * run.state.ladder.lr_factor / 2:g}",
                ) from error


def rescue(run: Run) -> str:
    """After an error: save what has been trained, unless it struck in the midst of a step; returns what to tell."""
    if run.ranks.shards or not (run.consistent and run.ranks.is_first):  # what is sharded takes all ranks to be saved
        return ""
    try:
        return f" ({save_and_wait(run, together=False)})"
    except Exception as error:  # it must not hide the one that is to be told
        return f" (not saved: {error})"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done; 1 a bug; 2 bad usage or input; 3 diverged; 130 / 143 stopped by a signal.

    Of ``check-data``: 1 for findings; of ``evaluate`` and ``predict``: 1 for an image that could not be read.
    """
    if (exit_code := commands.run(argv)) is not None:
        return exit_code
    run = commands.attempt(lambda: prepare(argv))
    if isinstance(run, int):
        return run
    exit_code, message = 0, ""
    with run.stop:  # to the end: launchers send SIGTERM as soon as one rank has failed
        try:
            train(run)
            run.store.wait()
            if not run.ranks.all(run.store.failure is None):  # a last attempt, for what is in no file yet
                message = save_and_wait(run)
                exit_code = 0 if run.ranks.all(run.store.failure is None) else 1
        except StoppedError as stopped:
            exit_code, message = stopped.exit_code, str(stopped) if run.ranks.is_first else ""
        except torch.OutOfMemoryError:
            exit_code, way_out = 1, "--gradient-checkpointing, a smaller --img-size or --backbone needs less"
            message = (
                f"out of memory with the smallest batches; {way_out}. Go on with: {run.resume_command}{rescue(run)}"
            )
        except UnreadableDataError as error:
            exit_code, message = 2, f"{error}; then go on with: {run.resume_command}{rescue(run)}"
        except KeyboardInterrupt:
            exit_code, message = 130, f"stopped at once. Go on from the newest checkpoint with: {run.resume_command}"
        except Exception as error:
            exit_code, reason = 1, next(iter(str(error).splitlines()), type(error).__name__)
            if lost := run.ranks.lost():
                message = f"{lost} has ended ({reason}){rescue(run)}"
            else:
                traceback.print_exc()
                message = f"unexpected, see above. Go on with: {run.resume_command}{rescue(run)}"
        run.log_end(exit_code)
        if run.lock is not None:
            unlock_directory(run.lock)
        run.ranks.close(done=exit_code == 0)
        print(*run.state.ladder.describe(), *run.unreadable.describe(), sep="\n")
        if message:
            print(message if exit_code in (0, 130, 143) else f"error: {message}", file=sys.stderr)
        if not exit_code:
            print(*run.last_lines(), sep="\n")
        run.log.close()
    return exit_code


if __name__ == "__main__":
    commands.begin()
    sys.exit(main())
