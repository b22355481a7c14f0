"""``plan``: look at photographs and machine, try settings out for a minute, and choose those to train with."""

import gc
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from commands.output import print_lines, require_writable
from commands.own_files import is_json_with, require_own
from data.cache import default_directory
from data.facts import DataFacts, facts_of
from data.layouts import by_name, find_subsets, leave_out, read_exclude_file, training_pairs
from data.processes import num_cores, process_pool
from data.survey import survey_pairs
from reporting.history import duration
from runtime.files import write_json
from runtime.machine import free_memory, resolve_device
from runtime.ranks import is_launched
from training.costs import Costs, RunCosts, forecast
from training.rules import (
    GB,
    Rule,
    Situation,
    networks_for,
    settings_for,
    too_few_validated,
    wanted_epochs,
)
from training.settings import Settings, flag

Trial = Callable[[Mapping[str, Any], float], Costs]

TIME_FOR_TRIALS, LONGEST_TRIAL = 90.0, 40.0  # seconds
_SECONDS_OF_WINDOWS = 15.0  # in a trial, of each stage
_MOST_HOURS = 0.1  # of a trial, whose own clock ends it before
_WINDOWS, _VALIDATED = 12, 16  # an epoch of a trial: of fewer windows, loader processes would be idle for most
_SHARE_OF_TIME = 0.9  # of --hours: the rest is for what a forecast does not know
_LEAST_SHARE = 1 / 3  # of the wanted epochs: the rest gains less than a larger network or size, docs/experiments.md
_SAVE_EVERY = 600.0  # seconds; epochs that take longer are saved on the way


@dataclass(frozen=True)
class Choice:
    """Settings that were tried out, and what a run with them costs."""

    settings: Settings
    reasons: dict[str, tuple[Any, Rule]]
    costs: Costs
    forecast: RunCosts
    wanted: int  # epochs, if there was time


def plan(args: Any, trial: Trial) -> int:
    """Print settings for a dataset on this machine with a reason for each, and a forecast; write them to a file.

    Args:
        args: of the command line.
        trial: trains some windows of settings for about so many seconds.

    Returns:
        exit code 0.

    Raises:
        ValueError: The data cannot be used, the file cannot be written, or nothing can be trained here.
    """
    if is_launched():
        raise ValueError("plan runs in one process: start it with python, not with torchrun")
    require_writable(args.json)
    require_own([args.json], is_json_with("settings", "forecast"), "plan", f"--json {args.json}")
    root = args.dataset_path
    excluded = read_exclude_file(args.exclude) if args.exclude else []
    subsets = find_subsets(root, args.include_noncam)
    pairs, _ = leave_out(training_pairs(subsets, root), root, excluded)
    survey = survey_pairs(pairs, args.mask_values)
    facts = facts_of(pairs, survey.reading)
    situation = situation_of(facts, args)
    print_lines(_about_data(root, facts, survey.summary, situation))
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name in ("dataset_path", "exclude", "include_noncam", "mask_values", "start_from", "device")
        if (value := getattr(args, name)) not in (None, False, "auto")
    }
    with TemporaryDirectory(prefix="train-ultimate-plan-") as folder:
        sample = _SampleOf(list(by_name(pairs, root)), excluded, Path(folder))
        choice = choose(situation, given, args.hours, _measured_apart(trial, sample, situation.on_cpu))
    print_lines(_about_choice(choice, situation, args.hours))
    write_json(args.json, _as_json(choice, facts, situation))
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={situation.num_ranks}"]
    program = [*(launcher if situation.num_ranks > 1 else ["python"]), sys.argv[0]]
    print_lines(["", f"Next: {shlex.join([*program, 'train', '--plan', str(args.json)])}"])
    return 0


def situation_of(facts: DataFacts, args: Any) -> Situation:
    """Return what the settings depend on: the data, this machine, and what the user has asked for."""
    device = resolve_device(args.device)
    cache = default_directory()
    disk = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    return Situation(
        num_pairs=facts.num_pairs,
        side=facts.side,
        object_side=facts.object_side,
        device=device.type,
        memory=free_memory(device),
        disk=disk,
        num_ranks=max(1, torch.cuda.device_count()) if device.type == "cuda" else 1,
        backbone=args.backbone,
        start_from=args.start_from,
    )


