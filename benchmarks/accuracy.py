"""Test scores of our network and of segmentation_models.pytorch's, trained alike: same weights, data, everything.

    python benchmarks/accuracy.py --dataset-path data/CAMO --backbone-weights FILE --out DIR --seeds 1 2 3 \
        --models ours unet fpn deeplabv3plus upernet segformer [--epochs N] [--img-size PX] [-- flags of train]
    python benchmarks/accuracy.py ... --models ours without-context ... --validation-only

A model may bring flags of its own: --models "ours --zoom 1.25" ours.

Every one goes through ``train`` itself: same order of the same augmented images, same loss, optimizer, average, number
of epochs and validation images, by which the best epoch is chosen. Rivals have one output, so one loss; ours has its
side outputs. Then ``evaluate`` on the test set; with --validation-only, on the images held out to validate on, and the
test set is not looked at: that is for choosing, and for ours without one of its parts. What is done already in DIR is
not done again, and a run that was interrupted is resumed: a long table can be made in pieces. Without --seeds, the
table of what there is.

Speed is measured apart: each model in a process of its own, as in training (in one process, they lose each other's
memory), taking turns at forward and backward pass on one batch, in an order of its own each round.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import cli
from data.layouts import find_subsets
from data.processes import keep_freed_memory
from evaluation import trained
from evaluation.figures import contact_sheet, thumbnail
from losses import deep_supervision_loss
from models.backbone import speed_up_depthwise
from models.network import CamouflageSegmenter
from models.zoom import resized
from runtime.machine import Precision, resolve_precision
from train_ultimate import main as command
from training import setup as builders

RIVALS = ("unet", "fpn", "deeplabv3plus", "upernet", "segformer")
ABLATIONS = tuple(f"without-{part}" for part in ("context", "estimate", "mix", "gate", "side-losses"))
MODELS = ("ours", *ABLATIONS, *RIVALS)
SCORES = {"s_measure": "S", "weighted_f": "wF", "mae": "MAE", "mean_e": "mean E", "iou": "IoU"}
# The recipe that the baseline was measured with, as far as the flags of train go.
RECIPE = [
    *("--batch-size", "8", "--accumulation-steps", "1", "--stage1-epochs", "0", "--keep-checkpoints", "1"),
    *("--lr", "0.001", "--stage2-lr-scale", "1", "--backbone-lr-scale", "0.1", "--grad-clip", "1"),
]


class Rival(CamouflageSegmenter):
    """A decoder of segmentation_models.pytorch, in the place of ours, on a backbone with the same weights."""

    def __init__(self, name: str, ours: CamouflageSegmenter, backbone_name: str) -> None:
        nn.Module.__init__(self)
        network: Any = smp.create_model(name, f"tu-{backbone_name}", encoder_weights=None)
        network.encoder.model.load_state_dict(ours.backbone.body.state_dict())
        speed_up_depthwise(network.encoder)  # as ours: what is compared are decoders
        self.backbone = network.encoder
        self.decoder = nn.ModuleList([network.decoder, network.segmentation_head])  # type: ignore[assignment]
        self.freeze_norm_statistics = ours.freeze_norm_statistics
        self.backbone_frozen, self.always_frozen = False, frozenset()
        self.register_buffer("mean", ours.get_buffer("mean"), persistent=False)
        self.register_buffer("std", ours.get_buffer("std"), persistent=False)

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        decoder, head = self.decoder  # type: ignore[misc]
        normalised = (images - self.get_buffer("mean")) / self.get_buffer("std")
        logits = head(decoder(self.backbone(resized(normalised, scale))))
        return [F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)]


class Ones(nn.Module):
    """Where a gate was."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)


class NoEstimate(nn.Module):
    """A refinement block that is told nothing: half foreground, half background, everywhere."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, feature: Tensor, hidden: Tensor, coarser_logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(feature, hidden, torch.zeros_like(coarser_logits))


class FinestOnly(nn.Module):
    """A decoder whose other side outputs get no loss."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.decoder(features)[-1:]


