import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bytes_kept
from torch import Tensor, nn

from models.network import CamouflageSegmenter, NetworkSettings, build_network
from models.zoom import zoomed_side


def build(name: str = "test_efficientnet", **settings: Any) -> CamouflageSegmenter:
    return build_network(NetworkSettings(name, **{"decoder_channels": 16, "img_size": 64, **settings}))


SETTINGS = {
    "backbone": "resnet10t", "decoder_channels": 32, "img_size": 96, "zoom": [0.5, 1.0], "multi_scale": [0.75, 1.0],
    "frozen_levels": 2, "pretrained": False, "backbone_weights": "weights.pth", "epochs": 3,
}  # fmt: skip


def test_network_settings_are_read_from_the_settings_of_a_run() -> None:
    expected = NetworkSettings("resnet10t", 32, 96, (0.5, 1.0), (0.75, 1.0), 2, freeze_norm_statistics=True)
    assert NetworkSettings.of(SETTINGS) == expected
    assert NetworkSettings.of(SETTINGS, img_size=64).img_size == 64
    assert not NetworkSettings.of({**SETTINGS, "backbone_weights": None}).freeze_norm_statistics
    assert NetworkSettings.of({**SETTINGS, "backbone_weights": None, "pretrained": True}).freeze_norm_statistics


def test_settings_that_an_older_version_did_not_have_take_their_defaults() -> None:
    older = {key: value for key, value in SETTINGS.items() if key not in ("zoom", "multi_scale", "frozen_levels")}
    assert NetworkSettings.of(older) == NetworkSettings("resnet10t", 32, 96)


def test_the_source_of_pretrained_weights_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    settings = NetworkSettings("nonsense", 16, 64)
    for pretrained, weights in ((False, None), (True, {"weight": torch.ones(1)}), (True, None)):
        with pytest.raises(ValueError, match="no model of that name"):
            build_network(settings, pretrained, weights)
    assert caplog.messages == [
        "Pretrained weights of nonsense: from the Hugging Face hub, or its cache on this machine"
    ]


@pytest.mark.parametrize("size", [64, 96])
def test_finest_logits_have_the_images_size(size: int) -> None:
    outputs = build()(torch.rand(2, 3, size, size))
    assert len(outputs) == 5
    assert outputs[-1].shape == (2, 1, size, size)


def test_input_is_normalised_inside() -> None:
    model = build().eval()
    mean, std = model.get_buffer("mean"), model.get_buffer("std")
    assert mean.flatten().tolist() == pytest.approx([0.5, 0.5, 0.5], abs=0.1)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        direct = model.decoder(model.backbone((images - mean) / std))
        assert torch.equal(model(images)[0], direct[0])


def test_frozen_backbone_has_no_gradients_and_keeps_its_statistics() -> None:
    model = build(freeze_norm_statistics=False)
    model.set_backbone_frozen(True)
    model.train()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model(torch.rand(4, 3, 64, 64))[-1].mean().backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not any(module.training for module in model.backbone.modules())
    assert model.decoder.training


def test_unfrozen_pretrained_backbone_trains_but_keeps_its_batchnorm_statistics() -> None:
    model = build(freeze_norm_statistics=True)
    model.set_backbone_frozen(True)
    model.set_backbone_frozen(False)
    model.train()
    before = {key: value.clone() for key, value in model.backbone.named_buffers()}
    model(torch.rand(4, 3, 64, 64))[-1].mean().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.named_buffers())
    assert any(parameter.grad is not None for parameter in model.backbone.parameters())
    assert model.backbone.training


def frozen_names(model: CamouflageSegmenter) -> set[str]:
    return {name for name, parameter in model.backbone.body.named_parameters() if not parameter.requires_grad}


def test_frozen_levels_stay_frozen_when_the_backbone_trains_and_later_layers_learn() -> None:
    model = build(frozen_levels=1)
    expected = {
        n
        for n, _ in model.backbone.body.named_parameters()
        if n.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1"))
    }
    assert frozen_names(model) == expected
    model.set_backbone_frozen(True)
    model.set_backbone_frozen(False)
    assert frozen_names(model) == expected
    model.train()(torch.rand(2, 3, 64, 64))[-1].mean().backward()
    without = {name for name, parameter in model.backbone.body.named_parameters() if parameter.grad is None}
    assert without == expected


