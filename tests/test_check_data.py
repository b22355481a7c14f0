"""``check-data`` and ``train --exclude``, as a user runs them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, Argv, needs_shared
from PIL import Image, ImageFilter

import train_ultimate
from data.synthetic import write_synthetic_dataset
from train_ultimate import main

ROOT = Path(__file__).parents[1]


def check(dataset: Path, *flags: str, workers: int = 0) -> int:
    return main(["check-data", "--dataset-path", str(dataset), "--num-workers", str(workers), *flags])


def read_findings(dataset: Path, out: Path, workers: int = 0) -> tuple[int, list[tuple[str, str]], dict[str, Any]]:
    """Return the exit code, (kind, file) of each finding, and the whole report."""
    code = check(dataset, "--json", str(out), workers=workers)
    report = json.loads(out.read_text())
    return code, [(finding["kind"], finding["file"]) for finding in report["findings"]], report


def plant_defects(root: Path) -> list[tuple[str, str]]:
    """Damage training pairs, each in its own way. Return (kind, file) of the expected findings."""
    images, masks = Path("TrainDataset/Imgs"), Path("TrainDataset/GT")
    stems = iter(sorted(path.stem for path in (root / images).iterdir()))

    def mask_as(change: Callable[[Image.Image], Image.Image]) -> str:
        file = masks / f"{next(stems)}.png"
        change(Image.open(root / file)).save(root / file)
        return file.as_posix()

    def image_of(stem: str) -> str:
        return (images / f"{stem}.jpg").as_posix()

    def copy(stem: str, name: str, split: str = "TrainDataset") -> None:
        shutil.copyfile(root / images / f"{stem}.jpg", root / split / "Imgs" / f"{name}.jpg")
        shutil.copyfile(root / masks / f"{stem}.png", root / split / "GT" / f"{name}.png")

    unreadable, truncated, no_mask, no_image = (next(stems) for _ in range(4))
    (root / image_of(unreadable)).write_text("<html>404</html>")
    data = (root / image_of(truncated)).read_bytes()
    (root / image_of(truncated)).write_bytes(data[: len(data) * 6 // 10])
    (root / masks / f"{no_mask}.png").unlink()
    (root / image_of(no_image)).unlink()
    wider = mask_as(lambda mask: mask.crop((0, 0, mask.width * 3 // 2, mask.height)))
    blurred = mask_as(lambda mask: mask.filter(ImageFilter.GaussianBlur(4)))
    empty = mask_as(lambda mask: mask.point(lambda _: 0))
    full = mask_as(lambda mask: mask.point(lambda _: 255))
    cmyk, twice, leaked, near = (next(stems) for _ in range(4))
    Image.open(root / image_of(cmyk)).convert("CMYK").save(root / image_of(cmyk))
    copy(twice, "zz_copy")
    copy(leaked, "zz_leaked", "TestDataset")
    copy(near, "zz_near")
    photo = Image.open(root / image_of(near))
    size = (photo.width * 6 // 10, photo.height * 6 // 10)
    photo.resize(size).save(root / images / "zz_near.jpg", quality=50)
    mask = Image.open(root / masks / f"{near}.png")
    mask.resize(size, Image.Resampling.NEAREST).save(root / masks / "zz_near.png")
    return [
        ("leak", image_of(leaked)),
        ("unreadable", image_of(unreadable)),
        ("truncated", image_of(truncated)),
        ("size-mismatch", wider.replace("GT", "Imgs").replace(".png", ".jpg")),
        ("empty-mask", empty),
        ("full-mask", full),
        ("mask-not-binary", blurred),
        ("wrong-mode", image_of(cmyk)),
        ("image-without-mask", image_of(no_mask)),
        ("mask-without-image", (masks / f"{no_image}.png").as_posix()),
        ("duplicate", image_of("zz_copy")),
        ("near-duplicate", image_of("zz_near")),
    ]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    root = tmp_path / "scenes"
    write_synthetic_dataset(root, num_train=50, num_test=10, img_size=96, seed=3)
    return root


def test_twelve_defects_are_found_and_nothing_else(scenes: Path, tmp_path: Path) -> None:
    code, findings, _ = read_findings(scenes, tmp_path / "clean.json")
    assert (code, findings) == (0, [])
    planted = plant_defects(scenes)
    code, findings, report = read_findings(scenes, tmp_path / "planted.json", workers=2)
    assert code == 1
    assert findings == planted
    assert all(finding["reason"] for finding in report["findings"])
    assert len(report["exclude"]) == 7


@needs_shared
def test_twelve_defects_are_found_among_photographs(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split, count in (("TrainDataset", 50), ("TestDataset", 10)):
        source = SHARED / "data" / "CAMO" / split
        stems = sorted(path.stem for path in (source / "Imgs").iterdir())
        for kind, suffix in (("Imgs", ".jpg"), ("GT", ".png")):
            (root / split / kind).mkdir(parents=True)
            for stem in stems[:: len(stems) // count][:count]:
                shutil.copyfile(source / kind / (stem + suffix), root / split / kind / (stem + suffix))
    _, before, _ = read_findings(root, tmp_path / "clean.json")
    planted = plant_defects(root)
    _, findings, _ = read_findings(root, tmp_path / "planted.json", workers=2)
    assert [finding for finding in findings if finding not in before] == planted


def test_table_names_files_reasons_and_the_next_step(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant_defects(scenes)
    assert check(scenes) == 1
    captured = capsys.readouterr()
    assert "Findings: 12" in captured.out
    assert "scene_00000.jpg: not an image but HTML or XML, as a failed download leaves" in captured.out
    assert "same file; one for training, one for testing [TestDataset/Imgs/zz_leaked.jpg]" in captured.out
    assert "Object's share of the image" in captured.out
    last = captured.out.splitlines()[-1]
    assert last.startswith("Training is better without 7 of its images. Next: python ")
    assert last.endswith(f"check-data --dataset-path {scenes} --write-exclude exclude.txt")
    assert captured.err == ""


def test_long_lists_are_cut_in_the_table_but_not_in_json(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mask in (scenes / "TrainDataset" / "GT").iterdir():
        mask.unlink()
    code, findings, _ = read_findings(scenes, tmp_path / "out.json")
    assert (code, len(findings)) == (1, 50)
    out = capsys.readouterr().out
    assert out.count("no file of its name among the masks") == 10
    assert "... and 40 more" in out


def test_training_excludes_the_images_that_check_data_lists(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, exclude = tmp_path / "tiny", tmp_path / "exclude.txt"
    shutil.copytree(tiny_dataset, root)
    images = sorted((root / "TrainDataset" / "Imgs").iterdir())
    images[0].write_bytes(b"no image")
    Image.new("L", (64, 64), 255).save(root / "TrainDataset" / "GT" / f"{images[1].stem}.png")
    assert check(root, "--write-exclude", str(exclude)) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(f"train --dataset-path {root} --exclude {exclude}")
    lines = exclude.read_text().splitlines()
    assert lines[2:] == [
        "# unreadable: not an image",
        "TrainDataset/Imgs/scene_00000.jpg",
        "# full-mask: mask: the object fills the image",
        "TrainDataset/Imgs/scene_00001.jpg",
    ]
    exclude.write_text(exclude.read_text() + "TrainDataset/Imgs/nobody.jpg\n")
    flags = ("--dataset-path", str(root), "--exclude", str(exclude), "--epochs", "1", "--stage1-epochs", "1")
    assert main(tiny_argv(*flags)) == 0
    out = capsys.readouterr().out
    assert "18 pairs to train on, 2 to validate on" in out
    assert f"2 pairs left out by --exclude {exclude}\n" in out
    assert "1 paths match no training pair, the first: TrainDataset/Imgs/nobody.jpg" in out


@pytest.mark.slow
def test_resumed_run_excludes_the_same_images_if_the_list_is_gone(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("TrainDataset/GT/scene_00003.png\n")  # a mask's name works too
    assert main(tiny_argv("--exclude", str(exclude), "--epochs", "1", "--stage1-epochs", "1")) == 0
    capsys.readouterr()
    exclude.unlink()
    assert main(tiny_argv("--resume", "auto", "--epochs", "2", "--stage1-epochs", "1")) == 0
    out = capsys.readouterr().out
    assert f"--exclude {exclude}: no such file; what it named when the checkpoint was written is left out" in out
    assert "19 pairs to train on, 2 to validate on" in out
    assert "files were added, removed, changed or excluded" not in out
    exclude.write_text("")  # an existing list counts as it is now
    assert main(tiny_argv("--resume", "auto", "--epochs", "3", "--stage1-epochs", "1")) == 0
    assert "20 pairs to train on, 2 to validate on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "exclude.txt: no such file"), ("all", "names every one of the 22 training pairs")],
)
def test_unusable_exclude_file_is_reported_in_one_line(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    content: str | None, message: str,
) -> None:  # fmt: skip
    exclude = tmp_path / "exclude.txt"
    if content is not None:
        images = (tiny_dataset / "TrainDataset" / "Imgs").iterdir()
        exclude.write_text("".join(f"{path.relative_to(tiny_dataset)}\n" for path in images))
    assert main(tiny_argv("--exclude", str(exclude))) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_unusable_folders_are_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for kind, name in (("Imgs", "a.jpg"), ("GT", "a.png")):
        (tmp_path / "broken" / "TrainDataset" / kind).mkdir(parents=True)
        (tmp_path / "broken" / "TrainDataset" / kind / name).write_bytes(b"no image")
    for folder, message in (
        ("nowhere", "no such folder; --dataset-path must name the dataset's folder"),
        ("empty", "no image/mask folders found. Looked for {image,gt_object}"),
        ("broken", "no image with a mask can be used; see the findings above"),
    ):
        assert check(tmp_path / folder) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--json", "--write-exclude"])
def test_only_its_own_files_are_replaced(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    notes, pipe, link = tmp_path / "notes.txt", tmp_path / "pipe", tmp_path / "link"
    notes.write_text('# my notes\n{"sets": 1}\n')
    os.mkfifo(pipe)
    link.symlink_to(scenes / "TrainDataset" / "Imgs" / "scene_00001.jpg")
    image, mask = (
        scenes / "TrainDataset" / "Imgs" / "scene_00000.jpg",
        scenes / "TrainDataset" / "GT" / "scene_00000.png",
    )
    kept = {file: file.read_bytes() for file in (notes, image, mask)}
    for place in (notes, image, mask, pipe, link, Path("/dev/null")):
        assert check(scenes, flag, str(place)) == 2
        captured = capsys.readouterr()
        assert f"{flag} {place}: {place} exists already, and check-data did not write it" in captured.err
        assert (captured.err.count("\n"), captured.out) == (1, "")
    assert {file: file.read_bytes() for file in kept} == kept
    assert link.is_symlink()
    own = tmp_path / "own"
    own.touch()  # an empty file, as mktemp makes
    for _ in range(2):
        assert check(scenes, flag, str(own)) == 0
        assert own.stat().st_size > 0


def test_lists_written_by_the_previous_version_are_replaced(scenes: Path, tmp_path: Path) -> None:
    old = tmp_path / "exclude.txt"
    old.write_text(
        "# Of a: training images to leave out, with train --exclude FILE. Found by check-data.\nImgs/a.jpg\n"
    )
    assert check(scenes, "--write-exclude", str(old)) == 0
    assert "Imgs/a.jpg" not in old.read_text()


def test_images_without_an_object_are_left_out_only_if_the_user_says_so(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be negatives on purpose. A blank mask of a copy that has an object elsewhere is none."""
    exclude, train = tmp_path / "exclude.txt", scenes / "TrainDataset"
    for name in ("scene_00003", "scene_00007"):
        Image.new("L", (96, 96)).save(train / "GT" / f"{name}.png")
    for kind, suffix in (("Imgs", ".jpg"), ("GT", ".png")):
        shutil.copyfile(train / kind / f"scene_00007{suffix}", train / kind / f"aa_copy{suffix}")
    Image.open(train / "GT" / "scene_00008.png").save(train / "GT" / "scene_00007.png")
    assert check(scenes, "--write-exclude", str(exclude)) == 1
    assert "TrainDataset/GT/scene_00003.png: no object" in capsys.readouterr().out
    lines = exclude.read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["TrainDataset/Imgs/aa_copy.jpg"]
    assert "#TrainDataset/Imgs/scene_00003.jpg" in lines


