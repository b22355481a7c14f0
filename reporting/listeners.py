"""Listeners of a run's log: epoch lines on the terminal, curves for TensorBoard, and the report at the end."""

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import load_image, load_mask
from data.layouts import Pair
from data.loading import unit_range
from data.masks import ABOVE_HALF, MaskReading
from reporting.forecast import LEAST_LEFT, Forecast, describe, forecast_of
from reporting.history import number
from reporting.report import write_final_report
from runtime.files import first_line
from runtime.log import Listener
from training.run import Run

_EPOCH_SCALARS = (
    "epoch", "loss", "iou", "dice", "mae", "s_measure", "grad_norm_avg", "grad_norm_max", "lr", "backbone_lr",
    "images_per_second", "skipped", "overflows", "unreadable",
)  # fmt: skip
_WINDOW_SCALARS = ("loss", "grad_norm", "loss_scale", "lr")
_FLUSH_SECONDS = 30
_LAST_WORDS_SECONDS = 5  # for the writer's thread to raise its error, before the hook that drops it is gone
_NUM_SAMPLES = 4

logger = logging.getLogger("train_ultimate")

Samples = Callable[[], tuple[Tensor, Tensor, Tensor] | None]


class EpochLines:
    """The lines on the terminal at the end of each epoch: loss, scores, gradient norms, overflows.

    Args:
        epochs: number of epochs in the run.
        grad_clip: ``--grad-clip``; gradient norms above five times this value are reported.
        forecast: tells the time left, if it is more than two minutes; None for no such lines.
    """

    def __init__(self, epochs: int, grad_clip: float, forecast: Forecast | None = None) -> None:
        self._forecast = forecast
        self._epochs = epochs
        self._large_norm = 5 * grad_clip
        self._has_warned = False

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "window":
            self._tell(None if self._forecast is None else self._forecast.window(fields))
        if event != "epoch":
            return
        if not (sys.stderr and sys.stderr.isatty()):  # on a terminal, the progress bar above has named the epoch
            logger.info("Epoch %d/%d", fields["epoch"], self._epochs)
        logger.info("Loss: %.4f | IoU: %.4f | Dice: %.4f", fields["loss"], fields["iou"], fields["dice"])
        if "rehearsed_iou" in fields:
            logger.info(
                "   Rehearsed: IoU %.4f | S-measure %.4f", fields["rehearsed_iou"], fields["rehearsed_s_measure"]
            )
        logger.info("   Gradient norm - Avg: %.3f, Max: %.3f", fields["grad_norm_avg"], fields["grad_norm_max"])
        if fields["overflows"]:
            text = "   fp16 overflows: %d, none applied; loss scale now %g"
            logger.info(text, fields["overflows"], fields["loss_scale"])
        if fields["large_norms"] and not self._has_warned:
            text = "%d of %d windows had a gradient norm above 5 x --grad-clip = %g; they were clipped"
            logger.warning(text, fields["large_norms"], fields["applied"], self._large_norm)
            self._has_warned = True
        elif fields["large_norms"]:
            text = "   %d of %d windows above %g were clipped"
            logger.info(text, fields["large_norms"], fields["applied"], self._large_norm)
        self._tell(None if self._forecast is None else self._forecast.epoch(fields))

    @staticmethod
    def _tell(seconds_left: float | None) -> None:
        if seconds_left is not None and seconds_left > LEAST_LEFT:
            logger.info("   %s", describe(seconds_left))

    def close(self) -> None:
        """Do nothing: the last epoch's lines are written."""


