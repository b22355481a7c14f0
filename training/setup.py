"""From what the user typed to a run that is ready to train, new or resumed: first decide, then build, then write."""

import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.cache import DecodedCache, default_directory, open_cache
from data.dataset import header_problems
from data.decoding import problem_of
from data.layouts import (
    OUTSIDE,
    Pair,
    by_name,
    describe,
    find_subsets,
    fingerprint,
    leave_out,
    pairs_to_rehearse,
    read_exclude_file,
    split_as_before,
    split_validation,
    training_pairs,
)
from data.masks import MaskReading
from data.processes import keep_freed_memory, num_cores
from data.scenes import fold_of_each, keep_scenes_together
from data.survey import survey_pairs
from data.synthetic import write_synthetic_dataset
from data.unreadable import UnreadablePairs, require_few
from losses import deep_supervision_loss
from models import CamouflageSegmenter, NetworkSettings, build_network
from runtime import console
from runtime.checkpoint import CheckpointStore, find_checkpoint, made_by_modified_copy, read_weights
from runtime.files import write_json
from runtime.folder import CONFIG, INCIDENTS, config_begun, read_json, require_free
from runtime.log import environment
from runtime.machine import (
    LEAST_GAIN,
    Machine,
    Precision,
    gain_of_bf16,
    memory_format_of,
    on_device,
    resolve_device,
    resolve_precision,
    use_deterministic_algorithms,
)
from runtime.ranks import Ranks, is_launched, is_started_again
from runtime.sharding import load_whole_state, shard
from runtime.signals import Signals
from training.drill import Drill
from training.gate import SpikeDetector
from training.optim import Ema, all_finite, build_optimizer
from training.recovery import Recovery
from training.rules import what_does_not_fit
from training.run import Run, RunFolder, TrainingData
from training.runner import WindowRunner
from training.settings import NOT_RESUMED, Settings, with_paths_found
from training.stages import build_stages
from training.start import TrainedNetwork, read_trained, start_from
from training.state import TrainState, resume, window_size
from training.window import Loss

NetworkBuilder = Callable[[NetworkSettings, bool, Mapping[str, torch.Tensor] | None], CamouflageSegmenter]

logger = logging.getLogger("train_ultimate")

_OF_A_RUN = ("settings", "validation", "data", "precision", "batch_size", "accumulation_steps")  # in each checkpoint


@dataclass(frozen=True)
class Plan:
    """What a run will do. Rank 0 reads the disk, decides and broadcasts it: plain values and tensors in host memory.

    Attributes:
        settings: every setting.
        checkpoint: content of the checkpoint to resume, verified; None to start from the beginning.
        weights: weights to start from, if the file that ``--resume`` names holds nothing else.
        start: network of ``--start-from``, for a new run.
        source: file that ``checkpoint`` was read from.
        root: the dataset's folder.
        train_pairs: pairs to train on.
        val_pairs: pairs to validate on.
        excluded: names that ``--exclude`` leaves out.
        window_size: samples per optimizer step, over all ranks.
        masks: how the masks are read.
    """

    settings: Settings
    checkpoint: dict[str, Any] | None
    weights: dict[str, Any] | None
    start: TrainedNetwork | None
    source: Path | None
    root: Path
    train_pairs: Sequence[Pair]
    val_pairs: Sequence[Pair]
    excluded: list[str]
    window_size: int
    masks: MaskReading

    @property
    def config_before(self) -> dict[str, Any] | None:
        """Configuration in the checkpoint to resume."""
        return None if self.checkpoint is None else self.checkpoint["config"]

    @property
    def pairs(self) -> list[Pair]:
        return [*self.train_pairs, *self.val_pairs]

    @property
    def names(self) -> list[str]:
        """Names of the images of ``pairs``: paths below the root."""
        return list(by_name(self.pairs, self.root))


@dataclass(frozen=True)
class Parts:
    """Parts of a run that tests and other programs may exchange."""

    build_network: NetworkBuilder = build_network
    loss: Loss = deep_supervision_loss
    recovery: type[Recovery] = Recovery
    scenes: tuple[int, int] = (640, 64)  # training and test images of --dataset-path synthetic


