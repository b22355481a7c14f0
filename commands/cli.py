"""The command line: flags, defaults, help texts and what contradicts what. Imports nothing heavy."""

import argparse
import difflib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.settings import (
    DEMO_DEFAULTS,
    DEMO_DRILLS,
    NOT_RESUMED,
    SCALES,
    STAGE1_EPOCHS,
    STAGE1_SHARE,
    ZOOMS,
    UsageError,
    _check_img_size,
    _reconcile,
)


class _Parser(argparse.ArgumentParser):
    """Without the page of usage that argparse puts before an error, and without guessing at abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(
    argv: Sequence[str] | None, saved: dict[str, Any] | None = None, has_weights: bool = True
) -> argparse.Namespace:
    """Settings from the command line.

    Args:
        argv: without the program's name; None for ``sys.argv``.
        saved: settings of the run being resumed; they take the place of the defaults, and each difference is printed.
        has_weights: of that run, which not every setting fits.

    Raises:
        UsageError: unknown flags, values out of range, a change that the run being resumed does not allow.
    """
    parser = _Parser(
        prog="train_ultimate.py", description="Train camouflaged-object segmentation; do not lose the run."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser("train", usage="%(prog)s [flags]", help="train on a data set, or on synthetic scenes")
    demo = commands.add_parser(
        "demo", usage="%(prog)s [flags]", help="see it work: about two minutes on two CPU cores, nothing to download"
    )
    for command, defaults in ((train, {}), (demo, DEMO_DEFAULTS)):
        _add_training_flags(command)
        command.set_defaults(**defaults)
        command.set_defaults(**{key: value for key, value in (saved or {}).items() if key not in NOT_RESUMED})
    replay = commands.add_parser("replay", help="run an incident's window again and say what was at fault")
    replay.add_argument("incident", metavar="INCIDENT_DIR", help="a folder from a run's incidents/, or a copy of one")
    replay.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    _add_evaluate(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_report(commands)
    check_data = commands.add_parser("check-data", help="list what is wrong with a data set, file by file")
    _add_check_data_flags(check_data)
    args = _parsed(parser, sys.argv[1:] if argv is None else argv, commands.choices)
    if args.command in ("evaluate", "predict", "export") and args.checkpoint and Path(args.checkpoint).is_dir():
        args.checkpoint = type(args.checkpoint)(Path(args.checkpoint) / "best_model.pth")  # of a run's folder
    if args.command == "evaluate":
        _check_evaluate(args)
    if args.command in ("predict", "export") and args.img_size is not None:
        _check_img_size(args.img_size)
    if args.command not in ("train", "demo"):
        return args
    if args.stage1_epochs is None:
        args.stage1_epochs = min(STAGE1_EPOCHS, round(args.epochs * STAGE1_SHARE))
    args.zoom = sorted(set(args.zoom or ZOOMS))
    args.multi_scale = sorted(set(args.multi_scale or SCALES))
    if args.command == "demo" and args.resume is None:
        args.drill = args.drill or list(DEMO_DRILLS)
    if args.checkpoint_dir is None:
        beside = str(Path(args.resume).parent) if args.resume not in (None, "auto") else None
        fresh = time.strftime("demo-runs/%Y%m%d-%H%M%S") if args.command == "demo" else "./checkpoints"
        args.checkpoint_dir = beside or fresh
    if saved is not None:
        _reconcile(args, saved, has_weights)
    return args


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]
) -> argparse.Namespace:
    """``parse_args`` with better answers to flags that there are not, or that stand before the command."""
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        parser.error(f"{argv[0]}: the command comes first, one of {', '.join(commands)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[args.command]
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        known = [text for action in command._actions for text in action.option_strings]
        meant = [f"; did you mean {name}?" for name in difflib.get_close_matches(flag, known, 1)]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(meant)}")
    return args


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default to a help text that does not tell it itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = "default" in text or action.default in (None, False, [], argparse.SUPPRESS)
        return text if told else text + " (default: %(default)s)"


def _add_check_data_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    flag = parser.add_argument
    flag("--dataset-path", metavar="DIR", type=Path, required=True,
         help="the data set's folder, in any layout docs/data.md lists")
    flag("--json", metavar="FILE", type=Path, help="write the report there, too, every finding of it")
    flag("--write-exclude", metavar="FILE", type=Path,
         help="write a list of the training images that training is better without, for train --exclude")
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: check its images without camouflaged objects too")
    flag("--num-workers", type=_whole(0), help="processes that read (default: CPU cores, at most 8); 0: this one")
    # fmt: on


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    flag = parser.add_argument_group("data").add_argument
    flag("--dataset-path", help="the data set's folder, in any layout docs/data.md lists, or 'synthetic'")
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: take in its images without camouflaged objects too")
    flag("--exclude", metavar="FILE",
         help="leave out the pairs whose image or mask this file names, one path a line below the data set's folder; "
         "check-data --write-exclude writes one")
    flag("--img-size", type=_whole(64), default=384, help="side of the network's input in pixels; a multiple of 32")
    flag("--val-fraction", type=_number(0, 0.9), default=0.1, help="share of the training images to validate on")
    flag("--num-workers", type=_whole(0), help="processes that load images (default: CPU cores less one, at most 8)")

    flag("--cache", action=argparse.BooleanOptionalAction, default=False,
         help="decode every image once, into a file of 4 x img-size x img-size bytes each that all processes share")
    flag("--cache-dir", metavar="DIR",
         help="where such files are kept (default: train_ultimate in $XDG_CACHE_HOME or ~/.cache)")

    flag = parser.add_argument_group("model").add_argument
    flag("--backbone", default="pvt_v2_b2", help="any timm model that offers features_only")
    flag("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="start from timm's ImageNet weights")
    flag("--backbone-weights", help="start from this .pth or .safetensors file instead; nothing is downloaded")
    flag("--frozen-levels", metavar="N", type=_whole(0), default=0,
         help="keep what the backbone's N finest of four feature levels are computed from as pretrained, for good:"
         " less memory and time, of convolutional backbones much less")
    flag("--decoder-channels", type=_whole(8), default=64, help="width of the decoder; a multiple of 8")
    flag("--zoom", metavar="FACTOR", nargs="*", type=_number(0.25, 4, zero=True), default=[1.0],
         help="let the backbone see each image at these multiples of --img-size, and choose between them place by "
         "place; --zoom alone: 0.5 1 1.5. Time and memory grow with the sum of their squares")

    flag("--multi-scale", metavar="FACTOR", nargs="*", type=_number(0.25, 4, zero=True), default=[1.0],
         help="in training, let each window be seen at one of these multiples of its size, drawn at random; "
         "--multi-scale alone: 0.75 1 1.25")

    flag = parser.add_argument_group("schedule").add_argument
    flag("--epochs", type=_whole(1), default=140, help="epochs of both stages together")
    flag("--stage1-epochs", type=_whole(0),
         help="epochs with a frozen backbone at the start (default: 30, and of fewer than 140 epochs 3 in 14)")
    flag("--batch-size", type=_whole(1), default=2, help="images that go through the network at once")
    flag("--accumulation-steps", type=_whole(1), default=4, help="batches whose gradients make one optimizer step")
    flag("--lr", type=_number(0), default=0.00025, help="peak learning rate of the decoder in stage 1")
    flag("--stage2-lr-scale", type=_number(0), default=0.5, help="the decoder's in stage 2, as a multiple of --lr")
    flag("--backbone-lr-scale", type=_number(0), default=0.1, help="the backbone's, as a multiple of the decoder's")
    flag("--weight-decay", type=_number(0, zero=True), default=1e-4, help="AdamW's; norms and biases are exempt")
    flag("--ema-decay", type=_number(0, 1, zero=True), default=0.999,
         help="decay, per window, of the weight average that is validated and saved for use; 0: none")

    flag = parser.add_argument_group("stability").add_argument
    flag("--grad-clip", type=_number(0), default=0.5,
         help="gradients of a larger norm are scaled down to it; 0.3 for unstable runs")
    flag("--spike-policy", choices=("skip", "clip", "off"), default="skip",
         help="a gradient norm far above its own history: skip the window, only clip it, or take no notice")
    flag("--max-rollbacks", type=_whole(0), default=3,
         help="returns to an earlier state, in a row, before the run goes on in fp32 and then gives up; 0: never, and "
         "only weights that are not finite end the run")
    flag("--drill", metavar="KIND@WINDOW[xCOUNT][rRANK]", action="append", default=[],
         help="rehearse a fault at a window of the run, in COUNT attempts in a row; KIND is nan-loss, inf-grad, spike, "
         "overflow, nan-weight, bad-sample or kill; may be given several times (default: none; of demo: "
         f"{' and '.join(DEMO_DRILLS)})")
    flag("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto",
         help="number format of the forward pass; auto: bf16 where the hardware has it, else fp16 on CUDA, fp32 on CPU")
    flag("--seed", type=_whole(0, 2**63 - 1), default=42, help="decides split, order, augmentation and initial weights")
    flag("--deterministic", action=argparse.BooleanOptionalAction, default=False,
         help="the same bits from the same settings on CUDA too; slower")

    flag = parser.add_argument_group("checkpoints").add_argument
    flag("--resume", metavar="PATH|auto", help="go on from a checkpoint, or with 'auto' from the newest intact one; "
         "flags given beside it win over the saved settings")
    flag("--checkpoint-dir", help="where checkpoints, metrics.jsonl and config.json go (default: ./checkpoints; "
         "with --resume PATH, that file's folder; for demo, a new folder in demo-runs)")
    flag("--checkpoint-every", type=_whole(0), default=0,
         help="save in mid-epoch, too, every so many windows; 0: after epochs only")
    flag("--keep-checkpoints", type=_whole(1), default=3, help="how many epoch files to keep")

    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    flag("--rank-timeout", metavar="SECONDS", type=_number(0), default=60.0,
         help="with several processes (torchrun): the silence of one after which the others end")
    flag("--shard", action=argparse.BooleanOptionalAction, default=False,
         help="with several processes: split weights, gradients, moments and average between them (FSDP), for a "
         "network that is too large for one GPU with all of them; slower")
    flag("--augment-on", choices=("loader", "device"), default="loader",
         help="where training images are augmented; device: where the processes that load them cannot keep up")
    flag("--quiet", action=argparse.BooleanOptionalAction, default=False,
         help="tell warnings, incidents and errors alone, on standard error")
    flag("--json-logs", action=argparse.BooleanOptionalAction, default=False,
         help="print the lines of metrics.jsonl as they are written, instead of text; warnings go to standard error")
    flag("--channels-last", action=argparse.BooleanOptionalAction, default=True,
         help="the memory layout convolutions prefer")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="have torch.compile make kernels of network and loss; takes a minute or more when a stage begins")
    flag("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
         help="compute activations again in the backward pass instead of keeping them: less memory, a third more time")
    # fmt: on


def _add_evaluate(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "evaluate", usage="%(prog)s [flags]",
        help="score a checkpoint on test sets, or any method's predictions against masks",
    )  # fmt: skip
    # fmt: off
    flag = parser.add_argument_group("what to score").add_argument
    flag("--checkpoint", help="a checkpoint of train, such as best_model.pth; its averaged weights are scored")
    flag("--tta", action=argparse.BooleanOptionalAction, default=False,
         help="average the logits of each image and its mirror image: a little better at twice the time")
    flag("--predictions", metavar="DIR", help="predictions of any method, each with its mask's file name, instead")
    flag("--dataset-path", metavar="DIR", nargs="+",
         help="folders with test sets, in any layout docs/data.md lists; with --predictions, one folder of them a set")
    flag("--held-out", action=argparse.BooleanOptionalAction, default=False,
         help="with --checkpoint: instead of test sets, the images of --dataset-path that its run held out of training "
         "to validate on")
    flag("--masks", metavar="DIR", help="with --predictions: the folder with the masks, instead of --dataset-path")
    flag("--include-noncam", action=argparse.BooleanOptionalAction, default=False,
         help="COD10K: take in its images without camouflaged objects too")

    flag = parser.add_argument_group("what to write").add_argument
    flag("--json", metavar="FILE", help="everything: scores, curves, groups, and each image's scores")
    flag("--save-predictions", metavar="DIR", help="8-bit PNGs at the masks' sizes, in one folder a set")
    flag("--contact-sheet", metavar="FILE", help="a picture of the 24 worst: image, mask, prediction")
    # fmt: on
    _add_machine_flags(parser, "score")


def _add_predict(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = commands.add_parser(
        "predict", usage="%(prog)s --checkpoint FILE INPUT... --output DIR [flags]",
        help="find the objects in photographs; no masks needed",
    )  # fmt: skip
    # fmt: off
    parser.add_argument("inputs", metavar="INPUT", nargs="+",
                        help="an image; a folder, with all below it; or a quoted pattern such as 'frames/**/*.jpg'")
    flag = parser.add_argument_group("what to write").add_argument
    flag("--output", metavar="DIR", required=True,
         help="where PNGs go, at the photographs' sizes, in the input folder's sub-folders: probabilities x 255")
    flag("--threshold", metavar="P", type=_number(0, 1),
         help="write masks instead, 255 from this probability on, else 0")
    flag("--overlay", action=argparse.BooleanOptionalAction, default=False,
         help="beside them, in DIR/overlays, JPEGs of the photographs with the objects (probability from --threshold "
         "on, or else 0.5) tinted and outlined")

    flag = parser.add_argument_group("network").add_argument
    flag("--checkpoint", metavar="FILE", required=True,
         help="a checkpoint of train, such as best_model.pth; its averaged weights are used")
    flag("--tta", action=argparse.BooleanOptionalAction, default=False,
         help="average the logits of each image and its mirror image: a little better at twice the time")
    _add_machine_flags(parser, "decode and write")
    # fmt: on


def _add_machine_flags(parser: _Parser, work: str) -> None:
    """Of the commands that use a trained network."""
    # fmt: off
    flag = parser.add_argument_group("machine").add_argument
    flag("--img-size", type=_whole(32), help="side of the network's input (default: as it was trained)")
    flag("--batch-size", type=_whole(1), default=8, help="images that go through the network at once")
    flag("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="of the forward pass")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    flag("--num-workers", type=_whole(0), help=f"processes that {work} (default: CPU cores, at most 8); 0: this one")
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
    flag("--format", choices=("onnx", "torch", "safetensors"), required=True,
         help="onnx: a file for onnxruntime and others; torch: a .pt2 of torch.export, runs without this program; "
         "safetensors: a folder for from_pretrained and the Hugging Face hub")
    flag("--output", metavar="PATH", type=Path,
         help="file, or folder for safetensors (default: the checkpoint's name with another ending, beside it)")
    flag("--img-size", type=_whole(32), help="side of the network's input (default: as it was trained)")
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
        "--epochs", metavar="N", nargs="+", type=_whole(1), default=[],
        help="show validation images as predicted after these epochs (default: the best one)",
    )  # fmt: skip


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
        _check_img_size(args.img_size)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
        return value

    return convert


def _number(low: float, high: float = math.inf, zero: bool = False) -> Callable[[str], float]:
    """A finite number above ``low``, or equal to it where ``zero`` is set, and at most ``high``."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not (low < value <= high or (zero and value == low)):
            least = f"at least {low:g}" if zero else f"above {low:g}"
            most = f" and at most {high:g}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"must be {least}{most}, not {text}")
        return value

    return convert
