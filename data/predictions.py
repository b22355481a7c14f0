"""Saved predictions of any program, as grey levels of 0 to 255.

As with masks, one file does not say what its values mean: a dark prediction of 16 bits may have none above 255. So a
set's predictions are read in one way, which a sample of them decides.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageOps

from data.decoding import decode_message
from data.looks import Kind, Look, kind_of, look_at, map_sample
from data.masks import UInt8Array, alpha_of, brightest, has_alpha
from data.opening import open_picture

# Value of certain object, and the value that the brightest of a set's pixels must exceed for it: the first that fits.
_WHITES: Mapping[Kind, Sequence[tuple[float, float]]] = {
    "byte": ((1, 0), (255, -1)),
    "integer": ((1, 0), (255, -1), (1000, 0), (1023, 0), (4095, 0), (10_000, 0), (16_383, 0), (65_535, 0)),
    "float": ((1, -1), (255, 127), (65_535, 16_383)),
}
_TOLERANCE = 1e-3  # by which rounding may exceed the range


@dataclass(frozen=True)
class PredictionReading:
    """How every prediction of a set is read.

    Attributes:
        is_alpha: they are cut-outs, and their transparency counts. Otherwise, the brightest channel does.
        white: value of certain object, by kind of stored values. A kind that it does not name has the value that each
            file suggests: 65,535 or 1 if that is not exceeded, and otherwise 255.
        is_logit: floats are logits.
        advice: what is unusual about them.
    """

    is_alpha: bool = False
    white: Mapping[Kind, float] = field(default_factory=dict)
    is_logit: bool = False
    advice: tuple[str, ...] = ()

    def grey_levels(self, values: NDArray[Any]) -> UInt8Array:
        """Return stored values, (H, W), as grey levels.

        Raises:
            ValueError: they are not of the range that the other predictions of the set are of.
        """
        kind = kind_of(values)
        low, high = float(values.min()), float(values.max())
        if kind == "float" and self.is_logit:
            return (255 / (1 + np.exp(-values.astype(np.float64)))).round().astype(np.uint8)
        white = self.white.get(kind)
        if white is None:
            white = 255 if kind == "byte" else 1 if kind == "float" and high <= 1 else 65_535 if high > 255 else 255
        elif not -_TOLERANCE * white <= low <= high <= (1 + _TOLERANCE) * white:
            raise ValueError(
                f"has values from {low:g} to {high:g}, and the others of its set from 0 to {white:g}; save all of them "
                "in one way"
            )
        if kind == "byte" and white == 255:
            return values
        return (values * (255 / white)).clip(0, 255).round().astype(np.uint8)


def survey_predictions(files: Iterable[Path]) -> PredictionReading:
    """Look at 48 predictions of a set, or all of fewer, and decide how all are read."""
    return _decide(map_sample(look_at, files))


def decode_prediction(path: Path, reading: PredictionReading | None = None) -> UInt8Array:
    """Read a prediction saved by any program as grey levels, (H, W).

    Raises:
        ValueError: the file cannot be decoded, or is unlike the others of its set.
    """
    reading = reading or PredictionReading()
    try:
        with open_picture(path) as file:
            image = ImageOps.exif_transpose(file)
            values = alpha_of(image) if reading.is_alpha and has_alpha(image) else brightest(image)
    except Exception as error:  # Pillow's plug-ins raise anything for a damaged file
        raise ValueError(decode_message(path, error)) from error
    try:
        return reading.grey_levels(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _decide(looks: Sequence[Look]) -> PredictionReading:
    varied = [look for look in looks if look.varies]
    with_alpha = [look for look in varied if look.alpha is not None]
    if 2 * len(with_alpha) > len(varied) and 2 * sum(look.has_opaque_background for look in with_alpha) <= len(
        with_alpha
    ):
        return PredictionReading(is_alpha=True, advice=("they are cut-outs: their transparency is scored",))
    white: dict[Kind, float] = {}
    advice, is_logit = [], False
    if 2 * sum(look.is_coloured for look in varied) > len(varied):
        advice.append("they are in colour, of which the brightest channel is scored; save them as grey levels")
    for kind in ("byte", "integer", "float"):
        own = [look.values for look in looks if look.kind == kind]
        if not own:
            continue
        low, high = min(levels.low for levels in own), max(levels.high for levels in own)
        if kind == "float" and low < -_TOLERANCE:
            is_logit = True
            advice.append(f"they are floats from {low:g} to {high:g}, read as logits: through the logistic function")
            continue
        known = next((value for value, least in _WHITES[kind] if least < high <= value * (1 + _TOLERANCE)), None)
        white[kind] = high if known is None else known
        if white[kind] not in (1, 255, 65_535):
            what = "floats" if kind == "float" else "of more than 8 bits"
            advice.append(f"they are {what}, with values up to {high:g}, read as shares of {white[kind]:g}")
    return PredictionReading(white=white, is_logit=is_logit, advice=tuple(advice))