@dataclass(frozen=True)
class FileReport:
    """The dataset's files as all ranks found them."""

    cache: DecodedCache | None
    problems: dict[str, str]  # image -> why it or its mask cannot be read
    fingerprint: str


def prepare(
    given: Mapping[str, Any], ranks: Ranks, preset: Mapping[str, Any] | None = None, parts: Parts | None = None,
    began: float | None = None,
) -> Run:  # fmt: skip
    """Build a run that is ready to train, new or resumed.

    Args:
        given: settings that the user typed, by name, and the checkpoint folder.
        ranks: the processes that train together.
        preset: defaults of ``demo``.
        parts: exchangeable parts.
        began: time.monotonic() from which ``--max-hours`` counts; None: now.

    Raises:
        ValueError, OSError: a mistake in the flags, the data or the checkpoint.
    """
    began = began or time.monotonic()
    parts = parts or Parts()
    plan = ranks.from_first(lambda: plan_run(given, preset, ranks.size, parts.scenes))
    machine = set_up_machine(plan, ranks, parts.build_network)
    files = examine_files(plan, ranks)
    state = build_state(plan, machine, parts.build_network)
    resume_state(state, plan, machine, files)
    runner = build_runner(plan, machine, parts.loss)
    folder = claim_folder(plan, state, ranks)
    data = open_data(plan, files, state, folder, ranks)
    recovery = parts.recovery(state, data.images, plan.settings, machine, runner, folder.path / INCIDENTS, folder.log)
    run = Run(plan.settings, machine, data, state, folder, runner, recovery, signals_of(plan.settings, ranks, began))
    record_start(run, files, resumed=plan.checkpoint is not None)
    return run


def plan_run(
    given: Mapping[str, Any], preset: Mapping[str, Any] | None, num_ranks: int, scenes: tuple[int, int]
) -> Plan:
    """Read the disk and settle everything that can be a user's mistake. Write nothing, except for synthetic scenes.

    Raises:
        ValueError, OSError: see ``prepare``.
    """
    directory = Path(given["checkpoint_dir"])
    require_free(directory)
    source, checkpoint = find_checkpoint(given.get("resume"), directory)
    weights = None
    if checkpoint is not None and "config" not in checkpoint:
        logger.warning(f"{source} holds only weights: epochs, moments, learning rates and average start afresh")
        source, checkpoint, weights = None, None, checkpoint.get("model")
    before = None if checkpoint is None else checkpoint["config"]
    if before is not None:
        present = {*before, *before.get("settings", {})}
        if missing := [key for key in _OF_A_RUN if key not in present]:
            raise made_by_modified_copy(str(source), f"its config has no {missing[0]}")
    config = before
    if before is None and given.get("resume") == "auto" and (config := config_begun(directory)) is not None:
        logger.info(f"{directory / CONFIG}: settings that are not given are those of the run begun here")
    saved = None if config is None else with_paths_found(config)
    start = None
    if before is None and weights is None and (source_of_start := {**(saved or {}), **given}.get("start_from")):
        start = read_trained(source_of_start)
        preset = {**(preset or {}), **start.settings}
    settings = Settings.resolve(given, saved, has_weights=before is not None, preset=preset)
    for text in settings.drill:
        Drill.parse(text)
    size = size_of_windows(settings, num_ranks, before)
    holds_a_run = bool(CheckpointStore(directory, keep=1).files())
    if holds_a_run and (source is None or source.parent.resolve() != directory.resolve()):
        raise ValueError(
            f"{directory} holds a run already: go on with --resume auto, or choose another --checkpoint-dir"
        )
    excluded = excluded_names(settings, before)
    validation = None if before is None else before["validation"]
    train_pairs, val_pairs, root = find_pairs(settings, validation, excluded, scenes)
    if before is None and settings.dataset_path != "synthetic" and settings.plan is None and settings.fold in (None, 1):
        num_windows = settings.epochs * math.ceil(len(train_pairs) / size)
        if misfit := what_does_not_fit(len(train_pairs), num_windows, not {"lr", "epochs"} & given.keys()):
            command = shlex.join(["python", sys.argv[0], "plan", "--dataset-path", settings.dataset_path])
            logger.info(f"   {misfit}; settings that suit them: {command}")
    masks = reading_of_masks(settings, before, [*train_pairs, *val_pairs], root)
    return Plan(settings, checkpoint, weights, start, source, root, train_pairs, val_pairs, excluded, size, masks)