def remove(part: str, network: CamouflageSegmenter) -> None:
    decoder, blocks = network.decoder, network.decoder.blocks
    if part == "context":
        decoder.context = decoder.context.reduce  # type: ignore[assignment]
    elif part == "estimate":
        decoder.blocks = nn.ModuleList(NoEstimate(block) for block in blocks)
    elif part == "mix":
        for block in blocks:
            block.mix = nn.Identity()
    elif part == "gate":
        for block in blocks:
            block.mix.gate = Ones()  # type: ignore[union-attr]
    elif part == "side-losses":
        network.decoder = FinestOnly(decoder)  # type: ignore[assignment]


def builder_of(model: str) -> Callable[[argparse.Namespace, bool], CamouflageSegmenter]:
    build = builders.build_network

    def build_other(args: argparse.Namespace, load_weights: bool) -> CamouflageSegmenter:
        ours = build(args, load_weights)
        torch.manual_seed(args.seed)
        if model in RIVALS:
            return Rival(model, ours, args.backbone)
        remove(model.removeprefix("without-"), ours)
        return ours

    return build if model == "ours" else build_other


@contextlib.contextmanager
def in_place_of_ours(model: str) -> Iterator[None]:
    build = builder_of(model)

    def build_trained(settings: Mapping[str, Any], img_size: int) -> CamouflageSegmenter:
        return build(builders.settings_of({**settings, "img_size": img_size}), False)

    train, use = (builders, "build_network", build), (trained, "build_as_trained", build_trained)
    with mock.patch.object(*train), mock.patch.object(*use):
        yield


def train_and_evaluate(model: str, seed: int, options: argparse.Namespace) -> None:
    name, *own_flags = model.split()
    directory = directory_of(model, seed, options)
    done = directory / scores_file(options)
    if done.exists():
        return
    print(f"== {model}, seed {seed}")
    flags = [
        *("--dataset-path", options.dataset_path, "--backbone", options.backbone, "--img-size", str(options.img_size)),
        *("--backbone-weights", options.backbone_weights, "--epochs", str(options.epochs), "--seed", str(seed)),
        *("--checkpoint-dir", str(directory), "--resume", "auto", *RECIPE, *options.more, *own_flags),
    ]
    with in_place_of_ours(name):
        if (code := command(["train", *flags])) != 0:
            raise SystemExit(code)
        checkpoint, result = str(directory / "best_model.pth"), directory / "unfinished.json"
        flags = ["--checkpoint", checkpoint, "--dataset-path", options.dataset_path, "--json", str(result)]
        flags += ["--tta"] if options.tta else []
        if options.validation_only:
            flags += ["--held-out"]
        elif not options.tta:
            flags += ["--save-predictions", str(directory / "predictions")]
        if (code := command(["evaluate", *flags])) != 0:
            raise SystemExit(code)
    result.rename(done)


def directory_of(model: str, seed: int, options: argparse.Namespace) -> Path:
    return options.out / f"{model.replace(' ', '_')}-{seed}"


def scores_file(options: argparse.Namespace) -> str:
    return f"{'held-out' if options.validation_only else 'test'}{'-tta' if options.tta else ''}.json"


