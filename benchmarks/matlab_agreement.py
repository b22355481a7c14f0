"""Scores against those of the papers' MATLAB code, image by image: the largest difference of each measure.

    git clone https://github.com/ArcherFMY/sal_eval_toolbox
    python benchmarks/matlab_agreement.py sal_eval_toolbox

The repository has the maps of three methods for the 300 images of SOD, the masks, and the MATLAB code's scores.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.metrics import score_image

METHODS = ("DSS", "Amulet", "PiCANet")
_OBJECT = 26  # the MATLAB code takes mask values from 0.1 on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    tools = parser.parse_args().repository / "tools"
    masks = sorted((tools / "GroundTruth" / "SOD").glob("*.png"))
    print(
        "| method | images | S | MAE | adaptive F | precision, 256 thresholds | recall |\n|---|---|---|---|---|---|---|"
    )
    for method in METHODS:
        theirs = loadmat(tools / "Results" / "SOD" / f"{method}.mat")
        ours = [
            score_image(np.asarray(Image.open(tools / "SaliencyMaps" / "SOD" / method / mask.name).convert("L")),
                        np.asarray(Image.open(mask).convert("L")) >= _OBJECT)
            for mask in masks
        ]  # fmt: skip
        differences = (
            np.array([one.s_measure for one in ours]) - theirs["S_measure_image"][:, 0],
            np.array([one.mae for one in ours]) - theirs["MAE_image"][:, 0],
            np.array([one.adaptive_f for one in ours]) - theirs["mean_Fmeasure_image"][:, 2],
            np.array([one.precision[::-1] for one in ours]) - theirs["Pre_image"],  # from the highest threshold down
            np.array([one.recall[::-1] for one in ours]) - theirs["Recall_image"],
        )
        largest = " | ".join(f"{np.abs(difference).max():.1e}" for difference in differences)
        print(f"| {method} | {len(ours)} | {largest} |")


if __name__ == "__main__":
    main()
