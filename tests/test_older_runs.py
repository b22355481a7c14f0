"""A run folder that an older version wrote: it resumes, its incident replays, and it can be reported and evaluated.

The folder is from commit e422775: 3 + 1 epochs on the dataset of ``tiny_dataset``, killed after the second. In its
fifth window, the drill bad-sample sent an image into quarantine until epoch 5. Its checkpoint counts samples seen, its
settings name the command, and its log has no spike limits.
"""

import json
import tarfile
from pathlib import Path

import pytest
from conftest import train
from launching import read_events

from runtime.checkpoint import read_checkpoint

ARCHIVE = Path(__file__).parent / "fixtures" / "run_of_e422775" / "run.tar.xz"
CULPRIT = "TrainDataset/Imgs/scene_00005.jpg"
# loss and gradient norm of the windows that the older version went on with
NEXT_WINDOWS = [
    (3.3026, 1.2984), (3.3816, 1.9653), (3.5027, 1.5381), (3.5957, 3.0202),
    (3.6760, 3.0172), (3.6590, 4.4351), (3.7070, 2.7476), (3.7295, 3.6292),
]  # fmt: skip


@pytest.fixture
def older_run(tmp_path: Path) -> Path:
    """A copy of the folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def resume(directory: Path, dataset: Path) -> int:
    return train(["train", "--resume", "auto", "--checkpoint-dir", str(directory), "--dataset-path", str(dataset)])


def test_it_resumes_and_goes_on_as_the_older_version_did(older_run: Path, tiny_dataset: Path) -> None:
    """Without the moments, the second norm would be 3.5."""
    before = len(read_events(older_run, "window"))
    assert resume(older_run, tiny_dataset) == 0
    windows = read_events(older_run, "window")[before:]
    assert [(window["loss"], window["grad_norm"]) for window in windows] == [
        pytest.approx(numbers, rel=0.01) for numbers in NEXT_WINDOWS
    ]
    maes = [epoch["mae"] for epoch in read_events(older_run, "epoch")[2:]]
    assert maes == pytest.approx([0.4429, 0.4097], rel=0.01)
    state = read_checkpoint(older_run / "epoch_0004.pth")
    assert state["ladder"]["quarantine"] == {CULPRIT: 4}
    assert state["ladder"]["num_applied"] == 16
    settings = json.loads((older_run / "config.json").read_text())["settings"]
    assert "command" not in settings
    assert (settings["epochs"], settings["stage1_epochs"], settings["decoder_channels"]) == (4, 3, 8)


def test_its_incident_replays(older_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["replay", str(older_run / "incidents" / "000001")]) == 0
    out = capsys.readouterr().out
    assert out.count("backbone.body.conv_stem (output, from an input that is not finite itself)") == 3
    assert f"Alone, in fp32, this sample does it: {CULPRIT}" in out
    assert "Cause: data" in out
    assert "a fire drill: bad-sample" in out


@pytest.mark.parametrize("resumed", [False, True])
def test_it_is_reported_with_and_without_windows_of_this_version(
    older_run: Path, tiny_dataset: Path, resumed: bool
) -> None:
    if resumed:
        assert resume(older_run, tiny_dataset) == 0
    assert train(["report", str(older_run)]) == 0
    page = (older_run / "report.html").read_text()
    assert "nonfinite loss" in page
    assert CULPRIT in page


def test_its_checkpoint_is_evaluated(older_run: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(older_run / "epoch_0002.pth")
    flags = ("--dataset-path", str(tiny_dataset), "--device", "cpu", "--num-workers", "0")
    assert train(["evaluate", "--checkpoint", checkpoint, *flags]) == 0
    assert f"{checkpoint}, 64 px" in capsys.readouterr().out