def test_no_next_command_that_would_be_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(name: str, folder: str, masks: tuple[str, ...]) -> Path:
        for kind, names in (("Imgs", ("a.jpg", "b.jpg")), ("GT", masks)):
            (tmp_path / name / folder / kind).mkdir(parents=True)
            for number, file in enumerate(names):
                picture = Image.effect_noise((96, 96), 50 + 100 * number).convert("RGB" if kind == "Imgs" else "1")
                picture.save(tmp_path / name / folder / kind / file)
        return tmp_path / name

    one = made("one", "TrainDataset", ("a.png",))
    (one / "TrainDataset" / "Imgs" / "b.jpg").unlink()
    assert check(one) == 1
    out = capsys.readouterr().out
    assert "Training would refuse it: 1 training pair: at least two are needed" in out
    assert "Next:" not in out
    assert check(made("test", "TestDataset", ("a.png", "b.png"))) == 0
    out = capsys.readouterr().out
    assert "Training would refuse it" in out
    assert "only test folders found" in out
    assert "Next:" not in out
    assert check(made("unlike", "TrainDataset", ("c.png", "d.png"))) == 2
    printed = capsys.readouterr()
    assert "Next:" not in printed.out
    assert "TrainDataset: the names are such as a and c" in printed.out
    assert "no image with a mask can be used" in printed.err


