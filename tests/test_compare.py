"""``compare``: methods in any layout of folders, runs of a method, networks, and files that do not belong there."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_arguments
from PIL import Image

from train_ultimate import main

SETS = {"CAMO": 12, "NC4K": 10}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test sets, each object at another place."""
    root = tmp_path_factory.mktemp("data")
    for name, number in SETS.items():
        for folder in ("Imgs", "GT"):
            (root / name / "TestDataset" / folder).mkdir(parents=True)
        for index in range(number):
            mask = Image.new("L", (32, 24))
            mask.paste(255, (2 + index, 3, 12 + index, 15))
            mask.save(root / name / "TestDataset" / "GT" / f"{index}.png")
            Image.new("RGB", (32, 24), (90, 120, 60)).save(root / name / "TestDataset" / "Imgs" / f"{index}.jpg")
    return root


def predict(data: Path, folder: Path, noise: int, sets: tuple[str, ...] = tuple(SETS), seed: int = 0) -> Path:
    """Write predictions of the sets into a folder each: the masks, softened, with noise."""
    generator = np.random.default_rng(seed)
    for name in sets:
        (folder / name).mkdir(parents=True)
        for file in sorted((data / name / "TestDataset" / "GT").iterdir()):
            mask = np.asarray(Image.open(file)).astype(int)
            soft = mask // 2 + 60 + generator.integers(-noise, noise + 1, mask.shape)
            Image.fromarray(soft.clip(0, 255).astype(np.uint8)).save(folder / name / file.name)
    return folder


