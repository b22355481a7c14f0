"""Train camouflaged-object segmentation models, and do not lose the run.

    python train_ultimate.py demo                                   about two minutes on two CPU cores, no download
    python train_ultimate.py train --dataset-path data/COD10K-v3    the real thing
    python train_ultimate.py train --resume auto                    after a crash, a kill, a pre-emption

Read it from main() upwards: main -> train -> run_stage -> train_epoch. Stage 1 trains the decoder on a frozen backbone,
stage 2 everything; both are rows of build_stages() and share all code. A window is one optimizer step's worth of
batches.
"""

import gc
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import commands

if __name__ == "__main__":  # help, mistakes and commands that need no torch answer before it is imported
    commands.prepare_for_torch()
    REQUEST = commands.answer()
    if isinstance(REQUEST, int):
        sys.exit(REQUEST)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: a traceback from amid imports helps nobody

import torch
from torch.utils.data import DataLoader

from commands.cli import Request
from commands.folds import runs_of, score_folds
from commands.output import print_error, print_lines
from commands.plan import Trial, plan
from data.cache import seconds_to_decode
from data.dataset import Batch
from data.loading import batches_of, to_device, training_loader, validation_loader, workers_that_fit
from data.masks import IGNORED
from data.processes import default_num_workers, num_cores
from data.unreadable import UnreadableDataError
from evaluation.metrics import interval_of_mean, mean_scores, quick_scores
from models import CamouflageSegmenter, NetworkSettings, build_network
from reporting.closing import closing_lines, resume_command
from reporting.listeners import listeners_of
from runtime import console
from runtime.files import first_line
from runtime.folder import FolderLostError
from runtime.log import Listener
from runtime.ranks import Ranks, join, rank_before_joining
from runtime.sharding import whole_weights
from training.costs import Costs, Meter
from training.feed import WindowQueue
from training.gate import StepGate, clip_gradients_, gated_step
from training.ladder import LossHistory
from training.optim import fresh_moments, gradient_norm, set_learning_rates
from training.recovery import RecoverySpentError
from training.run import Run
from training.settings import Settings
from training.setup import Parts, prepare
from training.stages import Stage
from training.state import EpochStats

Validation = Callable[[Run, DataLoader[Batch]], dict[str, float]]


