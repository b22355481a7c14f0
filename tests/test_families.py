"""Every family of timm's backbones: it trains, or it is refused with the reason."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from models.network import NetworkSettings, build_network

SMALL = ("test_", "atto", "femto", "pico", "xxs", "nano", "_xxt", "_xt", "xtiny", "_t0", "tiny", "_xs", "_t", "mini",
         "micro", "_s0", "88m", "167m", "_d1", "beit_base", "naflexvit_base", "v5_base", "0", "small", "_s", "12", "18",
         "26", "s", "b")  # fmt: skip
SIZES = {"byoanet": 256, "crossvit": 240, "deepseek_vit": 224, "efficientformer": 224, "inception_resnet_v2": 96,
         "inception_v3": 96, "inception_v4": 96}  # fmt: skip  # px, of those that do not take 64
UNREACHED = {"pit": {"backbone.body.body.norm.weight", "backbone.body.body.norm.bias"}}  # of a classifier that is gone


def smallest(family: str) -> str:
    """Return a network of the family that its name suggests to be small."""
    names = timm.list_models(module=family)
    return min(names, key=lambda name: (next((i for i, tag in enumerate(SMALL) if tag in name), 99), len(name)))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(timm.list_modules()))
def test_family_trains_or_is_refused_with_the_reason(family: str) -> None:
    settings = NetworkSettings(smallest(family), decoder_channels=8, img_size=64)
    if family in SIZES:
        with pytest.raises(ValueError, match=r"images of --img-size 64 \(.+\); it was made for \d+ x \d+ pixels"):
            build_network(settings)
        settings = replace(settings, img_size=SIZES[family])
    network = build_network(settings).train()
    levels: list[Any] = []
    network.backbone.register_forward_hook(lambda _module, _inputs, features: levels.extend(features))
    size = settings.img_size
    side_logits = network(torch.rand(2, 3, size, size))
    torch.stack([logits.square().mean() for logits in side_logits]).sum().backward()
    sides = [level.shape[-2:] for level in reversed(levels)]  # coarse to fine
    assert [logits.shape[-2:] for logits in side_logits] == [sides[0], *sides[:-1], (size, size)]
    assert all(torch.isfinite(logits).all() for logits in side_logits)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, gradient in gradients.items() if gradient is None} == UNREACHED.get(family, set())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