def size_of_windows(settings: Settings, num_ranks: int, before: dict[str, Any] | None) -> int:
    """Return the samples per optimizer step, over all ranks. A run resumed on more or fewer ranks keeps its own.

    Raises:
        ValueError: There are more ranks than samples.
    """
    size = settings.batch_size * settings.accumulation_steps * num_ranks
    if before is not None:
        shape = settings.batch_size, settings.accumulation_steps
        shape_before = before["settings"]["batch_size"], before["settings"]["accumulation_steps"]
        if shape == shape_before and size != (kept := window_size(before)):
            logger.info(f"Windows of {kept} images, as before, on {num_ranks} rank{'s' if num_ranks > 1 else ''}")
            size = kept
    if num_ranks > size:
        raise ValueError(
            f"{num_ranks} ranks for steps of {size} images: some would have nothing to do; start fewer, or give "
            f"another --batch-size or --accumulation-steps"
        )
    return size


def excluded_names(settings: Settings, before: dict[str, Any] | None) -> list[str]:
    """Return what ``--exclude`` names; what it named before, if a resumed run's file is missing.

    Args:
        settings: of this run.
        before: "config" of the run being resumed.
    """
    path = settings.exclude
    if not path:
        return []
    if before is not None and before["settings"].get("exclude") == path and not Path(path).exists():
        logger.warning(f"--exclude {path}: no such file; what it named when the checkpoint was written is left out")
        return before["excluded"]
    return read_exclude_file(Path(path))


def find_pairs(
    settings: Settings, validation: list[str] | None, excluded: list[str], scenes: tuple[int, int]
) -> tuple[list[Pair], list[Pair], Path]:
    """Return training pairs, the validation pairs split off from them, and the dataset's folder; never test pairs.

    Args:
        settings: of this run.
        validation: names of the validation images of the run being resumed.
        excluded: names of images or masks whose pairs are left out.
        scenes: number of synthetic training and test images.
    """
    root = Path(settings.dataset_path)
    if settings.dataset_path == "synthetic":
        root = Path(settings.checkpoint_dir) / "synthetic"
        logger.info(f"Synthetic scenes: {scenes[0]} to train on, {scenes[1]} to test on, in {root}")
        write_synthetic_dataset(root, *scenes, settings.img_size, settings.seed)
    subsets = find_subsets(root, settings.include_noncam)
    found = training_pairs(subsets, root)
    pairs, unmatched = leave_out(found, root, excluded)
    num_moved = 0
    if validation is not None:
        train_pairs, val_pairs = split_as_before(pairs, root, validation)
    elif settings.folds is None:
        _, drawn = split_validation(pairs, settings.val_fraction, settings.seed)
        train_pairs, val_pairs, num_moved = keep_scenes_together(pairs, drawn, settings.seed)
    else:
        folds = list(zip(pairs, fold_of_each(pairs, settings.folds, settings.seed), strict=True))
        train_pairs = [pair for pair, fold in folds if fold != settings.fold]
        val_pairs = [pair for pair, fold in folds if fold == settings.fold]
    part = "" if settings.fold is None else f", fold {settings.fold} of {settings.folds}"
    logger.info(f"Data: {root}, {len(train_pairs)} pairs to train on, {len(val_pairs)} to validate on{part}")
    if num_moved:
        logger.info(f"   {num_moved} of them exchanged for others, because training has photographs of the same scenes")
    for line in describe(subsets, len(found)):
        logger.info(f"   {line}")
    if settings.exclude:
        logger.info(f"   {len(found) - len(pairs)} pairs left out by --exclude {settings.exclude}")
    if unmatched:
        logger.warning(
            f"--exclude {settings.exclude}: {len(unmatched)} paths match no training pair, the first: {unmatched[0]}"
        )
    if settings.rehearse is not None:
        old_training, old_validation = find_rehearsed(settings, root, pairs, len(train_pairs), validation)
        train_pairs, val_pairs = [*train_pairs, *old_training], [*val_pairs, *old_validation]
    return train_pairs, val_pairs, root