class StoppedError(Exception):
    """The run ends before its last epoch, with its state saved: an exit code and a message for the user."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train_epoch(run: Run, stage: Stage, loader: DataLoader[Batch]) -> None:
    """Train the rest of the epoch, one optimizer step per window of batches; sums go to ``state.epoch_stats``.

    The device decides whether a step is applied. The host reads that verdict one window later, so it never waits for
    the step it has just queued. If recovery reruns the previous window, the current gradient is discarded and both
    windows are queued again, in order.

    Raises:
        RecoverySpentError: Recovery has nothing left to try.
        UnreadableDataError: Too many images or masks cannot be decoded.
    """
    state, grad_clip = run.state, run.settings.grad_clip
    model, optimizer = state.model.train(), state.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gate = StepGate(model, state.detector, grad_clip, run.machine.ranks, run.signals.received)
    with WindowQueue(run, stage, loader, gate) as queue:
        for window in queue:
            gate.begin_window()
            window, loss = run.runner.backward(model, window, gate.guard)  # forward and backward pass of each batch
            if queue.settle_previous():  # the only host sync, on numbers one window old
                queue.put_back(window)
                continue
            window.strike(parameters)  # a fire drill's fault; nothing in an ordinary window
            window.scaler.unscale_(optimizer)
            grad_norm = gradient_norm(parameters)
            verdict = gate.judge(loss, grad_norm, window.scaler, optimizer, window.num_samples)  # the same on all ranks
            clip_gradients_(parameters, verdict, grad_clip)
            set_learning_rates(optimizer, window.lr * state.ladder.lr_factor, stage.backbone_lr_scale)
            gated_step(optimizer, verdict.skip)  # a skipped step changes no weight and no moment
            gate.end_window(verdict.skip)  # nor BatchNorm's running statistics
            window.scaler.update_after(verdict.loss, verdict.found_inf)
            optimizer.zero_grad(set_to_none=True)
            queue.stepped(window, verdict)


@torch.inference_mode()
def validate(run: Run, loader: DataLoader[Batch]) -> dict[str, float]:
    """Return IoU and Dice at 0.5, MAE and S-measure of the averaged weights: means over images, at the training size.

    With them, as ``iou_low`` and ``iou_high``, the 95 % interval of the mean IoU; and as ``rehearsed_iou`` and so on
    the means over images of ``--rehearse``.

    Predictions are scored in 8 bits, unreadable images are left out. A network whose output is not finite has no score:
    NaN, which is never the best.

    Raises:
        StoppedError: A signal arrived.
        UnreadableDataError: Too many images, or all of them, cannot be decoded.
    """
    ranks, unreadable = run.machine.ranks, run.data.unreadable
    model = run.state.model_for_use.train().eval()  # train() first: some timm models cache weights when eval() begins
    scores: dict[int, dict[str, float]] = {}
    is_finite = True
    num_interruptible = 0 if ranks.shards else min(ranks.gather(len(loader)))  # batches that every rank has
    for number, batch in enumerate(batches_of(loader)):
        if number < num_interruptible:
            stop_if_asked(run)
        unreadable.meet({run.data.validation[index]: reason for index, reason in batch.errors.items()})
        if not len(batch.images):
            continue
        images, _ = to_device(batch, run.machine.device, run.machine.memory_format)
        with run.precision_in_use.products(), run.precision_in_use.autocast():
            logits = model(images)[-1]
        probabilities = logits.float().sigmoid()
        if not torch.isfinite(probabilities).all():  # a host sync, once a batch, as is the copy below
            is_finite = False
            break
        predictions = (probabilities * 255).round().to(torch.uint8).cpu()
        pairs = zip(predictions[:, 0].numpy(), batch.masks[:, 0].numpy(), strict=True)
        scores |= {
            index: quick_scores(prediction, mask)
            for index, (prediction, mask) in zip(batch.indices.tolist(), pairs, strict=True)
            if (mask != IGNORED).any()
        }
    unreadable.agree(ranks.gather)
    if not ranks.all(is_finite):
        return dict.fromkeys(("iou", "dice", "mae", "s_measure"), math.nan)
    everywhere = {index: image for part in ranks.gather(scores) for index, image in part.items()}
    num_own, indices = run.data.num_own_validation, sorted(everywhere)  # for the same sums on any number of ranks
    own, rehearsed = ([everywhere[i] for i in indices if (i < num_own) == is_own] for is_own in (True, False))
    if not own:
        raise UnreadableDataError("none of the validation images can be read: restore them")
    low, high = interval_of_mean([image["iou"] for image in own])
    old = {f"rehearsed_{name}": mean for name, mean in mean_scores(rehearsed).items()}
    return {**mean_scores(own), "iou_low": low, "iou_high": high, **old}


def stop_if_asked(run: Run) -> None:
    """Save and end the run if a signal or the end of its time asks for it.

    On resume, an epoch trained to its end is only validated.

    Raises:
        StoppedError: A signal arrived, or the time is up.
    """
    run.signals.hear(run.machine.ranks.total(run.signals.received()))
    number = run.signals.signal_number
    if run.signals.stop:
        saved = save_and_wait(run)
        reason = f"--max-hours {run.settings.max_hours:g}" if number is None else signal.Signals(number).name
        raise StoppedError(
            0 if number is None else 128 + number, f"stopped by {reason}; {saved}. Go on with: {resume_command(run)}"
        )


def save_and_wait(run: Run, together: bool = True) -> str:
    """Save before the process ends. Return what to print about it, on rank 0.

    Args:
        run: the run.
        together: All ranks wait for rank 0, which writes.
    """
    ranks, store = run.machine.ranks, run.folder.store

    def written() -> str:
        store.wait()
        kept = "older checkpoints stay" if store.files() else "there is no older checkpoint"
        return f"saved {path}" if store.failure is None else f"not saved ({store.failure}); {kept}"

    path = run.save_step()
    saved = ranks.from_first(written) if together else written()
    return saved if ranks.is_first else ""


def begin_stage(run: Run, stage: Stage) -> None:
    """Bring the state to the stage's start. A run resumed within the stage keeps its scaler and its history."""
    state, progress = run.state, run.state.progress
    assert isinstance(state.model, CamouflageSegmenter)
    state.model.set_backbone_frozen(stage.freeze_backbone)
    begins = progress.stage != stage.number
    if begins:
        progress.stage = stage.number
        state.scaler = run.machine.precision.new_scaler(stage.scaler)
        state.detector.reset(run.machine.device)
        if not stage.freeze_backbone and not state.model.freeze_norm_statistics:
            state.ladder.losses = LossHistory()  # BatchNorm begins to learn its statistics: losses of another level
    fresh_moments(state.optimizer, everywhere=False)
    largest_share = -(-run.data.window_size // run.machine.ranks.size)
    run.runner.replicate(state.model.train(), run.precision_in_use, largest_share if begins else None)
    run.recovery.begin_stage()


def run_stage(run: Run, stage: Stage, validate: Validation = validate) -> None:
    """Train, validate and save the stage's remaining epochs.

    Raises:
        StoppedError: A signal arrived.
        RecoverySpentError, UnreadableDataError: see ``train_epoch``.
    """
    state, progress, settings = run.state, run.state.progress, run.settings
    begin_stage(run, stage)
    num_workers = default_num_workers() if settings.num_workers is None else settings.num_workers
    batch_size = run.runner.batch_size
    per_window = -(-len(run.share.of(run.data.window_size)) // batch_size)
    num_workers = workers_that_fit(num_workers, settings.img_size, batch_size, per_window)
    shape: dict[str, Any] = {"img_size": settings.img_size, "share": run.share}
    workers = {"num_workers": num_workers, "pin_memory": run.machine.device.type == "cuda"}
    files = {"cache": run.data.cache, "masks": run.data.masks}
    train_loader = training_loader(
        run.data.train_pairs, **shape, **workers, **files, batch_size=batch_size, seed=settings.seed,
        window_size=run.data.window_size, augment_on_device=settings.augment_on == "device",
    )  # fmt: skip
    val_loader = validation_loader(run.data.val_pairs, **shape, **workers, **files, batch_size=settings.batch_size)
    backbone = "frozen" if stage.freeze_backbone else f"lr {stage.lr * stage.backbone_lr_scale:g}"
    epochs = f"epochs {stage.first_epoch + 1} to {stage.end_epoch}"
    console.logger.info(f"Stage {stage.number}: {epochs}, lr {stage.lr:g}, backbone {backbone}")
    if settings.compile:
        run.runner.compile(state.model.train(), run.precision_in_use)
    while progress.epoch < stage.end_epoch:
        stop_if_asked(run)
        train_epoch(run, stage, train_loader)
        run.data.unreadable.agree(run.machine.ranks.gather)
        run.recovery.require_finite_weights()
        stop_if_asked(run)
        with whole_weights(state.model_for_use):
            scores = validate(run, val_loader)
        finish_epoch(run, stage, scores)


def finish_epoch(run: Run, stage: Stage, scores: dict[str, float]) -> None:
    """Log the epoch, move on to the next one, and begin the checkpoint.

    Raises:
        FolderLostError: Another run has the folder now.
    """
    run.mend_folder()
    state, stats = run.state, run.state.epoch_stats
    run.folder.log.event(
        "epoch",
        stage=stage.number,
        epoch=state.progress.epoch + 1,
        **scores,
        **stats.summary(),
        backbone_lr=0.0 if stage.freeze_backbone else stats.lr * stage.backbone_lr_scale,
        loss_scale=state.scaler.get_scale(),
        unreadable=len(run.data.unreadable.reasons),
    )
    is_best = state.progress.end_epoch(scores["iou"])
    state.epoch_stats = EpochStats()
    run.folder.store.save_epoch(state.progress.epoch, run.checkpoint(), is_best)


def train(run: Run, validate: Validation = validate) -> None:
    """Run the remaining stages.

    Raises:
        StoppedError: A signal arrived, or recovery has nothing left to try.
        UnreadableDataError: Too many images or masks cannot be decoded.
    """
    progress, settings, ladder = run.state.progress, run.settings, run.state.ladder
    if ladder.spent:
        lower = f"{resume_command(run)} --lr {settings.lr / 2:g}"
        raise StoppedError(
            3, f"diverged before, and the same command would again; go on with a lower learning rate, say: {lower}"
        )
    if progress.epoch >= settings.epochs:
        console.logger.info(f"All {settings.epochs} epochs are done already; a larger --epochs goes on from here")
    for stage in run.stages:
        if progress.epoch < stage.end_epoch:
            try:
                run_stage(run, stage, validate)
            except RecoverySpentError as error:
                raise StoppedError(
                    3,
                    f"diverged in epoch {progress.epoch + 1}/{settings.epochs}, all recoveries spent: {error}. What "
                    f"happened: {run.recovery.incidents.directory}; a good state: {save_and_wait(run)}\n"
                    f"Go on from it, say with a lower learning rate: {resume_command(run)} "
                    f"--lr {settings.lr * ladder.lr_factor / 2:g}",
                ) from error


def rescue(run: Run) -> str:
    """Save what has been trained after an error, unless a step is half done. Return what to print about it."""
    ranks = run.machine.ranks
    if ranks.shards or not ranks.is_first or run.state.mid_step:  # saving shards takes all ranks
        return ""
    try:
        return f" ({save_and_wait(run, together=False)})"
    except Exception as error:  # must not hide the first error
        return f" (not saved: {error})"


def outcome_of(run: Run, validate: Validation) -> tuple[int, str]:
    """Train, and return the exit code and the message for the user."""
    ranks, store, go_on = run.machine.ranks, run.folder.store, f"Go on with: {resume_command(run)}"
    epochs_before = run.state.progress.epoch
    try:
        train(run, validate)
        store.wait()
        if not ranks.all(store.failure is None):
            message = save_and_wait(run)  # a last attempt, for a state that is in no file yet
            return 0 if ranks.all(store.failure is None) else 1, message
        if ranks.from_first(lambda: not store.files()):
            return 1, f"the checkpoints in {store.directory} were removed: {save_and_wait(run)}"
        if run.state.progress.epoch > epochs_before and run.state.progress.best_iou < 0:
            return 1, (
                f"the network's output was not finite in any validation, so there is no {store.best_path.name}. Train "
                "again with --precision fp32 or a lower --lr"
            )
        return 0, ""
    except StoppedError as stopped:
        return stopped.exit_code, str(stopped) if ranks.is_first else ""
    except torch.OutOfMemoryError:
        way_out = "--gradient-checkpointing, a smaller --img-size or --backbone needs less"
        return 1, f"out of memory with the smallest batches; {way_out}. {go_on}{rescue(run)}"
    except UnreadableDataError as error:
        return 2, f"{error}; then go on with: {resume_command(run)}{rescue(run)}"
    except FolderLostError as error:
        return 1, str(error)
    except KeyboardInterrupt:
        return 130, f"stopped at once. Go on from the newest checkpoint with: {resume_command(run)}"
    except Exception as error:
        if lost := ranks.lost():
            return 1, f"{lost} has ended ({first_line(error)}){rescue(run)}"
        print_lines(traceback.format_exc().splitlines(), to_stderr=True)
        return 1, f"unexpected, see above. {go_on}{rescue(run)}"


def run_to_its_end(run: Run, parts: "ScriptParts") -> int:
    """Train with signals caught, then log how the run ended, print it, and return the exit code."""
    progress, ladder, unreadable = run.state.progress, run.state.ladder, run.data.unreadable
    with run.signals:  # to the end: launchers send SIGTERM as soon as one rank has failed
        if run.machine.ranks.is_first:
            run.folder.log.listeners += parts.listeners_of(run)  # may import for a second
        exit_code, message = outcome_of(run, parts.validate)
        run.folder.log.event(
            "run_end",
            exit_code=exit_code,
            best_iou=progress.best_iou,
            best_epoch=progress.best_epoch,
            recovery=ladder.summary(),
            unreadable=list(unreadable.reasons),
        )
        run.folder.release()
        run.machine.ranks.close(done=exit_code == 0)
        for line in (*ladder.describe(), *unreadable.describe()):
            console.logger.info(line)
        if message and (exit_code == 0 or exit_code > 128):  # stopped by a signal
            print_lines([message], to_stderr=True)
        elif message:
            print_error(message)
        for line in closing_lines(run) if exit_code == 0 and not run.signals.time_is_up else ():
            console.logger.info(line)
        run.folder.log.close()
    return exit_code


@dataclass(frozen=True)
class ScriptParts(Parts):
    """Parts of the script that tests and other programs may exchange."""

    validate: Validation = validate
    listeners_of: Callable[[Run], list[Listener]] = listeners_of


def train_one(request: Request, parts: ScriptParts, began: float) -> tuple[int, bool]:
    """Train one run. Return the exit code, and whether all its epochs are done.

    Args:
        request: of the run.
        parts: exchangeable parts.
        began: time.monotonic() from which ``--max-hours`` counts.
    """
    given = request.given

    def prepared() -> Run:
        ranks = join(given.get("device", "auto"), given.get("rank_timeout", Settings.rank_timeout))
        return prepare(given, ranks, request.preset, parts, began)

    run = commands.attempt(prepared)
    if isinstance(run, int):
        return run, False
    return run_to_its_end(run, parts), run.state.progress.epoch >= run.settings.epochs


def run_training(request: Request, parts: ScriptParts | None = None) -> int:
    """Run ``train`` or ``demo``: one run, or with ``--folds`` one after another. Return the exit code, see ``main``."""
    parts, given, began = parts or ScriptParts(), request.given, time.monotonic()
    quiet = given.get("quiet", False) or given.get("json_logs", False)
    with console.configured(warnings_only=quiet, silent=rank_before_joining() > 0):
        requests = commands.attempt(lambda: runs_of(request))
        if isinstance(requests, int):
            return requests
        for one in requests:
            exit_code, is_done = train_one(one, parts, began)
            if exit_code or not is_done:
                return exit_code
            gc.collect()  # the run refers to itself, and would stay in the GPU's memory beside the next
        if len(requests) == 1:
            return 0
        return commands.attempt(lambda: score_folds(Path(given["checkpoint_dir"]), quiet))


def try_out(given: Mapping[str, Any], seconds: float) -> Costs:
    """Train windows of these settings for about so many seconds, from random weights, and return what they cost.

    The run has a folder of its own, which is removed, and says nothing.

    Raises:
        ValueError: A mistake in the settings, or the machine is too slow.
    """

    def without_download(settings: NetworkSettings, _pretrained: bool, _weights: object) -> CamouflageSegmenter:
        return build_network(settings)

    began = time.monotonic()
    with TemporaryDirectory(prefix="train-ultimate-trial-") as folder, console.configured(silent=True):
        run = prepare({**given, "checkpoint_dir": folder}, Ranks(), None, Parts(build_network=without_download))
        meter = Meter(run, began, seconds)
        run.folder.log.listeners += [*listeners_of(run), meter]  # TensorBoard and the report take memory, too
        with run.signals:
            exit_code, message = outcome_of(run, validate)
        run.folder.release()
        run.folder.log.close()
        if exit_code:
            raise KeyboardInterrupt if exit_code > 128 else ValueError(message)
        settings, pairs = run.settings, [*run.data.train_pairs, *run.data.val_pairs]
        decoding = seconds_to_decode(pairs[:8], settings.img_size, run.data.masks, num_cores()) if settings.cache else 0
        return meter.costs(decoding, max(path.stat().st_size for path in run.folder.store.files()))


def run_plan(request: Request, try_out: Trial = try_out) -> int:
    """Run ``plan``. Return the exit code, see ``main``."""
    with console.configured(warnings_only=True):
        return commands.attempt(lambda: plan(request.args, try_out))


def main(argv: Sequence[str] | None = None, parts: ScriptParts | None = None) -> int:
    """Run a command and return its exit code.

    0: done, or stopped by ``--max-hours``. 1: a bug; findings of ``check-data``; images that ``evaluate`` or
    ``predict`` could not read; a GPU that cannot be used. 2: bad usage or bad input. 3: diverged, all recoveries
    spent. 129, 130, 143: stopped by SIGHUP, SIGINT, SIGTERM. Whatever stops a run, a checkpoint is written.
    """
    request = commands.answer(argv)
    return request if isinstance(request, int) else run_request(request, parts)


def run_request(request: Request, parts: ScriptParts | None = None) -> int:
    """Run a command that trains. Return its exit code, see ``main``."""
    return run_plan(request) if request.command == "plan" else run_training(request, parts)


if __name__ == "__main__":
    commands.begin()
    sys.exit(run_request(REQUEST))  # pyright: ignore[reportPossiblyUnboundVariable]