def test_files_that_are_not_read_are_findings_and_rules_are_notes(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = scenes / "TrainDataset"
    for mask in (train / "GT").iterdir():
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    os.mkfifo(train / "Imgs" / "pipe.jpg")
    (train / "Imgs" / "telephone.HEIC").write_bytes(b"x")
    code, findings, report = read_findings(scenes, tmp_path / "out.json")
    assert (code, findings) == (
        1,
        [("left-out", "TrainDataset/Imgs/pipe.jpg"), ("left-out", "TrainDataset/Imgs/telephone.HEIC")],
    )
    assert "TrainDataset: all 50 masks end in _mask; paired by the rest" in report["notes"]
    assert "pipe.jpg: not a file but a pipe, socket or device" in capsys.readouterr().out


def test_names_that_are_not_utf8_are_printed_escaped(scenes: Path, tmp_path: Path) -> None:
    """The process is one of its own, whose terminal takes only UTF-8."""
    folder = os.fsencode(scenes / "TrainDataset" / "Imgs")
    (scenes / "TrainDataset" / "Imgs" / "scene_00000.jpg").rename(os.fsdecode(folder + b"/\xe9\xff.jpg"))
    command = [
        sys.executable,
        train_ultimate.__file__,
        "check-data",
        "--dataset-path",
        str(scenes),
        "--num-workers",
        "0",
    ]
    command += ["--write-exclude", str(tmp_path / "exclude.txt"), "--json", str(tmp_path / "out.json")]
    process = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"}, check=False)
    assert process.returncode == 1
    assert process.stderr == b""
    assert b"TrainDataset/Imgs/\\udce9\\udcff.jpg: no file of its name" in process.stdout


@pytest.mark.parametrize("flag", ["--json", "--write-exclude"])
def test_files_that_cannot_be_written_are_reported_before_the_work(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    for place, message in ((tmp_path / "nowhere" / "out", "create it first"), (tmp_path, "is a folder")):
        assert check(scenes, flag, str(place)) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


def test_closed_pipe_is_no_error(scenes: Path) -> None:
    plant_defects(scenes)
    read, write = os.pipe()
    os.close(read)
    command = (
        "from pathlib import Path; from commands.check_data import check_data; import sys; "
        "sys.exit(check_data(Path(sys.argv[1]), None, None, 0, False))"
    )
    process = subprocess.run(
        [sys.executable, "-c", command, str(scenes)], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert process.stderr == b""
    assert process.returncode == 1


def test_interrupt_ends_all_processes_without_a_traceback(tmp_path: Path) -> None:
    for kind, side in (("Imgs", 2000), ("GT", 20)):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG")  # a small file that takes a while to decode
        (tmp_path / "TrainDataset" / kind).mkdir(parents=True)
        for number in range(300):
            (tmp_path / "TrainDataset" / kind / f"{number}.png").write_bytes(buffer.getvalue())
    command = (
        "from pathlib import Path; from commands import check_data; import sys\n"
        "inspect = check_data._inspect\n"
        "check_data._inspect = lambda *args: (print('begins', flush=True), inspect(*args))[1]\n"
        "sys.exit(check_data.check_data(Path(sys.argv[1]), None, None, 2, False))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path)], cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted: nothing was written\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of the group is alive
