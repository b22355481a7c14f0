"""The limit of a picture's size: stated, named by errors, and the user's to raise."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import train_ultimate
from data.dataset import header_problems
from data.decoding import decode_image, image_size
from data.inspection import inspect_pair
from data.layouts import Pair
from data.opening import LIMIT_VARIABLE, MAX_MEGAPIXELS, max_megapixels, open_picture
from train_ultimate import main

WAY_OUT = "the limit is 1, to read it, set TRAIN_ULTIMATE_MAX_MEGAPIXELS=2"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture of 1.2 megapixels, with a limit of one."""
    path = tmp_path / "large.png"
    Image.new("RGB", (1200, 1000)).save(path)
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    return path


@pytest.mark.parametrize("read", [open_picture, decode_image, image_size])
def test_a_picture_above_the_limit_is_refused_with_the_limit_and_the_way_out(
    large: Path, monkeypatch: pytest.MonkeyPatch, read: object
) -> None:
    assert callable(read)
    with pytest.raises(ValueError, match=WAY_OUT):
        read(large)
    monkeypatch.setenv(LIMIT_VARIABLE, "2")
    read(large)


def test_far_above_the_limit_the_message_is_the_same(large: Path) -> None:
    """Pillow itself refuses what is twice as large as its own limit."""
    Image.new("1", (4000, 1000)).save(large)
    with pytest.raises(ValueError, match=r"4 megapixels take 0\.0 GB.*the limit is 1, to read it, set .*=4"):
        open_picture(large)


def test_the_default_takes_what_telephones_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    assert max_megapixels() == MAX_MEGAPIXELS
    assert 108 < MAX_MEGAPIXELS < 169


@pytest.mark.parametrize("text", ["much", "0", "-3", "nan", "inf", "1e99"])
def test_a_limit_that_is_no_number_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{LIMIT_VARIABLE}={text}: not a number of megapixels; try 128"):
        max_megapixels()


def test_training_and_check_data_find_it_by_the_header(large: Path, tmp_path: Path) -> None:
    Image.new("L", (30, 30), 255).save(tmp_path / "mask.png")
    pair = Pair(large, tmp_path / "mask.png")
    (problem,) = header_problems([pair]).values()
    assert WAY_OUT in problem
    reasons = [problem.reason for problem in inspect_pair(pair).problems]
    assert any(WAY_OUT in reason for reason in reasons)


def test_check_data_names_the_limit(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    large.rename(tmp_path / "data" / "images" / "a.png")
    Image.new("L", (30, 30)).save(tmp_path / "data" / "masks" / "a.png")
    assert main(["check-data", "--dataset-path", str(tmp_path / "data"), "--num-workers", "0"]) == 2
    assert WAY_OUT in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes there")
def test_an_rgb_photograph_takes_four_bytes_a_pixel(tmp_path: Path) -> None:
    """A second copy would take another 240 MB for 60 megapixels."""
    Image.new("RGB", (10000, 6000), (9, 90, 9)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from pathlib import Path; from data.decoding import fixed_size_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "fixed_size_image(Path(sys.argv[1]), 64)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    folder = Path(train_ultimate.__file__).parent
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    peak = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
    assert int(peak) < 1.5 * 240e6 / 1024
