"""From the command line to a run that is ready to train: settings, data, network, state, folder."""

import argparse
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from commands import cli
from data.cache import DecodedCache, default_directory, open_cache
from data.dataset import header_problems
from data.decoding import problem_of
from data.layouts import (
    Pair,
    by_name,
    describe,
    find_subsets,
    fingerprint,
    leave_out,
    read_exclude_file,
    split_as_before,
    split_validation,
    training_pairs,
)
from data.loading import unit_range
from data.processes import keep_freed_memory, num_cores
from data.sampler import Share
from data.synthetic import write_synthetic_dataset
from data.unreadable import UnreadablePairs, require_few
from models.network import build_network
from reporting.history import CONFIG
from reporting.listeners import SamplePredictions, listeners_of
from runtime.checkpoint import CheckpointStore, find_checkpoint
from runtime.console import LastingStream, OnlyWarnings
from runtime.files import write_json
from runtime.folder import LOG, lock_directory, require_free, settings_begun
from runtime.log import RunLog, environment
from runtime.machine import (
    Precision,
    memory_format_of,
    on_device,
    resolve_device,
    resolve_precision,
    use_deterministic_algorithms,
)
from runtime.ranks import Ranks, is_launched, is_started_again, join
from runtime.sharding import shard
from runtime.signals import StopRequest
from training.drill import Drill
from training.gate import SpikeDetector
from training.optim import Ema, all_finite, build_optimizer
from training.recovery import Recovery
from training.run import Run
from training.runner import WindowRunner
from training.settings import check
from training.stages import build_stages
from training.state import TrainState, load_weights, resume, window_size

SYNTHETIC_TRAIN_IMAGES, SYNTHETIC_TEST_IMAGES = 640, 64


def size_of_windows(args: argparse.Namespace, num_ranks: int, before: dict[str, Any] | None) -> int:
    """Samples in an optimizer step, over all ranks. A run that goes on with more ranks or fewer keeps its own.

    Raises:
        ValueError: there are more ranks than samples.
    """
    size = args.batch_size * args.accumulation_steps * num_ranks
    if before is not None:
        settings = before["settings"]
        as_before = (settings["batch_size"], settings["accumulation_steps"]) == (
            args.batch_size,
            args.accumulation_steps,
        )
        if as_before and size != (kept := window_size(before)):
            print(f"Windows of {kept} images, as before, on {num_ranks} rank{'s' if num_ranks > 1 else ''}")
            size = kept
    if num_ranks > size:
        raise ValueError(
            f"{num_ranks} ranks for steps of {size} images: some would have nothing to do; start fewer, or give "
            f"another --batch-size or --accumulation-steps"
        )
    return size


def settings_of(saved: dict[str, Any]) -> argparse.Namespace:
    """The settings of a run as it saved them; flags that there were not yet have the values of runs without them."""
    return cli.parse(["train"], saved)


def excluded_names(args: argparse.Namespace, before: dict[str, Any] | None) -> list[str]:
    """What ``--exclude`` names. A run being resumed whose file has gone leaves out what it named before.

    Args:
        args: the settings.
        before: "config" of the run being resumed.
    """
    if not args.exclude:
        return []
    if before is not None and before["settings"].get("exclude") == args.exclude and not Path(args.exclude).exists():
        print(f"--exclude {args.exclude} has gone: what it named when the checkpoint was written is left out")
        return before["excluded"]
    return read_exclude_file(Path(args.exclude))


