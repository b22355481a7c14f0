"""Validation images with their predictions, for a report: the one part of it that imports torch, when it needs it."""

import base64
import bisect
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.decoding import decode_image, decode_mask
from data.layouts import Pair, by_name, find_subsets, training_pairs
from data.masks import IGNORED, MaskReading
from evaluation.figures import thumbnail
from evaluation.metrics import ByteArray, quick_scores
from reporting.history import EPOCH_FILE, RunHistory, whole
from runtime.folder import BEST

SHOWN = 3  # worst, and as many best images
FEW = 16  # images predicted for the report at the end of a run ...
FEW_SECONDS = 20.0  # ... unless this time is over before
_BATCH = 8  # images, at most: the run's own batch size if that is smaller
_TITLES = ("image", "mask", "prediction", "error map")
_FALSE_ALARM, _MISS = (255, 140, 0), (64, 128, 255)  # readers of any colour vision can distinguish them


@dataclass(frozen=True)
class Panel:
    """A picture on the page."""

    title: str
    alt: str
    data_uri: str
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class Example:
    """A validation image: its scores, and the panels image, mask, prediction and error map."""

    name: str
    rank: str  # worst or best
    scores: dict[str, float]
    panels: list[Panel]


@dataclass(frozen=True)
class Gallery:
    """The examples of one epoch. The note says what they were chosen from, or why there are none."""

    title: str
    note: str
    examples: list[Example]


def galleries(run: RunHistory, epochs: Sequence[int], few: bool = False) -> list[Gallery]:
    """Return the worst and the best validation images by IoU, for each epoch.

    Args:
        run: a run whose folder holds the checkpoints.
        epochs: epochs from 1; empty for the best one.
        few: choose from ``FEW`` images, spread over the set, so that a run's end need not wait.

    Raises:
        ValueError, OSError, RuntimeError: a checkpoint cannot be used.
    """
    best = run.checkpoints.get(BEST, (0, 0))[0] or (run.best[1] if run.best else 0)
    return [_gallery(run, epoch, is_best=epoch == best, few=few) for epoch in epochs or [best]]


def _gallery(run: RunHistory, epoch: int, is_best: bool, few: bool) -> Gallery:
    if not epoch:
        return Gallery("Validation images", "No epoch has been validated yet.", [])
    title = f"Epoch {epoch}" + (", the best" if is_best else "")
    file = run.directory / f"epoch_{epoch:04d}.pth"
    if is_best and not file.exists():
        file = run.directory / BEST
    if not file.exists():
        kept = sorted(int(found[1]) for path in run.directory.iterdir() if (found := EPOCH_FILE.fullmatch(path.name)))
        others = f"the kept epochs are {', '.join(map(str, kept))}" if kept else "no epoch is kept"
        return Gallery(title, f"There is no {file.name}; {others}.", [])
    try:
        pairs = _validation_pairs(run)
    except (ValueError, OSError) as error:
        return Gallery(title, f"No pictures: the dataset is not available ({error}).", [])
    return _predicted(run, file, title, pairs, few)


def _validation_pairs(run: RunHistory) -> list[tuple[str, Pair]]:
    """Return the validation pairs that still exist, with their names.

    Raises:
        ValueError, OSError: the dataset, or all of them, cannot be found.
    """
    names = {name for name in run.config.get("validation") or [] if name not in run.unreadable}
    path = run.settings.get("dataset_path")
    if not names or not isinstance(path, str):
        raise ValueError("the run does not say which images it was validated on")
    root = run.directory / "synthetic" if path == "synthetic" else Path(path)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder here")
    found = training_pairs(find_subsets(root, bool(run.settings.get("include_noncam"))), root)
    pairs = [(name, pair) for name, pair in by_name(found, root).items() if name in names]
    if not pairs:
        raise ValueError(f"{root}: none of the {len(names)} validation images is there")
    return pairs


