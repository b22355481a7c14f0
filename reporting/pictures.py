"""Validation images with their predictions for a report. The only part of it that needs torch, and imports it late."""

import base64
import bisect
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.decoding import decode_image, decode_mask
from data.layouts import Pair, by_name, find_subsets, training_pairs
from evaluation.figures import thumbnail
from evaluation.metrics import quick_scores
from reporting.history import RunHistory, whole
from runtime.folder import BEST

SHOWN = 3  # of the worst, and of the best
FEW, FEW_SECONDS = 16, 20.0  # images looked at when a run ends, and the time after which no further batch is begun
_BATCH = 8
_TITLES = ("image", "mask", "prediction", "error map")
_FALSE_ALARM, _MISS = (255, 140, 0), (64, 128, 255)  # told apart by readers of any colour vision


@dataclass(frozen=True)
class Panel:
    title: str
    alt: str
    data_uri: str
    width: int  # in pixels
    height: int


@dataclass(frozen=True)
class Example:
    """One validation image. ``panels`` are image, mask, prediction and error map."""

    name: str
    rank: str  # worst or best
    scores: dict[str, float]
    panels: list[Panel]


@dataclass(frozen=True)
class Gallery:
    """Of one epoch. Without examples, ``note`` says why; with them, what they were chosen from."""

    title: str
    note: str
    examples: list[Example]


def galleries(run: RunHistory, epochs: Sequence[int], few: bool = False) -> list[Gallery]:
    """The worst and the best validation images by IoU, for each epoch, or for the best one where none is given.

    Args:
        run: whose folder holds the checkpoints.
        epochs: from 1.
        few: look at some images alone, spread over the set: for the end of a run, which should not wait.
    """
    best = run.checkpoints.get(BEST, (0, 0))[0] or (run.best[1] if run.best else 0)
    wanted = epochs or [best]
    return [_gallery(run, epoch, is_best=epoch == best, few=few) for epoch in wanted]


def _gallery(run: RunHistory, epoch: int, is_best: bool, few: bool) -> Gallery:
    title = f"Epoch {epoch}" + (", the best" if is_best else "")
    if not epoch:
        return Gallery("Validation images", "No epoch has been validated yet.", [])
    file = run.directory / f"epoch_{epoch:04d}.pth"
    if is_best and not file.exists():
        file = run.directory / BEST
    if not file.exists():
        there = sorted(int(found[1]) for path in run.directory.iterdir() if (found := _EPOCH_FILE.fullmatch(path.name)))
        kept = f"kept are {', '.join(map(str, there))}" if there else "no epoch's file is kept"
        return Gallery(title, f"{file.name} is not there: {kept}.", [])
    try:
        pairs = _validation_pairs(run)
    except (ValueError, OSError) as error:
        return Gallery(title, f"No pictures, for the data set is not to be had: {error}.", [])
    return _predicted(run, file, title, pairs, few)


_EPOCH_FILE = re.compile(r"epoch_(\d+)\.pth")


def _validation_pairs(run: RunHistory) -> list[tuple[str, Pair]]:
    """Those that the run's folder names and that are there.

    Raises:
        ValueError, OSError: none of them, or no data set.
    """
    names = {name for name in run.config.get("validation") or [] if name not in run.unreadable}
    path = run.settings.get("dataset_path")
    if not names or not isinstance(path, str):
        raise ValueError("the run does not tell which images it was validated on")
    root = run.directory / "synthetic" if path == "synthetic" else Path(path)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder here")
    found = training_pairs(find_subsets(root, bool(run.settings.get("include_noncam"))), root)
    pairs = [(name, pair) for name, pair in by_name(found, root).items() if name in names]
    if not pairs:
        raise ValueError(f"{root}: none of the {len(names)} validation images is there")
    return pairs