def build_pairs(
    args: argparse.Namespace, validation: list[str] | None, excluded: list[str]
) -> tuple[list[Pair], list[Pair], Path]:
    """Training pairs, the validation pairs carved out of them, and the data set's folder. Test folders are not touched.

    Args:
        args: the settings.
        validation: paths below the folder of the images that the run being resumed is validated on.
        excluded: paths below the folder of images or masks whose pairs are left out.
    """
    root = Path(args.dataset_path)
    if args.dataset_path == "synthetic":
        root = Path(args.checkpoint_dir) / "synthetic"
        print(f"Synthetic scenes: {SYNTHETIC_TRAIN_IMAGES} to train on, {SYNTHETIC_TEST_IMAGES} to test on, in {root}")
        write_synthetic_dataset(root, SYNTHETIC_TRAIN_IMAGES, SYNTHETIC_TEST_IMAGES, args.img_size, args.seed)
    subsets = find_subsets(root, args.include_noncam)
    found = training_pairs(subsets, root)
    pairs, unmatched = leave_out(found, root, excluded)
    if validation is None:
        train_pairs, val_pairs = split_validation(pairs, args.val_fraction, args.seed)
    else:
        train_pairs, val_pairs = split_as_before(pairs, root, validation)
    print(f"Data: {root}, {len(train_pairs)} pairs to train on, {len(val_pairs)} to validate on")
    for line in describe(subsets, len(found)):
        print(f"   {line}")
    if args.exclude:
        print(f"   {len(found) - len(pairs)} pairs left out by --exclude {args.exclude}")
    if unmatched:
        print(f"   Warning: {len(unmatched)} paths in it match no training pair, the first: {unmatched[0]}")
    return train_pairs, val_pairs, root


def find_unreadable(
    args: argparse.Namespace, root: Path, pairs: Sequence[Pair], names: Sequence[str], known: Collection[str]
) -> tuple[DecodedCache | None, dict[str, str]]:
    """The cache of decoded images, where one is asked for; and image -> why it or its mask cannot be read.

    With a cache, that is known of every file. Without one, of what shows in the headers, and of the images whose names
    are ``known``, which are tried again.
    """
    named = list(zip(pairs, names, strict=True))
    if args.cache:
        cache_dir = default_directory() if args.cache_dir is None else Path(args.cache_dir)
        cache = open_cache(pairs, root, args.img_size, cache_dir, num_cores())
        return cache, {name: cache.problems[pair.image] for pair, name in named if pair.image in cache.problems}
    problems = {names[position]: problem for position, problem in header_problems(pairs).items()}
    again = {name: problem_of(pair.image, pair.mask) for pair, name in named if name in known}
    return None, {**problems, **{name: problem for name, problem in again.items() if problem}}


def take_directory(store: CheckpointStore, global_window: int, resumed: bool) -> tuple[int | None, bool]:
    """Make the folder this run's own; returns the lock on it, and whether it holds the best weights of the run so far.

    Raises:
        ValueError: another run is writing there.
    """
    try:
        store.directory.mkdir(parents=True, exist_ok=True)
        (store.directory / LOG).touch()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"--checkpoint-dir {store.directory}: cannot be written to ({why}); choose another") from error
    lock = lock_directory(store.directory)
    store.remove_leftovers()
    for path in store.set_aside_after(global_window) if resumed else ():
        print(f"Set aside as {path}: further on than the checkpoint being resumed")
    return lock, store.best_path.exists()


def agreed_precision(name: str, device: torch.device, ranks: Ranks) -> Precision:
    """The same on all ranks: where ``auto`` means another on each machine, what all of them can do."""
    mine = resolve_precision(name, device)
    found = ranks.gather((mine.name, torch.__version__))
    if len({version for _, version in found}) > 1:
        told = ", ".join(f"rank {rank}: {version}" for rank, (_, version) in enumerate(found))
        print(f"Warning: ranks have different versions of torch ({told}); the same on all machines is safer")
    if len({precision for precision, _ in found}) == 1:
        return mine
    return Precision("fp16" if device.type == "cuda" else "fp32", device.type)


def agreed_fingerprint(pairs: Sequence[Pair], root: Path, ranks: Ranks) -> str:
    """Of the data set, which each rank must find alike.

    Raises:
        ValueError: on another machine, files are missing or of another size.
    """
    found = ranks.gather(fingerprint(pairs, root))
    if others := [str(rank) for rank, other in enumerate(found) if other != found[0]]:
        raise ValueError(
            f"{root}: on the machine of rank {', '.join(others)}, files are missing or of other sizes than on that of "
            "rank 0; copy the data set again"
        )
    return found[0]


