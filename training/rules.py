"""Settings that suit a dataset and a machine: rules as data, each with its reason and where that was measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.settings import ZOOMS

GB = 10**9
FEW_WINDOWS = 300  # too few for a network to learn much at the default learning rate
ENOUGH_WINDOWS, ENOUGH_EPOCHS = 600, 15  # docs/recipes.md has a table of them
PAPER_EPOCHS, LARGE = 140, 2000  # epochs for a dataset of at least so many photographs, on a GPU
FEW_VALIDATION_IMAGES = 30
_DEVIATION_OF_IOU = 0.25  # from image to image: .246 on 199 images of CAMO whose mean was .586
_SCALES = [0.8, 0.9, 1.0, 1.15]
_RECIPE, _TUNING, _BUDGET = "docs/experiments.md", "docs/recipes.md", "README.md"


@dataclass(frozen=True)
class Situation:
    """What settings depend on.

    Attributes:
        num_pairs: photographs with a mask, those to validate on included.
        side: longer side of the photographs in pixels, the median.
        object_side: side of a square of the object's area, as a share of the photograph's; a quarter of the objects
            are smaller.
        device: cpu or cuda.
        memory: bytes of a GPU, or of this machine that are free.
        disk: bytes that are free where the cache goes.
        num_ranks: GPUs, with a process each; 1 on a CPU.
        backbone: given by the user; None to choose one.
        start_from: trained network that the user starts from; None for none.
    """

    num_pairs: int
    side: int
    object_side: float
    device: str
    memory: float
    disk: float
    num_ranks: int = 1
    backbone: str | None = None
    start_from: str | None = None

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def is_small(self) -> bool:
        """It is trained by the short recipe: the long one is for thousands of photographs on a GPU."""
        return self.on_cpu or self.num_pairs < LARGE


def _always(_: Situation) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """Settings for the situations in which it applies.

    Attributes:
        settings: by name.
        why: the reason, in a few words.
        evidence: document that has what was measured; "" for a rule of thumb.
        applies: whether it applies.
    """

    settings: Mapping[str, Any]
    why: str
    evidence: str = ""
    applies: Callable[[Situation], bool] = _always


# Networks, the most able first. Those that do not fit the memory, or take too long, are passed over.
NETWORKS: Sequence[Rule] = (
    Rule(
        {"backbone": "pvt_v2_b4", "img_size": 448, "zoom": ZOOMS, "batch_size": 16},
        "needs 45 GB of the GPU", _BUDGET, lambda s: not s.on_cpu and s.memory > 56 * GB,
    ),
    Rule(
        {"backbone": "pvt_v2_b2", "img_size": 384, "zoom": ZOOMS, "batch_size": 8},
        "needs 10 GB of the GPU", _BUDGET, lambda s: not s.on_cpu and s.memory > 14 * GB,
    ),
    Rule(
        {"backbone": "pvt_v2_b2", "img_size": 384, "batch_size": 8},
        "needs 4 GB of the GPU", _BUDGET, lambda s: not s.on_cpu,
    ),
    Rule({"backbone": "pvt_v2_b2", "img_size": 288, "batch_size": 8}, "faster", "", lambda s: not s.on_cpu),
    Rule({"backbone": "pvt_v2_b0", "img_size": 288, "batch_size": 8}, "faster still", "", lambda s: not s.on_cpu),
    Rule(
        {"backbone": "tf_efficientnet_lite0", "img_size": 448, "batch_size": 8}, "a quarter of the objects are small",
        _RECIPE, lambda s: s.on_cpu and s.object_side < 0.14,
    ),
    *(
        Rule({"backbone": "tf_efficientnet_lite0", "img_size": size, "batch_size": 8}, why, _RECIPE, lambda s: s.on_cpu)
        for size, why in ((352, "size finds more than a larger network in the same time"), (288, "in less time"),
                          (224, "in little time"), (160, "in very little time"))
    ),
)  # fmt: skip

# From each group the first rule that applies.
GROUPS: Sequence[Sequence[Rule]] = (
    (
        Rule({}, "layers as trained", "", lambda s: s.start_from is not None),
        Rule(
            {"frozen_levels": 2}, "the finest layers need no training: half the memory, less time", _RECIPE,
            lambda s: s.on_cpu and s.backbone is None,
        ),
    ),
    (
        Rule({"batch_size": 4, "accumulation_steps": 1}, "more steps of few photographs", "",
             lambda s: s.num_pairs < 40),
        Rule({"accumulation_steps": 1}, "batches as large as steps take less time"),
    ),
    (
        Rule({"val_fraction": 0.2}, "a tenth would be too few to compare epochs by", _TUNING,
             lambda s: s.num_pairs < 200),
        Rule({"val_fraction": 0.1}, "a tenth chooses the best epoch"),
    ),
    (
        Rule(
            {"stage1_epochs": 0, "lr": 0.0003, "stage2_lr_scale": 1.0, "grad_clip": 1.0},
            "continues a trained network", _TUNING, lambda s: s.start_from is not None,
        ),
        Rule(
            {"stage1_epochs": 0, "lr": 0.001, "stage2_lr_scale": 1.0, "grad_clip": 1.0},
            "short and at once the whole network", _RECIPE, lambda s: s.is_small,
        ),
        Rule({"lr": 0.00025}, "the defaults, for COD10K"),
    ),
    (
        Rule({"multi_scale": _SCALES}, "objects come in all sizes", _RECIPE, lambda s: s.is_small),
    ),
)  # fmt: skip


def networks_for(situation: Situation) -> list[Rule]:
    """Return the networks to try, the most able first; none shows more than the photographs have."""
    largest = max(64, 32 * math.ceil(situation.side / 32))
    found = []
    for rule in NETWORKS:
        if not rule.applies(situation):
            continue
        size, why = min((rule.settings["img_size"], rule.why), (largest, "no larger than the photographs"))
        settings = {**rule.settings, "img_size": size}
        if situation.start_from is not None:  # which brings its own
            settings = {name: value for name, value in settings.items() if name not in ("backbone", "zoom")}
        elif situation.backbone is not None:
            settings["backbone"] = situation.backbone
        if settings not in [other.settings for other in found]:
            found.append(Rule(settings, why, rule.evidence if why == rule.why else ""))
    return found


def settings_for(situation: Situation, network: Rule) -> dict[str, tuple[Any, Rule]]:
    """Return each setting with its value and the rule it comes from, without the epochs.

    Args:
        situation: what the settings depend on.
        network: one of ``networks_for``.
    """
    chosen = {name: (value, network) for name, value in network.settings.items()}
    for group in GROUPS:
        rule = next((rule for rule in group if rule.applies(situation)), None)
        if rule is not None:
            chosen |= {name: (value, rule) for name, value in rule.settings.items()}
    if situation.backbone is not None:
        chosen["backbone"] = situation.backbone, Rule({}, "as given")
    if situation.num_ranks > 1:
        ranks, factor = situation.num_ranks, math.sqrt(situation.num_ranks)
        larger = Rule({}, f"steps of {ranks} times as many images: the square root of it", "docs/scaling.md")
        chosen["lr"] = round(chosen["lr"][0] * factor, 6), larger
        chosen["ema_decay"] = round(0.999**ranks, 5), Rule({}, f"{ranks} times fewer steps", "docs/scaling.md")
    size = 4 * chosen["img_size"][0] ** 2 * situation.num_pairs
    if 2 * size < situation.disk and (not situation.on_cpu or 4 * size < situation.memory):
        chosen["cache"] = True, Rule({}, f"photographs are decoded once, into {size / GB:.1f} GB", "docs/benchmarks.md")
    return chosen


def too_few_windows(num_windows: int, num_images: int, window_size: int) -> str:
    """Say that a run had too few windows, and what would be enough; "" if it had not."""
    if num_windows >= FEW_WINDOWS:
        return ""
    return (
        f"Only {num_windows} windows (optimizer steps) were trained, too few to learn much: with {num_images} training "
        f"images, --epochs {enough_epochs(num_images, window_size)} is enough; plan chooses settings for small datasets"
    )


def too_few_validated(num_validated: int) -> str:
    """Say how little few validation images mean; "" if they are enough."""
    if num_validated >= FEW_VALIDATION_IMAGES:
        return ""
    return (
        f"Only {num_validated} images to validate on: the standard error of their mean IoU is about "
        f"{_DEVIATION_OF_IOU / math.sqrt(num_validated):.2f}; smaller differences between epochs or runs are chance. "
        "--folds 5 scores every photograph, in five runs"
    )


def enough_epochs(num_images: int, window_size: int) -> int:
    """Return the epochs that make enough optimizer steps of this many training images."""
    return max(ENOUGH_EPOCHS, math.ceil(ENOUGH_WINDOWS / math.ceil(num_images / window_size)))


def what_does_not_fit(num_images: int, num_windows: int, is_default: bool) -> str:
    """Say what does not fit a dataset in a run's settings; "" if all does.

    Args:
        num_images: photographs to train on.
        num_windows: optimizer steps of the run.
        is_default: Learning rate and epochs are the defaults.
    """
    if num_windows < FEW_WINDOWS:
        return f"{num_windows} optimizer steps are too few to learn much from {num_images} photographs"
    if is_default and num_images < LARGE:
        return f"The default schedule is for thousands of photographs, and these are {num_images}"
    return ""


def wanted_epochs(situation: Situation, num_images: int, window_size: int) -> tuple[int, Rule]:
    """Return the epochs that the data deserve, if there is time.

    Args:
        situation: what settings depend on.
        num_images: photographs to train on.
        window_size: of them in an optimizer step, over all ranks.
    """
    if not situation.is_small and situation.start_from is None:
        return PAPER_EPOCHS, Rule({}, "as many as papers train on COD10K")
    epochs = enough_epochs(num_images, window_size)
    windows = epochs * math.ceil(num_images / window_size)
    return epochs, Rule({}, f"{windows} optimizer steps; more gain little", _RECIPE)