def _predicted(run: RunHistory, file: Path, title: str, pairs: Sequence[tuple[str, Pair]], few: bool) -> Gallery:
    from evaluation.predictor import (  # torch: seconds that a page without pictures does not take
        load_network,
        predict_pairs,
    )

    total = len(pairs)
    if few and total > FEW:
        pairs = [pairs[index] for index in np.linspace(0, total - 1, FEW).round().astype(int)]
    device = "auto" if run.end is not None else "cpu"  # the GPU's memory belongs to a run that is still going
    precision = "fp32" if run.config.get("precision") == "fp32" else "auto"
    network = load_network(file, device, precision, None)
    batch_size = min(_BATCH, whole(run.settings, "batch_size", _BATCH))
    ranked: list[tuple[float, int]] = []  # IoU and index, the worst first
    kept: dict[int, tuple[dict[str, float], NDArray[np.uint8]]] = {}
    failed = 0
    begun = time.monotonic()
    for index, prediction in predict_pairs(network, [pair for _, pair in pairs], batch_size, 0):
        if isinstance(prediction, str):
            failed += 1
            continue
        try:
            scores = quick_scores(prediction, decode_mask(pairs[index][1].mask))
        except ValueError:
            failed += 1
            continue
        bisect.insort(ranked, (scores["iou"], index))
        kept[index] = scores, prediction
        shown = {index for _, index in [*ranked[:SHOWN], *ranked[-SHOWN:]]}
        kept = {index: value for index, value in kept.items() if index in shown}
        if few and time.monotonic() - begun > FEW_SECONDS:
            break
    if not ranked:
        return Gallery(title, f"No pictures: not one of {len(pairs)} images could be predicted and scored.", [])
    worst = ranked[: min(SHOWN, -(-len(ranked) // 2))]
    best = ranked[max(len(worst), len(ranked) - SHOWN) :]
    examples = [
        _example(pairs[index], rank, kept[index])
        for rank, chosen in (("worst", worst), ("best", best[::-1]))
        for _, index in chosen
    ]
    share = f"all {total}" if len(ranked) == total else f"{len(ranked)} of {total}"
    note = f"Chosen by IoU from {share} validation images, predicted with {file.name}, stretched as evaluate does."
    note += " Report DIR looks at all of them." if few and len(ranked) < total and not failed else ""
    note += f" {failed} could not be read or predicted." if failed else ""
    return Gallery(title, note, examples)


def _example(named: tuple[str, Pair], rank: str, predicted: tuple[dict[str, float], NDArray[np.uint8]]) -> Example:
    (name, pair), (scores, prediction) = named, predicted
    mask = decode_mask(pair.mask)
    photograph = decode_image(pair.image).resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    errors, false_alarm, missed = error_map(photograph, mask, prediction)
    alt = (
        f"{Path(name).name}",
        f"mask, the object covers {mask.mean():.1%} of the image",
        f"prediction, IoU {scores['iou']:.3f}",
        f"error map: {false_alarm:.1%} of the image is a false alarm, {missed:.1%} is missed",
    )
    pixels: tuple[NDArray[np.uint8], ...] = (np.asarray(photograph), mask.astype(np.uint8) * 255, prediction, errors)
    images = (thumbnail(source) for source in pixels)
    panels = [_panel(title, text, image) for title, text, image in zip(_TITLES, alt, images, strict=True)]
    return Example(name, rank, scores, panels)


def error_map(
    photograph: Image.Image, mask: NDArray[np.bool_], prediction: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], float, float]:
    """Where a prediction is wrong, in colour on the darkened photograph: orange for false alarm, blue for missed.

    Args:
        photograph: of the mask's size.
        mask: (H, W).
        prediction: (H, W).

    Returns:
        (H, W, 3); the shares of the image that are false alarm and missed at 0.5.
    """
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)[..., None] * 0.35
    wrong = np.abs(prediction.astype(np.float32) / 255 - mask)[..., None]
    colour = np.where(mask[..., None], np.array(_MISS, np.float32), np.array(_FALSE_ALARM, np.float32))
    pixels = (grey * (1 - wrong) + colour * wrong).round().astype(np.uint8)
    found = prediction >= 128
    return pixels, float((found & ~mask).mean()), float((~found & mask).mean())


def _panel(title: str, alt: str, image: Image.Image) -> Panel:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return Panel(title, alt, uri, image.width, image.height)