class Compare:
    """The command on the sets, with a cache of its own."""

    def __init__(self, data: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys, self.json = folder, capsys, folder / "scores.json"
        cache = ["--cache-dir", str(folder / "cache"), "--num-workers", "0", "--json", str(self.json)]
        self.flags = ["--dataset-path", str(data), *cache]

    def __call__(self, *argv: str | Path) -> dict[str, Any]:
        """Return what was written; ``out`` has what was printed."""
        exit_code = main(["compare", *map(str, argv), *self.flags])
        self.out, self.err = self._capsys.readouterr()
        assert exit_code == 0, self.err
        return json.loads(self.json.read_text())

    def failing(self, *argv: str | Path) -> str:
        assert main(["compare", *map(str, argv), *self.flags]) == 2
        (line,) = self._capsys.readouterr().err.splitlines()
        return line


@pytest.fixture
def compare(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    return Compare(data, tmp_path, capsys)


def names(content: dict[str, Any]) -> list[str]:
    return [method["name"] for method in content["methods"]]


def test_the_scores_are_those_of_evaluate(data: Path, compare: Compare, tmp_path: Path) -> None:
    method = predict(data, tmp_path / "unet", 40)
    content = compare(method)
    flags = ["--predictions", str(method), "--dataset-path", str(data), "--json", str(tmp_path / "evaluate.json")]
    assert main(["evaluate", *flags]) == 0
    evaluated = json.loads((tmp_path / "evaluate.json").read_text())["sets"]
    (scored,) = content["methods"]
    assert scored["runs"][0]["sets"] == evaluated
    assert scored["scores"] == {name: report["scores"] for name, report in evaluated.items()}


def test_a_folder_of_methods_and_a_folder_of_each_set_are_both_understood(
    data: Path, compare: Compare, tmp_path: Path
) -> None:
    for name, noise in (("sinet", 40), ("pfnet", 60)):
        predict(data, tmp_path / "methods" / name, noise)
        for each in SETS:
            (tmp_path / "sets" / each).mkdir(parents=True, exist_ok=True)
            shutil.copytree(tmp_path / "methods" / name / each, tmp_path / "sets" / each / name)
    by_method, by_set = compare(tmp_path / "methods"), compare(tmp_path / "sets")
    assert names(by_method) == names(by_set) == ["pfnet", "sinet"]
    scores = [[method["scores"] for method in content["methods"]] for content in (by_method, by_set)]
    assert scores[0] == scores[1]


def test_masks_in_folders_of_classes_are_no_methods(data: Path, compare: Compare, tmp_path: Path) -> None:
    """Predictions have the same folders."""
    root, method = tmp_path / "classes", predict(data, tmp_path / "unet", 40)
    for name in SETS:
        shutil.copytree(data / name / "TestDataset", root / name / "TestDataset")
        for folder in (root / name / "TestDataset" / "Imgs", root / name / "TestDataset" / "GT", method / name):
            for file in list(folder.iterdir()):
                below = folder / ("even" if int(file.stem) % 2 == 0 else "odd")
                below.mkdir(exist_ok=True)
                file.rename(below / file.name)
    compare.flags[1] = str(root)
    (only,) = compare(method)["methods"]
    assert only["name"] == "unet"
    assert len(only["runs"][0]["sets"]["NC4K"]["images"]) == SETS["NC4K"]


def test_a_method_is_called_like_its_folder_or_the_link_to_it(
    data: Path, compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = predict(data, tmp_path / "unet", 40)
    (tmp_path / "best").symlink_to(method)
    monkeypatch.chdir(method)
    assert names(compare(".", tmp_path / "best")) == ["unet", "best"]


def test_one_set_needs_no_folder_of_its_own(data: Path, compare: Compare, tmp_path: Path) -> None:
    folder = predict(data, tmp_path / "unet", 40, ("CAMO",)) / "CAMO"
    compare.flags[1] = str(data / "CAMO")
    (only,) = compare(f"unet={folder}")["methods"]
    compare.flags[:2] = ["--masks", str(data / "CAMO" / "TestDataset" / "GT")]
    (alone,) = compare(f"unet={folder}")["methods"]
    assert only["name"] == alone["name"] == "unet"
    assert only["scores"] == alone["scores"]


def test_masks_alone_are_not_enough_for_a_network(data: Path, compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"")
    compare.flags[:2] = ["--masks", str(data / "CAMO" / "TestDataset" / "GT")]
    assert "a network needs photographs: give --dataset-path" in compare.failing(tmp_path / "net.pth")
    compare.flags[:2] = []
    assert "compare needs --dataset-path or --masks, one of them" in compare.failing(tmp_path)


def test_runs_of_a_method_become_a_mean_and_a_deviation(data: Path, compare: Compare, tmp_path: Path) -> None:
    for seed in (1, 2, 10):
        predict(data, tmp_path / "all" / "ours" / f"seed{seed}", 50, seed=seed)
    predict(data, tmp_path / "all" / "unet", 60)
    content = compare(tmp_path / "all", "--baseline", "unet")
    assert names(content) == ["ours", "unet"]
    runs = [run["sets"]["CAMO"]["scores"]["s_measure"] for run in content["methods"][0]["runs"]]
    assert len(set(runs)) == 3
    assert content["methods"][0]["scores"]["CAMO"]["s_measure"] == pytest.approx(np.mean(runs))
    assert f"{np.mean(runs):.3f} ± {np.std(runs, ddof=1):.3f}" in compare.out
    assert "over runs: ours of 3" in compare.out


def test_a_better_method_is_called_better_and_a_like_one_is_not(data: Path, compare: Compare, tmp_path: Path) -> None:
    methods = [predict(data, tmp_path / name, noise, seed=noise) for name, noise in (("a", 60), ("b", 61), ("c", 5))]
    content = compare(*methods, "--baseline", "a")
    sentences = [one["sentence"] for one in content["differences"] if one["measure"] == "s_measure"]
    assert [text[: text.index(":")] for text in sentences if text.startswith("c")] == [
        f"c is better than a on {where}" for where in ("CAMO", "NC4K", "all sets")
    ]
    assert all("do not differ" in text for text in sentences if text.startswith("b"))
    assert "c is better than a on all sets: S +" in compare.out
    assert {one["measure"] for one in content["differences"]} == {"s_measure", "weighted_f", "mae", "mean_e"}
    assert all(one["p"] <= one["p_corrected"] for one in content["differences"])


def test_a_network_is_compared_by_its_own_predictions(tiny_dataset: Path, compare: Compare, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(tiny_arguments(tiny_dataset, run, "--epochs", "1", "--stage1-epochs", "1")) == 0
    saved = tmp_path / "saved"
    flags = ["--checkpoint", str(run), "--dataset-path", str(tiny_dataset), "--save-predictions", str(saved)]
    assert main(["evaluate", *flags]) == 0
    compare.flags[1] = str(tiny_dataset)
    network, files = compare(run, f"files={saved}", "--page", tmp_path / "page.html")["methods"]
    assert network["name"] == "run"
    assert network["scores"] == files["scores"]
    page = (tmp_path / "page.html").read_text()
    assert "Predictions of run were not saved" in page
    assert page.count("data:image/jpeg;base64,") == 3 * 3  # image, mask and the saved prediction


def test_scores_are_kept_and_only_what_has_changed_is_scored_again(
    data: Path, compare: Compare, tmp_path: Path
) -> None:
    first, second = (predict(data, tmp_path / name, noise) for name, noise in (("a", 40), ("b", 60)))
    before = compare(first, second)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "scores").iterdir()}
    assert len(kept) == 2
    assert compare(first, second)["methods"] == before["methods"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache" / "scores").iterdir()} == kept
    changed = first / "CAMO" / "3.png"
    Image.new("L", (32, 24)).save(changed)
    os.utime(changed, ns=(time.time_ns(), time.time_ns() + 1))
    after = compare(first, second)
    assert after["methods"][0]["scores"] != before["methods"][0]["scores"]
    assert after["methods"][1] == before["methods"][1]
    for file in (tmp_path / "cache" / "scores").iterdir():
        file.write_text("cut sho")
    assert compare(first, second)["methods"] == after["methods"]


def test_a_cache_that_cannot_be_written_costs_no_scores(data: Path, compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert names(compare(predict(data, tmp_path / "unet", 40))) == ["unet"]
    assert "scores are not kept for the next call" in compare.out


def test_numbers_of_papers_stand_beside_only_for_sets_of_their_size(
    data: Path, compare: Compare, tmp_path: Path
) -> None:
    method, table = predict(data, tmp_path / "unet", 40), tmp_path / "papers.csv"
    table.write_text(
        "method,set,images,source,s_measure\nPaper,camo,12,its page 7,.999\nPaper,NC4K,4121,its page 7,.9\n"
    )
    content = compare(method, "--published", table)
    assert [(row["name"], list(row["scores"]), row["source"]) for row in content["published"]] == [
        ("Paper", ["CAMO"], "its page 7")
    ]
    assert "No published numbers for NC4K: they are for 4121 images, and there are 10" in compare.out
    assert "Paper         0.999*" in compare.out
    compare(method, "--published")
    assert "No published numbers for CAMO: they are for 250 images, and there are 12" in compare.out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method,set,images,source,s_measure\nA,CAMO,12,b,x\n", "line 2: could not convert"),
        ("a,b\n1,2\n", "needs a first line with images, method, set, source"),
        ("", "needs a first line"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    data: Path, compare: Compare, tmp_path: Path, text: str, problem: str
) -> None:
    (tmp_path / "papers.csv").write_text(text)
    line = compare.failing(predict(data, tmp_path / "unet", 40), "--published", tmp_path / "papers.csv")
    assert problem in line


def test_tables_are_written_and_no_other_file_is_replaced(data: Path, compare: Compare, tmp_path: Path) -> None:
    method = predict(data, tmp_path / "unet", 40)
    files = {"--markdown": "t.md", "--latex": "t.tex", "--csv": "t.csv"}
    flags = [part for name, file in files.items() for part in (name, str(tmp_path / file))]
    for _ in range(2):  # its own files are replaced
        compare(method, *flags)
    assert "| unet | 0." in (tmp_path / "t.md").read_text()
    assert "unet & 0." in (tmp_path / "t.tex").read_text()
    assert "unet,CAMO,12,1,scored here,0." in (tmp_path / "t.csv").read_text()
    for name, file in files.items():
        (tmp_path / file).write_text("mine\n")
        assert "compare did not write it" in compare.failing(method, name, tmp_path / file)


def test_the_page_has_tables_curves_and_the_images_on_which_methods_differ(
    data: Path, compare: Compare, tmp_path: Path
) -> None:
    methods = [predict(data, tmp_path / f"<{name}>", noise) for name, noise in (("a", 5), ("b", 60))]
    Image.new("L", (32, 24)).save(methods[1] / "NC4K" / "4.png")
    for _ in range(2):  # the page may be replaced
        compare(*methods, "--baseline", "<a>", "--page", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<table class="sortable">') == len(SETS)
    assert page.count('<button type="button">') == 4 * len(SETS)
    disputed = page[page.index('id="disputed"') : page.index('id="curves"')]
    assert re.findall(r"<code>(.*?)</code>", disputed)[0] == "NC4K/4.png"
    assert disputed.count("data:image/jpeg;base64,") == 4 * 12  # image, mask and two predictions
    assert "&lt;b&gt; is worse than &lt;a&gt; on all sets" in page
    assert "<b>" not in page[: page.index("<script>")]
    figures = json.loads(page.split('<script type="application/json" id="figures">')[1].split("</script>")[0])
    assert list(figures) == [
        *(f"{curve}-{name}" for name in ("camo", "nc4k") for curve in ("pr", "f", "e")),
        "object-size-camo", "object-size-nc4k", "images-camo", "images-nc4k",
    ]  # fmt: skip
    assert [trace["name"] for trace in figures["f-camo"]["data"]] == ["<a>", "<b>"]
    assert len(figures["images-camo"]["data"][1]["x"]) == SETS["CAMO"]
    (tmp_path / "page.html").write_text("mine")
    assert "compare did not write it" in compare.failing(*methods, "--page", tmp_path / "page.html")


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_figures_for_papers_are_drawn_alike_each_time(
    suffix: str, data: Path, compare: Compare, tmp_path: Path
) -> None:
    methods = [predict(data, tmp_path / "good", 20), predict(data, tmp_path / "bad", 120)]
    grid, curves = tmp_path / f"grid{suffix}", tmp_path / f"curves{suffix}"
    contents = []
    for _ in range(2):  # the second time it replaces its own
        compare(*methods, "--figure", grid, "--curves", curves)
        contents.append((grid.read_bytes(), curves.read_bytes()))
    assert contents[0] == contents[1]
    if suffix == ".svg":
        assert contents[0][0].count(b"<image") == 6 * 4  # image, mask and two methods
        assert b"<image" not in contents[0][1]  # lines only
    else:
        assert contents[0][0].startswith(b"%PDF")
    grid.write_text("mine")
    assert "compare did not write it" in compare.failing(*methods, "--figure", grid)


def test_the_rows_of_the_figure_are_chosen_by_name(data: Path, compare: Compare, tmp_path: Path) -> None:
    method, grid = predict(data, tmp_path / "good", 20), tmp_path / "grid.svg"
    compare(method, "--figure", grid, "--figure-rows", "CAMO/3", "NC4K/5.png")
    assert grid.read_bytes().count(b"<image") == 2 * 3
    assert "CAMO/3.png, NC4K/3.png have this name" in compare.failing(method, "--figure", grid, "--figure-rows", "3")
    compare(f"mask={method}", "--figure", grid, "--figure-rows", "CAMO/3")  # called like the mask's own column
    assert grid.read_bytes().count(b"<image") == 3
    assert "99: no mask or photograph" in compare.failing(method, "--figure", grid, "--figure-rows", "99")
    assert "name a .svg or .pdf file" in compare.failing(method, "--figure", tmp_path / "grid.jpg")


def test_images_are_grouped_by_attributes_of_a_table(data: Path, compare: Compare, tmp_path: Path) -> None:
    method, table = predict(data, tmp_path / "unet", 40), tmp_path / "attributes.csv"
    lines = [f"{index}.jpg,{'day' if index < 4 else 'night'},{'' if index else 'rain'}" for index in range(9)]
    table.write_text("name,light,weather\n" + "\n".join(lines) + "\n")
    content = compare(method, "--attributes", table, "--page", tmp_path / "page.html")
    assert "nothing about 3 images, such as 10.png" in compare.out
    page = (tmp_path / "page.html").read_text()
    figures = json.loads(page.split('<script type="application/json" id="figures">')[1].split("</script>")[0])
    (bars,) = figures["light-camo"]["data"]
    images = content["methods"][0]["runs"][0]["sets"]["CAMO"]["images"]
    day = [image["s_measure"] for image in images if int(image["name"].removesuffix(".png")) < 4]
    assert bars["x"] == ["day", "night"]
    assert bars["y"][0] == pytest.approx(np.mean(day), abs=1e-5)
    assert "weather-camo" not in figures  # one group is nothing to compare
    table.write_text("name,light\nother,day\n")
    assert "none of its names, such as other" in compare.failing(method, "--attributes", table, "--page", "page.html")
    assert "--attributes goes with --page" in compare.failing(method, "--attributes", table)


def test_rare_measures_are_computed_when_named_and_ranked_by_their_direction(
    data: Path, compare: Compare, tmp_path: Path
) -> None:
    methods = [predict(data, tmp_path / "good", 20), predict(data, tmp_path / "bad", 120)]
    rare = ["balanced_error", "size_invariant_f", "camouflage_context"]
    content = compare(*methods, "--measures", "mae", *rare, "--baseline", "bad")
    good, bad = (method["scores"]["CAMO"] for method in content["methods"])
    assert good["balanced_error"] < bad["balanced_error"]
    assert good["size_invariant_f"] > bad["size_invariant_f"]
    assert 0 < bad["camouflage_context"] < good["camouflage_context"] <= 1
    lines = [line for line in compare.out.splitlines() if line.startswith("good  ")]
    assert [line.count("*") for line in lines] == [4, 4]
    assert {one["measure"] for one in content["differences"]} == {"mae", *rare}
    assert "balanced_error" not in compare(*methods)["methods"][0]["scores"]["CAMO"]


def test_the_convention_moves_the_curves_alone(data: Path, compare: Compare, tmp_path: Path) -> None:
    method = predict(data, tmp_path / "good", 20)
    pysod, matlab = (
        compare(method, "--convention", convention)["methods"][0]["scores"]["CAMO"]
        for convention in ("pysod", "matlab")
    )
    assert pysod["mean_e"] != matlab["mean_e"]
    for name in ("s_measure", "weighted_f", "mae", "iou", "adaptive_f"):
        assert pysod[name] == matlab[name]


@pytest.mark.parametrize("stretch", [True, False])
def test_images_without_an_object_are_named_once_or_told_apart_for_each_method(
    stretch: bool, data: Path, compare: Compare, tmp_path: Path
) -> None:
    methods = [predict(data, tmp_path / name, noise) for name, noise in (("good", 20), ("bad", 120))]
    empty, masks = np.zeros((40, 50), dtype=np.uint8), tmp_path / "masks"
    shutil.copytree(data / "CAMO" / "TestDataset" / "GT", masks)
    for folder in (masks, *(method / "CAMO" for method in methods)):
        Image.fromarray(empty + 10 * (folder != masks)).save(folder / "empty.png")
    compare.flags = ["--masks", str(masks), *compare.flags[2:]]
    paths = [f"{method.name}={method / 'CAMO'}" for method in methods]
    content = compare(*paths, "--stretch" if stretch else "--no-stretch")
    lines = [line for line in compare.out.splitlines() if "images without an object" in line]
    assert len(lines) == (1 if stretch else 2)
    assert ("--no-stretch says" in lines[0]) == stretch
    if not stretch:
        (presence,) = (one["presence"] for one in content["methods"][0]["runs"][0]["sets"].values())
        assert presence == {"num_empty": 1, "auroc": 1.0, "false_alarms": 0.0}


def test_the_camouflage_context_is_refused_without_photographs(data: Path, tmp_path: Path, compare: Compare) -> None:
    method = predict(data, tmp_path / "good", 20, ("CAMO",))
    masks = ["--masks", str(data / "CAMO" / "TestDataset" / "GT"), "--cache-dir", str(tmp_path / "c")]
    compare.flags = [*masks, "--num-workers", "0"]
    assert "needs the photographs: give --dataset-path" in compare.failing(
        method / "CAMO", "--measures", "camouflage_context"
    )


def test_what_is_missing_or_wrong_is_named(data: Path, compare: Compare, tmp_path: Path) -> None:
    method = predict(data, tmp_path / "unet", 40)
    assert "nowhere: no such file or folder" in compare.failing(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "(missing: CAMO, NC4K)" in compare.failing(tmp_path / "empty")
    assert "(missing: NC4K); it has CAMO" in compare.failing(predict(data, tmp_path / "half", 40, ("CAMO",)))
    assert "two methods are called unet" in compare.failing(method, method)
    assert "--baseline sinet: the methods are unet" in compare.failing(method, "--baseline", "sinet")
    for name in ("a", "b"):
        predict(data, tmp_path / "two" / name, 40)
    assert "holds several methods: a, b" in compare.failing(f"x={tmp_path / 'two'}")
    (method / "CAMO" / "0.png").write_bytes(b"no image")
    assert "methods are compared only if all their images can be scored" in compare.failing(method)
    (method / "CAMO" / "0.png").unlink()
    assert "no prediction for 1 of the 12 masks of CAMO: 0.png" in compare.failing(method)


def test_folders_and_predictions_that_belong_to_nothing_are_named(data: Path, compare: Compare, tmp_path: Path) -> None:
    predict(data, tmp_path / "all" / "unet", 40)
    (tmp_path / "all" / "notes").mkdir()
    Image.new("L", (32, 24)).save(tmp_path / "all" / "unet" / "CAMO" / "other.png")
    assert names(compare(tmp_path / "all")) == ["unet"]
    assert "left out: " in compare.out
    assert "not scored, without a mask in CAMO: other.png" in compare.out
