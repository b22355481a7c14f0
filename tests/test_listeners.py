"""Listeners of a run: epoch lines, and events for TensorBoard, which are read back by TensorBoard itself."""

import io
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, prepare_run, signal_at_step, train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from data.dataset import Batch
from data.layouts import Pair
from reporting.listeners import EpochLines, FinalReport, SamplePredictions, TensorBoardCurves, listeners_of
from runtime.checkpoint import read_checkpoint
from runtime.log import RunLog
from train_ultimate import ScriptParts, main, validate
from training.run import Run

EPOCH = {
    **{"epoch": 3, "loss": 2.37, "iou": 0.5845, "dice": 0.735, "grad_norm_avg": 0.381, "grad_norm_max": 0.498},
    **{"applied": 8, "overflows": 0, "large_norms": 0, "loss_scale": 1.0},
}


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(directory: Path, tag: str) -> dict[int, float]:
    """Return step -> value; asserts that no step appears twice."""
    found = [(event.step, event.value) for event in events_of(directory).Scalars(tag)]
    assert len(found) == len(dict(found)), f"{tag}: steps appear twice"
    return dict(found)


def logged(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (directory / "metrics.jsonl").open()) if event["event"] == kind]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(caplog: pytest.LogCaptureFixture, lines: EpochLines, **fields: Any) -> list[tuple[str, str]]:
    """Return the level and the text of the lines after an epoch."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="train_ultimate"):
        lines.event("window", {"loss": 1.0})
        lines.event("epoch", {**EPOCH, **fields})
    return [(record.levelname, record.message) for record in caplog.records]


def test_an_epoch_has_a_line_of_scores_and_one_of_gradient_norms(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())  # whose progress bar names the epoch
    assert lines_of(caplog, EpochLines(140, 0.5)) == [
        ("INFO", "Loss: 2.3700 | IoU: 0.5845 | Dice: 0.7350"),
        ("INFO", "   Gradient norm - Avg: 0.381, Max: 0.498"),
    ]


def test_without_a_terminal_a_line_names_the_epoch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stderr in (io.StringIO(), None):  # a file or pipe; closed
        monkeypatch.setattr(sys, "stderr", stderr)
        assert lines_of(caplog, EpochLines(140, 0.5))[0] == ("INFO", "Epoch 3/140")


def test_overflows_are_counted_with_the_loss_scale(caplog: pytest.LogCaptureFixture) -> None:
    last = lines_of(caplog, EpochLines(140, 0.5), overflows=2, loss_scale=512.0)[-1]
    assert last == ("INFO", "   fp16 overflows: 2, none applied; loss scale now 512")


def test_large_norms_warn_once_and_are_counted_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    lines = EpochLines(140, 0.5)
    first, second = (lines_of(caplog, lines, large_norms=4)[-1] for _ in range(2))
    text = "4 of 8 windows had a gradient norm above 5 x --grad-clip = 2.5; they were clipped"
    assert first == ("WARNING", text)
    assert second == ("INFO", "   4 of 8 windows above 2.5 were clipped")


def test_sample_predictions_are_of_the_first_images_that_can_be_read(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = sorted((tiny_dataset / "TrainDataset" / "Imgs").iterdir())
    pairs = [Pair(image, tiny_dataset / "TrainDataset" / "GT" / f"{image.stem}.png") for image in images[:6]]
    pairs[1] = Pair(tmp_path / "bad.jpg", pairs[1].mask)
    seen: list[torch.Tensor] = []

    def predict(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        value = torch.nan if len(seen) == 2 else 0.5
        return torch.full((1, 1, 32, 32), value)

    samples = SamplePredictions(predict, pairs, 32)()
    assert samples is not None
    images, masks, predictions = samples
    assert [(image.dtype, image.shape) for image in seen] == [(torch.uint8, (1, 3, 32, 32))] * 4
    assert torch.equal(images, torch.cat(seen) / 255)
    assert masks.shape == (4, 1, 32, 32)
    assert predictions.amax((1, 2, 3)).tolist() == [0.5, 0, 0.5, 0.5]  # not finite: black
    assert SamplePredictions(predict, pairs[1:2], 32)() is None


def test_a_run_writes_its_scalars_and_images(tiny_argv: Argv, tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_resumed_runs_show_no_window_twice(tiny_argv: Argv, tmp_path: Path) -> None:
    with signal_at_step(11):
        assert main(tiny_argv()) == 143
    (step,) = (tmp_path / "run").glob("step_*.pth")
    step.unlink()  # as after a kill: what came after the epoch is trained again
    assert main(tiny_argv("--resume", "auto")) == 0
    assert list(scalars(tmp_path / "run" / "tensorboard", "window/loss")) == list(range(1, 17))
    assert len(scalars(tmp_path / "run" / "tensorboard", "epoch/loss")) == 4


def test_listeners_do_not_change_the_weights(tiny_argv: Argv, tmp_path: Path) -> None:
    extra = ("--ema-decay", "0", "--epochs", "3")  # so that pictures use the weights in training themselves
    assert main(tiny_argv(*extra)) == 0
    assert train(tiny_argv(*extra, checkpoint_dir=tmp_path / "without"), listeners_of=lambda _: []) == 0
    with_them, without = (read_checkpoint(tmp_path / name / "epoch_0003.pth") for name in ("run", "without"))
    assert differing_tensors(with_them["model"], without["model"]) == []


def test_a_full_disk_costs_a_warning_and_no_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
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
    warnings = out + caplog.text
    assert warnings.count("TensorBoardCurves") == 1
    assert "training goes on" in warnings
    assert "Traceback" not in err
    assert [event["epoch"] for event in logged(tmp_path, "epoch")] == [1, 2, 3]


@pytest.mark.parametrize("fails_at", ["epoch", "close"])
def test_a_writer_whose_thread_has_ended_is_dropped_and_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails_at: str
) -> None:
    curves = TensorBoardCurves(tmp_path / "tensorboard", 0, None)
    (thread,) = curves._writing_threads
    thread._queue.put(thread._shutdown_signal)  # type: ignore[attr-defined]  # it ends, and nobody knows
    thread.join()
    log = RunLog(tmp_path)
    log.listeners.append(curves)
    if fails_at == "epoch":
        log.event("epoch", epoch=1)
    log.close()
    assert caplog.messages == ["TensorBoardCurves stopped (its thread has ended); training goes on without it"]


def test_a_folder_that_is_removed_during_the_run_costs_a_warning_and_no_time(
    tiny_argv: Argv, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The loader's processes end with the run. Python waited a minute for them when it exited."""

    def remove_once(run: Run, loader: DataLoader[Batch]) -> dict[str, float]:
        shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)
        return validate(run, loader)

    assert main(tiny_argv("--num-workers", "1"), ScriptParts(validate=remove_once)) == 0
    assert caplog.text.count("TensorBoardCurves stopped") == 1
    assert multiprocessing.active_children() == []


