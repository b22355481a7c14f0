"""``replay``: its answer to incidents of each kind. (Data and precision, end to end: test_recovery.py.)"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Argv, tiny_arguments

from train_ultimate import main


@pytest.fixture(scope="module")
def incident(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that runs a drill and moves the folder of its first incident away from the run."""

    def folder(drill: str, *more: str) -> Path:
        root = tmp_path_factory.mktemp("incident")
        flags = ("--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "1", "--drill", drill, *more)
        assert main(tiny_arguments(tiny_dataset, root / "run", *flags)) == 0
        shutil.move(root / "run" / "incidents" / "000001", root / "moved")
        shutil.rmtree(root / "run")
        return root / "moved"

    return folder


@pytest.mark.parametrize(
    ("drill", "cause"),
    [
        ("bad-sample@4", "data: other samples are fine"),
        ("nan-weight@13", "model: the samples are not to blame"),
        ("nan-loss@13", "not reproduced: the rerun is as it should be"),
        ("spike@16", "not reproduced: the rerun is as it should be"),
    ],
)
def test_cause_of_each_kind_is_named(
    incident: Callable[..., Path], capsys: pytest.CaptureFixture[str], drill: str, cause: str
) -> None:
    folder = incident(drill)
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^Cause: {cause}", out, re.MULTILINE)
    assert re.search(r"^recorded, fp32 ", out, re.MULTILINE)
    assert re.search(r"^replayed, fp32 ", out, re.MULTILINE)
    weights_broken = drill.startswith("nan-weight")  # set one window before it shows
    assert ("Weights are not finite" in out) == weights_broken
    assert ("a fire drill" in out) == (not weights_broken)


@pytest.mark.parametrize("flags", [(), ("--augment-on", "device", "--gradient-checkpointing")])
def test_finite_window_has_the_recorded_loss(
    incident: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    """The spike drill changes only the gradient, so the loss must be the same to every digit."""
    folder = incident("spike@16", *flags)
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    rows = dict(re.findall(r"^(recorded|replayed), fp32 +(\S+)", capsys.readouterr().out, re.MULTILINE))
    assert rows["recorded"] == rows["replayed"]


def test_reproduced_spike_is_attributed_to_the_sample_that_stands_out(
    incident: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The network predicts only background, which is right for an empty mask and wrong for a full one."""
    folder = incident("spike@16")
    payload = torch.load(folder / "replay.pt", weights_only=True)
    for name, weights in payload["model"].items():
        if "head" in name:
            weights.fill_(-20.0 if name.endswith("bias") else 0.0)
    masks = payload["window"]["batches"][0]["masks"]
    masks[0], masks[1] = 0, 1
    torch.save(payload, folder / "replay.pt")
    record = json.loads((folder / "incident.json").read_text())
    (folder / "incident.json").write_text(json.dumps({**record, "grad_norm": 1.0, "drill": ""}))
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"Alone, in fp32, this sample does it: {record['samples'][1]}" in out
    assert "Cause: data" in out


@pytest.mark.parametrize("argv", [["replay"], ["replay", "nowhere"], ["replay", "x", "--lr", "3"]])
def test_mistakes_are_reported_in_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_weights_of_another_network_are_refused(
    incident: Callable[..., Path], tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = incident("nan-loss@4")
    payload = torch.load(folder / "replay.pt", weights_only=True)
    payload["settings"]["decoder_channels"] = 24
    torch.save(payload, folder / "replay.pt")
    assert main(["replay", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{folder} was made by a modified copy of this program" in error
    assert "first difference: decoder." in error