def find_rehearsed(
    settings: Settings, root: Path, own: Sequence[Pair], num_training: int, validation: list[str] | None
) -> tuple[list[Pair], list[Pair]]:
    """Return pairs of ``--rehearse`` to train on and to validate on.

    Args:
        settings: of this run.
        root: the dataset's folder.
        own: pairs of the dataset itself.
        num_training: of them, pairs to train on.
        validation: names of the validation images of the run being resumed.

    Raises:
        ValueError: It is the dataset itself, has too few pairs, or its masks are to be read in another way.
    """
    folder = Path(str(settings.rehearse))
    if folder.resolve() == root.resolve():
        raise ValueError(f"--rehearse {folder}: is --dataset-path itself; name the folder of the earlier dataset")
    pairs = training_pairs(find_subsets(folder, settings.include_noncam), folder)
    surveyed = [survey_pairs(each, settings.mask_values) for each in (own, pairs)]
    if surveyed[0].reading != surveyed[1].reading:
        raise ValueError(
            f"--rehearse {folder}: its masks ({surveyed[1].seen}) are to be read in another way than those of {root} "
            f"({surveyed[0].seen}); convert one of them, or give --mask-values for both"
        )
    number = round(num_training * settings.rehearse_share / (1 - settings.rehearse_share))
    before = [name for name in validation or () if name.startswith(OUTSIDE)] or None
    training, held_out = pairs_to_rehearse(pairs, root, number, settings.val_fraction, settings.seed, before)
    logger.info(f"   rehearsed: {folder}, {len(training)} pairs to train on, {len(held_out)} to validate on")
    return training, held_out


def reading_of_masks(
    settings: Settings, before: dict[str, Any] | None, pairs: Sequence[Pair], root: Path
) -> MaskReading:
    """Decide how all masks of the dataset are read, and log it. A resumed run reads them as before.

    Args:
        settings: of this run.
        before: "config" of the run being resumed.
        pairs: all pairs of the run.
        root: the dataset's folder.

    Raises:
        ValueError: Every mask that was looked at is constant: a network would learn to find nothing, or everything.
    """
    saved = {} if before is None else before["settings"]
    same_data = all(saved.get(name) == getattr(settings, name) for name in ("dataset_path", "mask_values"))
    if before is not None and same_data and "masks" in before:
        reading = MaskReading.from_dict(before["masks"])
        logger.info(f"Masks: as before; {reading.rule}")
        return reading
    survey = survey_pairs(pairs, settings.mask_values)
    logger.info(f"Masks: {survey.summary}")
    if 1 < survey.num_looked_at == survey.num_constant:
        raise ValueError(f"{root}: {survey.constant}")
    for text in filter(None, (survey.advice, survey.constant)):
        logger.warning(f"masks: {text}")
    return survey.reading


