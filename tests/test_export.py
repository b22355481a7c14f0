"""``export``: exported networks compute what the original does, in this program and in others."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, differing_tensors, needs_shared, tiny_arguments
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from torch import Tensor

from commands.export import ExportedNetwork, trace
from data.dataset import load_image
from evaluation.predictor import load_network
from models.backbone import build_backbone
from models.network import CamouflageSegmenter, NetworkSettings, build_network
from runtime.checkpoint import read_checkpoint, read_weights, write_checkpoint
from train_ultimate import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    assert main(tiny_arguments(tiny_dataset, directory, "--epochs", "2", "--stage1-epochs", "1")) == 0
    return directory / "epoch_0002.pth"


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "net"
    assert main(["export", "--checkpoint", str(checkpoint), "--format", "safetensors", "--output", str(folder)]) == 0
    return folder


def network_of(checkpoint: Path) -> CamouflageSegmenter:
    return load_network(checkpoint, "cpu", "fp32", None).models[0]


def untrained(
    path: Path, backbone: str, img_size: int, weights: Path | None = None, zoom: Sequence[float] = (1,)
) -> Path:
    """Write a checkpoint of a network as ``train`` would start with it."""
    settings = {
        "backbone": backbone, "decoder_channels": 16, "img_size": img_size, "zoom": list(zoom),
        "pretrained": False, "backbone_weights": None if weights is None else str(weights),
    }  # fmt: skip
    model = build_network(NetworkSettings.of(settings), backbone_weights=weights and read_weights(weights))
    progress = {"epoch": 0, "window": 0, "best_epoch": 0, "best_iou": -1.0}
    saved = {"config": {"settings": settings}, "model": model.state_dict(), "ema": None, "progress": progress}
    write_checkpoint(path, saved)
    return path


def run_onnx(path: Path, images: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def failing(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(["export", *argv]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.slow
@pytest.mark.parametrize("zoom", [[1], [0.5, 1, 1.5]])
def test_torch_export_computes_the_same_for_any_number_and_size_of_images(zoom: list[float], tmp_path: Path) -> None:
    path = untrained(tmp_path / "net.pth", "test_efficientnet", 128, zoom=zoom)
    assert main(["export", "--checkpoint", str(path), "--format", "torch"]) == 0
    module = torch.export.load(tmp_path / "net.pt2").module()
    network = ExportedNetwork(network_of(path), any_size=True)
    for shape in ((1, 3, 128, 128), (4, 3, 192, 160), (2, 3, 160, 256), (1, 3, 107, 190)):
        images = torch.rand(shape)
        with torch.inference_mode():
            torch.testing.assert_close(module(images), network(images), rtol=0, atol=1e-5)


def test_images_of_any_size_are_padded_to_the_next_multiple_and_the_output_is_cropped() -> None:
    network = build_network(NetworkSettings("test_efficientnet", decoder_channels=16, img_size=64)).eval()
    images = torch.rand(2, 3, 70, 96)
    padded = torch.nn.functional.pad(images, (0, 0, 0, 26), mode="replicate")
    with torch.inference_mode():
        expected = network(padded)[-1].sigmoid()[:, :, :70]
        torch.testing.assert_close(ExportedNetwork(network, any_size=True)(images), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_torch_export_runs_without_this_program(checkpoint: Path, tmp_path: Path) -> None:
    exported = tmp_path / "net.pt2"
    assert main(["export", "--checkpoint", str(checkpoint), "--format", "torch", "--output", str(exported)]) == 0
    images = torch.rand(2, 3, 64, 96)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import torch; images = torch.load('images.pt'); "
        "torch.save(torch.export.load('net.pt2').module()(images).detach(), 'probabilities.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.inference_mode():
        expected = ExportedNetwork(network_of(checkpoint), any_size=True)(images)
    torch.testing.assert_close(torch.load(tmp_path / "probabilities.pt"), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_onnx_is_one_file_with_named_dimensions_and_the_networks_probabilities(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    exported = tmp_path / "net.onnx"
    assert main(["export", "--checkpoint", str(checkpoint), "--format", "onnx", "--output", str(exported)]) == 0
    assert "Checked with onnxruntime: within" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [exported]
    graph = onnx.load(exported).graph
    named = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert named == {"images": ["batch", 3, "height", "width"], "probabilities": ["batch", 1, "height", "width"]}
    metadata = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert (metadata["backbone"], metadata["img_size"]) == ("test_efficientnet", "64")
    for shape in ((3, 3, 96, 160), (1, 3, 81, 113)):
        images = torch.rand(shape)
        with torch.inference_mode():
            expected = ExportedNetwork(network_of(checkpoint), any_size=True)(images)
        torch.testing.assert_close(run_onnx(exported, images), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_convolutions_that_leave_bf16_are_exported_as_plain_ones() -> None:
    model = build_network(NetworkSettings("tf_efficientnet_lite0", decoder_channels=16, img_size=64)).eval()
    graph = trace(model, 64, fixed_size=True).program.graph
    assert not [node for node in graph.nodes if "autocast" in str(node.target) or "_to_copy" in str(node.target)]


@pytest.mark.slow
def test_backbone_of_one_size_leaves_only_the_number_of_images_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = untrained(tmp_path / "net.pth", "test_vit", 160)
    assert main(["export", "--checkpoint", str(path), "--format", "torch"]) == 0
    assert "Images: any number, all of 160 x 160 pixels (its backbone takes one size)" in capsys.readouterr().out
    assert torch.export.load(tmp_path / "net.pt2").module()(torch.rand(3, 3, 160, 160)).shape == (3, 1, 160, 160)


@pytest.mark.slow
def test_exported_network_that_computes_something_else_is_not_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.export.load

    def load_another(path: Path) -> SimpleNamespace:
        module = load(path).module()
        return SimpleNamespace(module=lambda: lambda images: module(images) + 2e-4)

    monkeypatch.setattr(torch.export, "load", load_another)
    exported = tmp_path / "net.pt2"
    exported.write_text("an earlier export, exported_with torch")
    argv = ["--checkpoint", str(checkpoint), "--format", "torch", "--output", str(exported)]
    assert "differs by 0.0002 in probabilities, more than 0.0001: not kept" in failing(argv, capsys, code=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier export, exported_with torch"]


@pytest.mark.slow
def test_missing_check_is_reported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    argv = ["--checkpoint", str(checkpoint), "--format", "onnx", "--fixed-size", "--output", str(tmp_path / "net.onnx")]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    assert main(["export", *argv]) == 0
    assert "Not checked: onnxruntime is not installed" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "needs onnxscript; pip install onnx onnxscript onnxruntime" in failing(argv, capsys)


def test_mistakes_are_reported_before_anything_is_computed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--checkpoint", str(checkpoint), "--format"]
    assert "--format torch writes a file that ends in .pt2" in failing([*argv, "torch", "--output", "a.pth"], capsys)
    assert "there is no folder" in failing([*argv, "torch", "--output", str(tmp_path / "no/a.pt2")], capsys)
    assert "there is no folder" in failing([*argv, "safetensors", "--output", str(tmp_path / "no/a")], capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("edited")
    assert "exists already" in failing([*argv, "safetensors", "--output", str(tmp_path / "mine")], capsys)
    assert "--img-size 100 is not a multiple of 32" in failing([*argv, "onnx", "--img-size", "100"], capsys)
    weights = tmp_path / "weights.pth"
    torch.save(read_checkpoint(checkpoint)["model"], weights)
    assert "holds only weights" in failing(["--checkpoint", str(weights), "--format", "safetensors"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "weights.pth"]


def test_folder_gives_back_the_averaged_weights_bit_for_bit(checkpoint: Path, folder: Path) -> None:
    model = CamouflageSegmenter.from_pretrained(folder)
    assert not model.training
    average = read_checkpoint(checkpoint)["ema"]["model"]
    assert differing_tensors(dict(model.state_dict()), dict(average)) == []
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = network_of(checkpoint).to(memory_format=torch.contiguous_format)(images)  # type: ignore[call-overload]
        assert torch.equal(model(images)[-1], expected[-1])
    assert (model.config["img_size"], model.config["backbone"]) == (64, "test_efficientnet")


def test_folder_of_a_zoomed_network_saves_and_loads_again(tmp_path: Path) -> None:
    model = build_network(NetworkSettings("test_efficientnet", 16, 64, zooms=(0.5, 1, 1.5)))
    model.get_buffer("mean").fill_(0.4)  # normalisation is that of training, not timm's current values
    model.save_pretrained(tmp_path / "a", {"backbone": "test_efficientnet", "decoder_channels": 16, "img_size": 64})
    again = CamouflageSegmenter.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", again.config)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    images = torch.rand(1, 3, 64, 96)
    assert torch.equal(CamouflageSegmenter.from_pretrained(tmp_path / "b")(images)[-1], model.eval()(images)[-1])


def test_folder_is_one_that_huggingface_hubs_own_mixin_loads(folder: Path) -> None:
    class Mixed(PyTorchModelHubMixin, CamouflageSegmenter):  # type: ignore[misc]  # the mixin's methods hide ours
        def __init__(self, backbone: str, decoder_channels: int, img_size: int, zooms: list[float]) -> None:
            body = build_backbone(backbone, pretrained=False, weights=None, img_size=img_size)
            CamouflageSegmenter.__init__(self, body, decoder_channels, True, zooms)

    mixed = Mixed.from_pretrained(str(folder))
    ours = CamouflageSegmenter.from_pretrained(folder)
    assert differing_tensors(dict(mixed.state_dict()), dict(ours.state_dict())) == []


def test_network_comes_from_the_hubs_cache_by_its_name(folder: Path, tmp_path: Path) -> None:
    """The cache has huggingface_hub's layout."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--net"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    model = CamouflageSegmenter.from_pretrained("someone/net", **options)
    assert model.config["backbone"] == "test_efficientnet"
    with pytest.raises(
        ValueError, match="someone/other: no such folder, and no such repository could be read from the Hugging Face"
    ):
        CamouflageSegmenter.from_pretrained("someone/other", **options)
    with pytest.raises(ValueError, match="no such folder, and no such repository could be read"):
        CamouflageSegmenter.from_pretrained("not/a/name", **options)


