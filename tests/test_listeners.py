"""TensorBoard's events of a run, read back by TensorBoard itself."""

import io
import json
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, SignalAt, differing_tensors
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reporting.listeners import FinalReport, TensorBoardCurves, listeners_of
from runtime.checkpoint import read_checkpoint
from runtime.log import RunLog
from train_ultimate import main


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(directory: Path, tag: str) -> dict[int, float]:
    """Step -> value; a step that came twice fails."""
    found = [(event.step, event.value) for event in events_of(directory).Scalars(tag)]
    assert len(found) == len(dict(found)), f"{tag}: steps appear twice"
    return dict(found)


def logged(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (directory / "metrics.jsonl").open()) if event["event"] == kind]


def test_a_run_writes_its_scalars_and_images(tiny_argv: Argv, tmp_path: Path, followed: None) -> None:
    assert main(tiny_argv("--drill", "nan-loss@3")) == 0
    directory, run = tmp_path / "run" / "tensorboard", tmp_path / "run"
    applied = {event["global_window"]: event["loss"] for event in logged(run, "window")}  # the last attempt counts
    assert scalars(directory, "window/loss") == pytest.approx(applied)
    epochs = logged(run, "epoch")
    assert list(scalars(directory, "epoch/iou").values()) == pytest.approx([event["iou"] for event in epochs])
    assert list(scalars(directory, "epoch/epoch").values()) == [1, 2, 3, 4]
    found = events_of(directory)
    assert found.Tags()["images"] == ["validation/image", "validation/mask", "validation/prediction"]
    assert (found.Images("validation/prediction")[0].width, len(found.Images("validation/prediction"))) == (128, 4)
    assert len(found.Images("validation/mask")) == 1  # they do not change
    assert "incidents/text_summary" in found.Tags()["tensors"]


def test_resumed_runs_show_no_window_twice(
    tiny_argv: Argv, tmp_path: Path, followed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        SignalAt(patch, "gated_step", 11)
        assert main(tiny_argv()) == 143
    (step,) = (tmp_path / "run").glob("step_*.pth")
    step.unlink()  # as after a kill: what came after the epoch is trained again
    assert main(tiny_argv("--resume", "auto")) == 0
    assert list(scalars(tmp_path / "run" / "tensorboard", "window/loss")) == list(range(1, 17))
    assert len(scalars(tmp_path / "run" / "tensorboard", "epoch/loss")) == 4


def test_listeners_do_not_change_the_weights(
    tiny_argv: Argv, tmp_path: Path, followed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ("--ema-decay", "0", "--epochs", "3")  # then the pictures are of the very weights that are trained
    assert main(tiny_argv(*extra)) == 0
    monkeypatch.setattr("training.setup.listeners_of", lambda *_: [])
    assert main(tiny_argv(*extra, checkpoint_dir=tmp_path / "alone")) == 0
    with_them, alone = (read_checkpoint(tmp_path / name / "epoch_0003.pth") for name in ("run", "alone"))
    assert differing_tensors(with_them["model"], alone["model"]) == []


def test_a_full_disk_costs_a_warning_and_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise = torch.rand(4, 3, 64, 64)
    curves = TensorBoardCurves(tmp_path / "tensorboard", 0, lambda: (noise, noise, noise))
    log = RunLog(tmp_path)
    log.listeners.append(curves)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for number in (1, 2, 3):
            log.event("epoch", epoch=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    out, err = capfd.readouterr()
    assert out.count("Warning: TensorBoardCurves gives up (") == 1
    assert "training goes on" in out
    assert "Traceback" not in err
    assert [event["epoch"] for event in logged(tmp_path, "epoch")] == [1, 2, 3]


def test_where_nothing_can_be_written_a_run_goes_on(
    tiny_argv: Argv, tmp_path: Path, followed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert main(tiny_argv("--epochs", "1", "--stage1-epochs", "0")) == 0
    assert "nothing is written for TensorBoard" in capsys.readouterr().out


def test_without_tensorboard_it_is_said_once(
    tiny_argv: Argv, tmp_path: Path, followed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(tiny_argv("--epochs", "1", "--stage1-epochs", "0")) == 0
    assert capsys.readouterr().out.count("TensorBoard: not installed") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("error", [TypeError("Descriptors cannot be created directly"), AttributeError("np.bool8")])
def test_a_tensorboard_that_does_not_fit_its_packages_costs_its_curves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", broken)
    (report,) = listeners_of(tmp_path, 0, None)
    assert isinstance(report, FinalReport)
    assert "nothing is written for TensorBoard" in capsys.readouterr().out


def test_images_that_do_not_fit_the_memory_cost_the_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def samples() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    curves = TensorBoardCurves(tmp_path, 0, samples)
    for epoch in (1, 2):
        curves.event("window", {"global_window": epoch})
        curves.event("epoch", {"epoch": epoch, "loss": 1.0 / epoch})
    curves.close()
    assert capsys.readouterr().out.count("no more validation images") == 1
    assert scalars(tmp_path, "epoch/loss") == {1: 1.0, 2: 0.5}


@pytest.mark.slow
def test_tensorboard_serves_scalars_and_images(tiny_argv: Argv, tmp_path: Path, followed: None) -> None:
    assert main(tiny_argv()) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--logdir", str(tmp_path / "run"), "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "tensorboard.main", *flags], stderr=subprocess.DEVNULL) as server:
        try:
            tags = wait_for(port, "scalars/tags", "validation/prediction")
            assert {"window/loss", "epoch/iou"} <= tags["scalars/tags"]["tensorboard"].keys()
            assert "validation/prediction" in tags["images/tags"]["tensorboard"]
            series = fetch(port, "scalars/scalars", run="tensorboard", tag="window/loss")
            assert [step for _, step, _ in json.loads(series)] == list(range(1, 17))
            (image, *_) = json.loads(fetch(port, "images/images", run="tensorboard", tag="validation/prediction"))
            picture = Image.open(io.BytesIO(fetch(port, f"images/individualImage?{image['query']}")))
            assert (picture.format, picture.size) == ("PNG", (128, 64))  # two of 64 pixels, side by side
        finally:
            server.send_signal(signal.SIGTERM)


def fetch(port: int, path: str, **query: str) -> bytes:
    question = "?" + urllib.parse.urlencode(query) if query else ""
    address = f"http://127.0.0.1:{port}/data/plugin/{path}{question}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=20) as answer:
        return answer.read()


def wait_for(port: int, path: str, image_tag: str) -> dict[str, Any]:
    """The tags, when the server has read the events."""
    deadline = time.monotonic() + 90
    while True:
        try:
            tags = {name: json.loads(fetch(port, name)) for name in (path, "images/tags")}
            if image_tag in tags["images/tags"].get("tensorboard", {}):
                return tags
        except OSError:
            pass
        assert time.monotonic() < deadline, "TensorBoard does not answer"
        time.sleep(0.5)
