"""Test scores of our network and of segmentation_models.pytorch's, trained by the same command on the same weights.

    python benchmarks/accuracy.py --dataset-path data/CAMO --backbone-weights FILE --out DIR --seeds 1 2 3 \
        --models ours unet fpn deeplabv3plus upernet segformer [--epochs N] [--img-size PX] [-- flags of train]
    python benchmarks/accuracy.py ... --models ours without-context ... --validation-only

A model may bring flags of its own: --models "ours --zoom 1.25" ours.

All go through ``train``: same order of the same augmented images, same loss, optimizer, average, number of epochs and
validation images, which choose the best epoch. Rivals have one output, so one loss; ours has its side outputs. Then
they are scored on the test set; with --validation-only, which is for choosing between models and for ours without one
of its parts, on the validation images, and no test image is read. Results that DIR holds already are kept, and an
interrupted run is resumed, so a long table can be made in pieces. Without --seeds, only the table is printed.

Speed is measured separately: each model in a process of its own, as in training (in one process they would compete for
cached memory). They take turns at forward and backward pass on one batch, in another order each round.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from runs import seconds_of, settings_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from commands.scoring import Case, SetReport, scored_cases
from data.layouts import Pair, find_subsets, named_pairs, training_pairs
from data.processes import keep_freed_memory, num_cores
from evaluation.figures import contact_sheet, thumbnail
from evaluation.predictor import TrainedNetwork, predict_pairs
from losses import deep_supervision_loss
from models import CamouflageSegmenter, NetworkSettings, build_network
from models.backbone import speed_up_depthwise
from models.zoom import resized
from runtime.checkpoint import read_checkpoint
from runtime.files import write_json
from runtime.machine import Machine
from runtime.ranks import Ranks
from train_ultimate import ScriptParts
from train_ultimate import main as command
from training.setup import NetworkBuilder

RIVALS = ("unet", "fpn", "deeplabv3plus", "upernet", "segformer")
ABLATIONS = tuple(f"without-{part}" for part in ("context", "estimate", "mix", "gate", "side-losses"))
MODELS = ("ours", *ABLATIONS, *RIVALS)
SCORES = {"s_measure": "S", "weighted_f": "wF", "mae": "MAE", "mean_e": "mean E", "iou": "IoU"}
# Flags of the recipe that the baseline was measured with.
RECIPE = [
    *("--batch-size", "8", "--accumulation-steps", "1", "--stage1-epochs", "0", "--keep-checkpoints", "1"),
    *("--lr", "0.001", "--stage2-lr-scale", "1", "--backbone-lr-scale", "0.1", "--grad-clip", "1"),
]


class Rival(CamouflageSegmenter):
    """Network with a decoder of segmentation_models.pytorch instead of ours, on a backbone with the same weights."""

    def __init__(self, name: str, ours: CamouflageSegmenter, backbone_name: str) -> None:
        nn.Module.__init__(self)
        network: Any = smp.create_model(name, f"tu-{backbone_name}", encoder_weights=None)
        network.encoder.model.load_state_dict(ours.backbone.body.state_dict())
        speed_up_depthwise(network.encoder)  # as in ours: the comparison is between decoders
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
    """Constant of ones in the place of a gate."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.ones_like(values)


class NoEstimate(nn.Module):
    """Refinement block without an estimate: half foreground, half background, everywhere."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, feature: Tensor, hidden: Tensor, coarser_logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(feature, hidden, torch.zeros_like(coarser_logits))


class FinestOnly(nn.Module):
    """Decoder that returns only its finest output, so that the others get no loss."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return self.decoder(features)[-1:]


def remove(part: str, network: CamouflageSegmenter) -> None:
    """Take a part out of the decoder, for an ablation."""
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


