"""Masks: how their pixels become background, object, or pixels that do not count.

One ``MaskReading`` holds for all masks of a dataset, because a single mask does not say what it is: one of 0 and 1 may
be a label image, or almost black. ``data/survey.py`` decides. Imports only Pillow and NumPy, so that worker processes
start fast.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

BoolArray = NDArray[np.bool_]
UInt8Array = NDArray[np.uint8]
Channel = Literal["brightest", "alpha", "index", "colour"]

IGNORED = 2  # in a decoded mask, beside 0 for background and 1 for object: counts in no loss and no score
_NAMES = {(0, 0, 0): "black", (255, 255, 255): "white"}


@dataclass(frozen=True)
class MaskReading:
    """How every mask of a dataset is read. The default suits masks of 0 and 255, with or without noise.

    Attributes:
        channel: the value that a pixel has: that of its brightest channel, its palette index, ...; or all its colour.
        threshold: values above it are object. None: 128; or in a mask whose brightest value is not in 129 to 255, half
            of that value.
        background: value or colour of the background: all others are object. None: the threshold decides.
        ignored: value or colour of pixels that count in no loss and no score. None: all pixels count.
        tolerance: largest difference from ``background`` and ``ignored``, in any channel, that is noise.
        inverted: the object is dark.
    """

    channel: Channel = "brightest"
    threshold: float | None = None
    background: tuple[float, ...] | None = None
    ignored: tuple[float, ...] | None = None
    tolerance: float = 0
    inverted: bool = False

    def read(self, mask: Image.Image, lossy: bool = False) -> UInt8Array:
        """Return (H, W) of 0 for background, 1 for object, and IGNORED.

        Args:
            mask: a decoded mask of any mode.
            lossy: it comes from a JPEG. By the default threshold, one with no value above 31 holds only noise.
        """
        if self.channel == "alpha" and not has_alpha(mask):
            return ABOVE_HALF.read(mask, lossy)
        pixels = self.pixels(mask)
        if self.background is not None:
            is_object = ~_is_near(pixels, self.background, self.tolerance)
        elif self.threshold is not None:
            is_object = pixels > self.threshold
        elif lossy and pixels.max(initial=0) < 32:
            is_object = np.zeros(pixels.shape, dtype=np.bool_)
        else:
            is_object = pixels > half_of_white(pixels)
        if self.inverted:
            np.logical_not(is_object, out=is_object)
        labels = is_object.view(np.uint8)
        if self.ignored is not None:
            labels[_is_near(pixels, self.ignored, self.tolerance)] = IGNORED
        return labels

    def pixels(self, mask: Image.Image) -> NDArray[Any]:
        """Return the values that count: (H, W), or (H, W, 3) for colours."""
        if self.channel == "alpha":
            return alpha_of(mask)
        if self.channel == "index" and mask.mode == "P":
            return np.array(mask)
        if self.channel == "colour":
            return np.array(to_rgb(mask))
        return brightest(mask)

    @property
    def rule(self) -> str:
        """What counts as object, in words."""
        channel = "alpha " * (self.channel == "alpha")
        if self.background is None:
            threshold = 128 if self.threshold is None else self.threshold
            return f"{channel}{'not ' * self.inverted}above {threshold:g} is object"
        ignored = "" if self.ignored is None else f", {name_of(self.ignored)} is ignored"
        return f"{channel}not {name_of(self.background)} is object{ignored}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by name, as checkpoints and ``config.json`` hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the reading that ``to_dict`` was called on.

        Raises:
            ValueError: it is none.
        """
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        try:
            made = cls(**plain)
        except TypeError as error:
            raise ValueError(f"no reading of masks: {error}") from error
        if made.channel not in get_args(Channel):
            raise ValueError(f"no reading of masks: channel {made.channel!r}")
        return made


ABOVE_HALF = MaskReading()
READINGS: Mapping[str, MaskReading] = {  # by the values of --mask-values other than auto
    "above-half": ABOVE_HALF,
    "nonzero": MaskReading(background=(0,)),
    "nonzero-but-255": MaskReading(background=(0,), ignored=(255,)),
    "alpha": MaskReading("alpha"),
    "inverted": MaskReading(inverted=True),
}


def brightest(mask: Image.Image) -> NDArray[Any]:
    """Return a mask's values, (H, W), whatever its mode: the brightest channel of a colour."""
    if mask.mode.startswith("F"):
        return np.nan_to_num(np.array(mask))
    grey = mask.mode == "L" or mask.mode.startswith("I")
    if grey:
        return np.array(mask)
    red, green, blue = to_rgb(mask).split()
    return np.array(ImageChops.lighter(ImageChops.lighter(red, green), blue))  # NumPy's max takes ten times as long


def to_rgb(mask: Image.Image) -> Image.Image:
    """Drop transparency, and look up the colours of a palette."""
    if mask.mode == "P" and "transparency" in mask.info:  # in one step, Pillow warns
        mask = mask.convert("RGBA")
    return mask.convert("RGB")


def half_of_white(values: NDArray[Any]) -> float:
    """Return the value above which a pixel of this mask is object, by the default threshold."""
    brightest_value = float(values.max(initial=0))
    return 128 if 128 < brightest_value <= 255 else brightest_value / 2


def has_alpha(mask: Image.Image) -> bool:
    """Return whether pixels have a transparency of their own. A colour that stands for transparency is none."""
    return mask.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (mask.mode == "P" and "transparency" in mask.info)


def alpha_of(mask: Image.Image) -> UInt8Array:
    """Return the transparency of each pixel, (H, W): 0 is transparent."""
    return np.array((mask if "A" in mask.getbands() else mask.convert("RGBA")).getchannel("A"))


def name_of(value: tuple[float, ...]) -> str:
    """Return a value or colour in words: 255, black, #00ff00."""
    if len(value) == 1:
        return f"{value[0]:g}"
    return _NAMES.get(value, "#" + "".join(f"{int(part):02x}" for part in value))  # type: ignore[call-overload]


def _is_near(pixels: NDArray[Any], value: tuple[float, ...], tolerance: float) -> BoolArray:
    """Return (H, W), True on pixels that differ from a value or colour by the tolerance at most, in every channel."""
    planes = [pixels] if pixels.ndim == 2 else [pixels[:, :, channel] for channel in range(pixels.shape[2])]
    near = np.ones(planes[0].shape, dtype=np.bool_)
    for plane, middle in zip(planes, value, strict=True):
        if tolerance:
            near &= (plane >= middle - tolerance) & (plane <= middle + tolerance)
        else:
            near &= plane == middle
    return near
