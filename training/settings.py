"""Every setting of a run: its type, its default, its range, and where its value comes from. Imports nothing heavy."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger("train_ultimate")

# ``demo`` is ``train`` with these defaults: the same program on scenes it draws itself, small enough for two CPU cores.
DEMO_DEFAULTS: Mapping[str, Any] = {
    "dataset_path": "synthetic", "backbone": "resnet10t", "pretrained": False, "decoder_channels": 32, "img_size": 128,
    "batch_size": 16, "accumulation_steps": 1, "epochs": 10, "stage1_epochs": 1, "lr": 0.003, "stage2_lr_scale": 1.0,
    "backbone_lr_scale": 1.0, "grad_clip": 2.0, "ema_decay": 0.98,
}  # fmt: skip
DEMO_DRILLS = ("bad-sample@100", "spike@200")  # of a new demo, unless others are given

STAGE1_EPOCHS, STAGE1_SHARE = 30, 3 / 14  # 30 of the 140 epochs, and the same share of fewer
ZOOMS = [0.5, 1.0, 1.5]  # --zoom without factors
SCALES = [0.75, 1.0, 1.25]  # --multi-scale without factors

# Settings of one invocation, not of the run.
NOT_RESUMED = ("resume", "checkpoint_dir", "drill", "quiet", "json_logs", "max_hours")
FIXED_AT_START = ("backbone", "decoder_channels", "zoom")  # they decide the shapes in a checkpoint
PATHS = ("dataset_path", "exclude", "backbone_weights", "start_from", "rehearse", "cache_dir")
# Without use once a checkpoint brings the weights and the list of validation images.
ONLY_AT_START = ("pretrained", "backbone_weights", "start_from", "val_fraction", "folds", "fold", "plan")


class UsageError(ValueError):
    """A mistake in the command line, explained in one line."""


@dataclass(frozen=True)
class Range:
    """Numbers a setting may have: from ``low`` to ``high``; ``low`` itself only if ``closed``."""

    low: float
    high: float = math.inf
    closed: bool = True
    whole: bool = False

    def problem(self, value: Any) -> str:
        """Say what is wrong with a value; "" if nothing is."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"must be a {'whole ' if self.whole else ''}number, not {value!r}"
        if math.isfinite(value) and self.low <= value <= self.high and (self.closed or value > self.low):
            return ""
        if self.whole:
            return f"must be at least {self.low}, not {value}" if value < self.low else f"must be at most {self.high}"
        least = f"at least {self.low:g}" if self.closed else f"above {self.low:g}"
        most = f" and at most {self.high:g}" if math.isfinite(self.high) else ""
        return f"must be {least}{most}, not {value:g}"


def whole(low: int, high: float = math.inf) -> Range:
    """Return the range of whole numbers from ``low`` to ``high``."""
    return Range(low, high, whole=True)


def above(low: float, high: float = math.inf) -> Range:
    """Return the range of numbers above ``low``, up to ``high``."""
    return Range(low, high, closed=False)