def prepare(argv: Sequence[str] | None) -> Run:
    """From the command line to a run that is ready to train, new or resumed.

    A setting comes from the first of: the command line; the checkpoint being resumed; the defaults.

    Raises:
        ValueError, OSError: a mistake in the flags, the data or the checkpoint.
    """
    args = cli.parse(argv)
    device = resolve_device(args.device)
    ranks = join(device.type, args.rank_timeout)
    json_to = sys.stdout if args.json_logs else None
    # For as long as the process lives.
    sys.stdout, sys.stderr = LastingStream.of(sys.stdout), LastingStream.of(sys.stderr)
    if args.quiet or args.json_logs or not ranks.is_first:
        sys.stdout = OnlyWarnings(sys.stderr if ranks.is_first else None)  # one rank tells for all
    directory = Path(args.checkpoint_dir)
    ranks.from_first(lambda: require_free(directory))
    source, checkpoint = ranks.from_first(lambda: find_checkpoint(args.resume, directory))
    weights_alone = checkpoint["model"] if checkpoint is not None and "config" not in checkpoint else None
    if weights_alone is not None:
        print(f"Warning: {source} holds weights alone: epochs, moments, learning rates and average begin anew")
        source = checkpoint = None
    before = checkpoint["config"] if checkpoint is not None else None
    begun = ranks.from_first(lambda: settings_begun(directory)) if args.resume == "auto" and before is None else None
    if begun is not None:
        print(f"{directory / CONFIG}: what is not given is as in the run that was begun here")
    if before is not None or begun is not None:
        args = cli.parse(argv, saved=begun if before is None else before["settings"], has_weights=before is not None)
    ranks.from_first(lambda: check(args))
    ranks.shards = args.shard and ranks.size > 1
    if args.shard and ranks.size == 1:
        print("--shard: one process alone, started without torchrun, has nothing to share: it keeps all weights")
    drills = [Drill.parse(text) for text in args.drill]
    drills = [] if is_started_again() else [drill for drill in drills if drill.rank in (None, ranks.rank)]
    windows_of = ranks.from_first(lambda: size_of_windows(args, ranks.size, before))
    store = CheckpointStore(directory, args.keep_checkpoints, writes=ranks.is_first)
    if ranks.from_first(store.files) and (source is None or source.parent.resolve() != directory.resolve()):
        raise ValueError(
            f"{directory} holds a run already: go on with --resume auto, or choose another --checkpoint-dir"
        )
    if args.deterministic:
        use_deterministic_algorithms()
    torch.backends.cudnn.benchmark = not args.deterministic  # tries kernels for each new shape, and there are few
    keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # torch counts cores, not a container's share
    precision = agreed_precision(args.precision, device, ranks)
    memory_format = memory_format_of(args)
    no_cuda = "" if torch.cuda.is_available() else " (no CUDA device found)"
    together = f", {ranks.size} ranks" if ranks.size > 1 else ""
    frozen = f" (frozen up to its feature level {args.frozen_levels})" if args.frozen_levels else ""
    print(f"Device: {device}{no_cuda}{together}, precision {precision.name}, backbone {args.backbone}{frozen}")
    if args.drill:
        print(f"Fire drills, faults on purpose at windows of the run: {', '.join(args.drill)}")
    excluded = ranks.from_first(lambda: excluded_names(args, before))
    validation = before["validation"] if before is not None else None
    train_pairs, val_pairs, root = ranks.from_first(lambda: build_pairs(args, validation, excluded))
    pairs = [*train_pairs, *val_pairs]
    if not pairs[0].image.exists():
        where = f"not there for rank {ranks.rank}"
        raise ValueError(f"{pairs[0].image}: {where}; every machine needs the data set, at the same path")
    names = list(by_name(pairs, root))
    stages = build_stages(args)
    model = build_network(args, load_weights=checkpoint is None and weights_alone is None)
    if not ranks.shards:
        model = on_device(model, device, memory_format)
    if args.gradient_checkpointing and not model.checkpoint_gradients():
        print(f"Warning: timm has no gradient checkpointing for {args.backbone}: only the decoder's will save memory")
    largest_batch = min(args.batch_size, len(train_pairs))
    runner = WindowRunner(largest_batch, args.multi_scale, recomputes=args.gradient_checkpointing)
    if weights_alone is not None:
        load_weights(model, weights_alone)
    if not all_finite(model.state_dict().values()):
        raise ValueError(f"--backbone {args.backbone}: its initial weights are not finite; are the right ones loaded?")
    ema = Ema(model, args.ema_decay) if args.ema_decay > 0 else None
    if ranks.shards:
        for module in (model, *([ema.module] if ema is not None else [])):
            shard(module, device, ranks.size)
    optimizer = build_optimizer(model, model.backbone, args.weight_decay)
    detector = SpikeDetector(args.spike_policy, device)
    state = TrainState(model, optimizer, precision.new_scaler(stages[0].scaler), detector, ema)
    advice = (
        "Repair them, or list them with: python train_ultimate.py check-data --dataset-path "
        f"{shlex.quote(str(root))} --write-exclude unreadable.txt, and leave them out with --exclude unreadable.txt"
    )
    known = checkpoint.get("unreadable", {}) if checkpoint is not None else {}
    look = lambda: find_unreadable(args, root, pairs, names, known)  # noqa: E731
    cache, problems = look() if args.cache else ranks.from_first(look)
    problems = {image: reason for found in ranks.gather(problems) for image, reason in found.items()}
    require_few(problems, len(pairs), advice)
    config = {
        "settings": vars(args),
        "precision": precision.name,
        "window_size": windows_of,
        "data": agreed_fingerprint(pairs, root, ranks),
        "excluded": excluded,
        "validation": names[len(train_pairs) :],
    }
    if checkpoint is not None:
        resume(state, checkpoint, config, stages, precision)
        # Whoever goes on from a run that diverged has changed something, but for a launcher that starts it again.
        saved = checkpoint["config"]["settings"]
        changed = any(saved.get(key) != value for key, value in vars(args).items() if key not in cli.NOT_RESUMED)
        state.ladder.spent &= is_started_again() and not changed
        state.unreadable = {name: problems[name] for name in state.unreadable if name in problems}  # since repaired
        print(f"Resumed {source}: {state.progress.epoch} epochs and {state.progress.window} windows done")
    lock, has_best = ranks.from_first(
        lambda: take_directory(store, state.progress.global_window, checkpoint is not None)
    )
    lock = lock if ranks.is_first else None
    if not has_best:  # of another folder, or set aside: the best of what follows is the best
        state.progress.best_iou = -1.0
    store.last_window = state.progress.global_window
    log = RunLog(directory if ranks.is_first else None, echo=json_to)
    if ranks.is_first:
        # Weights that are sharded are whole on no rank alone: no images then.
        def predict(image: torch.Tensor) -> torch.Tensor:
            network = state.model_for_use.train().eval()
            with torch.inference_mode(), state.precision_in_use(precision).autocast():
                logits = network(unit_range(image.to(device), memory_format))[-1]
            return logits.float().sigmoid().cpu()

        samples = None if ranks.shards else SamplePredictions(predict, val_pairs, args.img_size)
        done = state.progress.global_window
        # Without EpochLines: the script still prints these lines itself.
        log.listeners += listeners_of(directory, args.epochs, args.grad_clip, done, samples, ranks.size == 1)[1:]
    store.on_saved = lambda name: log.event("checkpoint", file=name)
    incidents = directory / "incidents"
    images = names[: len(train_pairs)]
    recovery = Recovery(state, images, config["settings"], incidents, log, precision, args.max_rollbacks, ranks)
    packages = environment(Path(__file__), ("torch", "torchvision", "timm", "numpy", "pillow"))
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "device": str(device),
        "training_pairs": len(train_pairs),
        **config,
        **packages,
    }
    if ranks.is_first:
        write_json(directory / "config.json", facts)
    log.event("run_start" if checkpoint is None else "resume", **facts, progress=asdict(state.progress))
    unreadable = UnreadablePairs(state.unreadable, len(pairs), config["validation"], advice, log.event, ranks.size == 1)
    unreadable.note(problems)
    return Run(args, config, device, precision, memory_format, stages, train_pairs, val_pairs, cache, state, store,
               log, recovery, unreadable, drills, runner, StopRequest(ranks.size == 1, is_launched()), ranks,
               Share(ranks.rank, ranks.size), lock)  # fmt: skip
