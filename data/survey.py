"""Survey of a dataset's masks: decide from a sample of them how all are read.

The decision depends only on the files' names and contents, so that it is the same each time.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data.layouts import NONCAM_PREFIX, Pair
from data.looks import NOISE, Levels, Look, look_at, map_sample, unpack
from data.masks import ABOVE_HALF, READINGS, Channel, MaskReading, name_of

AUTO = "auto"
MASK_VALUES = (AUTO, *READINGS)

_RARE, _MOST = 0.1, 0.75  # shares of the masks
_FEWEST = 3  # masks that can show that the object is dark, or the background is not black
_IN_REGIONS = 0.25  # share of a label's pixels that are inside of regions, at least
_BETWEEN = 0.95  # share of all unlike neighbours that a border between object and background is one of
_THIN = 0.85  # largest share of a border's pixels that are inside of regions: it is up to 13 pixels wide
_SMALL = 32  # numbers of classes and objects begin below it
_END = 32  # noise reaches this far from 0 and from the brightest value
_MAX_CENTRES = 32
_SHOWN = 8  # values in a message
_OTHERWISE = "if that is wrong, give --mask-values {}"
_INVERTED = (
    "they look inverted: their bright part lies all round the border of the image, so their dark part is read as the "
    "object; " + _OTHERWISE
)
_VOC_BORDER = 0xE0E0C0  # Pascal VOC's colour of index 255


@dataclass(frozen=True)
class MaskSurvey:
    """How the masks of a dataset are read, and why.

    Attributes:
        reading: how they are read.
        seen: what they are, in words.
        is_label: they are label images.
        is_inverted: their background is bright.
        advice: what is odd about them, and what to do; "" if nothing is.
        num_looked_at: number of masks in the sample that could be decoded.
        num_empty: of them, masks without an object.
        num_full: of them, masks that are all object.
    """

    reading: MaskReading
    seen: str
    is_label: bool = False
    is_inverted: bool = False
    advice: str = ""
    num_looked_at: int = 0
    num_empty: int = 0
    num_full: int = 0

    @property
    def summary(self) -> str:
        return f"{self.seen}; {self.reading.rule}"

    @property
    def num_constant(self) -> int:
        return self.num_empty + self.num_full

    @property
    def constant(self) -> str:
        """What is wrong if more than half of the sample is empty or full, and what to do; "" otherwise."""
        if 2 * self.num_constant <= self.num_looked_at:
            return ""
        what = "are all object" if self.num_full else "have no object"
        what = "have no object, or nothing else" if self.num_empty and self.num_full else what
        return (
            f"{self.num_constant} of {self.num_looked_at} masks {what}, read in this way: {self.summary}; check that "
            "they are the right files, or give another --mask-values"
        )


def survey_pairs(pairs: Sequence[Pair], mask_values: str = AUTO) -> MaskSurvey:
    """Survey the masks of a dataset, except those of COD10K's images that have no object."""
    with_object = [pair for pair in pairs if not pair.image.name.startswith(NONCAM_PREFIX)]
    return survey_masks([pair.mask for pair in with_object or pairs], mask_values)


def survey_masks(masks: Iterable[Path], mask_values: str = AUTO) -> MaskSurvey:
    """Look at 48 masks of a dataset, or all of fewer, and decide how all are read; about 10 ms for each.

    Args:
        masks: mask files, in any order.
        mask_values: one of ``MASK_VALUES``; ``auto`` to decide.
    """
    masks = list(masks)
    if mask_values == AUTO:
        survey = decide(map_sample(look_at, masks))
    else:
        survey = MaskSurvey(READINGS[mask_values], f"as --mask-values {mask_values} says")

    def has(mask: Image.Image, lossy: bool) -> tuple[bool, bool]:
        labels = survey.reading.read(mask, lossy)
        return bool((labels == 0).any()), bool((labels == 1).any())

    found = map_sample(has, masks)  # of each mask, whether it has a background, and an object
    num_empty, num_full = sum(not has_object for _, has_object in found), found.count((False, True))
    return replace(survey, num_looked_at=len(found), num_empty=num_empty, num_full=num_full)