def builder_of(model: str, seed: int) -> NetworkBuilder:
    """Return the function that builds a model; rivals draw their decoder's weights from the seed."""

    def build(
        settings: NetworkSettings, pretrained: bool = False, backbone_weights: Mapping[str, Tensor] | None = None
    ) -> CamouflageSegmenter:
        ours = build_network(settings, pretrained, backbone_weights)
        if model == "ours":
            return ours
        torch.manual_seed(seed)
        if model in RIVALS:
            return Rival(model, ours, settings.backbone)
        remove(model.removeprefix("without-"), ours)
        return ours

    return build


def train_and_score(model: str, seed: int, options: argparse.Namespace) -> None:
    name, *own_flags = model.split()
    directory, build = directory_of(model, seed, options), builder_of(name, seed)
    done = directory / scores_file(options)
    if done.exists():
        return
    print(f"== {model}, seed {seed}")
    flags = [
        *("--dataset-path", options.dataset_path, "--backbone", options.backbone, "--img-size", str(options.img_size)),
        *("--backbone-weights", options.backbone_weights, "--epochs", str(options.epochs), "--seed", str(seed)),
        *("--checkpoint-dir", str(directory), "--resume", "auto", *RECIPE, *options.more, *own_flags),
    ]
    if (code := command(["train", *flags], ScriptParts(build_network=build))) != 0:
        raise SystemExit(code)
    network = load(directory / "best_model.pth", build, options.tta)
    save_to = None if options.validation_only or options.tta else directory / "predictions"
    set_name, pairs = pairs_to_score(
        Path(options.dataset_path), network.held_out[0] if options.validation_only else None
    )
    report = score(network, set_name, pairs, save_to)
    write_json(done, {"sets": {set_name: report.to_json()}})