def choose_precision(plan: Plan, build_network: NetworkBuilder) -> tuple[str, str]:
    """Return the precision to use, and the reason in brackets if it was chosen here.

    On a CPU that has bf16, "auto" is what trains this network faster. A resumed run keeps the precision it began with,
    so that it ends in the same weights.

    Raises:
        ValueError: The device is not available, or there is no such backbone.
    """
    settings, device = plan.settings, resolve_device(plan.settings.device)
    if settings.precision != "auto" or device.type != "cpu" or resolve_precision("auto", device).name != "bf16":
        return settings.precision, ""
    before = plan.config_before
    if before is not None and before["precision"] != "fp16":
        return before["precision"], " (as before)"
    size, memory_format = settings.img_size, memory_format_of(settings.channels_last)
    model = on_device(build_network(NetworkSettings.of(settings.to_dict()), False, None), device, memory_format).eval()
    images = torch.rand(min(settings.batch_size, 2), 3, size, size).to(memory_format=memory_format)

    def step(precision: Precision) -> None:
        with precision.autocast():
            loss = torch.stack([logits.float().square().mean() for logits in model(images)]).sum()
        loss.backward()

    gain = gain_of_bf16(step)
    name = "bf16" if gain >= LEAST_GAIN else "fp32"
    return name, f" (bf16 is {gain:.2g} times as fast as fp32 here)"


def set_up_machine(plan: Plan, ranks: Ranks, build_network: NetworkBuilder) -> Machine:
    """Resolve device, precision and memory layout, configure torch for them, and log what the run computes on.

    Raises:
        ValueError: The device is not available, or there is no such backbone.
    """
    settings = plan.settings
    usual = min(torch.get_num_threads(), num_cores())  # torch ignores a container's share of the cores
    torch.set_num_threads(settings.threads or usual)
    precision, reason = choose_precision(plan, build_network)
    machine = Machine.of(settings.device, precision, settings.channels_last, settings.shard, ranks)
    if settings.deterministic:
        use_deterministic_algorithms()
    torch.backends.cudnn.benchmark = not settings.deterministic  # tries kernels for each new shape; there are few
    keep_freed_memory()
    no_cuda = "" if torch.cuda.is_available() else " (no CUDA device found)"
    together = f", {ranks.size} ranks" if ranks.size > 1 else ""
    frozen = f" (frozen up to its feature level {settings.frozen_levels})" if settings.frozen_levels else ""
    logger.info(
        f"Device: {machine.device}{no_cuda}{together}, precision {machine.precision.name}{reason}, backbone "
        f"{settings.backbone}{frozen}"
    )
    if settings.shard and ranks.size == 1:
        logger.warning("--shard has no effect in one process, started without torchrun: it holds all weights")
    if settings.drill:
        logger.info(f"Fire drills, faults on purpose at windows of the run: {', '.join(settings.drill)}")
    return machine


def examine_files(plan: Plan, ranks: Ranks) -> FileReport:
    """Look for unreadable files, open the cache if ``--cache`` asks for one, and compare the dataset over ranks.

    Raises:
        ValueError: A rank does not find the dataset, or finds another one.
        UnreadableDataError: Too many files cannot be read.
    """
    first = plan.pairs[0].image
    if not first.exists():
        raise ValueError(f"{first}: not found by rank {ranks.rank}; every machine needs the dataset, at the same path")
    known = {} if plan.checkpoint is None else plan.checkpoint.get("unreadable", {})

    def look() -> tuple[DecodedCache | None, dict[str, str]]:
        return find_unreadable(plan.settings, plan.root, plan.pairs, plan.names, known, plan.masks)

    cache, problems = look() if plan.settings.cache else ranks.from_first(look)
    problems = {image: reason for found in ranks.gather(problems) for image, reason in found.items()}
    require_few(problems, len(plan.pairs), advice_on_unreadable(plan.root))
    return FileReport(cache, problems, agreed_fingerprint(plan, ranks))


def find_unreadable(
    settings: Settings, root: Path, pairs: Sequence[Pair], names: Sequence[str], known: Collection[str],
    masks: MaskReading,
) -> tuple[DecodedCache | None, dict[str, str]]:  # fmt: skip
    """Look for unreadable files: all of them decoded with a cache, else headers, and decoded only ``known`` images."""
    named = list(zip(pairs, names, strict=True))
    if settings.cache:
        cache_dir = default_directory() if settings.cache_dir is None else Path(settings.cache_dir)
        cache = open_cache(pairs, root, settings.img_size, cache_dir, num_cores(), masks, console.progress_bar)
        return cache, {name: cache.problems[pair.image] for pair, name in named if pair.image in cache.problems}
    problems = {names[position]: problem for position, problem in header_problems(pairs).items()}
    again = {name: problem_of(pair.image, pair.mask) for pair, name in named if name in known}
    return None, {**problems, **{name: problem for name, problem in again.items() if problem}}