def choose(
    situation: Situation, given: Mapping[str, Any], hours: float | None,
    measure: Callable[[Settings, float], Costs], clock: Callable[[], float] = time.monotonic,
) -> Choice:  # fmt: skip
    """Return the settings of the most able network that fits memory and time, with as many epochs as fit.

    Args:
        situation: what settings depend on.
        given: settings that the user has given.
        hours: time for the whole run; None for as much as it takes.
        measure: returns what settings cost, in about so many seconds.
        clock: seconds.

    Raises:
        ValueError: No network could be tried out.
    """
    began, best, problem = clock(), None, ""
    networks = networks_for(situation)
    for network in networks:
        left = TIME_FOR_TRIALS - (clock() - began)
        if best is not None and left < LONGEST_TRIAL / 2:
            break
        if best is not None and network is not networks[-1] and _is_too_slow(network, best):
            continue
        reasons = settings_for(situation, network)
        values = {name: value for name, (value, _) in reasons.items()}
        settings = Settings.resolve({**values, **given})
        try:
            costs = measure(settings, min(LONGEST_TRIAL, left))
        except (ValueError, torch.OutOfMemoryError) as error:
            problem = str(error)
            continue
        if situation.on_cpu and costs.memory > situation.memory and network is not networks[-1]:
            continue
        if situation.on_cpu:  # where "auto" is a measurement, which may come out otherwise on another day
            settings = replace(settings, precision=costs.precision)
            reasons["precision"] = costs.precision, Rule({}, "the faster one of bf16 and fp32 here")
        best = _with_epochs(situation, settings, reasons, costs, hours)
        if best.settings.epochs >= _LEAST_SHARE * best.wanted:
            return best
    if best is None:
        raise ValueError(problem or "no network can be trained here")
    return best


def _is_too_slow(network: Rule, tried: Choice) -> bool:
    """Return whether a network need not be tried: the same one at a larger size gets far too few epochs.

    The time of a window grows with the area of its images. That estimate gets half as many epochs again, in case it is
    too low.
    """
    if network.settings.get("backbone", tried.settings.backbone) != tried.settings.backbone:
        return False
    epochs = 1.5 * tried.settings.epochs * (tried.settings.img_size / network.settings["img_size"]) ** 2
    return epochs < _LEAST_SHARE * tried.wanted


