"""The command line: commands, flags and help texts. Imports nothing heavy."""

import argparse
import dataclasses
import difflib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from runtime.folder import best_weights
from training.settings import (
    CHOICES,
    DEMO_DEFAULTS,
    DEMO_DRILLS,
    RANGES,
    Range,
    Settings,
    UsageError,
    above,
    check_img_size,
    whole,
)
from training.settings import flag as flag_of

PUBLISHED = Path(__file__).parents[1] / "evaluation" / "published.csv"
MEASURES = {  # titles as in papers
    "s_measure": "S", "weighted_f": "wF", "mae": "MAE", "adaptive_e": "adpE", "mean_e": "meanE", "max_e": "maxE",
    "adaptive_f": "adpF", "mean_f": "meanF", "max_f": "maxF", "iou": "IoU", "dice": "Dice",
}  # fmt: skip
FURTHER_MEASURES = {  # computed only when asked for
    "balanced_error": "BER", "multiscale_iou": "MSIoU", "context": "C", "camouflage_context": "CC",
    "size_invariant_f": "SI-F", "size_invariant_mae": "SI-MAE", "correction_effort": "HCE",
}  # fmt: skip
ALL_MEASURES = MEASURES | FURTHER_MEASURES
EXPORT_FORMATS = ("onnx", "torch", "safetensors")
_SEVERAL_GPUS = ("--gpus", "--num-gpus", "--devices", "--ngpus", "--nproc-per-node", "--distributed")  # elsewhere


_MASK_VALUES = (
    "how masks are read; auto: as 48 of them suggest, see docs/data.md; above-half: values above 128 are object, in a "
    "dark mask those above half of its brightest; nonzero: all but 0; nonzero-but-255: the same, and 255 counts in no "
    "loss and no score; alpha: the transparency of cut-outs; inverted: values that above-half leaves out"
)


@dataclass(frozen=True)
class Request:
    """What the user typed.

    Attributes:
        command: train, demo, evaluate, ...
        given: settings of ``train`` and ``demo`` that were typed, by name; and the checkpoint folder, always.
        preset: defaults of ``demo``; none for ``train``.
        args: arguments of the other commands.
    """

    command: str
    given: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    args: argparse.Namespace = field(default_factory=argparse.Namespace)

    @property
    def trains(self) -> bool:
        return self.command in ("train", "demo")