def _predicted(run: RunHistory, file: Path, title: str, pairs: Sequence[tuple[str, Pair]], few: bool) -> Gallery:
    """Return the gallery of a checkpoint: predict and score the pairs, and keep the worst and the best.

    Raises:
        ValueError, OSError, RuntimeError: the checkpoint cannot be used.
    """
    from evaluation.predictor import load_network, predict_pairs  # imports torch: takes seconds

    reading = MaskReading.from_dict(run.config.get("masks") or {})
    total = len(pairs)
    if few and total > FEW:
        pairs = [pairs[index] for index in np.linspace(0, total - 1, FEW).round().astype(int)]
    device = "auto" if run.end is not None else "cpu"  # a run that is still going needs the GPU's memory
    precision = "fp32" if run.config.get("precision") == "fp32" else "auto"
    network = load_network(file, device, precision, None)
    batch_size = min(_BATCH, whole(run.settings, "batch_size", _BATCH))
    ranked: list[tuple[float, int]] = []  # IoU and index, worst first
    kept: dict[int, tuple[dict[str, float], ByteArray]] = {}  # index -> scores, prediction
    num_failed = 0
    start = time.monotonic()
    for index, prediction in predict_pairs(network, [pair for _, pair in pairs], batch_size, 0):
        if isinstance(prediction, str):
            num_failed += 1
            continue
        try:
            labels = decode_mask(pairs[index][1].mask, reading)
            scores = quick_scores(prediction, labels)
        except ValueError:
            num_failed += 1
            continue
        bisect.insort(ranked, (scores["iou"], index))
        kept[index] = scores, np.where(labels == IGNORED, 0, prediction)  # in pictures, no error there
        candidates = {index for _, index in [*ranked[:SHOWN], *ranked[-SHOWN:]]}
        kept = {index: value for index, value in kept.items() if index in candidates}  # predictions take memory
        if few and time.monotonic() - start > FEW_SECONDS:
            break
    if not ranked:
        return Gallery(title, f"No pictures: none of {len(pairs)} images could be predicted and scored.", [])
    worst = ranked[: min(SHOWN, -(-len(ranked) // 2))]
    best = ranked[max(len(worst), len(ranked) - SHOWN) :]
    examples = [
        _example(pairs[index], rank, *kept[index], reading)
        for rank, chosen in (("worst", worst), ("best", best[::-1]))
        for _, index in chosen
    ]
    share = f"all {total}" if len(ranked) == total else f"{len(ranked)} of {total}"
    note = f"Chosen by IoU from {share} validation images, predicted with {file.name} and stretched as evaluate does."
    note += " The report command chooses from all of them." if few and len(ranked) < total and not num_failed else ""
    note += f" {num_failed} could not be read or predicted." if num_failed else ""
    return Gallery(title, note, examples)


def _example(
    named_pair: tuple[str, Pair], rank: str, scores: dict[str, float], prediction: ByteArray, reading: MaskReading
) -> Example:
    name, pair = named_pair
    mask = decode_mask(pair.mask, reading) == 1
    photograph = decode_image(pair.image).resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    errors, false_alarm, missed = error_map(photograph, mask, prediction)
    alt = (
        Path(name).name,
        f"mask, the object covers {mask.mean():.1%} of the image",
        f"prediction, IoU {scores['iou']:.3f}",
        f"error map: {false_alarm:.1%} of the image is a false alarm, {missed:.1%} is missed",
    )
    pixels: tuple[ByteArray, ...] = (np.asarray(photograph), mask.astype(np.uint8) * 255, prediction, errors)
    images = (thumbnail(source) for source in pixels)
    panels = [panel(title, text, image) for title, text, image in zip(_TITLES, alt, images, strict=True)]
    return Example(name, rank, scores, panels)


def error_map(
    photograph: Image.Image, mask: NDArray[np.bool_], prediction: ByteArray
) -> tuple[ByteArray, float, float]:
    """Paint the errors of a prediction on the darkened photograph: orange for false alarms, blue for misses.

    Args:
        photograph: an image of the mask's size.
        mask: (H, W).
        prediction: (H, W), 0 to 255.

    Returns:
        the picture, (H, W, 3), and the shares of the image that are false alarm and missed at a threshold of 0.5.
    """
    grey = np.asarray(photograph.convert("L"), dtype=np.float32)[..., None] * 0.35
    wrong = np.abs(prediction.astype(np.float32) / 255 - mask)[..., None]
    colour = np.where(mask[..., None], np.array(_MISS, np.float32), np.array(_FALSE_ALARM, np.float32))
    pixels = (grey * (1 - wrong) + colour * wrong).round().astype(np.uint8)
    found = prediction >= 128
    return pixels, float((found & ~mask).mean()), float((~found & mask).mean())


def panel(title: str, alt: str, image: Image.Image) -> Panel:
    """Return a picture that is part of the page itself."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=82)
    uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
    return Panel(title, alt, uri, image.width, image.height)