def advice_on_unreadable(root: Path) -> str:
    """Return what the user can do about unreadable files."""
    return (
        "Repair them, or list them with: python train_ultimate.py check-data --dataset-path "
        f"{shlex.quote(str(root))} --write-exclude unreadable.txt, and leave them out with --exclude unreadable.txt"
    )


def agreed_fingerprint(plan: Plan, ranks: Ranks) -> str:
    """Return the dataset's fingerprint, which all ranks must share.

    Raises:
        ValueError: On another machine, files are missing or have other sizes.
    """
    found = ranks.gather(fingerprint(plan.pairs, plan.root))
    if others := [str(rank) for rank, other in enumerate(found) if other != found[0]]:
        raise ValueError(
            f"{plan.root}: on the machine of rank {', '.join(others)}, files are missing or have other sizes than on "
            "that of rank 0; copy the dataset again"
        )
    return found[0]


def build_state(plan: Plan, machine: Machine, build_network: NetworkBuilder) -> TrainState:
    """Build network, average, optimizer, scaler and spike detector, not yet resumed.

    Raises:
        ValueError: The weights to start from are not finite, or belong to another network.
    """
    settings = plan.settings
    is_new = plan.checkpoint is None and plan.weights is None and plan.start is None  # else a file brings all weights
    weights = read_weights(Path(settings.backbone_weights)) if is_new and settings.backbone_weights else None
    torch.manual_seed(settings.seed)
    model = build_network(NetworkSettings.of(settings.to_dict()), is_new and settings.pretrained, weights)
    if not machine.ranks.shards:
        model = machine.place(model)
    if settings.gradient_checkpointing and not model.checkpoint_gradients():
        logger.warning(
            f"timm has no gradient checkpointing for {settings.backbone}: only the decoder's will save memory"
        )
    if plan.weights is not None:
        try:
            load_whole_state(model, plan.weights)
        except ValueError as error:
            raise ValueError(
                f"--resume {settings.resume}: the weights do not fit this network; first difference: {error}"
            ) from error
    if plan.start is not None:
        logger.info(f"Start: {settings.start_from}, a {settings.backbone} with {settings.decoder_channels} channels")
        for line in start_from(model, plan.start, settings.start_from or ""):
            logger.warning(line)
    if not all_finite(model.state_dict().values()):
        raise ValueError(
            f"--backbone {settings.backbone}: its initial weights are not finite; are the right ones loaded?"
        )
    ema = Ema(model, settings.ema_decay) if settings.ema_decay > 0 else None
    if machine.ranks.shards:
        for module in (model, *([ema.module] if ema is not None else [])):
            shard(module, machine.device, machine.ranks.size)
    optimizer = build_optimizer(model, model.backbone, settings.weight_decay)
    detector = SpikeDetector(settings.spike_policy, machine.device)
    scaler = machine.precision.new_scaler(build_stages(settings)[0].scaler)
    drills = [] if is_started_again() else [Drill.parse(text) for text in settings.drill]
    drills = [drill for drill in drills if drill.rank in (None, machine.ranks.rank)]
    return TrainState(model, optimizer, scaler, detector, ema, drills=drills)