def test_frozen_levels_of_a_transformer_are_its_first_blocks_with_embedding_and_positions() -> None:
    model = build("vit_tiny_patch16_224", frozen_levels=1)
    frozen = frozen_names(model)
    assert {"model.pos_embed", "model.patch_embed.proj.weight", "model.blocks.8.mlp.fc2.bias"} <= frozen
    assert not any(name.startswith(("model.blocks.10.", "model.blocks.11.")) for name in frozen)


def test_too_many_frozen_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="--frozen-levels 5: this backbone has 4 feature levels"):
        build(frozen_levels=5)


def test_a_frozen_level_of_a_convolutional_backbone_saves_much_of_the_memory() -> None:
    settings = {"decoder_channels": 64, "img_size": 224}
    whole, less = (
        bytes_kept(build("tf_efficientnet_lite0", frozen_levels=levels, **settings), torch.rand(2, 3, 224, 224))
        for levels in (0, 1)
    )
    assert less < 0.65 * whole


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "pvt_v2_b0"])
def test_frozen_levels_and_gradient_checkpointing_go_together(backbone: str) -> None:
    def gradients(recomputes: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build(backbone, frozen_levels=1)
        if recomputes:
            assert model.checkpoint_gradients()
        model(torch.rand(2, 3, 64, 64))[-1].mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())


def test_backbone_from_random_weights_learns_its_statistics() -> None:
    model = build(freeze_norm_statistics=False).train()
    before = {key: value.clone() for key, value in model.backbone.named_buffers() if "running_mean" in key}
    model(torch.rand(4, 3, 64, 64))
    assert all(not torch.equal(value, before[key]) for key, value in model.backbone.named_buffers() if key in before)


def test_backbone_that_does_not_take_the_image_size_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match=r"--backbone crossvit_tiny_240|timm cannot build it"):
        build("crossvit_tiny_240")


def test_normalisation_constants_are_not_in_the_checkpoint() -> None:
    assert not {"mean", "std"} & build().state_dict().keys()


@pytest.mark.parametrize("zooms", [(1.0,), (1.5,), (0.5, 1.0)])
def test_at_another_scale_the_backbone_sees_another_size_and_logits_keep_theirs(zooms: tuple[float, ...]) -> None:
    model = build(zooms=zooms)
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    images = torch.rand(2, 3, 64, 64)
    assert model(images)[-1].shape == model(images, 1.5)[-1].shape == (2, 1, 64, 64)
    assert seen == [zoomed_side(64, zoom * scale) for scale in (1, 1.5) for zoom in zooms]


def test_a_size_that_a_backbone_does_not_take_is_refused_with_one_that_it_takes() -> None:
    with pytest.raises(ValueError, match=r"of --img-size 64 \(.+\); it was made for 240 x 240 pixels"):
        build("crossvit_tiny_240")


def test_a_scale_that_a_backbone_does_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="does not take images of --img-size 64 at --multi-scale 2"):
        build("vit_tiny_patch16_224", scales=(1.0, 2.0))


def saved_and_loaded(model: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "tf_efficientnet_lite0"])  # plain convolutions, Conv2dSame
@pytest.mark.parametrize(
    "copied",
    [lambda model, _: pickle.loads(pickle.dumps(model)), saved_and_loaded, lambda model, _: copy.deepcopy(model)],
)
def test_copied_network_computes_the_same_bits(
    backbone: str, copied: Callable[[nn.Module, Path], CamouflageSegmenter], tmp_path: Path
) -> None:
    model = build(backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copied(model, tmp_path)
    images = torch.rand(2, 3, 64, 64)
    outputs = []
    for network in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(images)
        logits[-1].mean().backward()
        outputs.append([*logits, *(parameter.grad for parameter in network.parameters() if parameter.grad is not None)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