class SamplePredictions:
    """A few validation images and their current predictions: the same images each time, one per batch to save memory.

    Args:
        predict: maps images (1, 3, S, S), uint8 on the CPU, to probabilities (1, 1, S, S), float32 on the CPU.
        pairs: validation pairs; the first few that can be read are shown.
        img_size: S.
        masks: how the masks are read.
    """

    def __init__(
        self, predict: Callable[[Tensor], Tensor], pairs: Sequence[Pair], img_size: int,
        masks: MaskReading = ABOVE_HALF,
    ) -> None:  # fmt: skip
        self._predict = predict
        self._pairs = pairs
        self._img_size = img_size
        self._masks = masks

    def __call__(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return images (N, 3, S, S), masks and predictions (N, 1, S, S), in [0, 1]; None if no image can be read.

        Predictions that are not finite are black.
        """
        images, masks = self._loaded
        if not len(images):
            return None
        predictions = torch.cat([self._predict(image) for image in images.split(1)])
        return images.float() / 255, masks.float(), predictions.nan_to_num(0, 0, 0)

    @cached_property
    def _loaded(self) -> tuple[Tensor, Tensor]:
        images, masks = [], []
        for pair in self._pairs[: 4 * _NUM_SAMPLES]:
            try:
                image = load_image(pair.image, self._img_size)
                mask = load_mask(pair.mask, self._img_size, self._masks) == 1
            except ValueError:  # reported by whoever validates
                continue
            images.append(image)
            masks.append(mask)
            if len(images) == _NUM_SAMPLES:
                break
        return (torch.stack(images), torch.stack(masks)) if images else (torch.empty(0), torch.empty(0))


class TensorBoardCurves:
    """TensorBoard's copy of the log's scalars, with a few validation images after each epoch.

    Every step is a number of windows in the run. TensorBoard shows the later one of two windows with the same number,
    which a resumed run trains again. A window that recovery reruns is written once, by its last attempt.

    Args:
        directory: folder of the event files.
        global_window: windows that the run has done before.
        samples: called after an epoch: returns images (N, 3, H, W), and masks and predictions (N, 1, H, W), all in
            [0, 1], or None. None for no images.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: Path, global_window: int, samples: Samples | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and may not be installed

        before = set(threading.enumerate())
        self._writer = SummaryWriter(str(directory), purge_step=global_window + 1, flush_secs=_FLUSH_SECONDS)
        self._writing_threads = set(threading.enumerate()) - before
        self._excepthook = threading.excepthook
        threading.excepthook = self._drop_error_of_writing_thread
        self._samples = samples
        self._shown = False
        self._step = global_window
        self._window: dict[str, Any] | None = None  # the newest one, kept back because recovery may rerun it

    def event(self, event: str, fields: dict[str, Any]) -> None:
        self._require_thread()
        if event == "window":
            if self._window is not None and self._window["global_window"] != fields["global_window"]:
                self._write_window()
            self._window = fields
        elif event == "epoch":
            self._write_window()
            for key in _EPOCH_SCALARS:
                self._writer.add_scalar(f"epoch/{key}", number(fields, key), self._step)
            self._write_samples()
            self._writer.flush()
        elif event == "incident":
            what = f"{fields['verdict']} in epoch {fields['epoch']}, window {fields['window']}: {fields['action']}"
            self._writer.add_text("incidents", what.encode(errors="backslashreplace").decode(), self._step)

    def close(self) -> None:
        try:
            self._require_thread()
            self._write_window()
            self._writer.close()
        finally:
            for thread in self._writing_threads:
                thread.join(_LAST_WORDS_SECONDS)
            threading.excepthook = self._excepthook
            self._samples = None  # it holds the run, and threads begun meanwhile hold the hook: tqdm's never ends

    def _require_thread(self) -> None:
        """Check that the writer's thread lives: the writer waits forever for one that has ended without an error.

        Raises:
            RuntimeError: it has ended.
        """
        if not all(thread.is_alive() for thread in self._writing_threads):
            self._writer.add_scalar("epoch/epoch", 0, self._step)  # raises the thread's error if it had one
            raise RuntimeError("its thread has ended")

    def _drop_error_of_writing_thread(self, arguments: threading.ExceptHookArgs) -> None:
        """Print no traceback for the writer's thread: its error is raised again by the next event."""
        if arguments.thread not in self._writing_threads:
            self._excepthook(arguments)

    def _write_window(self) -> None:
        fields, self._window = self._window, None
        if fields is None:
            return
        self._step = fields["global_window"]
        for key in _WINDOW_SCALARS:
            self._writer.add_scalar(f"window/{key}", number(fields, key), self._step)

    def _write_samples(self) -> None:
        """Write predictions each time, images and masks once."""
        try:
            samples = self._samples() if self._samples is not None else None
        except RuntimeError as error:  # out of memory, for example
            self._samples = None
            logger.warning("no more validation images for TensorBoard (%s); its curves go on", first_line(error))
            return
        if samples is None:
            return
        for name, images in zip(("image", "mask", "prediction"), samples, strict=True):
            if name == "prediction" or not self._shown:
                self._writer.add_images(f"validation/{name}", images, self._step)
        self._shown = True


class FinalReport:
    """The report that is written when the run has ended.

    It has no pictures after a signal: whoever sent it does not wait for long. Nor after the failure of a run of several
    processes, whose launcher does not wait either.

    Args:
        directory: folder of the run.
        alone: the run has a single process.
    """

    def __init__(self, directory: Path, alone: bool = True) -> None:
        self.directory = directory
        self.alone = alone
        self.exit_code = 1

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "run_end":
            self.exit_code = fields["exit_code"]

    def close(self) -> None:
        with_pictures = self.exit_code == 0 or (self.exit_code == 3 and self.alone)
        try:
            with torch.random.fork_rng(devices=[]):  # building the network for the pictures draws random numbers
                write_final_report(self.directory, with_pictures)
        except KeyboardInterrupt:
            again = f"python train_ultimate.py report {self.directory}"
            logger.warning("No report written (interrupted); later: %s", again)


def listeners_of(run: Run) -> list[Listener]:
    """Return the listeners of a run, on rank 0. Log which ones are missing because a package is not installed."""
    directory, global_window = run.folder.path, run.state.progress.global_window
    found: list[Listener] = [EpochLines(run.settings.epochs, run.settings.grad_clip, forecast_of(run))]
    samples = SamplePredictions(_predictor(run), run.data.val_pairs, run.settings.img_size, run.data.masks)
    try:  # no rank holds all weights of a sharded network, so there are no images of it
        curves = TensorBoardCurves(
            directory / "tensorboard", global_window, None if run.machine.ranks.shards else samples
        )
        found.append(curves)
    except ImportError:
        if not global_window:  # said when the run began
            logger.info("TensorBoard: not installed, so nothing is written for it (pip install tensorboard)")
    except Exception as error:  # a full disk, or a tensorboard that does not fit its protobuf or numpy
        logger.warning("%s: nothing is written for TensorBoard (%s)", directory / "tensorboard", first_line(error))
    if importlib.util.find_spec("plotly") is None:
        logger.info("Report: plotly is not installed, so no report.html is written at the end (pip install plotly)")
    else:
        found.append(FinalReport(directory, alone=run.machine.ranks.size == 1))
    return found


def _predictor(run: Run) -> Callable[[Tensor], Tensor]:
    """Return the function that ``SamplePredictions`` takes: the weights for use, applied to one image."""

    def predict(image: Tensor) -> Tensor:
        network = run.state.model_for_use.train().eval()
        with torch.inference_mode(), run.precision_in_use.products(), run.precision_in_use.autocast():
            logits = network(unit_range(image.to(run.machine.device), run.machine.memory_format))[-1]
        return logits.float().sigmoid().cpu()

    return predict