def load(path: Path, build: NetworkBuilder, tta: bool) -> TrainedNetwork:
    """Load a trained model with its averaged weights, as ``evaluate`` does with ours."""
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    settings = NetworkSettings.of(config["settings"])
    model = build(replace(settings, scales=(1.0,), frozen_levels=0), False, None)
    model.load_state_dict(checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"]["model"])
    machine = Machine.of("auto", "auto", channels_last=True, shard=False, ranks=Ranks())
    model, device = machine.place(model.eval()), machine.device
    held_out = tuple(config["validation"])
    return TrainedNetwork(
        (model,), settings.img_size, device, machine.precision, machine.memory_format, tta, (held_out,)
    )


def pairs_to_score(root: Path, held_out: tuple[str, ...] | None) -> tuple[str, list[Pair]]:
    """Return name and pairs of the dataset's test set, or of the images that were held out to validate on."""
    if held_out is not None:
        return "held-out", named_pairs(training_pairs(find_subsets(root, include_noncam=True), root), root, held_out)
    return root.resolve().name, [
        pair for subset in find_subsets(root) if subset.split == "test" for pair in subset.pairs
    ]


def score(network: TrainedNetwork, set_name: str, pairs: list[Pair], save_to: Path | None) -> SetReport:
    """Return the scores of ``evaluate``, and save predictions as it does."""
    folder = None if save_to is None else save_to / set_name
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def cases() -> Iterator[Case | str]:
        for index, prediction in predict_pairs(network, pairs, batch_size=8, num_workers=1):
            pair = pairs[index]
            save_as = None if folder is None else folder / f"{pair.mask.stem}.png"
            yield prediction if isinstance(prediction, str) else Case(set_name, pair.mask, None, prediction, save_as)

    report = SetReport()
    for result in scored_cases(cases(), num_cores()):
        if isinstance(result, str):
            raise SystemExit(f"not scored: {result}")
        report.add(*result)
    return report


def directory_of(model: str, seed: int, options: argparse.Namespace) -> Path:
    return options.out / f"{model.replace(' ', '_')}-{seed}"


def scores_file(options: argparse.Namespace) -> str:
    return f"{'held-out' if options.validation_only else 'test'}{'-tta' if options.tta else ''}.json"


def side_by_side(options: argparse.Namespace) -> Image.Image:
    """Return a picture of the first seed's predictions on twelve test images, evenly spaced in the order of names."""
    directories = [directory_of(model, options.seeds[0], options) for model in options.models]
    reports = [json.loads((directory / "test.json").read_text())["sets"] for directory in directories]
    (test_set,) = reports[0]
    scores = [{image["name"]: image["s_measure"] for image in report[test_set]["images"]} for report in reports]
    _, pairs = pairs_to_score(Path(options.dataset_path), held_out=None)
    rows = []
    for pair in sorted(pairs, key=lambda pair: pair.mask.name)[len(pairs) // 24 :: len(pairs) // 12][:12]:
        caption = " / ".join(f"S {score[pair.mask.name]:.3f}" for score in scores)
        files = [directory / "predictions" / test_set / f"{pair.mask.stem}.png" for directory in directories]
        rows.append((f"{pair.image.stem}  {caption}", [thumbnail(path) for path in (pair.image, pair.mask, *files)]))
    return contact_sheet(rows, ("image", "mask", *options.models))


def results(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return the scores of each seed by model."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted(options.out.glob(f"*/{scores_file(options)}")):
        (scored,) = json.loads(path.read_text())["sets"].values()
        found.setdefault(path.parent.name.rpartition("-")[0].replace("_", " "), []).append(scored["scores"])
    return found


def measure(models: list[str], options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Return images per second in training, millions of parameters and GMACs per image, by model."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    amounts: dict[str, tuple[int, float, float]] = {}
    for model in models:
        pipes[model], theirs = context.Pipe()
        context.Process(target=take_steps, args=(model, options, theirs), daemon=True).start()
        theirs.close()  # so that recv() raises EOFError if the process has died
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
    """Send a model's batch size, parameters and GMACs; then, on each request, the mean seconds of a step."""
    keep_freed_memory()
    name, *own_flags = model.split()
    flags = ["--dataset-path", "x", "--backbone", options.backbone, "--no-pretrained", *RECIPE, *options.more]
    settings = settings_of(*flags, "--img-size", str(options.img_size), *own_flags)
    machine = Machine.of("auto", settings.precision, channels_last=True, shard=False, ranks=Ranks())
    device, size = machine.device, settings.img_size
    images = torch.rand(settings.batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    masks = (torch.rand(settings.batch_size, 1, size, size, device=device) > 0.5).float()
    build = builder_of(name, settings.seed)
    network = machine.place(build(NetworkSettings.of(settings.to_dict()), False, None))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(images[:1])
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    pipe.send((settings.batch_size, millions, counter.get_total_flops() / 2e9))
    network.train()

    def step(scale: float) -> None:
        with machine.precision.autocast():
            side_logits = network(images, scale)
        deep_supervision_loss(side_logits, masks, 0.5).backward()
        network.zero_grad()

    with contextlib.suppress(EOFError):  # the main process has ended
        while pipe.recv() == "go":
            scales = settings.multi_scale
            pipe.send(statistics.mean(seconds_of(lambda scale=scale: step(scale), device) for scale in scales))


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
    parser.add_argument(
        "--validation-only", action="store_true", help="score on the validation images, not on the test set"
    )
    parser.add_argument("--tta", action="store_true", help="average over each image and its mirror image")
    parser.add_argument("--speed-rounds", type=int, default=15)
    parser.add_argument("more", nargs="*", help="after --: more flags of train, for all of them")
    parser.add_argument(
        "--contact-sheet", type=Path, help="picture to write, of predictions of --models with the first of --seeds"
    )
    options = parser.parse_args()
    if options.contact_sheet is not None and (options.validation_only or not options.seeds):
        parser.error("--contact-sheet shows test images: it needs --seeds, and does not go with --validation-only")
    keep_freed_memory()
    for seed in options.seeds:
        for model in options.models:
            train_and_score(model, seed, options)
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