def decide(looks: Sequence[Look]) -> MaskSurvey:
    """Decide how masks are read that look like these."""
    looks = [look for look in looks if look.varies]
    if not looks:
        return MaskSurvey(ABOVE_HALF, "masks of one value each")
    alpha = [look.alpha for look in looks if look.alpha is not None]
    if 2 * len(alpha) > len(looks) and 2 * sum(look.has_opaque_background for look in looks) <= len(alpha):
        survey = _by_value(alpha, "alpha")
        return replace(survey, seen=f"cut-outs: transparency with {survey.seen}")
    if (survey := _by_index(looks)) is not None:
        return survey
    num_coloured = sum(look.is_coloured for look in looks)
    if num_coloured > _RARE * len(looks) and (survey := _by_colour(looks)) is not None:
        return survey
    values = [look.values for look in looks if look.values.varies]
    if num_coloured > _MOST * len(looks) or not values:
        advice = "they look like photographs, not like masks; check that they are the right files"
        return MaskSurvey(ABOVE_HALF, "colour images", advice=advice)
    return _by_value(values, "brightest", is_lossy=2 * sum(look.lossy for look in looks) > len(looks))


def _by_value(masks: Sequence[Levels], channel: Channel, is_lossy: bool = False) -> MaskSurvey:
    """Decide on masks with one value for each pixel: labels, or shades that a threshold divides."""
    low, high = min(levels.low for levels in masks), max(levels.high for levels in masks)
    is_usual = low < 16 and 240 <= high <= 255  # black and white in 8 bits
    if not (is_lossy and high >= 64) and _are_labels(masks, ordered=True):
        values = sorted({value for levels in masks for value in levels.counts})
        odd = [levels for levels in masks if not {0, 255}.issuperset(levels.counts)]
        if len(odd) > _RARE * len(masks) or not is_usual:
            return _label_survey(masks, values, channel)
        return _thresholded(masks, MaskReading(channel), "values 0 and 255", odd)
    centres = _centres(masks, colours=False) or []
    if len(centres) > 2 and (is_lossy or _occur_together(masks, centres)):
        return _noisy_label_survey(masks, centres, channel)
    if len(centres) == 2:
        seen = f"values about {centres[0]:g} and {centres[1]:g}"
        threshold = None if is_usual else (centres[0] + centres[1]) / 2
    else:
        seen = f"values from {low:g} to {high:g}"
        threshold = 128 if is_usual else (low + high) / 2
    return _thresholded(masks, MaskReading(channel, threshold), seen)


def _thresholded(masks: Sequence[Levels], reading: MaskReading, seen: str, odd: Sequence[Levels] = ()) -> MaskSurvey:
    """Find out on which side of the threshold the object is."""
    threshold = 128 if reading.threshold is None else reading.threshold
    frames = [levels.frame for levels in masks]
    if _is_most([sum(n for value, n in frame.items() if value > threshold) / frame.total() for frame in frames]):
        return MaskSurvey(
            replace(reading, inverted=True), seen, is_inverted=True, advice=_INVERTED.format("above-half")
        )
    if odd:
        seen += f" ({len(odd)} of {len(masks)} masks have others too)"
    return MaskSurvey(reading, seen)


def _by_index(looks: Sequence[Look]) -> MaskSurvey | None:
    """Decide on palette images whose colours do not say enough: equal ones, or Pascal VOC's index 255. Else None."""
    masks = [look.index for look in looks if look.index is not None]
    palette: dict[float, float] = {}
    for look in looks:
        if any(palette.setdefault(index, colour) != colour for index, colour in look.palette.items()):
            return None
    is_ambiguous = len(set(palette.values())) < len(palette) or _ignored(masks, 0, 255) is not None
    if len(masks) < _MOST * len(looks) or not is_ambiguous or not _are_labels(masks, ordered=False):
        return None
    black = min((index for index, colour in palette.items() if colour == 0), default=0)
    return _label_survey(masks, sorted(palette), "index", black)


def _by_colour(looks: Sequence[Look]) -> MaskSurvey | None:
    """Decide on masks with a colour for each object. None if they have too many colours."""
    masks = [look.colours or _as_colours(look.values) for look in looks]
    if 2 * sum(look.lossy for look in looks) <= len(looks) and _are_labels(masks, ordered=False):
        return _label_survey(masks, sorted({value for levels in masks for value in levels.counts}), "colour")
    centres = _centres(masks, colours=True)
    return None if centres is None else _noisy_label_survey(masks, centres, "colour")


