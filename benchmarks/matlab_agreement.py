"""Scores against those of the papers' MATLAB code, image by image: the largest difference of each measure.

    git clone https://github.com/ArcherFMY/sal_eval_toolbox
    python benchmarks/matlab_agreement.py sal_eval_toolbox

The repository has the maps of three methods for the 300 images of SOD, the masks, and the MATLAB code's scores. With

    git clone https://github.com/DengPingFan/CODToolbox
    python benchmarks/matlab_agreement.py sal_eval_toolbox --cod CODToolbox

also the means and curves of three images of COD10K, by both conventions.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation.metrics import CONVENTIONS, MeanScores, Protocol, score_image

METHODS = ("DSS", "Amulet", "PiCANet")
COD_NAMES = {
    "s_measure": "Sm", "weighted_f": "wFm", "mae": "mae", "adaptive_e": "adpEm", "mean_e": "meanEm",
    "max_e": "maxEm", "adaptive_f": "adpFm", "mean_f": "meanFm", "max_f": "maxFm",
}  # fmt: skip
_OBJECT = 26  # the MATLAB code takes mask values from 0.1 on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--cod", type=Path)
    args = parser.parse_args()
    tools = args.repository / "tools"
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
    if args.cod is not None:
        compare_curves(args.cod / "Onekey_Evaluation_Code")


def compare_curves(toolbox: Path) -> None:
    """Print the largest differences to the scores that the toolbox's authors have stored."""
    theirs = loadmat(toolbox / "Results" / "Result-COD10K-test" / "COD10K-mat" / "2020-CVPR-SINet.mat")
    maps = sorted((toolbox / "CamMap" / "2020-CVPR-SINet" / "COD10K").glob("*.png"))
    print("\n| convention | S | wF | MAE | adpE | meanE | maxE | adpF | meanF | maxF | E | F | precision | recall |")
    print("|---" * 14 + "|")
    for convention in CONVENTIONS:
        scores = MeanScores()
        for file in maps:
            prediction = np.asarray(Image.open(file).convert("L"))
            mask = np.asarray(Image.open(toolbox / "CamDataset" / "COD10K" / file.name).convert("L")) > 128
            scores.add(score_image(prediction, mask, Protocol(convention=convention)))
        means, curves = scores.means(), scores.curve_sums / scores.num_images
        found = [abs(means[ours] - float(theirs[name].item())) for ours, name in COD_NAMES.items()]
        found += [
            float(np.abs(curve[::-1] - theirs[name].ravel()).max())
            for curve, name in zip(curves, ("column_E", "column_F", "column_Pr", "column_Rec"), strict=True)
        ]
        print(f"| {convention} | {' | '.join(f'{one:.1e}' for one in found)} |")


if __name__ == "__main__":
    main()