class _Parser(argparse.ArgumentParser):
    """A parser without the page of usage before an error, and without guesses at abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str] | None) -> Request:
    """Parse the command line.

    Args:
        argv: Arguments without the program's name; None for ``sys.argv``.

    Raises:
        UsageError: Unknown flags, values out of range.
    """
    parser = _Parser(
        prog="train_ultimate.py", description="Train camouflaged-object segmentation; do not lose the run."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser("train", usage="%(prog)s [flags]", help="train on a dataset, or on synthetic scenes")
    _add_training_flags(train, {})
    demo = commands.add_parser(
        "demo", usage="%(prog)s [flags]", help="see it work: about two minutes on two CPU cores, nothing to download"
    )
    _add_training_flags(demo, DEMO_DEFAULTS)
    _add_plan(commands)
    _add_replay(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_report(commands)
    _add_check_data(commands)
    args = _parsed(parser, sys.argv[1:] if argv is None else argv, commands.choices)
    command = vars(args).pop("command")
    if command in ("train", "demo"):
        return _training_request(command, vars(args))
    if command in ("evaluate", "predict", "export") and args.checkpoint and Path(args.checkpoint).is_dir():
        files = best_weights(Path(args.checkpoint))
        if len(files) > 1 and command == "export":
            raise UsageError(f"--checkpoint {args.checkpoint}: {len(files)} folds; name one file, such as {files[0]}")
        if len(files) == 1:
            args.checkpoint = type(args.checkpoint)(files[0])  # else the folder of --folds: an ensemble
    if command == "evaluate":
        _check_evaluate(args)
    if command == "compare":
        _check_compare(args)
    if command == "predict" and args.csv is None and (args.sort or args.least_object is not None):
        raise UsageError("--sort and --least-object go with --csv, the table they shape")
    if command in ("evaluate", "compare", "predict", "export") and args.img_size is not None:
        check_img_size(args.img_size)
    return Request(command, args=args)


def evaluate_arguments(**given: Any) -> argparse.Namespace:
    """Return the arguments of ``evaluate`` with some given: training with ``--folds`` ends with its scores."""
    commands = _Parser().add_subparsers()
    _add_evaluate(commands)
    return argparse.Namespace(**{**vars(commands.choices["evaluate"].parse_args([])), **given})


def _training_request(command: str, given: dict[str, Any]) -> Request:
    """Complete what was typed by what depends on the command: the folder, and the drills of a new demo."""
    resume = given.get("resume")
    if resume not in (None, "auto"):
        given.setdefault("checkpoint_dir", str(Path(resume).parent))
    if command == "train":
        return Request(command, {"checkpoint_dir": "./checkpoints", **given})
    if resume is None:
        given.setdefault("drill", list(DEMO_DRILLS))
    return Request(command, {"checkpoint_dir": time.strftime("demo-runs/%Y%m%d-%H%M%S"), **given}, DEMO_DEFAULTS)


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]
) -> argparse.Namespace:
    """Parse, with better answers than argparse's to unknown flags and to flags before the command."""
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"{argv[0]}: the command comes first, one of {', '.join(commands)}")
    if argv and argv[0] not in ("-h", "--help", *commands):
        meant = difflib.get_close_matches(argv[0], commands, 1)
        hint = f"did you mean {meant[0]}?" if meant else f"choose from {', '.join(commands)}"
        parser.error(f"{argv[0]}: no such command; {hint}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[args.command]
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        known = [text for action in command._actions for text in action.option_strings]
        meant = [f"; did you mean {name}?" for name in difflib.get_close_matches(flag, known, 1)]
        hint = "".join(meant)
        if flag in _SEVERAL_GPUS:
            hint = "; torchrun starts several GPUs: torchrun --nproc-per-node=gpu train_ultimate.py train ..."
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return args


class _HelpFormatter(argparse.HelpFormatter):
    """Formatter that adds the default to help texts that do not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        named = "default" in text or action.default in (None, False, [], argparse.SUPPRESS)
        return text if named else text + " (default: %(default)s)"


def _add_replay(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("replay", help="rerun an incident's window and say what was at fault")
    parser.add_argument("incident", metavar="INCIDENT_DIR", help="a folder from a run's incidents/, or a copy of one")
    parser.add_argument("--device", choices=CHOICES["device"], default="auto", help="auto: CUDA if there is one")


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "plan", usage="%(prog)s --dataset-path DIR [flags]",
        help="choose settings for your photographs and this machine, and say how long training takes",
    )  # fmt: skip
    # fmt: off
    flag = parser.add_argument
    flag("--dataset-path", metavar="DIR", type=Path, required=True,
         help="the dataset's folder, in any layout docs/data.md lists")
    flag("--hours", metavar="H", type=_number(above(0)), help="time for the whole training (default: what it takes)")
    flag("--backbone", metavar="NAME", help="any timm model that offers features_only (default: by the machine)")
    flag("--start-from", metavar="PATH|NAME",
         help="plan the training of a network that this program trained before, see train --start-from")
    flag("--json", metavar="FILE", type=Path, default=Path("plan.json"), help="file to write, for train --plan")
    flag("--exclude", metavar="FILE", help="leave out the pairs that this file names, see train --exclude")
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: use its images without camouflaged objects too")
    flag("--mask-values", choices=CHOICES["mask_values"], default="auto", help=_MASK_VALUES)
    flag("--device", choices=CHOICES["device"], default="auto", help="auto: CUDA if there is one")
    # fmt: on


def _add_check_data(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("check-data", help="list what is wrong with a dataset, file by file")
    # fmt: off
    flag = parser.add_argument
    flag("--dataset-path", metavar="DIR", type=Path, required=True,
         help="the dataset's folder, in any layout docs/data.md lists")
    flag("--json", metavar="FILE", type=Path, help="write the report there, too, every finding of it")
    flag("--write-exclude", metavar="FILE", type=Path,
         help="write a list of the training images that training is better without, for train --exclude")
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: check its images without camouflaged objects too")
    flag("--mask-values", choices=CHOICES["mask_values"], default="auto", help=_MASK_VALUES)
    flag("--num-workers", type=_number(whole(0)), help="processes that read (default: CPU cores, at most 8); 0: none")
    # fmt: on


def _add_training_flags(parser: argparse.ArgumentParser, preset: Mapping[str, Any]) -> None:
    """Add a flag for every field of ``Settings``. What is not typed stays out of the result: see ``Settings.resolve``.

    Args:
        parser: of ``train`` or ``demo``.
        preset: defaults of that command, for the help texts.
    """
    entries = {entry.name: entry for entry in dataclasses.fields(Settings)}

    def add(group: "argparse._ArgumentGroup", name: str, text: str, **options: Any) -> None:
        entry = entries.pop(name)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        default = preset.get(name, default)
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        if name in RANGES:
            options["type"] = _number(RANGES[name])
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        if "default" not in text and default not in (None, False, [], dataclasses.MISSING):
            text += f" (default: {default})"
        group.add_argument(flag_of(name), default=argparse.SUPPRESS, help=text, **options)

    # fmt: off
    group = parser.add_argument_group("data")
    add(group, "dataset_path", "the dataset's folder, in any layout docs/data.md lists, or 'synthetic'")
    add(group, "include_noncam", "COD10K: use its images without camouflaged objects too")
    add(group, "exclude",
        "leave out the pairs whose image or mask this file names, one path a line below the dataset's folder; "
        "check-data --write-exclude writes one", metavar="FILE")
    add(group, "mask_values", _MASK_VALUES)
    add(group, "img_size", "side of the network's input in pixels; a multiple of 32")
    add(group, "val_fraction", "share of the training images to validate on")
    add(group, "folds",
        "cross-validation: split the photographs into K parts, train a network for each that is validated on it and "
        "trained on the others, in a folder of its own, and score every photograph by the network that has not seen it",
        metavar="K")
    add(group, "fold", "with --folds: train the network of this part only, from 1, say on another machine", metavar="N")
    add(group, "num_workers", "processes that load images (default: CPU cores less one, at most 8)")
    add(group, "cache", "decode every image once, into a file of 4 x img-size x img-size bytes each, which all "
        "processes share")
    add(group, "cache_dir", "folder of such files (default: train_ultimate in $XDG_CACHE_HOME or ~/.cache)",
        metavar="DIR")

    group = parser.add_argument_group("model")
    add(group, "backbone", "any timm model that offers features_only")
    add(group, "pretrained", "start from timm's ImageNet weights")
    add(group, "backbone_weights", "start from this .pth or .safetensors file instead; nothing is downloaded")
    add(group, "start_from",
        "start from a network that this program trained, on these data and with a schedule of its own: a checkpoint, a "
        "run's folder, a folder of export, owner/name on the Hugging Face hub, or a file of weights",
        metavar="PATH|NAME")
    add(group, "rehearse",
        "against forgetting: mix in photographs of this dataset, which the network of --start-from was trained on, and "
        "validate on both", metavar="DIR")
    add(group, "rehearse_share", "share of each epoch's photographs that --rehearse brings, if it has so many",
        metavar="F")
    add(group, "plan",
        "take the settings that plan has written to this file; flags that are given win", metavar="FILE")
    add(group, "frozen_levels",
        "keep the layers below the backbone's N finest of four feature levels as pretrained, throughout: less memory "
        "and time, much less for convolutional backbones", metavar="N")
    add(group, "decoder_channels", "width of the decoder; a multiple of 8")
    add(group, "zoom",
        "show the backbone each image at these multiples of --img-size, and choose between them place by place; --zoom "
        "without factors: 0.5 1 1.5. Time and memory grow with the sum of their squares", metavar="FACTOR", nargs="*")
    add(group, "multi_scale",
        "in training, scale each window by one of these factors, drawn at random; --multi-scale without factors: "
        "0.75 1 1.25", metavar="FACTOR", nargs="*")

    group = parser.add_argument_group("schedule")
    add(group, "epochs", "epochs of both stages together")
    add(group, "stage1_epochs",
        "epochs with a frozen backbone at the start (default: 30, and of fewer than 140 epochs 3 in 14)")
    add(group, "batch_size", "images per forward pass")
    add(group, "accumulation_steps", "batches whose gradients make one optimizer step")
    add(group, "lr", "peak learning rate of the decoder in stage 1")
    add(group, "stage2_lr_scale", "the decoder's learning rate in stage 2, as a multiple of --lr")
    add(group, "backbone_lr_scale", "the backbone's learning rate, as a multiple of the decoder's")
    add(group, "weight_decay", "AdamW's weight decay; norms and biases are exempt")
    add(group, "ema_decay",
        "decay, per window, of the weight average that is validated and saved for use; 0: no average")

    group = parser.add_argument_group("stability")
    add(group, "grad_clip", "gradients of a larger norm are scaled down to it; 0.3 for unstable runs")
    add(group, "spike_policy",
        "a gradient norm far above its own history: skip the window, only clip it, or ignore it")
    add(group, "max_rollbacks",
        "rollbacks in a row before the run continues in fp32, and then ends; 0: never roll back, and end only when "
        "weights are not finite")
    add(group, "drill",
        "rehearse a fault at a window of the run, in COUNT attempts in a row, on rank RANK; KIND is nan-loss, "
        "inf-grad, spike, overflow, nan-weight, bad-sample or kill; may be given several times (default: none; of "
        f"demo: {' and '.join(DEMO_DRILLS)})", metavar="KIND@WINDOW[xCOUNT][rRANK]", action="append")
    add(group, "precision",
        "number format of the forward pass; auto: bf16 if the hardware has it and, on a CPU, is faster with it, else "
        "fp16 on CUDA, fp32 on CPU")
    add(group, "seed", "decides split, order, augmentation and initial weights")
    add(group, "deterministic", "the same bits from the same settings on CUDA too; slower")

    group = parser.add_argument_group("checkpoints")
    add(group, "resume",
        "continue from a checkpoint, or with 'auto' from the newest intact one; flags given with it win over the saved "
        "settings", metavar="PATH|auto")
    add(group, "checkpoint_dir",
        "folder for checkpoints, metrics.jsonl and config.json (default: ./checkpoints; with --resume PATH, that "
        "file's folder; for demo, a new folder in demo-runs)")
    add(group, "checkpoint_every", "save mid-epoch too, every so many windows; 0: after epochs only")
    add(group, "keep_checkpoints", "number of epoch files to keep")
    add(group, "max_hours",
        "save and end in time for a session of so many hours from now, with exit code 0; the same command with "
        "--resume auto goes on", metavar="HOURS")

    group = parser.add_argument_group("machine")
    add(group, "device", "auto: CUDA if there is one")
    add(group, "threads", "CPU threads that torch computes with, in each process (default: CPU cores); fewer leave "
        "room for other programs")
    add(group, "rank_timeout",
        "with several processes (torchrun): end the run when a process has been silent for this long",
        metavar="SECONDS")
    add(group, "shard",
        "with several processes: split weights, gradients, moments and average between them (FSDP), for a network "
        "that does not fit one GPU together with them; slower")
    add(group, "augment_on",
        "where training images are augmented; device: if the processes that load them cannot keep up")
    add(group, "quiet", "print only warnings, incidents and errors, to standard error")
    add(group, "json_logs",
        "print the lines of metrics.jsonl as they are written, instead of text; warnings go to standard error")
    add(group, "channels_last", "the memory layout that convolutions prefer")
    add(group, "compile",
        "compile network and loss with torch.compile; takes a minute or more at the start of a stage")
    add(group, "gradient_checkpointing",
        "recompute activations in the backward pass instead of keeping them: less memory, a third more time")
    # fmt: on
    assert not entries, f"settings without a flag: {entries}"


def _add_evaluate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "evaluate", usage="%(prog)s [flags]",
        help="score a checkpoint on test sets, or any method's predictions against masks",
    )  # fmt: skip
    # fmt: off
    flag = parser.add_argument_group("what to score").add_argument
    flag("--checkpoint", metavar="PATH",
         help="a checkpoint of train, such as best_model.pth, or a run's folder; its averaged weights are scored. The "
         "folder of train --folds: an ensemble")
    flag("--tta", action=argparse.BooleanOptionalAction, default=False,
         help="average the logits of each image and its mirror image: a little better at twice the time")
    flag("--predictions", metavar="DIR", help="predictions of any method, each with its mask's file name, instead")
    flag("--dataset-path", metavar="DIR", nargs="+",
         help="folders with test sets, in any layout docs/data.md lists; with --predictions, one folder of them a set")
    flag("--held-out", action=argparse.BooleanOptionalAction, default=False,
         help="with --checkpoint: instead of test sets, the images of --dataset-path that its run held out of training "
         "to validate on")
    flag("--masks", metavar="DIR", help="with --predictions: the folder with the masks, instead of --dataset-path")
    _add_protocol_flags(flag)

    flag = parser.add_argument_group("what to write").add_argument
    flag("--json", metavar="FILE", help="everything: scores, curves, groups, and each image's scores")
    flag("--save-predictions", metavar="DIR", help="8-bit PNGs at the masks' sizes, in one folder a set")
    flag("--contact-sheet", metavar="FILE", help="a picture of the 24 worst: image, mask, prediction")
    # fmt: on
    _add_machine_flags(parser, "score")


def _add_protocol_flags(flag: Callable[..., Any]) -> None:
    """Add the flags that decide how predictions are scored."""
    # fmt: off
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: take in its images without camouflaged objects too")
    flag("--mask-values", choices=CHOICES["mask_values"], default="auto", help=_MASK_VALUES)
    flag("--stretch", action=argparse.BooleanOptionalAction, default=True,
         help="stretch each prediction from its darkest to its brightest value before it is scored, as the field does; "
         "--no-stretch: score it as it is, so that a faint one stays faint")
    flag("--convention", choices=("pysod", "matlab"), default="pysod",
         help="whose curves of E and F: those of PySODMetrics, or of the MATLAB code of older papers, where a pixel at "
         "a threshold does not count for E, and values are not rounded to 8 bits; S, weighted F and MAE are the same")
    # fmt: on


def _add_compare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "compare", usage="%(prog)s METHOD... (--dataset-path DIR... | --masks DIR) [flags]",
        help="score several methods on test sets: one table, and whether differences mean anything",
    )  # fmt: skip
    # fmt: off
    parser.add_argument("methods", metavar="METHOD", nargs="+",
                        help="a folder with predictions, in one folder a set; a folder of several methods, or of one "
                        "method's runs (seed1, seed2, ...); a checkpoint or a run's folder; each also as NAME=PATH")
    flag = parser.add_argument_group("what to score").add_argument
    flag("--dataset-path", metavar="DIR", nargs="+", help="folders with test sets, in any layout docs/data.md lists")
    flag("--masks", metavar="DIR", type=Path, help="the folder with the masks of one set, instead; predictions only")
    flag("--tta", action=argparse.BooleanOptionalAction, default=False,
         help="checkpoints: average the logits of each image and its mirror image")
    _add_protocol_flags(flag)
    flag("--cache-dir", type=Path, metavar="DIR",
         help="where scores are kept, so that a new method costs only itself (default: the user's cache folder)")

    flag = parser.add_argument_group("what to compare").add_argument
    flag("--measures", nargs="+", choices=ALL_MEASURES, default=["s_measure", "weighted_f", "mae", "mean_e"],
         metavar="NAME", help=f"of {', '.join(ALL_MEASURES)} (default: s_measure weighted_f mae mean_e)")
    flag("--baseline", metavar="NAME",
         help="say of each other method whether it differs from this one beyond chance: bootstrap interval, Wilcoxon's "
         "test, Holm's correction")
    flag("--published", type=Path, metavar="FILE", nargs="?", const=PUBLISHED,
         help="also numbers from papers, for sets of the same size: the program's own, evaluation/published.csv, or a "
         "file like it")
    flag("--attributes", type=Path, metavar="FILE",
         help="a CSV of groups to show on the page: a column name, and a column for each attribute of the images")

    flag = parser.add_argument_group("what to write").add_argument
    flag("--figure", type=Path, metavar="FILE",
         help="an SVG or PDF for a paper: images, masks and predictions in a grid (needs matplotlib)")
    flag("--figure-rows", metavar="NAME", nargs="+", default=[],
         help="its images, by name (default: the 6 on which methods differ most)")
    flag("--curves", type=Path, metavar="FILE", help="an SVG or PDF of the curves (needs matplotlib)")
    for name, what in (("json", "everything: scores, curves, groups, each image's scores, and the differences"),
                       ("markdown", "the table in Markdown"), ("latex", "the table for LaTeX, with booktabs"),
                       ("csv", "the table for a spreadsheet, with all digits"),
                       ("page", "an HTML page: tables to sort, curves, groups, images on which methods differ")):
        flag(f"--{name}", type=Path, metavar="FILE", help=what)
    # fmt: on
    _add_machine_flags(parser, "score")


def _add_predict(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "predict", usage="%(prog)s --checkpoint PATH INPUT... --output DIR [flags]",
        help="find the objects in photographs; no masks needed",
    )  # fmt: skip
    # fmt: off
    parser.add_argument("inputs", metavar="INPUT", nargs="+",
                        help="an image; a folder, with all below it; or a quoted pattern such as 'frames/**/*.jpg'")
    flag = parser.add_argument_group("what to write").add_argument
    flag("--output", metavar="DIR", required=True,
         help="where PNGs go, at the photographs' sizes, in the input folder's sub-folders: probabilities x 255")
    flag("--threshold", metavar="P", type=_number(above(0, 1)),
         help="write masks instead, 255 from this probability on, else 0")
    flag("--overlay", action=argparse.BooleanOptionalAction, default=False,
         help="beside them, in DIR/overlays, JPEGs of the photographs with the objects (probability from --threshold "
         "on, or else 0.5) tinted and outlined")
    flag("--csv", metavar="FILE", type=Path,
         help="a table of all photographs: share of object, presence, number of objects, their boxes, doubt")
    flag("--sort", choices=("input", "doubt"),
         help="the table's order; doubt: most doubtful first, what to label next (default: input)")
    flag("--least-object", metavar="SHARE", type=_number(Range(0, 1)),
         help="smallest object in the table, as a share of its photograph (default: 0.0001)")

    flag = parser.add_argument_group("network").add_argument
    flag("--checkpoint", metavar="PATH", required=True,
         help="a checkpoint of train, such as best_model.pth, or a run's folder; its averaged weights are used. The "
         "folder of train --folds: an ensemble")
    flag("--tta", action=argparse.BooleanOptionalAction, default=False,
         help="average the logits of each image and its mirror image: a little better at twice the time")
    _add_machine_flags(parser, "decode and write")
    # fmt: on


def _add_machine_flags(parser: _Parser, work: str) -> None:
    """Add the flags of commands that use a trained network."""
    # fmt: off
    flag = parser.add_argument_group("machine").add_argument
    flag("--img-size", type=_number(whole(32)), help="side of the network's input (default: as it was trained)")
    flag("--batch-size", type=_number(whole(1)), default=8, help="images that go through the network at once")
    flag("--precision", choices=CHOICES["precision"], default="auto", help="number format of the forward pass")
    flag("--device", choices=CHOICES["device"], default="auto", help="auto: CUDA if there is one")
    flag("--num-workers", type=_number(whole(0)),
         help=f"processes that {work} (default: CPU cores, at most 8); 0: none")
    # fmt: on


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "export", usage="%(prog)s --checkpoint FILE --format FORMAT [flags]",
        help="write a checkpoint's network for other programs",
    )  # fmt: skip
    # fmt: off
    flag = parser.add_argument
    flag("--checkpoint", metavar="FILE", type=Path, required=True,
         help="a checkpoint of train, such as best_model.pth; its averaged weights are exported")
    flag("--format", type=_export_format, required=True, metavar="{onnx,torch,safetensors}",
         help="onnx: a file for onnxruntime and others; torch: a .pt2 of torch.export, runs without this program; "
         "safetensors: a folder for from_pretrained and the Hugging Face hub")
    flag("--output", metavar="PATH", type=Path,
         help="file, or folder for safetensors (default: the checkpoint's name with another ending, beside it)")
    flag("--img-size", type=_number(whole(32)), help="side of the network's input (default: as it was trained)")
    flag("--fixed-size", action=argparse.BooleanOptionalAction, default=False,
         help="onnx, torch: images of --img-size alone, for compilers that want to know; any number of them still")
    # fmt: on


def _add_report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser("report", help="curves, incidents and pictures of a run, or of several, as one page")
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="a run's --checkpoint-dir")
    parser.add_argument(
        "--output", metavar="FILE", type=Path,
        help="the page to write (default: report.html in the run's folder; of several runs, comparison.html here)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", metavar="N", nargs="+", type=_number(whole(1)), default=[],
        help="show validation images as predicted after these epochs (default: the best one)",
    )  # fmt: skip


def _check_compare(args: argparse.Namespace) -> None:
    if (args.dataset_path is None) == (args.masks is None):
        raise UsageError("compare needs --dataset-path or --masks, one of them")
    if args.figure_rows and args.figure is None:
        raise UsageError("--figure-rows goes with --figure, whose images they are")
    if args.attributes is not None and args.page is None:
        raise UsageError("--attributes goes with --page, which shows their groups")


def _check_evaluate(args: argparse.Namespace) -> None:
    if (args.checkpoint is None) == (args.predictions is None):
        raise UsageError("evaluate needs --checkpoint or --predictions, one of them")
    if args.checkpoint is not None and (args.dataset_path is None or args.masks is not None):
        raise UsageError("--checkpoint goes with --dataset-path, the folder with the test sets")
    if args.predictions is not None and (args.dataset_path is None) == (args.masks is None):
        raise UsageError("--predictions goes with --masks or --dataset-path, one of them")
    if args.predictions is not None and args.save_predictions is not None:
        raise UsageError("--save-predictions goes with --checkpoint; these are saved already")
    if args.held_out and (args.predictions is not None or len(args.dataset_path) > 1):
        raise UsageError("--held-out goes with --checkpoint and one --dataset-path, the folder it was trained with")
    if args.predictions is not None and args.tta:
        raise UsageError("--tta goes with --checkpoint; these predictions are made already")
    if args.img_size is not None:
        check_img_size(args.img_size)


def _export_format(text: str) -> str:
    """Return a format of ``export``; name the way to others that users ask for."""
    if text in EXPORT_FORMATS:
        return text
    way = ""
    if text.lower() in ("tflite", "litert"):
        way = ". TFLite files are made from an ONNX file by other programs: --format onnx --fixed-size, then onnx2tf"
    elif text.lower() in ("tensorrt", "trt", "engine", "openvino", "coreml"):
        way = f". {text} starts from an ONNX file: export --format onnx, then that program's own converter"
    raise argparse.ArgumentTypeError(f"no such format: {text!r}; choose from {', '.join(EXPORT_FORMATS)}{way}")


def _number(accepted: Range) -> Callable[[str], float]:
    """Return the conversion of a flag's text to a number in a range."""

    def convert(text: str) -> float:
        try:
            value = int(text) if accepted.whole else float(text)
        except ValueError:
            kind = "a whole number" if accepted.whole else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
        if problem := accepted.problem(value):
            raise argparse.ArgumentTypeError(problem)
        return value

    return convert