def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "net")
    config, weights = tmp_path / "net/config.json", tmp_path / "net/model.safetensors"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        CamouflageSegmenter.from_pretrained(tmp_path / "net")
    weights.write_bytes(whole)
    config.write_text(json.dumps({**settings, "decoder_channels": 32}))
    with pytest.raises(ValueError, match=r"do not fit the network of its config\.json"):
        CamouflageSegmenter.from_pretrained(tmp_path / "net")
    config.write_text(json.dumps({"architectures": ["ViT"]}))
    with pytest.raises(ValueError, match="not of a network of this program: it has no backbone"):
        CamouflageSegmenter.from_pretrained(tmp_path / "net")
    weights.unlink()
    with pytest.raises(ValueError, match=r"it holds no model\.safetensors"):
        CamouflageSegmenter.from_pretrained(tmp_path / "net")


@pytest.mark.slow
def test_model_card_has_the_hubs_header_and_its_code_runs(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    header = card.split("---\n")[1]
    assert "library_name: train_ultimate" in header
    assert "pipeline_tag: image-segmentation" in header
    assert not re.search("^license:", header, flags=re.MULTILINE)  # the user must choose one
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0].replace("PATH", str(folder))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_documented_commands_run(checkpoint: Path, tmp_path: Path) -> None:
    """Run the commands and scripts of docs/using.md in order, in a folder with a checkpoint and a photograph."""
    pytest.importorskip("onnxruntime")
    section = (ROOT / "docs/using.md").read_text().split("## Use it elsewhere")[1].split("\n## ")[0]
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(checkpoint, tmp_path / "checkpoints/best_model.pth")
    photograph = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(photograph).save(tmp_path / "photograph.jpg")
    blocks = re.findall(r"```(python|)\n(.*?)```", section, flags=re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        argv = line.removeprefix("python train_ultimate.py ").split()
        subprocess.run([sys.executable, str(ROOT / "train_ultimate.py"), *argv], cwd=tmp_path, check=True)
    scripts = [block for language, block in blocks if language == "python"]
    assert len(scripts) == 3
    for script in scripts:
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)


@needs_shared
@pytest.mark.slow
def test_onnx_agrees_with_torch_on_photographs_at_three_sizes(tmp_path: Path) -> None:
    weights = SHARED / "weights/tf_efficientnet_lite0.safetensors"
    path = untrained(tmp_path / "net.pth", "tf_efficientnet_lite0", 224, weights, zoom=[1.25])
    assert main(["export", "--checkpoint", str(path), "--format", "onnx"]) == 0
    network = ExportedNetwork(network_of(path), any_size=True)
    photographs = sorted((SHARED / "data/CAMO/TestDataset/Imgs").iterdir())[:20]
    worst = {}
    for size in (160, 224, 352):
        images = torch.stack([load_image(photograph, size) for photograph in photographs]).float() / 255
        with torch.inference_mode():
            expected = torch.cat([network(part) for part in images.split(5)])
        got = torch.cat([run_onnx(tmp_path / "net.onnx", part) for part in images.split(5)])
        assert expected.std() > 0.01  # not a constant image
        worst[size] = (got - expected).abs().max().item()
    assert max(worst.values()) <= 1e-4, worst
