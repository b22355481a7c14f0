"""Measures that few papers name against pysodmetrics: the largest difference, and the time per image.

pysodmetrics adds up the edges of multi-scale IoU in 16 bits, which are too few: most of that difference.

    git clone https://github.com/ArcherFMY/sal_eval_toolbox
    python benchmarks/further_measures.py sal_eval_toolbox

The repository has maps of salient-object detection, and the masks. Both programs take turns on each image.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import py_sod_metrics
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.further import further_scores
from evaluation.metrics import Protocol

_BINARY: dict[str, Any] = {"with_dynamic": False, "with_adaptive": False, "with_binary": True}
_CURVE: dict[str, Any] = {"with_dynamic": True, "with_adaptive": False}
REFERENCES: dict[str, Callable[[], Any]] = {
    "balanced_error": lambda: py_sod_metrics.FmeasureV2({"": py_sod_metrics.BERHandler(**_BINARY)}),
    "multiscale_iou": lambda: py_sod_metrics.MSIoU(**_BINARY),
    "context": py_sod_metrics.ContextMeasure,
    "size_invariant_f": lambda: py_sod_metrics.SizeInvarianceFmeasureV2({"": py_sod_metrics.FmeasureHandler(**_CURVE)}),
    "size_invariant_mae": py_sod_metrics.SizeInvarianceMAE,
    "correction_effort": py_sod_metrics.HumanCorrectionEffortMeasure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--images", type=int, default=124)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tools = args.repository / "tools"
    masks = sorted((tools / "GroundTruth" / "SOD").glob("*.png"))[: args.images]
    print("| measure | images | largest difference | ours, ms | theirs, ms | ratio |\n|---|---|---|---|---|---|")
    for name, make in REFERENCES.items():
        differences, seconds = [], np.zeros(2)
        for file in masks:
            mask = np.asarray(Image.open(file).convert("L"))
            prediction = np.asarray(Image.open(tools / "SaliencyMaps" / "SOD" / "PiCANet" / file.name).convert("L"))
            start = time.perf_counter()
            ours = further_scores([name], prediction, mask > 128, Protocol())[name]
            middle = time.perf_counter()
            measure = make()
            measure.step(prediction, mask)
            result = next(iter(measure.get_results().values()))
            while isinstance(result, dict):
                result = next(iter(result.values()))
            seconds += (middle - start, time.perf_counter() - middle)
            differences.append(abs(ours - float(np.mean(result))))
        per_image = seconds / len(masks) * 1000
        print(
            f"| {name} | {len(masks)} | {max(differences):.1e} | {per_image[0]:.2f} | {per_image[1]:.2f} | "
            f"{per_image[1] / per_image[0]:.1f} |"
        )


if __name__ == "__main__":
    main()