def test_errors_of_other_threads_are_reported_while_curves_are_written_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(str(arguments.exc_value)))
    hook = threading.excepthook
    curves = TensorBoardCurves(tmp_path, 0, None)
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    curves.close()
    assert reported == ["division by zero"]
    assert threading.excepthook is hook


@pytest.fixture
def run(tiny_argv: Argv) -> Run:
    return prepare_run(tiny_argv())


def kinds_of(caplog: pytest.LogCaptureFixture, run: Run) -> list[type]:
    """Return the types of a run's listeners; what they log is in ``caplog``."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="train_ultimate"):
        found = listeners_of(run)
    kinds = [type(listener) for listener in found]
    for listener in found:
        if isinstance(listener, TensorBoardCurves):
            listener.close()
    return kinds


def test_a_run_has_epoch_lines_curves_and_a_report(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert kinds_of(caplog, run) == [EpochLines, TensorBoardCurves, FinalReport]
    assert caplog.messages == []


def test_a_folder_that_cannot_be_written_costs_only_the_curves(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    (run.folder.path / "tensorboard").write_text("in the way")
    assert kinds_of(caplog, run) == [EpochLines, FinalReport]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nothing is written for TensorBoard" in record.message


def test_a_missing_tensorboard_is_mentioned_when_a_run_begins_and_not_when_it_is_resumed(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert kinds_of(caplog, run) == [EpochLines, FinalReport]
    assert caplog.text.count("TensorBoard: not installed") == 1
    assert not (run.folder.path / "tensorboard").exists()
    run.state.progress.global_window = 5
    assert kinds_of(caplog, run) == [EpochLines, FinalReport]
    assert caplog.messages == []


def test_a_missing_plotly_costs_only_the_report(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert kinds_of(caplog, run) == [EpochLines, TensorBoardCurves]
    assert caplog.text.count("plotly is not installed") == 1


@pytest.mark.parametrize("error", [TypeError("Descriptors cannot be created directly"), AttributeError("np.bool8")])
def test_a_tensorboard_that_does_not_fit_its_packages_costs_only_the_curves(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", broken)
    assert kinds_of(caplog, run) == [EpochLines, FinalReport]
    assert "nothing is written for TensorBoard" in caplog.text


def test_images_that_do_not_fit_the_memory_cost_only_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def samples() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    curves = TensorBoardCurves(tmp_path, 0, samples)
    for epoch in (1, 2):
        curves.event("window", {"global_window": epoch})
        curves.event("epoch", {"epoch": epoch, "loss": 1.0 / epoch})
    curves.close()
    assert caplog.text.count("no more validation images") == 1
    assert scalars(tmp_path, "epoch/loss") == {1: 1.0, 2: 0.5}


@pytest.mark.slow
def test_tensorboard_serves_scalars_and_images(tiny_argv: Argv, tmp_path: Path) -> None:
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
    """Wait until the server has read the events, and return the tags."""
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