def resume_state(state: TrainState, plan: Plan, machine: Machine, files: FileReport) -> None:
    """Restore a freshly built state from the plan's checkpoint, if there is one.

    Raises:
        ValueError: A modified copy of this program wrote it.
    """
    if plan.checkpoint is None:
        return
    settings = plan.settings.to_dict()
    identity = {"data": files.fingerprint, "window_size": plan.window_size, "precision": machine.precision.name}
    config, stages = {"settings": settings, **identity}, build_stages(plan.settings)
    try:
        resume(state, plan.checkpoint, config, stages, machine.precision)
    except ValueError as error:
        raise made_by_modified_copy(str(plan.source), str(error)) from error
    # A user who resumes a diverged run has changed something. A launcher that restarts it has not.
    saved = plan.checkpoint["config"]["settings"]
    changed = any(saved.get(name) != value for name, value in settings.items() if name not in NOT_RESUMED)
    state.ladder.spent &= is_started_again() and not changed
    problems = files.problems  # without files that have been repaired since
    state.unreadable = {name: problems[name] for name in state.unreadable if name in problems}
    logger.info(f"Resumed {plan.source}: {state.progress.epoch} epochs and {state.progress.window} windows done")


def claim_folder(plan: Plan, state: TrainState, ranks: Ranks) -> RunFolder:
    """Make the checkpoint folder this run's own.

    Raises:
        ValueError: Another run is writing there, or the folder cannot be written to.
    """
    store = CheckpointStore(Path(plan.settings.checkpoint_dir), plan.settings.keep_checkpoints, writes=ranks.is_first)
    resumed_at = None if plan.checkpoint is None else state.progress.global_window
    folder = RunFolder.claim(store, ranks, resumed_at, sys.stdout if plan.settings.json_logs else None)
    if not folder.had_best:  # in another folder, or set aside: the best of what follows is the best
        state.progress.best_iou = -1.0
    return folder


def open_data(plan: Plan, files: FileReport, state: TrainState, folder: RunFolder, ranks: Ranks) -> TrainingData:
    """Bring together what the run knows of its data."""
    names, num_training = plan.names, len(plan.train_pairs)
    advice = advice_on_unreadable(plan.root)
    return TrainingData(
        root=plan.root,
        train_pairs=plan.train_pairs,
        val_pairs=plan.val_pairs,
        images=names[:num_training],
        validation=names[num_training:],
        excluded=plan.excluded,
        fingerprint=files.fingerprint,
        window_size=plan.window_size,
        cache=files.cache,
        masks=plan.masks,
        unreadable=UnreadablePairs(
            state.unreadable, len(names), names[num_training:], advice, folder.log.event, ranks.size == 1
        ),
    )


def build_runner(plan: Plan, machine: Machine, loss: Loss) -> WindowRunner:
    """Build the runner for the loader's batches. A resumed run goes on with batches of the same size."""
    settings, batch_size = plan.settings, min(plan.settings.batch_size, len(plan.train_pairs))
    runner = WindowRunner(
        machine, settings.img_size, batch_size, settings.multi_scale, settings.gradient_checkpointing, loss
    )
    before = plan.config_before
    if before is not None and before["settings"]["batch_size"] == settings.batch_size and "batches" in before:
        match before["batches"]:
            case [int(size), int(parts)] if size > 0 and parts > 0:
                runner.batch_size, runner.num_parts = size, parts
            case other:
                raise made_by_modified_copy(str(plan.source), f"batches of {other}")
    return runner


def signals_of(settings: Settings, ranks: Ranks, began: float) -> Signals:
    """Return the run's signals, whose time counts from ``began``, a time.monotonic()."""
    hours = settings.max_hours
    return Signals(ranks.size == 1, is_launched(), began, None if hours is None else 3600 * hours)


def record_start(run: Run, files: FileReport, resumed: bool) -> None:
    """Write ``config.json`` and the log's first events: command, settings, data, versions; then unreadable files."""
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "device": str(run.machine.device),
        "training_pairs": len(run.data.train_pairs),
        **run.config,
        **environment(Path(__file__), ("torch", "torchvision", "timm", "numpy", "pillow")),
    }
    if run.settings.plan is not None:
        facts["forecast"] = read_json(Path(run.settings.plan)).get("forecast")
    run.folder.config = facts
    if run.machine.ranks.is_first:
        write_json(run.folder.path / CONFIG, facts)
    run.folder.log.event("resume" if resumed else "run_start", **facts, progress=asdict(run.state.progress))
    run.data.unreadable.note(files.problems)