FACTOR = Range(0.25, 4)  # of --img-size, for --zoom and --multi-scale
RANGES: Mapping[str, Range] = {
    "img_size": whole(64), "val_fraction": above(0, 0.9), "folds": whole(2), "fold": whole(1),
    "num_workers": whole(0), "frozen_levels": whole(0), "rehearse_share": above(0, 0.95),
    "decoder_channels": whole(8), "zoom": FACTOR, "multi_scale": FACTOR, "epochs": whole(1), "stage1_epochs": whole(0),
    "batch_size": whole(1), "accumulation_steps": whole(1), "lr": above(0), "stage2_lr_scale": above(0),
    "backbone_lr_scale": above(0), "weight_decay": Range(0), "ema_decay": Range(0, 1), "grad_clip": above(0),
    "max_rollbacks": whole(0), "seed": whole(0, 2**63 - 1), "checkpoint_every": whole(0), "keep_checkpoints": whole(1),
    "rank_timeout": above(0), "threads": whole(1), "max_hours": above(0),
}  # fmt: skip
CHOICES: Mapping[str, tuple[str, ...]] = {
    "spike_policy": ("skip", "clip", "off"),
    "precision": ("auto", "fp16", "bf16", "tf32", "fp32"),
    "device": ("auto", "cpu", "cuda"),
    "augment_on": ("loader", "device"),
    "mask_values": ("auto", "above-half", "nonzero", "nonzero-but-255", "alpha", "inverted"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a run with its default. Flags, checkpoints and ``config.json`` hold exactly these.

    The help texts are in commands/cli.py.
    """

    # data
    dataset_path: str
    include_noncam: bool = False
    exclude: str | None = None
    mask_values: str = "auto"
    img_size: int = 384  # pixels
    val_fraction: float = 0.1
    folds: int | None = None  # parts that the data are split into, each validated on once; None: no cross-validation
    fold: int | None = None  # part to validate on, from 1; None: each in turn, as a run of its own
    num_workers: int | None = None  # None: by the number of cores, of whichever machine the run is on
    cache: bool = False
    cache_dir: str | None = None
    # model
    backbone: str = "pvt_v2_b2"
    pretrained: bool = True
    backbone_weights: str | None = None
    plan: str | None = None  # file that ``plan`` wrote, whose settings take the place of the defaults
    start_from: str | None = None  # a trained network's file, folder or name on the hub
    rehearse: str | None = None  # folder of the dataset that ``start_from`` was trained on
    rehearse_share: float = 0.5  # of the photographs of an epoch
    frozen_levels: int = 0
    decoder_channels: int = 64
    zoom: list[float] = field(default_factory=lambda: [1.0])
    multi_scale: list[float] = field(default_factory=lambda: [1.0])
    # schedule
    epochs: int = 140  # of both stages together
    stage1_epochs: int = STAGE1_EPOCHS
    batch_size: int = 2  # images per forward pass
    accumulation_steps: int = 4  # batches per optimizer step
    lr: float = 0.00025  # peak learning rate of the decoder in stage 1
    stage2_lr_scale: float = 0.5
    backbone_lr_scale: float = 0.1
    weight_decay: float = 1e-4
    ema_decay: float = 0.999  # per window; 0: no average
    # stability
    grad_clip: float = 0.5
    spike_policy: str = "skip"
    max_rollbacks: int = 3
    drill: list[str] = field(default_factory=list)
    precision: str = "auto"
    seed: int = 42
    deterministic: bool = False
    # checkpoints
    resume: str | None = None
    checkpoint_dir: str = "./checkpoints"
    checkpoint_every: int = 0  # windows; 0: after epochs only
    keep_checkpoints: int = 3
    max_hours: float | None = None  # of this invocation; None: no limit
    # machine
    device: str = "auto"
    threads: int | None = None  # None: as many as cores, of whichever machine the run is on
    rank_timeout: float = 60.0  # seconds
    shard: bool = False
    augment_on: str = "loader"
    quiet: bool = False
    json_logs: bool = False
    channels_last: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False

    @classmethod
    def resolve(
        cls,
        given: Mapping[str, Any],
        saved: Mapping[str, Any] | None = None,
        has_weights: bool = True,
        preset: Mapping[str, Any] | None = None,
    ) -> Self:
        """Decide where each setting comes from, check them together, and log what differs from the resumed run.

        Args:
            given: What the user typed, by name.
            saved: Settings of the run being resumed; names that this version does not know are ignored.
            has_weights: The resumed run comes with a checkpoint, whose weights not every setting fits.
            preset: Defaults that take the place of this class's, of ``demo`` or of a plan.

        Raises:
            UsageError: A setting is missing, out of range, contradicts another or does not fit the checkpoint.
        """
        known = {entry.name for entry in fields(cls)}
        kept = {name: value for name, value in (saved or {}).items() if name in known and name not in NOT_RESUMED}
        # 1. what the user typed
        # 2. the run being resumed, except for what belongs to one invocation
        # 3. the preset (demo, --plan)
        # 4. the defaults of this class
        values = {**(preset or {}), **kept, **given}
        if has_weights and saved is not None:
            for name in ONLY_AT_START:
                if name in given and name in kept and values[name] != kept[name]:
                    logger.warning(f"Ignored {flag(name)}: weights and validation images are those of the checkpoint")
                    values[name] = kept[name]
        if values.get("dataset_path") is None:
            raise UsageError("--dataset-path is needed: the dataset's folder, or 'synthetic'")
        epochs = values.get("epochs", cls.epochs)
        if isinstance(epochs, int):  # whatever else it is, check() says
            values.setdefault("stage1_epochs", min(STAGE1_EPOCHS, round(epochs * STAGE1_SHARE)))
        for name, several in (("zoom", ZOOMS), ("multi_scale", SCALES)):
            if name in values:
                values[name] = sorted(set(values[name] or several))
        settings = cls(**values)
        for name, before in kept.items():
            now = getattr(settings, name)
            if now == before:
                continue
            if name in FIXED_AT_START and has_weights:
                raise UsageError(
                    f"{flag(name)} {now}: the checkpoint was trained with {before}, and its weights fit nothing else"
                )
            logger.info(f"{name}: {before} -> {now}")
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values out of range, and settings that contradict each other.

        Raises:
            UsageError: The message names the flags and a way out.
        """
        for name, accepted in RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                if problem := accepted.problem(number):
                    raise UsageError(f"{flag(name)} {problem}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{flag(name)} {getattr(self, name)}: choose from {', '.join(choices)}")
        if self.stage1_epochs > self.epochs:
            raise UsageError(
                f"--stage1-epochs {self.stage1_epochs} is more than --epochs {self.epochs}, the sum of both stages; "
                f"try --stage1-epochs {round(self.epochs * STAGE1_SHARE)}"
            )
        check_img_size(self.img_size)
        if self.fold is not None and self.fold > (self.folds or 0):
            raise UsageError(f"--fold {self.fold}: {f'there are {self.folds}' if self.folds else 'it needs --folds K'}")
        if self.decoder_channels % 8:
            raise UsageError(f"--decoder-channels {self.decoder_channels} is not a multiple of 8")
        if self.frozen_levels and not self.pretrained and self.backbone_weights is None and self.start_from is None:
            raise UsageError("--frozen-levels keeps layers as they were pretrained: not with --no-pretrained")
        if self.ema_decay == 1:
            raise UsageError("--ema-decay must be below 1: at 1 the average would never move")
        if self.shard and self.compile:
            raise UsageError("--shard and --compile do not work together: leave one of them out")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name, as checkpoints and ``config.json`` hold them."""
        return asdict(self)


def flag(name: str) -> str:
    """Return the flag of a setting: "img_size" is --img-size."""
    return "--" + name.replace("_", "-")


def with_paths_found(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration's settings. Relative paths missing here are taken from where it was written."""
    settings, written_in = dict(config["settings"]), Path(config.get("working_directory", "."))
    for name in PATHS:
        path = settings.get(name)
        if isinstance(path, str) and not Path(path).exists() and (written_in / path).exists():
            settings[name] = str(written_in / path)
    return settings


def check_img_size(size: int) -> None:
    """Refuse image sizes that the backbone's coarsest stride does not divide.

    Raises:
        UsageError: The message names the nearest size that is accepted.
    """
    if size % 32:
        raise UsageError(
            f"--img-size {size} is not a multiple of 32, a backbone's coarsest stride; try {round(size / 32) * 32}"
        )
