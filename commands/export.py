"""``export``: write a checkpoint's network for other programs, as ONNX, as a .pt2 of torch.export, or as a folder."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from commands.output import print_error, print_lines, require_writable
from commands.own_files import contains, require_own
from evaluation.trained import network_of
from models.backbone import padding_for_multiples
from models.network import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.files import first_line, replacing
from runtime.log import environment

MULTIPLE = 32  # pixels; networks take sides that are multiples of it
TOLERANCE = 1e-4  # largest difference in probabilities between the exported network and the original
_MOST_PIXELS, _MOST_IMAGES = 8192, 4096  # upper bounds that torch.export asks for
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ""}
_ONNX_PACKAGES = ("onnx", "onnxscript")


class ExportedNetwork(nn.Module):
    """Network as it is exported: only the finest output, as probabilities.

    Args:
        network: the trained network.
        any_size: repeat the last row and column of images up to the next multiple of 32, and crop the output.

    Shape:
        images (B, 3, H, W) float32 RGB in [0, 1] -> (B, 1, H, W) float32 in [0, 1]
    """

    def __init__(self, network: CamouflageSegmenter, any_size: bool) -> None:
        super().__init__()
        self.network = network
        self.any_size = any_size

    def forward(self, images: Tensor) -> Tensor:
        if not self.any_size:
            return self.network(images)[-1].sigmoid()
        height, width = images.shape[-2:]
        probabilities = self.network(_rows_and_columns(images, _next_multiple(height), _next_multiple(width)))[-1]
        return _rows_and_columns(probabilities, height, width).sigmoid()


def _next_multiple(side: int) -> int:
    return (side + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def _rows_and_columns(images: Tensor, height: int, width: int) -> Tensor:
    """Crop images at the bottom and on the right, or repeat their last row and column.

    By numbers of rows: padding and slices would have torch.export compare sides that it does not know.
    """
    for dim, side in ((2, height), (3, width)):
        images = images.index_select(dim, torch.arange(side, device=images.device).clamp(max=images.shape[dim] - 1))
    return images


class Traced(NamedTuple):
    """Program of torch.export, the module it was traced from, and the smallest images it takes."""

    program: torch.export.ExportedProgram
    model: ExportedNetwork
    least_side: int | None  # pixels; None: all images have one size


class _CheckError(Exception):
    """Failed check of an exported network against the original."""


def export(
    checkpoint: Path, form: str, output: Path | None = None, img_size: int | None = None, fixed_size: bool = False
) -> int:
    """Write a checkpoint's network under a temporary name, check it, and only then rename it.

    Args:
        checkpoint: checkpoint of ``train``; its averaged weights are exported if it has them.
        form: onnx, torch or safetensors.
        output: file, or folder for safetensors; None for one beside the checkpoint.
        img_size: side of the images in pixels; None for that of training.
        fixed_size: leave open how many images there are, but not their size.

    Returns:
        exit code: 0, or 1 if the exported network does not compute what the original does.

    Raises:
        ValueError, OSError: checkpoint or output cannot be used, packages are missing, or torch cannot export it.
    """
    output = output or _beside(checkpoint, form)
    _require_place(output, form)
    if form == "onnx":
        _require_onnx()
    saved = read_checkpoint(checkpoint)
    network = network_of(saved, checkpoint, img_size).requires_grad_(False)
    facts = _facts(saved, img_size)
    size = facts["img_size"]
    print_lines([f"Network: {checkpoint}, backbone {facts['backbone']}, {size} px"])
    try:
        with replacing(output, _SUFFIXES[form]) as unfinished:
            if form == "safetensors":
                difference = _write_folder(unfinished, network, facts, output.name)
            else:
                write, load = (write_onnx, _load_onnx) if form == "onnx" else (_write_torch, _load_torch)
                traced = trace(network, size, fixed_size)
                write(traced, unfinished, facts)
                exported, sizes = load(unfinished), sizes_to_check(size, traced.least_side)
                difference = None if exported is None else largest_difference(exported, traced.model, sizes)
            if difference is not None and not difference <= TOLERANCE:  # NaN, too
                raise _CheckError(f"differs by {difference:.2g} in probabilities, more than {TOLERANCE:g}: not kept")
    except _CheckError as error:
        print_error(f"{output}: the exported network {error}")
        return 1
    print_lines(_summary(output, form, difference))
    return 0


def trace(network: CamouflageSegmenter, img_size: int, fixed_size: bool) -> Traced:
    """Trace the network with torch.export, for any number of images, and any size if the backbone allows it.

    Raises:
        ValueError: torch.export does not understand the backbone.
    """
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    reason = "--fixed-size" if fixed_size else "its backbone takes one size" if network.backbone.fixed_size else ""
    if not reason:
        # The smallest zoom must see two features side by side: torch.export treats a single one as a special case.
        smallest = min([1.0] if network.zoom is None else [1.0, *network.zoom.zooms])
        least = (math.ceil(2 / smallest) - 1) * MULTIPLE + 1
        height, width = (torch.export.Dim(name, min=least, max=_MOST_PIXELS) for name in ("height", "width"))
        side = max(img_size, _next_multiple(least))
        images = torch.zeros(2, 3, side, side + MULTIPLE)
        model = ExportedNetwork(network, any_size=True).eval()
        try:
            with padding_for_multiples():
                program = torch.export.export(model, (images,), dynamic_shapes=({0: batch, 2: height, 3: width},))
            print_lines([f"Images: any number, sides of {least} to {_MOST_PIXELS} pixels"])
            return Traced(program, model, least)
        except Exception as error:  # torch.export raises anything if it does not understand a network
            reason = f"torch.export cannot leave the size open for this backbone: {first_line(error)}"
    print_lines([f"Images: any number, all of {img_size} x {img_size} pixels ({reason})"])
    try:
        images = torch.zeros(2, 3, img_size, img_size)
        model = ExportedNetwork(network, any_size=False).eval()
        return Traced(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), model, None)
    except Exception as error:
        raise ValueError(
            f"torch {torch.__version__} cannot export this backbone ({first_line(error)}); "
            f"use --format safetensors, which needs no export"
        ) from error


def sizes_to_check(img_size: int, least_side: int | None) -> list[tuple[int, int, int]]:
    """Return (number, height, width) of images to check with: the training size, and others if the size is open."""
    if least_side is None:
        return [(1, img_size, img_size), (3, img_size, img_size)]
    other = max(least_side, img_size // 2)
    return [(1, img_size, img_size), (2, img_size + 2 * MULTIPLE + 5, other), (3, least_side, least_side + MULTIPLE)]


def largest_difference(
    exported: Callable[[Tensor], Tensor], network: nn.Module, sizes: Sequence[tuple[int, int, int]]
) -> float:
    """Return the largest difference in probabilities, on images of coarse and fine noise; NaN if not all are finite."""
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
    """Write one ONNX file with named inputs, outputs and open dimensions, and with the facts as metadata."""
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
    except ValueError as error:  # from protobuf
        raise ValueError(
            f"--format onnx: an ONNX file holds at most 2 GB ({first_line(error)}); use --format torch"
        ) from error


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor] | None:
    """Return the function that onnxruntime computes from a file; None if onnxruntime is not installed."""
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
    """Write the folder, and return 0 if its weights are read back bit for bit, else NaN."""
    network.save_pretrained(folder, facts)
    (folder / "README.md").write_text(model_card(name, facts), encoding="utf-8")
    read_back = CamouflageSegmenter.from_pretrained(folder).state_dict()
    weights = network.state_dict()
    same = weights.keys() == read_back.keys() and all(torch.equal(weights[key], read_back[key]) for key in weights)
    return 0.0 if same else float("nan")


def model_card(name: str, facts: dict[str, Any]) -> str:
    """Return the folder's README.md, with the header that the Hugging Face hub reads."""
    iou, averaged = facts["validation_iou"], "averaged " if facts["averaged_weights"] else ""
    score = "" if iou is None else f"\nIoU at 0.5 on the validation images of its run: {iou:.4f}.\n"
    size = facts["img_size"]
    return f"""---
# license: choose one, see https://huggingface.co/docs/hub/repositories-licenses
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
{size} x {size} pixels. `model.safetensors` holds its {averaged}weights after epoch {facts["epoch"]} of training with
`train_ultimate`, and `config.json` describes the network.
{score}
## Use

Run this in the folder of `train_ultimate`, or with that folder in `PYTHONPATH`:

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


def _facts(saved: Mapping[str, Any], img_size: int | None) -> dict[str, Any]:
    """Return what an exported network says about its checkpoint."""
    settings, progress = saved["config"]["settings"], saved.get("progress", {})
    is_best = progress.get("best_epoch", 0) == progress.get("epoch") and progress.get("window") == 0
    return {
        "backbone": settings["backbone"],
        "decoder_channels": settings["decoder_channels"],
        "epoch": progress.get("epoch"),
        "validation_iou": progress["best_iou"] if is_best else None,  # checkpoints keep only that of the best epoch
        "averaged_weights": saved.get("ema") is not None,
        "exported_with": environment(Path(__file__), ("torch", "timm")),
        "img_size": img_size or settings["img_size"],
    }


def _beside(checkpoint: Path, form: str) -> Path:
    return checkpoint.with_suffix(_SUFFIXES[form]) if _SUFFIXES[form] else checkpoint.with_suffix("")


def _require_place(output: Path, form: str) -> None:
    """Check that the output can be written, before anything is computed."""
    if form == "safetensors":
        if output.exists() and not (output.is_dir() and not any(output.iterdir())):
            raise ValueError(f"{output}: exists already; choose another --output, or remove it")
        if not output.absolute().parent.is_dir():
            raise ValueError(f"{output}: cannot be written, there is no folder {output.parent}; create it first")
        return
    require_writable(output)
    require_own([output], contains(b"exported_with"), "export", f"--output {output}")  # one of the facts in each file
    if output.suffix != _SUFFIXES[form]:
        raise ValueError(f"{output}: --format {form} writes a file that ends in {_SUFFIXES[form]}; rename --output")


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx: needs {' and '.join(missing)}; pip install onnx onnxscript onnxruntime")


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
