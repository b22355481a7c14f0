"""Every setting of a run: defaults, what contradicts what, and what a resume may change. Imports nothing heavy."""

import argparse
from typing import Any

# `demo` is `train` with these defaults: the same program on data it makes itself, small enough for two CPU cores.
DEMO_DEFAULTS = {
    "dataset_path": "synthetic", "backbone": "resnet10t", "pretrained": False, "decoder_channels": 32, "img_size": 128,
    "batch_size": 16, "accumulation_steps": 1, "epochs": 10, "stage1_epochs": 1, "lr": 0.003, "stage2_lr_scale": 1.0,
    "backbone_lr_scale": 1.0, "grad_clip": 2.0, "ema_decay": 0.98,
}  # fmt: skip

DEMO_DRILLS = ("bad-sample@100", "spike@200")  # unless others are asked for, or it is resumed

STAGE1_EPOCHS, STAGE1_SHARE = 30, 3 / 14  # 30 of the 140 epochs, and as large a part of fewer

ZOOMS = (0.5, 1.0, 1.5)  # of --zoom without factors

SCALES = (0.75, 1.0, 1.25)  # --multi-scale alone

# These belong to one invocation, not to the run.
NOT_RESUMED = ("command", "resume", "checkpoint_dir", "drill", "quiet", "json_logs")

FIXED_AT_START = ("backbone", "decoder_channels", "zoom")  # they decide the shapes in a checkpoint

# Of no use once a checkpoint brings the weights and the list of images to validate on.
ONLY_AT_START = ("pretrained", "backbone_weights", "val_fraction")


class UsageError(ValueError):
    """A mistake in the command line, told in one line."""


def check(args: argparse.Namespace) -> None:
    """Refuse settings that cannot work together; called once it is settled where each of them comes from.

    Raises:
        UsageError: naming the flags and a way out.
    """
    if args.dataset_path is None:
        raise UsageError("--dataset-path is needed: the data set's folder, or 'synthetic'")
    if args.stage1_epochs > args.epochs:
        raise UsageError(
            f"--stage1-epochs {args.stage1_epochs} is more than --epochs {args.epochs}, the sum of both stages; "
            f"try --stage1-epochs {round(args.epochs * STAGE1_SHARE)}"
        )
    _check_img_size(args.img_size)
    if args.decoder_channels % 8:
        raise UsageError(f"--decoder-channels {args.decoder_channels} is not a multiple of 8")
    if args.frozen_levels and not args.pretrained and args.backbone_weights is None:
        raise UsageError("--frozen-levels keeps layers as they were pretrained: not with --no-pretrained")
    if args.ema_decay == 1:
        raise UsageError("--ema-decay must be below 1: at 1 the average would never move")
    if args.shard and args.compile:
        raise UsageError("--shard and --compile do not work together: leave one of them out")


def _check_img_size(size: int) -> None:
    if size % 32:
        raise UsageError(
            f"--img-size {size} is not a multiple of 32, a backbone's coarsest stride; try {round(size / 32) * 32}"
        )


def _reconcile(args: argparse.Namespace, saved: dict[str, Any], has_weights: bool) -> None:
    """Print what differs from the run being resumed; refuse what its weights do not fit."""
    for key, value in saved.items():
        now, flag = getattr(args, key, value), "--" + key.replace("_", "-")
        if now == value or key in NOT_RESUMED:
            continue
        if key in FIXED_AT_START and has_weights:
            raise UsageError(f"{flag} {now}: the checkpoint was trained with {value}, and its weights fit nothing else")
        if key in ONLY_AT_START and has_weights:
            print(f"Ignored {flag}: weights and validation images are those of the checkpoint")
            setattr(args, key, value)
        else:
            print(f"{key}: {value} -> {now}")
