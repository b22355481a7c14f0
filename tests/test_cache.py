"""The decoded cache: the same samples as without it, and no partial file whatever happens during a build."""

import errno
import fcntl
import json
import logging
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import Argv, differing_tensors, failing, tiny_arguments
from PIL import Image

import train_ultimate
from commands import cli
from data.cache import DecodedCache, _decode, default_directory, open_cache
from data.dataset import CamouflageDataset
from data.layouts import Pair, find_subsets, training_pairs
from data.loading import training_loader, windows
from data.masks import ABOVE_HALF
from data.sampler import SampleKey
from runtime.checkpoint import read_checkpoint
from train_ultimate import main
from training.settings import Settings

PROGRAM = Path(train_ultimate.__file__).parent


@pytest.fixture
def root(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the tiny dataset in which the third image is cut short."""
    copy = tmp_path / "data"
    shutil.copytree(tiny_dataset / "TrainDataset", copy / "TrainDataset")
    image = copy / "TrainDataset" / "Imgs" / "scene_00002.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    return copy


def pairs_of(root: Path) -> list[Pair]:
    return training_pairs(find_subsets(root), root)


def built(root: Path, directory: Path, img_size: int = 64, num_workers: int = 1) -> DecodedCache:
    return open_cache(pairs_of(root), root, img_size, directory, num_workers)


def building(root: Path, directory: Path) -> subprocess.Popen[str]:
    """Start another process that builds the dataset's cache."""
    code = (
        "import logging, sys; from pathlib import Path; from data.cache import *; from data.layouts import *\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "root = Path(sys.argv[1]); pairs = training_pairs(find_subsets(root), root)\n"
        "open_cache(pairs, root, 64, Path(sys.argv[2]), 2)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(directory)], cwd=PROGRAM, stdout=subprocess.PIPE, text=True
    )


def wait_for(directory: Path, pattern: str) -> Path:
    """Return the first file that matches, as soon as it exists."""
    for _ in range(20_000):
        if found := list(directory.glob(pattern)):
            return found[0]
        time.sleep(0.001)
    raise TimeoutError(pattern)


def test_every_sample_is_bitwise_the_one_decoded_from_the_files(root: Path, tmp_path: Path) -> None:
    pairs, cache = pairs_of(root), built(root, tmp_path / "cache")
    for augmented in (False, True):
        decoding = CamouflageDataset(pairs, 64, augmented, seed=4)
        reading = CamouflageDataset(pairs[::-1], 64, augmented, seed=4, cache=cache)  # by name, not by position
        reading.pairs.reverse()
        for epoch, index in ((epoch, index) for epoch in range(2) for index in range(len(pairs))):
            one, other = decoding[SampleKey(epoch, index)], reading[SampleKey(epoch, index)]
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.mask, other.mask)
            assert (one.index, one.errors, one.is_missing) == (other.index, other.errors, other.is_missing)
    assert [path.name for path in cache.problems] == ["scene_00002.jpg"]