def _label_survey(masks: Sequence[Levels], values: Sequence[float], channel: Channel, default: float = 0) -> MaskSurvey:
    """Decide on label images: which value is the background, and which one does not count."""
    background = _background([levels.frame for levels in masks], default if default in values else None)
    if channel == "colour":
        ignored = _VOC_BORDER if _VOC_BORDER in values and background == 0 and len(values) > 2 else None
    else:
        ignored = _ignored(masks, background, 65535 if max(values) == 65535 else 255)
    if ignored is None and len(values) == 3:
        ignored = _border(masks, background)
    is_inverted = len(values) == 2 and background == max(values) and channel != "colour"
    return MaskSurvey(
        MaskReading(
            channel,
            background=_point(background, channel),
            ignored=None if ignored is None else _point(ignored, channel),
        ),
        f"{'label images with ' * (len(values) > 2)}{_listed(values, channel)}",
        is_label=len(values) > 2,
        is_inverted=is_inverted,
        advice=_INVERTED.format("nonzero") if is_inverted else "",
    )


def _noisy_label_survey(masks: Sequence[Levels], centres: Sequence[float], channel: Channel) -> MaskSurvey:
    """Decide on label images with compression noise or soft outlines."""
    points = np.array([_point(centre, channel) for centre in centres], dtype=np.float64)

    def nearest(frame: Counter[float]) -> Counter[float]:
        found: Counter[float] = Counter()
        for value, count in frame.items():
            distances = np.abs(points - _point(value, channel)).max(axis=1)
            found[centres[int(distances.argmin())]] += count
        return found

    darkest = min(centres, key=lambda centre: max(_point(centre, channel)))
    background = _background([nearest(levels.frame) for levels in masks], darkest)
    distances = np.abs(points - _point(background, channel)).max(axis=1)
    tolerance = float(distances[distances > 0].min()) / 2
    reading = MaskReading(channel, background=_point(background, channel), tolerance=tolerance)
    seen = f"{'label images with ' * (len(centres) > 2)}{_listed(centres, channel, about=True)}"
    return MaskSurvey(reading, seen, is_label=len(centres) > 2)


# What label images are


def _are_labels(masks: Sequence[Levels], ordered: bool) -> bool:
    """Return whether the values of most masks form regions, and do not just lie between two others, as noise does.

    Args:
        masks: masks that vary.
        ordered: whether values lie between others. Colours do not.
    """
    counts: Counter[float] = Counter()
    inside: Counter[float] = Counter()
    for levels in masks:
        if len(levels.counts) > 2:
            counts.update(levels.counts)
            inside.update(levels.inside)
    regions = {value for value, count in counts.items() if inside[value] >= _IN_REGIONS * count}

    def is_label(levels: Levels) -> bool:
        values = sorted(levels.counts)
        if len(values) < 3:
            return len(values) == 2
        if ordered:
            between = values[1:-1]
            if levels.high - levels.low >= _SMALL and levels.num_small_steps >= 0.9 * levels.num_steps > 0:
                return False  # as smooth as a blurred mask
            at_low, at_high = (
                {value for value in between if abs(value - end) < _END} for end in (levels.low, levels.high)
            )
            if levels.high - levels.low >= 128 and at_low and at_high and len(at_low | at_high) == len(between):
                return False  # noise about black and white
        else:
            between = [value for value, _ in levels.counts.most_common()[1:]]
        in_regions = [value for value in between if value in regions]
        pixels, pixels_in_regions = (sum(levels.counts[value] for value in some) for some in (between, in_regions))
        return 2 * len(in_regions) >= len(between) and 2 * pixels_in_regions >= pixels

    return sum(is_label(levels) for levels in masks) >= _MOST * len(masks)


def _centres(masks: Sequence[Levels], colours: bool) -> list[float] | None:
    """Return the values below noise and soft outlines; None if these explain too little of what is not background."""
    flat: dict[float, float] = {}
    for levels in masks:
        for value, count in levels.flat.items():
            flat[value] = flat.get(value, 0) + count / levels.num_pixels
    if sum(flat.values()) < 0.5 * len(masks):
        return None
    least, enough = (0.02, 0.8) if colours else (0.05, 0.9)
    values, mass = list(flat), np.array(list(flat.values()))
    points = np.array([unpack(value) if colours else (value,) for value in values], dtype=np.float64)
    width = NOISE * (255 if colours else float(np.ptp(points)))
    shares: dict[int, float] = {}  # position of a centre -> share of the pixels about it
    total = mass.sum()
    for _ in range(4 * _MAX_CENTRES):
        heaviest = int(mass.argmax())
        if not mass[heaviest]:
            break
        distances = np.abs(points - points[heaviest]).max(axis=1)
        if not any(distances[centre] < 3 * width for centre in shares):  # else a shade between
            shares[heaviest] = float(mass[distances <= width].sum())
        mass[distances <= width] = 0
    (background, share), *others = ((values[centre], own) for centre, own in shares.items())
    others = [(centre, own) for centre, own in others if own >= least * (total - share)]
    if not others or len(others) > _MAX_CENTRES or sum(own for _, own in others) < enough * (total - share):
        return None
    found = sorted([background, *(centre for centre, _ in others)])
    if colours:
        return found
    rare = [
        value
        for value in found[1:-1]
        if sum(any(abs(near - value) <= width for near in levels.flat) for levels in masks) < _RARE * len(masks)
    ]
    return [value for value in found if value not in rare]


