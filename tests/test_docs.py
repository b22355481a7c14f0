"""The commands in README and docs: the program takes each of them, and those that can be run here are run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import epoch_lines_only
from packaging.requirements import Requirement

from commands import cli
from data.masks import READINGS
from data.opening import LIMIT_VARIABLE, MAX_MEGAPIXELS
from data.synthetic import write_synthetic_dataset
from train_ultimate import ScriptParts, main

ROOT = Path(__file__).parents[1]
SMALL = shlex.split(
    "--backbone test_efficientnet --no-pretrained --decoder-channels 16 --img-size 64 --epochs 2 --stage1-epochs 1 "
    "--batch-size 2 --accumulation-steps 2 --num-workers 0 --val-fraction 0.2 --frozen-levels 0"
)


SMALL_PARTS = ScriptParts(scenes=(40, 3), listeners_of=epoch_lines_only)


def commands() -> list[tuple[str, list[str]]]:
    """Return launcher and arguments of the program for each line of a code block that starts the program."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                launcher, program, rest = line.partition("train_ultimate.py ")
                if program and not line.startswith("train_ultimate.py"):
                    found.append((launcher, shlex.split(rest.rstrip(" &"))))
    return found


def test_program_takes_every_command() -> None:
    found = commands()
    assert len(found) > 25
    for _, arguments in found:
        assert cli.parse(arguments).command == arguments[0]


def test_versions_of_the_constraints_are_allowed_by_the_requirements() -> None:
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[requirement.name]), line


def test_data_document_has_all_ways_to_read_masks_and_the_limit_of_megapixels() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    assert set(re.findall(r"^\| `([a-z][a-z0-9-]*)` \|", text, flags=re.MULTILINE)) == READINGS.keys()
    assert f"more than {MAX_MEGAPIXELS} megapixels" in text
    assert f"`{LIMIT_VARIABLE}=" in text


def test_every_link_leads_somewhere() -> None:
    num_links = 0
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if not link.startswith("http"):
                file, _, heading = link.partition("#")
                target = path.parent / file
                assert target.is_file(), f"{path.name}: {link}"
                titles = re.findall(r"^#+ (.*)", target.read_text(), flags=re.MULTILINE) if heading else []
                assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}, link
                num_links += 1
    assert num_links > 15


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the documents expect: datasets, photographs, predictions, finished runs."""
    scenes, data = tmp_path / "scenes", tmp_path / "data"
    write_synthetic_dataset(scenes, num_train=12, num_test=3, img_size=64, seed=3)
    train, test = scenes / "TrainDataset", scenes / "TestDataset"

    def copy(source: Path, images: Path, masks: Path, name: str = "{}") -> None:
        for kind, target in (("Imgs", images), ("GT", masks)):
            target.mkdir(parents=True)
            for path in (source / kind).iterdir():
                shutil.copy(path, target / (name.format(path.stem) + path.suffix))

    camouflaged = "COD10K-CAM-1-Aquatic-1-BatFish-{}"
    copy(train, data / "COD10K-v3/Train/Image", data / "COD10K-v3/Train/GT_Object", camouflaged)
    copy(train, data / "CAMO/TrainDataset/Imgs", data / "CAMO/TrainDataset/GT")
    for name in ("CAMO", "NC4K"):
        copy(test, data / "TestDataset" / name / "Imgs", data / "TestDataset" / name / "GT")
    copy(train, tmp_path / "own/images", tmp_path / "own/masks")
    shutil.copytree(test / "Imgs", tmp_path / "photos")
    shutil.copytree(test / "GT", tmp_path / "video/night")
    for name in ("SINet-V2/CAMO", "SINet-V2/NC4K", "PFNet/CAMO", "PFNet/NC4K"):
        shutil.copytree(test / "GT", tmp_path / "results" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b", "c"):
        assert main(["train", "--dataset-path", "own", "--checkpoint-dir", f"runs/{name}", *SMALL], SMALL_PARTS) == 0
    return tmp_path


def made_small(arguments: list[str]) -> list[str]:
    """Return the command for a small network. Drills strike in the third window; a kill is left out."""
    without_kill = re.sub(r"--drill kill@\d+", "", shlex.join(arguments))
    return [*shlex.split(re.sub(r"@\d+", "@3", without_kill)), *SMALL]


@pytest.mark.slow
def test_every_command_works(folder: Path) -> None:
    """Run the commands in the documents' order, with small networks and few epochs."""
    num_runs = 0
    for launcher, arguments in commands():
        if not launcher.startswith("python"):  # torchrun: see test_ranks and test_two_hosts
            continue
        is_run = arguments[0] in ("train", "demo")
        if arguments[0] == "train" and "--resume" not in arguments and "--checkpoint-dir" not in arguments:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        arguments = made_small(arguments) if is_run else arguments
        expected = {0, 1} if arguments[0] == "check-data" else {0}
        assert main(arguments, SMALL_PARTS) in expected, shlex.join(arguments)
        num_runs += 1
    assert num_runs > 20
    for path in (
        "compared.html",
        "table.md",
        "runs/drill/report.html",
        "runs/drill/incidents/000001",
        "found",
        "exclude.txt",
    ):
        assert (folder / path).exists()
