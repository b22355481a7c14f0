"""``export``: a checkpoint's network for other programs, as ONNX, as a .pt2 of torch.export, or as a folder."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from commands.output import print_lines, require_writable
from evaluation.predictor import load_network
from models.backbone import padding_for_multiples
from models.network import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.log import environment

MULTIPLE = 32  # of pixels: what sides that are left open are multiples of
TOLERANCE = 1e-4  # in probabilities, between what is exported and the network it was made from
_MOST_PIXELS, _MOST_IMAGES = 8192, 4096  # torch.export wants to know an end
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ""}
_ONNX_PACKAGES = ("onnx", "onnxscript")


class ExportedNetwork(nn.Module):
    """The network as it is exported: its finest output alone, as probabilities.

    Shape:
        images (B, 3, H, W) float32 RGB in [0, 1] -> (B, 1, H, W) float32 in [0, 1]
    """

    def __init__(self, network: CamouflageSegmenter) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[-1].sigmoid()


class Traced(NamedTuple):
    program: torch.export.ExportedProgram
    least_side: int | None  # of images, in pixels; None: they have one size


def export(
    checkpoint: Path, form: str, output: Path | None = None, img_size: int | None = None, fixed_size: bool = False
) -> int:
    """Write the averaged weights' network beside its name, check it, and only then give it the name.

    Args:
        checkpoint: of ``train``.
        form: onnx, torch or safetensors.
        output: file, or folder for safetensors; None for one beside the checkpoint.
        img_size: side of the images it is for; None for that of training.
        fixed_size: leave open how many images there are, but not their size.

    Returns:
        the exit code: 0, or 1 where what was exported does not compute what the network does.

    Raises:
        ValueError, OSError: the checkpoint or the place is not usable, packages are missing, torch cannot export it.
    """
    output = output or _beside(checkpoint, form)
    _require_place(output, form)
    if form == "onnx":
        _require_onnx()
    facts = _facts(checkpoint)
    trained = load_network(checkpoint, "cpu", "fp32", img_size)
    network = trained.model.to(memory_format=torch.contiguous_format).requires_grad_(False)  # type: ignore[call-overload]
    facts["img_size"] = trained.img_size
    print_lines([f"Network: {checkpoint}, backbone {facts['backbone']}, {trained.img_size} px"])
    unfinished = output.with_name(f".unfinished-{os.getpid()}-{output.name}")  # its ending is looked at, too
    try:
        if form == "safetensors":
            difference = _write_folder(unfinished, network, facts, output.name)
        else:
            write, load = (write_onnx, _load_onnx) if form == "onnx" else (_write_torch, _load_torch)
            traced = trace(network, trained.img_size, fixed_size)
            write(traced, unfinished, facts)
            exported = load(unfinished)
            sizes = sizes_to_check(trained.img_size, traced.least_side)
            difference = None if exported is None else largest_difference(exported, ExportedNetwork(network), sizes)
        if difference is not None and not difference <= TOLERANCE:  # NaN, too
            told = f"differs by {difference:.2g} in probabilities, more than {TOLERANCE:g}: not kept"
            print_lines([f"error: {output}: what was exported {told}"], to_stderr=True)
            return 1
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)
    print_lines(_summary(output, form, difference))
    return 0


def trace(network: CamouflageSegmenter, img_size: int, fixed_size: bool) -> Traced:
    """Through torch.export, with the number of images left open, and their size where the backbone allows it.

    Raises:
        ValueError: torch.export does not understand the backbone.
    """
    model = ExportedNetwork(network).eval()
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    reason = "--fixed-size" if fixed_size else "its backbone takes one size" if network.backbone.fixed_size else ""
    if not reason:
        # Where the smallest zoom still sees two features side by side: one alone is a special case to torch.export.
        smallest = min([1.0] if network.zoom is None else [1.0, *network.zoom.zooms])
        least = math.ceil(2 / smallest)  # in multiples
        height, width = (
            MULTIPLE * torch.export.Dim(name, min=least, max=_MOST_PIXELS // MULTIPLE) for name in ("height", "width")
        )
        side = max(img_size, least * MULTIPLE)
        images = torch.zeros(2, 3, side, side + MULTIPLE)
        try:
            with padding_for_multiples():
                program = torch.export.export(model, (images,), dynamic_shapes=({0: batch, 2: height, 3: width},))
            print_lines(
                [f"Images: any number, sides multiples of {MULTIPLE}, {least * MULTIPLE} to {_MOST_PIXELS} pixels"]
            )
            return Traced(program, least * MULTIPLE)
        except Exception as error:  # of what torch.export does not understand it makes anything
            reason = f"torch.export cannot leave it open for this backbone: {_first_line(error)}"
    print_lines([f"Images: any number, all of {img_size} x {img_size} pixels ({reason})"])
    try:
        images = torch.zeros(2, 3, img_size, img_size)
        return Traced(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), None)
    except Exception as error:
        raise ValueError(
            f"torch {torch.__version__} cannot export this backbone ({_first_line(error)}); "
            f"--format safetensors needs no export"
        ) from error


def sizes_to_check(img_size: int, least_side: int | None) -> list[tuple[int, int, int]]:
    """Numbers of images with their heights and widths: as trained, and if that is left open, others."""
    if least_side is None:
        return [(1, img_size, img_size), (3, img_size, img_size)]
    other = max(least_side, img_size // 2 // MULTIPLE * MULTIPLE)
    return [(1, img_size, img_size), (2, img_size + 2 * MULTIPLE, other), (3, least_side, least_side + MULTIPLE)]


def largest_difference(
    exported: Callable[[Tensor], Tensor], network: nn.Module, sizes: Sequence[tuple[int, int, int]]
) -> float:
    """In probabilities, over images of noise, coarse and fine; NaN where one of the two is not finite."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for count, height, width in sizes:
        coarse = torch.rand(count, 3, 6, 6, generator=generator)
        coarse = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
        images = 0.7 * coarse + 0.3 * torch.rand(count, 3, height, width, generator=generator)
        with torch.inference_mode():
            expected = network(images)
        differences.append((exported(images) - expected).abs().max())
    return float(torch.stack(differences).max())


