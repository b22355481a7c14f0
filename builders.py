"""From settings to the parts of a run: stages, network, training and validation pairs."""

import argparse
from pathlib import Path

import torch

from data.dataset import require_image_headers
from data.layouts import Pair, describe, find_subsets, split_as_before, split_validation, training_pairs
from data.synthetic import write_synthetic_dataset
from models import CamouflageSegmenter, build_model
from training.stages import CONSERVATIVE_SCALER, Stage

SYNTHETIC_TRAIN_IMAGES, SYNTHETIC_TEST_IMAGES = 640, 64


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
