"""What a dataset is like, as far as settings depend on it: how many photographs, how large, how large their objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.layouts import Pair
from data.looks import map_sample
from data.masks import IGNORED, MaskReading
from data.scenes import scenes_of

_SAMPLE = 200  # photographs and masks to look at


@dataclass(frozen=True)
class DataFacts:
    """What a dataset's training photographs are like.

    Attributes:
        num_pairs: photographs with a mask.
        num_scenes: of them, photographs of one scene counted once.
        side: longer side of a photograph in pixels, the median.
        object_shares: quartiles of the object's share of the photograph, 0 to 1, over masks with an object; empty if
            there is none.
        empty_share: share of the masks that have no object.
        num_looked_at: masks that this is based on.
    """

    num_pairs: int
    num_scenes: int
    side: int
    object_shares: tuple[float, ...]
    empty_share: float
    num_looked_at: int

    @property
    def object_side(self) -> float:
        """Side of a square of the object's area, as a share of the photograph's; a quarter of the objects are smaller.

        1 if no object is known.
        """
        return float(self.object_shares[0] ** 0.5) if self.object_shares else 1.0


def facts_of(pairs: Sequence[Pair], masks: MaskReading) -> DataFacts:
    """Look at a dataset: at every photograph's thumbnail, and at up to 200 photographs and masks themselves.

    Args:
        pairs: training pairs.
        masks: how their masks are read.
    """

    def share(mask: Image.Image, lossy: bool) -> float:
        labels = masks.read(mask, lossy)
        return float((labels == 1).sum() / max(1, (labels != IGNORED).sum()))

    def longer_side(image: Image.Image, _lossy: bool) -> int:
        return max(image.size)

    shares = np.array(map_sample(share, [pair.mask for pair in pairs], _SAMPLE))
    sides = map_sample(longer_side, [pair.image for pair in pairs], _SAMPLE)
    objects = shares[shares > 0]
    quartiles = tuple(float(value) for value in np.percentile(objects, (25, 50, 75))) if len(objects) else ()
    return DataFacts(
        num_pairs=len(pairs),
        num_scenes=len(set(scenes_of([pair.image for pair in pairs]))),
        side=int(np.median(sides)) if sides else 0,
        object_shares=quartiles,
        empty_share=1 - len(objects) / max(1, len(shares)),
        num_looked_at=len(shares),
    )