def side_by_side(options: argparse.Namespace) -> Image.Image:
    """The predictions of the first seed's models on twelve test images, evenly spaced in the order of their names."""
    directories = [directory_of(model, options.seeds[0], options) for model in options.models]
    reports = [json.loads((directory / "test.json").read_text())["sets"] for directory in directories]
    (test_set,) = reports[0]
    scores = [{image["name"]: image["s_measure"] for image in report[test_set]["images"]} for report in reports]
    subsets = find_subsets(Path(options.dataset_path))
    pairs = [pair for subset in subsets if subset.split == "test" for pair in subset.pairs]
    rows = []
    for pair in sorted(pairs, key=lambda pair: pair.mask.name)[len(pairs) // 24 :: len(pairs) // 12][:12]:
        caption = " / ".join(f"S {score[pair.mask.name]:.3f}" for score in scores)
        files = [directory / "predictions" / test_set / f"{pair.mask.stem}.png" for directory in directories]
        rows.append((f"{pair.image.stem}  {caption}", [thumbnail(path) for path in (pair.image, pair.mask, *files)]))
    return contact_sheet(rows, ("image", "mask", *options.models))


def results(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Model -> scores of each seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(options.out.glob(f"*/{scores_file(options)}")):
        (scored,) = json.loads(path.read_text())["sets"].values()
        found.setdefault(path.parent.name.rpartition("-")[0].replace("_", " "), []).append(scored["scores"])
    return found


def measure(models: list[str], options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Model -> images a second in training, millions of parameters, GMACs of an image."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    amounts: dict[str, tuple[int, float, float]] = {}
    for model in models:
        pipes[model], theirs = context.Pipe()
        context.Process(target=take_steps, args=(model, options, theirs), daemon=True).start()
        amounts[model] = pipes[model].recv()
    seconds: dict[str, list[float]] = {model: [] for model in models}
    for round_number in range(options.speed_rounds + 2):
        for model in random.Random(round_number).sample(models, len(models)):
            pipes[model].send("go")
            taken = pipes[model].recv()
            if round_number >= 2:
                seconds[model].append(taken)
    return {
        model: (batch_size / statistics.median(seconds[model]), millions, gmacs)
        for model, (batch_size, millions, gmacs) in amounts.items()
    }


def take_steps(model: str, options: argparse.Namespace, pipe: Connection) -> None:
    """One model's process: tells how large it is, then, whenever it is asked, the mean seconds of a step."""
    keep_freed_memory()
    name, *own_flags = model.split()
    flags = ["--dataset-path", "x", "--backbone", options.backbone, "--no-pretrained", *RECIPE, *options.more]
    args = cli.parse(["train", *flags, "--img-size", str(options.img_size), *own_flags])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(args.precision, device)
    images = torch.rand(args.batch_size, 3, args.img_size, args.img_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    masks = (torch.rand(args.batch_size, 1, args.img_size, args.img_size, device=device) > 0.5).float()
    network = builders.on_device(builder_of(name)(args, False), device, torch.channels_last)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(images[:1])
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    pipe.send((args.batch_size, millions, counter.get_total_flops() / 2e9))
    network.train()
    with contextlib.suppress(EOFError):  # the end
        while pipe.recv() == "go":
            steps = [step_seconds(network, images, masks, precision, scale) for scale in args.multi_scale]
            pipe.send(statistics.mean(steps))


def step_seconds(network: nn.Module, images: Tensor, masks: Tensor, precision: Precision, scale: float) -> float:
    start = time.perf_counter()
    with precision.autocast():
        side_logits = network(images, scale)
    deep_supervision_loss(side_logits, masks, 0.5).backward()
    network.zero_grad()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def known(model: str) -> str:
    if model.split()[0] not in MODELS:
        raise argparse.ArgumentTypeError(f"{model} is none of {', '.join(MODELS)}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--backbone-weights", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", type=known, default=["ours", *RIVALS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--validation-only", action="store_true", help="the test set is not looked at")
    parser.add_argument("--tta", action="store_true", help="test scores with mirror images")
    parser.add_argument("--speed-rounds", type=int, default=15)
    parser.add_argument("more", nargs="*", help="after --: more flags of train, for all of them")
    parser.add_argument(
        "--contact-sheet", type=Path, help="picture of predictions of --models, by the first of --seeds"
    )
    options = parser.parse_args()
    if options.contact_sheet is not None and (options.validation_only or not options.seeds):
        parser.error(
            "--contact-sheet shows test images of the first of --seeds: not without, nor with --validation-only"
        )
    keep_freed_memory()
    for seed in options.seeds:
        for model in options.models:
            train_and_evaluate(model, seed, options)
    if options.contact_sheet is not None:
        side_by_side(options).save(options.contact_sheet)
    found = results(options)
    amounts = measure(sorted(found, key=lambda model: MODELS.index(model.split()[0])), options)
    print(f"| model | seeds | {' | '.join(SCORES.values())} | images/s | parameters | GMACs |")
    print("|---|---|" + "---|" * (len(SCORES) + 3))
    for model, (speed, millions, gmacs) in amounts.items():
        columns = []
        for name in SCORES:
            values = [scores[name] for scores in found[model]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            columns.append(f"{statistics.mean(values):.3f}{spread}")
        scores = " | ".join(columns)
        print(f"| {model} | {len(found[model])} | {scores} | {speed:.1f} | {millions:.2f} M | {gmacs:.2f} |")


if __name__ == "__main__":
    main()
