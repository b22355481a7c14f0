import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from models import backbone as backbone_module
from models.backbone import build_backbone, padding_for_multiples, speed_up_depthwise


def test_channels_last_features_are_turned_even_if_shapes_are_ambiguous() -> None:
    backbone = build_backbone("swin_tiny_patch4_window7_224", False, None, img_size=384).eval()
    images = torch.rand(1, 3, 384, 384)
    with torch.no_grad():
        raw, turned = backbone.body(images)[0], backbone(images)[0]
    assert raw.shape == turned.shape == (1, 96, 96, 96)
    assert torch.equal(turned, raw.permute(0, 3, 1, 2))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Weights of a test_efficientnet, named as in a classifier's checkpoint."""
    torch.manual_seed(11)
    body = build_backbone("test_efficientnet", pretrained=False, weights=None, img_size=64).body
    return {**body.state_dict(), "classifier.weight": torch.zeros(1000, 256)}


@pytest.mark.parametrize(
    ("name", "img_size", "strides"),
    [
        ("test_efficientnet", 64, [4, 8, 16, 32]),  # five levels, the finest is dropped
        ("test_convnext", 64, [4, 8, 16, 32]),
        ("swin_tiny_patch4_window7_224", 384, [4, 8, 16, 32]),  # channels last; height, width and channels are all 96
        ("vit_tiny_patch16_224", 160, [16, 16, 16]),  # one resolution; not the size it was trained at
    ],
)
def test_levels_are_channels_first_fine_to_coarse(name: str, img_size: int, strides: list[int]) -> None:
    backbone = build_backbone(name, pretrained=False, weights=None, img_size=img_size).eval()
    with torch.no_grad():
        levels = backbone(torch.rand(1, 3, img_size, img_size))
    assert [tuple(level.shape) for level in levels] == [
        (1, channels, img_size // stride, img_size // stride)
        for channels, stride in zip(backbone.channels, strides, strict=True)
    ]


def test_error_for_an_unknown_name_lists_close_matches() -> None:
    with pytest.raises(ValueError, match=r"no model of that name; did you mean .*pvt_v2_b2"):
        build_backbone("pvt2_v2_b2", pretrained=False, weights=None, img_size=64)


def test_error_for_a_failed_download_names_both_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: object, **__: object) -> None:
        raise OSError("Connection refused")

    monkeypatch.setattr(backbone_module.timm, "create_model", no_connection)
    with pytest.raises(ValueError, match=r"Connection refused.*--backbone-weights.*--no-pretrained"):
        build_backbone("resnet18", pretrained=True, weights=None, img_size=64)


def test_weights_are_loaded_whole(weights: dict[str, Tensor]) -> None:
    loaded = build_backbone("test_efficientnet", True, weights, 64).body.state_dict()
    torch.manual_seed(11)
    saved = build_backbone("test_efficientnet", False, None, 64).body.state_dict()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_loading_weights_leaves_the_global_generator_alone(weights: dict[str, Tensor]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_backbone("test_efficientnet", True, weights, 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_do_not_fit_are_refused_with_how_many_do(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"not the weights of resnet18: 1 of its 120 tensors fit \(.*size mismatch"):
        build_backbone("resnet18", True, weights, 64)
    with pytest.raises(
        ValueError, match=r"\d+ of its \d+ weight tensors are not in the file, the first being conv_stem"
    ):
        build_backbone("test_efficientnet", True, {"unrelated": torch.zeros(3)}, 64)


@pytest.mark.parametrize("name", ["resnet34", "pvt_v2_b1"])
def test_weights_of_a_usual_network_are_recognized(name: str) -> None:
    """The file has a classifier for other classes, and all tensors of the network that was asked for."""
    other = timm.create_model(name, num_classes=7).state_dict()
    with pytest.raises(ValueError, match=rf"they look like those of {name}, try --backbone {name}"):
        build_backbone("resnet18", True, other, 64)


# Depthwise convolutions that a CPU trains faster in fp32 than in bf16


def test_depthwise_convolutions_but_the_common_kind_train_in_fp32_under_bf16_on_a_cpu() -> None:
    """The output is that of fp32, rounded once; the gradient is that of fp32; other convolutions do not change."""
    body = build_backbone("tf_efficientnet_lite0", pretrained=False, weights=None, img_size=64).body
    plain = timm.create_model("tf_efficientnet_lite0", features_only=True)
    chosen = set()
    for name, layer in body.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if type(layer) is type(plain.get_submodule(name)):
            assert layer.groups == 1 or (layer.kernel_size, layer.stride) == ((3, 3), (1, 1))
            continue
        assert layer.groups == layer.in_channels
        chosen.add((layer.kernel_size[0], layer.stride[0]))
        images = torch.randn(2, layer.in_channels, 12, 12)
        expected = layer(images)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), layer.weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(images)
        assert torch.equal(found, expected.to(torch.bfloat16))
        assert torch.equal(torch.autograd.grad(found.sum(), layer.weight)[0], expected_gradient)
        layer.requires_grad_(False)  # nothing to train: torch's bf16, twice as fast
        plain.get_submodule(name).load_state_dict(layer.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(images), plain.get_submodule(name)(images))
    assert chosen == {(3, 2), (5, 1), (5, 2)}


def test_in_fp32_outputs_names_and_copies_do_not_change() -> None:
    plain = timm.create_model("test_efficientnet", features_only=True)
    sped_up = copy.deepcopy(plain)
    speed_up_depthwise(sped_up)
    images = torch.rand(1, 3, 64, 64)
    for model in (sped_up, copy.deepcopy(sped_up)):
        assert [str(module) for module in model.modules()] == [str(module) for module in plain.modules()]
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(images), plain.eval()(images), strict=True))


def test_padding_for_multiples_equals_timms_own_which_is_restored_afterwards() -> None:
    padding = timm.layers.padding
    original = padding.get_same_padding
    cases = [(side, k, s, d) for side in (7, 16, 32, 96) for k in (1, 3, 5) for s in (1, 2, 4) for d in (1, 2)]
    expected = [original(*case) for case in cases]
    with padding_for_multiples():
        assert [padding.get_same_padding(*case) for case in cases] == expected
    assert padding.get_same_padding is original