def write_onnx(traced: Traced, path: Path, facts: dict[str, Any]) -> None:
    """One file. Images and probabilities are named, their open sides, too; facts are in its metadata."""
    import onnx_ir

    exported = torch.onnx.export(
        traced.program, dynamo=True, verbose=False, input_names=["images"], output_names=["probabilities"]
    )
    assert exported is not None
    graph = exported.model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        sides = list(value.shape)[2:] if traced.least_side is None else ["height", "width"]
        value.shape = onnx_ir.Shape(["batch", value.shape[1], *sides])
    exported.model.metadata_props.update({key: str(value) for key, value in facts.items()})
    try:
        exported.save(str(path), external_data=False)
    except ValueError as error:  # of protobuf
        raise ValueError(f"{path.name}: larger than an ONNX file can be, 2 GB ({_first_line(error)})") from error


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """What onnxruntime computes from it; None where that is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def _write_torch(traced: Traced, path: Path, facts: dict[str, Any]) -> None:
    torch.export.save(traced.program, path, extra_files={"facts.txt": "\n".join(f"{k}: {v}" for k, v in facts.items())})


def _load_torch(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return module(images)

    return run


def _write_folder(folder: Path, network: CamouflageSegmenter, facts: dict[str, Any], name: str) -> float:
    """Returns by how much what is read back differs: 0, or else it is not what was written."""
    network.save_pretrained(folder, facts)
    (folder / "README.md").write_text(model_card(name, facts), encoding="utf-8")
    read_back = CamouflageSegmenter.from_pretrained(folder).state_dict()
    weights = network.state_dict()
    same = weights.keys() == read_back.keys() and all(torch.equal(weights[key], read_back[key]) for key in weights)
    return 0.0 if same else float("nan")


def model_card(name: str, facts: dict[str, Any]) -> str:
    """README.md of the folder, with the header that the Hugging Face hub reads."""
    iou, kept = facts["validation_iou"], "the averaged" if facts["averaged_weights"] else "the"
    score = "" if iou is None else f"\nIoU at 0.5 on the validation images of its run: {iou:.4f}.\n"
    size = facts["img_size"]
    return f"""---
# license: yours to say, see https://huggingface.co/docs/hub/repositories-licenses
library_name: train_ultimate
pipeline_tag: image-segmentation
tags:
- camouflaged-object-detection
- image-segmentation
- pytorch
- timm
---

# {name}

Finds camouflaged objects in photographs: a {facts["backbone"]} with a coarse-to-fine decoder, for images of
{size} x {size} pixels. `model.safetensors` holds {kept} weights after epoch {facts["epoch"]} of training by
`train_ultimate`, `config.json` tells which network they are of.
{score}
## Use

With the folder of `train_ultimate` as working directory, or in `PYTHONPATH`:

```python
import torch
from models import CamouflageSegmenter

model = CamouflageSegmenter.from_pretrained("PATH")  # this folder, or "owner/name" on the hub
size = model.config["img_size"]
images = torch.rand(1, 3, size, size)  # RGB in [0, 1]; normalisation is part of the network
with torch.inference_mode():
    probabilities = model(images)[-1].sigmoid()  # (1, 1, size, size)
```
"""


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What is to be told about a checkpoint, wherever it goes."""
    saved = read_checkpoint(checkpoint)
    settings, progress = saved.get("config", {}).get("settings", {}), saved.get("progress", {})
    is_best = progress.get("best_epoch", 0) == progress.get("epoch") and progress.get("window") == 0
    return {
        "backbone": settings.get("backbone"),
        "decoder_channels": settings.get("decoder_channels"),
        "epoch": progress.get("epoch"),
        "validation_iou": progress["best_iou"] if is_best else None,  # known of the best epoch alone
        "averaged_weights": saved.get("ema") is not None,
        "exported_with": environment(Path(__file__), ("torch", "timm")),
    }


def _beside(checkpoint: Path, form: str) -> Path:
    return checkpoint.with_suffix(_SUFFIXES[form]) if _SUFFIXES[form] else checkpoint.with_suffix("")


def _require_place(output: Path, form: str) -> None:
    """Before anything is computed."""
    if form == "safetensors":
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ValueError(f"{output}: is there already; choose another --output, or remove it")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"{output}: cannot be made, there is no folder {output.parent}; create it first")
        return
    require_writable(output)
    if output.suffix != _SUFFIXES[form]:
        raise ValueError(f"{output}: --format {form} writes a file that ends in {_SUFFIXES[form]}")


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")


def _summary(output: Path, form: str, difference: float | None) -> list[str]:
    if form == "safetensors":
        files = ", ".join(sorted(path.name for path in output.iterdir()))
        return [f"Exported: {output} ({files}), read back bit for bit"]
    size = output.stat().st_size / 1e6
    with_what = "onnxruntime" if form == "onnx" else "torch.export.load"
    checked = (
        "Not checked: onnxruntime is not installed (pip install onnxruntime)"
        if difference is None
        else f"Checked with {with_what}: within {difference:.1g} of the network, in probabilities"
    )
    return [f"Exported: {output}, {size:.1f} MB; images (B, 3, H, W) -> probabilities (B, 1, H, W)", checked]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