def test_it_is_built_once_and_then_found(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    first = built(root, tmp_path / "cache")
    assert caplog.messages[-1].startswith(f"Cache: {first.path}, 0.00 GB, built in ")
    assert first.path.stat().st_size >= 22 * 4 * 64 * 64
    written = first.path.stat().st_mtime_ns
    second = open_cache(pairs_of(root)[::-1], root, 64, tmp_path / "cache", 1)  # the split does not matter
    assert caplog.messages[-1].endswith(", found")
    assert second.path == first.path
    assert second.path.stat().st_mtime_ns == written
    assert list((tmp_path / "cache").iterdir()) == [first.path]


def test_another_size_file_or_modification_time_is_another_cache(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    paths = [built(root, directory).path, built(root, directory, img_size=32).path]
    os.utime(root / "TrainDataset" / "GT" / "scene_00005.png")
    paths.append(built(root, directory).path)
    (root / "TrainDataset" / "Imgs" / "scene_00006.jpg").unlink()
    paths.append(built(root, directory).path)
    assert len(set(paths)) == 4


def test_it_is_found_wherever_the_dataset_is_mounted(root: Path, tmp_path: Path) -> None:
    first = built(root, tmp_path / "cache")
    moved = root.rename(tmp_path / "elsewhere")
    second = built(moved, tmp_path / "cache")
    assert second.path == first.path
    assert next(iter(second.problems.values())).startswith(f"{moved}/TrainDataset/Imgs/scene_00002.jpg: cannot be")


def test_a_cache_that_was_cut_short_is_built_again(root: Path, tmp_path: Path) -> None:
    path = built(root, tmp_path / "cache").path
    whole = path.read_bytes()
    for size in (1000, 22 * 4 * 64 * 64):
        os.truncate(path, size)
        assert built(root, tmp_path / "cache").path.read_bytes() == whole


def test_an_image_that_was_unreadable_for_a_while_is_not_left_out_forever(root: Path, tmp_path: Path) -> None:
    path = built(root, tmp_path / "cache").path
    pixels = 22 * 4 * 64 * 64
    with open(path, "r+b") as file:  # as if reading the fifth image had met an I/O error
        file.seek(pixels)
        file.write(json.dumps({2: "scene_00002.jpg: cut short", 4: "scene_00004.jpg: Input/output error"}).encode())
    assert len(built(root, tmp_path / "cache").problems) == 1


def test_loader_processes_open_it_themselves(root: Path, tmp_path: Path) -> None:
    pairs, cache = pairs_of(root), built(root, tmp_path / "cache")
    assert cache.read(pairs[0])[0].flags.writeable
    assert len(pickle.dumps(cache)) < 10_000
    again = pickle.loads(pickle.dumps(cache))
    assert all((one == other).all() for one, other in zip(cache.read(pairs[1]), again.read(pairs[1]), strict=True))
    loader = training_loader(pairs, 64, 4, seed=1, num_workers=2, pin_memory=False, cache=cache)
    loader.multiprocessing_context = "spawn"
    decoding = training_loader(pairs, 64, 4, seed=1, num_workers=0, pin_memory=False)
    for one, other in zip(windows(loader, 0, 0), windows(decoding, 0, 0), strict=True):
        assert differing_tensors(list(one[0]), list(other[0])) == []


def test_building_processes_do_not_import_torch() -> None:
    code = "import data.cache, sys; assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROGRAM, check=True)


# What can go wrong


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"the cache needs 0\.00 GB, 0\.00 GB is free; .*--cache-dir.*--no-cache"):
        built(root, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_that_fills_up_during_the_build_leaves_nothing_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ValueError, match="the cache needs"):
        built(root, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_takes_no_row_raises_an_error(root: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        _decode(Path("/dev/full"), pairs_of(root), root, 64, 2, ABOVE_HALF)


def test_a_folder_that_is_not_writable_raises_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/cache: the cache cannot be written there .*--cache-dir"):
        built(root, tmp_path / "file" / "cache")


def test_a_killed_building_process_raises_an_error_and_leaves_nothing_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ValueError, match=r"a process that decodes for the cache was killed.*--no-cache"):
        built(root, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_next_build_removes_what_killed_builds_left(root: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    process = building(root, directory)
    wait_for(directory, ".*.unfinished")
    process.kill()
    process.communicate()
    (directory / ".0123.cache.unfinished").write_bytes(b"of another dataset")
    with open(directory / ".4567.cache.unfinished", "wb") as in_progress:
        fcntl.flock(in_progress, fcntl.LOCK_EX)
        path = built(root, directory).path
        assert {file.name for file in directory.iterdir()} == {path.name, ".4567.cache.unfinished"}
    fresh = built(root, tmp_path / "fresh").path
    assert path.read_bytes() == fresh.read_bytes()


def test_one_of_several_processes_builds_and_the_others_wait(root: Path, tmp_path: Path) -> None:
    processes = [building(root, tmp_path / "cache") for _ in range(3)]
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum("built in" in text for text in printed) == 1
    assert sum("found" in text for text in printed) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_ctrl_c_during_a_build_leaves_nothing_behind(root: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    for pair in pairs_of(root):  # enough of them for the signal to arrive in time even on a busy machine
        for number in range(60):
            for path in (pair.image, pair.mask):
                path.with_stem(f"{path.stem}_{number}").hardlink_to(path)
    directory = tmp_path / "cache"
    argv = tiny_argv("--dataset-path", str(root), "--cache", "--cache-dir", str(directory))
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM / "train_ultimate.py"), *argv], stderr=subprocess.PIPE, text=True,
        process_group=0,
    )  # fmt: skip
    wait_for(directory, ".*.unfinished")
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert list(directory.iterdir()) == []


def test_samples_are_decoded_if_the_cache_file_is_removed(root: Path, tmp_path: Path) -> None:
    pairs, cache = pairs_of(root), built(root, tmp_path / "cache")
    before = [CamouflageDataset(pairs, 64, cache=cache)[SampleKey(0, index)] for index in (0, 1)]
    cache.path.unlink()
    again = pickle.loads(pickle.dumps(cache))  # as in a new loader process, where the file is not mapped yet
    for index, sample in enumerate(before):
        decoded = CamouflageDataset(pairs, 64, cache=again)[SampleKey(0, index)]
        assert torch.equal(decoded.image, sample.image)
        assert torch.equal(decoded.mask, sample.mask)


# Whole runs


@pytest.mark.slow
def test_run_with_a_cache_ends_in_bitwise_the_weights_of_one_without(
    root: Path, tiny_argv: Argv, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """So does a resumed run, which finds the cache again."""
    caplog.set_level(logging.INFO, logger="train_ultimate")
    assert main(tiny_argv("--dataset-path", str(root), checkpoint_dir=tmp_path / "without")) == 0
    cached = ("--dataset-path", str(root), "--cache", "--cache-dir", str(tmp_path / "cache"), "--num-workers", "1")
    assert main(tiny_argv(*cached, "--epochs", "3", checkpoint_dir=tmp_path / "with")) == 0
    caplog.clear()
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "with"), "--epochs", "4"]) == 0
    assert any(message.startswith("Cache: ") and message.endswith(", found") for message in caplog.messages)
    without, with_cache = (read_checkpoint(tmp_path / name / "epoch_0004.pth") for name in ("without", "with"))
    assert without["unreadable"] == with_cache["unreadable"]
    assert len(without["unreadable"]) == 1
    resumed = tiny_arguments(root, tmp_path / "again", "--epochs", "3")
    assert main(resumed) == 0
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "again"), "--epochs", "4"]) == 0
    again = read_checkpoint(tmp_path / "again" / "epoch_0004.pth")
    assert differing_tensors(again["model"], with_cache["model"]) == []
    assert differing_tensors(again["optimizer"], with_cache["optimizer"]) == []


def test_too_many_unreadable_images_end_the_run_before_training(
    root: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in sorted((root / "TrainDataset" / "Imgs").iterdir())[:5]:
        image.write_bytes(image.read_bytes()[:-300])
    cached = ("--dataset-path", str(root), "--cache", "--cache-dir", str(tmp_path / "cache"))
    assert main(tiny_argv(*cached)) == 2
    assert "5 of 22 pairs of image and mask cannot be read, more than 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_default_folder_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "train_ultimate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory() == tmp_path / "home" / ".cache" / "train_ultimate"


def test_without_a_home_folder_the_error_names_the_flag_for_another(
    tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown_user(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    assert "--cache-dir" in failing(tiny_argv("--cache"), capsys)


def test_cache_and_its_folder_are_settings_of_the_run() -> None:
    given = cli.parse(["train", "--dataset-path", "x", "--cache", "--cache-dir", "/scratch"]).given
    saved = Settings.resolve(given).to_dict()
    resumed = Settings.resolve(cli.parse(["train", "--resume", "auto"]).given, saved)
    assert (resumed.cache, resumed.cache_dir) == (True, "/scratch")
    assert not Settings.resolve(cli.parse(["train", "--resume", "auto", "--no-cache"]).given, saved).cache
