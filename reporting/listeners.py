"""What follows a run while it goes on, beside its log: TensorBoard, and the report at its end."""

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.dataset import load_image, load_mask
from data.layouts import Pair
from data.loading import unit_range
from reporting.history import number
from runtime.files import first_line
from runtime.log import Listener
from runtime.machine import Precision
from training.state import EpochStats, TrainState

NO_TENSORBOARD = "TensorBoard: not installed, so nothing is written for it (pip install tensorboard)"
NO_PLOTLY_TO_TRAIN = "Report: plotly is not installed, so no report.html is written at the end (pip install plotly)"
_EPOCH_SCALARS = (
    "epoch", "loss", "iou", "dice", "mae", "s_measure", "grad_norm_avg", "grad_norm_max", "lr", "backbone_lr",
    "images_per_second", "skipped", "overflows", "unreadable",
)  # fmt: skip
_WINDOW_SCALARS = ("loss", "grad_norm", "loss_scale", "lr")
_FLUSH_SECONDS = 30
_NUM_SAMPLES = 4

Samples = Callable[[], tuple[Tensor, Tensor, Tensor] | None]


class SamplePredictions:
    """A few validation images as the weights in use see them, the same ones each time, one by one to save memory.

    Args:
        state: of the run.
        pairs: to validate on; the first few that can be read are taken.
        img_size: S.
        device: of the network.
        memory_format: of its input.
        precision: that the run was started in.
    """

    def __init__(
        self, state: TrainState, pairs: Sequence[Pair], img_size: int, device: torch.device,
        memory_format: torch.memory_format, precision: Precision,
    ) -> None:  # fmt: skip
        self.state = state
        self.pairs = pairs
        self.img_size = img_size
        self.device = device
        self.memory_format = memory_format
        self.precision = precision

    @torch.inference_mode()
    def __call__(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Images (N, 3, S, S), masks and predictions (N, 1, S, S), in [0, 1]; None where no image can be read.

        Predictions that are not finite are black.
        """
        images, masks = self._loaded
        if not len(images):
            return None
        model = self.state.model_for_use.train().eval()
        with self.state.precision_in_use(self.precision).autocast():
            inputs = (unit_range(image.to(self.device), self.memory_format) for image in images.split(1))
            logits = torch.cat([model(image)[-1] for image in inputs])
        return images.float() / 255, masks.float(), logits.float().sigmoid().nan_to_num(0, 0, 0).cpu()

    @cached_property
    def _loaded(self) -> tuple[Tensor, Tensor]:
        images, masks = [], []
        for pair in self.pairs[: 4 * _NUM_SAMPLES]:
            try:
                image, mask = load_image(pair.image, self.img_size), load_mask(pair.mask, self.img_size)
            except ValueError:  # told of elsewhere
                continue
            images.append(image)
            masks.append(mask)
            if len(images) == _NUM_SAMPLES:
                break
        return (torch.stack(images), torch.stack(masks)) if images else (torch.empty(0), torch.empty(0))


class TensorBoardCurves:
    """The log's scalars, and a few validation images after each epoch, as events for TensorBoard.

    Every step is the number of windows in the run. Of windows that a resumed run trains again, TensorBoard shows the
    later ones; of a window that was run again, its last attempt is written.

    Args:
        directory: where the event files go.
        global_window: windows of the run done before.
        samples: called after an epoch: images (N, 3, H, W) and masks and predictions (N, 1, H, W), all in [0, 1]; None
            for no images.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: Path, global_window: int, samples: Samples | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second, and not needed for help or mistakes

        before = set(threading.enumerate())
        self._writer = SummaryWriter(str(directory), purge_step=global_window + 1, flush_secs=_FLUSH_SECONDS)
        _keep_quiet(set(threading.enumerate()) - before)
        self._samples = samples
        self._shown = False
        self._step = global_window
        self._window: dict[str, Any] | None = None  # the newest: it may be run again

    def event(self, event: str, fields: dict[str, Any]) -> None:
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
        self._write_window()
        self._writer.close()

    def _write_window(self) -> None:
        fields, self._window = self._window, None
        if fields is None:
            return
        self._step = fields["global_window"]
        for key in _WINDOW_SCALARS:
            self._writer.add_scalar(f"window/{key}", number(fields, key), self._step)

    def _write_samples(self) -> None:
        """Predictions each time, images and masks once."""
        try:
            samples = self._samples() if self._samples is not None else None
        except RuntimeError as error:  # the memory is too short, say: the curves do without
            self._samples = None
            print(f"Warning: no more validation images for TensorBoard ({first_line(error)}); its curves go on")
            return
        if samples is None:
            return
        for name, images in zip(("image", "mask", "prediction"), samples, strict=True):
            if name == "prediction" or not self._shown:
                self._writer.add_images(f"validation/{name}", images, self._step)
        self._shown = True


class FinalReport:
    """Writes ``report.html`` when the run has ended.

    Pictures of validation images are left out after a signal: whoever sends one does not wait for long. Nor does the
    launcher of several processes, once one of them has failed.

    Args:
        directory: of the run.
        alone: no other process takes part.
    """

    def __init__(self, directory: Path, alone: bool = True) -> None:
        self.directory = directory
        self.alone = alone
        self.exit_code = 1

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == "run_end":
            self.exit_code = fields["exit_code"]

    def close(self) -> None:
        from reporting.report import write_final_report

        try:
            with torch.random.fork_rng(devices=[]):  # a network is built for the pictures
                patient = self.exit_code == 0 or (self.exit_code == 3 and self.alone)
                print(write_final_report(self.directory, with_pictures=patient))
        except KeyboardInterrupt:
            print(f"No report written: interrupted; later: python train_ultimate.py report {self.directory}")


def listeners_of(directory: Path, global_window: int, samples: Samples | None, alone: bool = True) -> list[Listener]:
    """Those of a run, as far as what they need is installed; what is not is told, once.

    Args:
        directory: of the run.
        global_window: windows of the run done before.
        samples: as ``TensorBoardCurves`` takes them.
        alone: as ``FinalReport`` takes it.
    """
    found: list[Listener] = []
    try:
        found.append(TensorBoardCurves(directory / "tensorboard", global_window, samples))
    except ImportError:
        if not global_window:
            print(NO_TENSORBOARD)
    except Exception as error:  # a disk that is full, or a tensorboard that does not fit its protobuf or numpy
        print(f"Warning: {directory / 'tensorboard'}: nothing is written for TensorBoard ({first_line(error)})")
    if importlib.util.find_spec("plotly") is None:
        print(NO_PLOTLY_TO_TRAIN)
    else:
        found.append(FinalReport(directory, alone))
    return found


def _keep_quiet(threads: set[threading.Thread]) -> None:
    """The error of the thread that writes is raised at the next event, and told there: no traceback before that."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread not in threads:
            previous(arguments)

    threading.excepthook = hook


def epoch_lines(
    stats: "EpochStats", scores: Mapping[str, float], large_norm: float, loss_scale: float, warn: bool
) -> list[str]:
    """What an epoch came to.

    Args:
        stats: of its windows.
        scores: of its validation: iou and dice.
        large_norm: what ``stats`` counts as a large gradient norm.
        loss_scale: now.
        warn: of large norms; without, their number is told all the same.
    """
    lines = [
        f"Loss: {stats.loss:.4f} | IoU: {scores['iou']:.4f} | Dice: {scores['dice']:.4f}",
        f"   Gradient norm - Avg: {stats.grad_norm_avg:.3f}, Max: {stats.grad_norm_max:.3f}",
    ]
    if stats.num_overflows:
        lines.append(f"   fp16 overflows: {stats.num_overflows}, none applied; loss scale now {loss_scale:g}")
    if stats.num_large_norms:
        share = f"{stats.num_large_norms} of {stats.num_applied} windows"
        told = f"had a gradient norm above 5 x --grad-clip = {large_norm:g}; they were clipped"
        lines.append(f"   Warning: {share} {told}" if warn else f"   {share} above {large_norm:g} were clipped")
    return lines