def _with_epochs(
    situation: Situation, settings: Settings, reasons: dict[str, tuple[Any, Rule]], costs: Costs, hours: float | None
) -> Choice:  # fmt: skip
    """Return the choice with as many epochs as the data deserve and the time allows, at least one."""
    num_validated = max(1, round(situation.num_pairs * settings.val_fraction))
    num_images = situation.num_pairs - num_validated
    window = settings.batch_size * settings.accumulation_steps * situation.num_ranks
    wanted, rule = wanted_epochs(situation, num_images, window)

    def of(epochs: int) -> tuple[Settings, RunCosts]:
        values = {name: value for name, value in settings.to_dict().items() if name != "stage1_epochs"}
        if settings.stage1_epochs == 0:
            values["stage1_epochs"] = 0
        complete = Settings.resolve({**values, "epochs": epochs})
        return complete, forecast(complete, num_images, num_validated, costs, situation.num_ranks)

    epochs = wanted
    limit = math.inf if hours is None else _SHARE_OF_TIME * 3600 * hours
    while epochs > 1 and of(epochs)[1].seconds > limit:
        epochs -= max(1, epochs // 50)
    complete, cost = of(epochs)
    if epochs < wanted:
        rule = Rule({}, f"as many as fit into --hours {hours:g}; {wanted} would be better")
    reasons = {**reasons, "epochs": (epochs, rule)}
    if (seconds := max(cost.stages.values()) / epochs) > _SAVE_EVERY:
        windows = max(1, round(math.ceil(num_images / window) * _SAVE_EVERY / seconds))
        reasons["checkpoint_every"] = windows, Rule({}, "a checkpoint about every ten minutes")
        complete = Settings.resolve({**complete.to_dict(), "checkpoint_every": windows})
    return Choice(complete, reasons, costs, cost, wanted)


def differing(settings: Settings) -> dict[str, Any]:
    """Return the settings that differ from the defaults. The others may come from the network of ``--start-from``."""
    defaults = Settings(dataset_path="").to_dict()
    return {name: value for name, value in settings.to_dict().items() if value != defaults[name]}


@dataclass(frozen=True)
class _SampleOf:
    """A few of a dataset's photographs to try settings out on: the others are named in an exclude file.

    Attributes:
        names: of all photographs.
        excluded: names that are left out in any case.
        folder: for the file.
    """

    names: Sequence[str]
    excluded: Sequence[str]
    folder: Path

    def settings(self, settings: Settings) -> dict[str, Any]:
        """Return the settings of a trial."""
        window = settings.batch_size * settings.accumulation_steps
        number = _WINDOWS * window + window // 2 + _VALIDATED  # a short window: on a GPU it takes memory of its own
        step = max(1, len(self.names) // number)
        kept = set(self.names[::step][:number])
        exclude = self.folder / "others.txt"
        exclude.write_text("\n".join([*self.excluded, *(name for name in self.names if name not in kept)]) + "\n")
        epochs = {"epochs": 4, "stage1_epochs": 1 if settings.stage1_epochs else 0}  # unless time is up before
        fraction = _VALIDATED / number if len(kept) == number else settings.val_fraction
        return {
            **differing(settings), **epochs, "exclude": str(exclude), "val_fraction": fraction,
            "cache_dir": str(self.folder), "spike_policy": "off", "max_rollbacks": 0,
            "max_hours": _MOST_HOURS,
        }  # fmt: skip


def _measured_apart(trial: Trial, sample: _SampleOf, on_cpu: bool) -> Callable[[Settings, float], Costs]:
    """Return a function that tries settings out: on a CPU in a process of its own, whose memory can be told apart."""

    def measure(settings: Settings, seconds: float) -> Costs:
        name = "the trained network" if settings.start_from else settings.backbone
        print_lines([f"Trying {name} at {settings.img_size} px"])
        given = sample.settings(settings)
        seconds = min(_SECONDS_OF_WINDOWS, seconds / 2)
        if not on_cpu:
            gc.collect()  # the trial before refers to itself
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return trial(given, seconds)
        way_out = "close other programs, or name a smaller --backbone"
        with process_pool(1, "tries settings", way_out, fresh=True) as pool:
            return pool.submit(trial, given, seconds).result()

    return measure


def _about_data(root: Path, facts: DataFacts, masks: str, situation: Situation) -> list[str]:
    repeated = facts.num_pairs - facts.num_scenes
    lines = [
        f"Data: {root}, {facts.num_pairs} photographs with masks"
        + (f", {repeated} of them of a scene that another shows too" if repeated else "")
        + f", {facts.side} px on their longer side",
        f"   masks: {masks}",
    ]
    if facts.object_shares:
        small, median, large = (f"{100 * share:.2g}" for share in facts.object_shares)
        lines.append(f"   objects: half of them take {small} to {large} % of the photograph, the median {median} %")
    if facts.empty_share:
        lines.append(f"   {100 * facts.empty_share:.0f} % of the masks have no object")
    where = f"{num_cores()} CPU cores" if situation.on_cpu else torch.cuda.get_device_name()
    several = f"{situation.num_ranks} x " if situation.num_ranks > 1 else ""
    lines.append(f"Machine: {several}{where}, {situation.memory / GB:.0f} GB of memory free")
    return lines


def _about_choice(choice: Choice, situation: Situation, hours: float | None) -> list[str]:
    rows, before = [("setting", "value", "why")], None
    for name, (value, rule) in choice.reasons.items():
        text = " ".join(f"{each:g}" for each in value) if isinstance(value, list) else str(value)
        why = rule.why + (f" ({rule.evidence})" if rule.evidence else "")
        rows.append((flag(name), "yes" if value is True else text, "" if rule is before else why))
        before = rule
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = ["", *(f"{name:{widths[0]}}  {value:{widths[1]}}  {why}".rstrip() for name, value, why in rows), ""]
    cost, settings = choice.forecast, choice.settings
    stages = ", ".join(f"stage {number} {duration(seconds)}" for number, seconds in cost.stages.items())
    several = f" on {situation.num_ranks} GPUs, by the model of docs/scaling.md" if situation.num_ranks > 1 else ""
    lines.append(f"Time: about {duration(cost.seconds)}{several}" + (f" ({stages})" if len(cost.stages) > 1 else ""))
    where = "process" if situation.on_cpu else "GPU"
    lines.append(f"Memory: about {cost.memory / GB:.1f} GB of the {where}; disk: {cost.disk / GB:.1f} GB")
    lines += [f"Better with {text}" for text in _what_would_help(choice, situation, hours)]
    few = too_few_validated(max(1, round(situation.num_pairs * settings.val_fraction)))
    return [*lines, *filter(None, [few])]


def _what_would_help(choice: Choice, situation: Situation, hours: float | None) -> list[str]:
    """Say what it would take to be better."""
    texts = []
    if hours is not None and choice.settings.epochs < choice.wanted:
        needed = choice.forecast.seconds * choice.wanted / choice.settings.epochs / _SHARE_OF_TIME / 3600
        texts.append(f"more time: --hours {needed:.2g} for {choice.wanted} epochs")
    if situation.num_pairs < 300:
        texts.append("more photographs: 300 and more")
    if situation.on_cpu:
        texts.append("a GPU: a larger network and larger images in the same time")
    return texts


def _as_json(choice: Choice, facts: DataFacts, situation: Situation) -> dict[str, Any]:
    """Return the content of plan.json."""
    return {
        "settings": differing(choice.settings),
        "working_directory": str(Path.cwd()),
        "reasons": {name: {"why": rule.why, "evidence": rule.evidence} for name, (_, rule) in choice.reasons.items()},
        "data": asdict(facts),
        "machine": asdict(situation),
        "measured": asdict(choice.costs),
        "forecast": asdict(choice.forecast),
    }