def _occur_together(masks: Sequence[Levels], centres: Sequence[float]) -> bool:
    """Return whether masks have several objects' values. If not, each may be a soft mask of its own brightness."""
    width = NOISE * (centres[-1] - centres[0])
    num_together = 0
    for levels in masks:
        near = [sum(n for value, n in levels.flat.items() if abs(value - centre) <= width) for centre in centres[1:]]
        num_together += sum(number >= 0.01 * levels.num_pixels for number in near) > 1
    return num_together > _RARE * len(masks)


def _background(frames: Sequence[Counter[float]], default: float | None) -> float:
    """Return the value of the background: the default, unless another one is on most of the frame of most masks.

    Args:
        frames: pixels by value on the frame of each mask.
        default: None if it does not occur.
    """
    tops = Counter(frame.most_common(1)[0][0] for frame in frames)
    top = tops.most_common(1)[0][0]
    return top if default is None or _is_most([frame[top] / frame.total() for frame in frames]) else default


def _is_most(shares: Sequence[float]) -> bool:
    """Return whether these shares of the frame, one for each mask, show that it is the background's."""
    is_clear = sum(share > 0.5 for share in shares) >= _MOST * len(shares)
    return len(shares) >= _FEWEST and is_clear and sum(shares) >= _MOST * len(shares)


def _ignored(masks: Sequence[Levels], background: float, highest: float) -> float | None:
    """Return the highest value, 255 or 65,535, if it stands for pixels that do not count: beside small numbers."""
    numbers = {value for levels in masks for value in levels.counts} - {background, highest}
    if not numbers or background == highest or min(numbers) >= _SMALL or max(numbers) > highest - _SMALL:
        return None
    with_highest = [levels for levels in masks if highest in levels.counts]
    with_both = [levels for levels in with_highest if not numbers.isdisjoint(levels.counts)]
    return highest if with_both and 2 * len(with_both) >= len(with_highest) else None


def _border(masks: Sequence[Levels], background: float) -> float | None:
    """Return the value, if there is one, that is a thin line between the background and the one other value."""
    borders, counts, inside = Counter[tuple[float, float]](), Counter[float](), Counter[float]()
    for levels in masks:
        if len(levels.counts) == 3:
            borders.update(levels.borders)
            counts.update(levels.counts)
            inside.update(levels.inside)
    for value in counts.keys() - {background}:
        is_between = sum(count for pair, count in borders.items() if value in pair) >= _BETWEEN * borders.total()
        is_beside = sum(len(levels.counts) == 3 for levels in masks) >= _MOST * sum(
            value in levels.counts for levels in masks
        )
        if is_between and is_beside and inside[value] <= _THIN * counts[value]:
            return value
    return None


def _point(value: float, channel: Channel) -> tuple[float, ...]:
    return unpack(value) if channel == "colour" else (value,)


def _as_colours(levels: Levels) -> Levels:
    """Return the levels of a grey mask as those of colours."""

    def packed(counter: Counter[float]) -> Counter[float]:
        return Counter({float(min(255, int(value)) * 0x010101): count for value, count in counter.items()})

    return replace(
        levels, counts=packed(levels.counts), inside=packed(levels.inside), frame=packed(levels.frame),
        flat=packed(levels.flat),
    )  # fmt: skip


def _listed(values: Sequence[float], channel: Channel, about: bool = False) -> str:
    names = [name_of(_point(value, channel)) for value in values]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    kind = {"colour": "the colours", "index": "the palette indices"}.get(channel, "values")
    return f"{kind} {'about ' * about}{shown}"
