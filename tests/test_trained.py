"""Tests of ``load_model``: a trained network in another program."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_arguments
from PIL import Image

from data.decoding import decode_image
from evaluation import load_model
from evaluation.predictor import load_network, probability_levels
from evaluation.trained import network_of
from models.network import NetworkSettings, build_network
from runtime.checkpoint import read_checkpoint
from train_ultimate import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    assert main(tiny_arguments(tiny_dataset, directory, "--epochs", "2", "--zoom", "0.5", "1")) == 0
    return directory / "best_model.pth"


def test_averaged_weights_in_evaluation_mode_and_a_transform_of_the_training_size(checkpoint: Path) -> None:
    model, transform = load_model(str(checkpoint), device="cpu")
    average = read_checkpoint(checkpoint)["ema"]["model"]
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in average.items())
    assert not any(module.training for module in model.modules())
    assert transform.img_size == 64
    assert transform.device == torch.device("cpu")


def test_without_an_average_the_weights_themselves(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "ema": None}, tmp_path / "raw.pth")
    model, _ = load_model(tmp_path / "raw.pth")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in state["model"].items())


def test_photographs_of_any_mode_and_size_make_a_batch_in_the_unit_range(checkpoint: Path) -> None:
    _, transform = load_model(checkpoint)
    grey, deep = Image.new("L", (3, 200), 128), Image.fromarray(np.full((5, 9), 65535, dtype=np.uint16))
    one, several = transform(grey), transform([grey, deep, Image.new("CMYK", (1, 1)), Image.new("RGBA", (64, 64))])
    assert (one.shape, several.shape, several.dtype) == ((1, 3, 64, 64), (4, 3, 64, 64), torch.float32)
    assert torch.equal(several[0], one[0])
    assert one.unique().tolist() == [pytest.approx(128 / 255)]
    assert several[1].unique().tolist() == [1]


def test_float_photographs_in_the_unit_range_are_not_black(checkpoint: Path) -> None:
    _, transform = load_model(checkpoint)
    values = np.array([[0.25, 0.5], [0.75, np.nan]], dtype=np.float32)
    assert transform(Image.fromarray(values)).amax() == pytest.approx(191 / 255)
    assert transform(Image.fromarray(values * 200)).amax() == pytest.approx(150 / 255)


def test_predictions_are_those_of_the_commands(checkpoint: Path, tiny_dataset: Path) -> None:
    image = next((tiny_dataset / "TestDataset" / "Imgs").iterdir())
    model, transform = load_model(checkpoint)
    network = load_network(checkpoint, "cpu", "fp32", img_size=None)
    with torch.inference_mode():
        inputs = transform(Image.open(image))
        here, there = model(inputs)[-1][0], network.logits(inputs)[0]
    assert torch.equal(transform(decode_image(image)), inputs)
    a, b = (probability_levels(logits, (50, 70)).astype(int) for logits in (here, there))
    assert abs(a - b).max() <= 1  # grey levels; the memory layouts differ, and so does the order of sums


def test_the_example_in_the_readme_runs(checkpoint: Path, tmp_path: Path) -> None:
    section = (ROOT / "docs/using.md").read_text().split("### From Python")[1].split("\n#")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(code.splitlines()) == 10
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best_model.pth").write_bytes(checkpoint.read_bytes())
    photograph = Image.new("RGB", (90, 40), (80, 120, 60))
    exif = photograph.getexif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "photograph.jpg", exif=exif)
    code += "print(tuple(probability.shape), bool((probability >= 0).all() and (probability <= 1).all()))\n"
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=paths,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "(90, 40) True\n"


def test_scales_and_frozen_levels_of_training_are_ignored_in_use() -> None:
    """The backbone takes images of one size only, so that building it for those scales would fail."""
    settings = {
        "backbone": "vit_tiny_patch16_224", "decoder_channels": 16, "img_size": 64, "pretrained": True,
        "backbone_weights": None,
    }  # fmt: skip
    weights = build_network(NetworkSettings.of(settings)).state_dict()
    config = {"settings": {**settings, "multi_scale": [1.0, 2.0], "frozen_levels": 9}}
    model = network_of({"config": config, "model": weights}, "vit.pth")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_files_that_are_no_checkpoint_of_a_run_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pth: not a checkpoint"):
        load_model(tmp_path / "text.pth")
    state = torch.load(checkpoint, weights_only=True)
    for content in (state["model"], {"state_dict": state["model"]}):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"weights.pth: holds only weights"):
            load_model(tmp_path / "weights.pth")
    state["config"]["settings"]["decoder_channels"] = 8
    with pytest.raises(ValueError, match=r"changed\.pth was made by a modified copy .* first difference: zoom\."):
        network_of(state, "changed.pth")
    for setting, value in (("decoder_channels", 0), ("zoom", []), ("backbone", 7), ("img_size", None)):
        odd = {**state, "config": {"settings": {**state["config"]["settings"], setting: value}}}
        with pytest.raises(ValueError, match=r"odd\.pth: "):
            network_of(odd, "odd.pth")
    with pytest.raises(ValueError, match="settings describe no network"):
        network_of({**state, "config": {}}, "odd.pth")


def test_a_flipped_bit_and_weights_that_are_not_finite_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped\.pth: damaged"):
        load_model(tmp_path / "flipped.pth")
    state = torch.load(checkpoint, weights_only=True)
    next(iter(state["model"].values())).fill_(torch.nan)
    torch.save({**state, "ema": None}, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="is not finite"):
        load_model(tmp_path / "nan.pth")


def test_nothing_in_the_file_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Trap(), "config": {}}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"refused: .* could run code"):
        load_model(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


def test_importing_and_building_leave_the_log_levels_of_other_libraries_alone() -> None:
    """A process of its own, because this one has imported everything before."""
    code = """
import logging
import timm, huggingface_hub, torchvision, safetensors.torch

def levels():
    loggers = {name: logging.getLogger(name) for name in ("", "timm.models._builder", *logging.root.manager.loggerDict)}
    return {name: logger.level for name, logger in loggers.items() if not name.startswith("train_ultimate")}

for level in (logging.NOTSET, logging.DEBUG):
    logging.getLogger("timm.models._builder").setLevel(level)
    logging.getLogger("huggingface_hub").setLevel(level)
    before = levels()
    from evaluation import load_model
    from models import NetworkSettings, build_network
    build_network(NetworkSettings("test_efficientnet", 16, 64))
    try:
        build_network(NetworkSettings("test_efficientnet", 16, 64), pretrained=True)
    except ValueError as error:
        assert "could not be loaded" in str(error)
    assert before.items() <= levels().items()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_scoring_saved_predictions_imports_no_torch() -> None:
    code = "import sys, evaluation, evaluation.metrics; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
