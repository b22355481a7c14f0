"""Every family of timm's backbones: it trains, or it is refused with the reason."""

import pytest
import timm
import torch
from torch import nn

from models.network import NetworkSettings, build_network

SMALL = ("test_", "atto", "femto", "pico", "xxs", "nano", "_xxt", "_xt", "xtiny", "_t0", "tiny", "_xs", "_t", "mini",
         "micro", "_s0", "0", "small", "_s", "12", "18", "26", "s", "b")  # fmt: skip
TAKES_NO_64_PX = {"byoanet", "crossvit", "deepseek_vit", "efficientformer", "inception_resnet_v2", "inception_v3",
                  "inception_v4"}  # fmt: skip
UNREACHED = {"pit": {"backbone.body.body.norm.weight", "backbone.body.body.norm.bias"}}  # of a classifier that is gone


def smallest(family: str) -> str:
    """Return a network of the family that its name suggests to be small."""
    names = timm.list_models(module=family)
    return min(names, key=lambda name: (next((i for i, tag in enumerate(SMALL) if tag in name), 99), len(name)))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(timm.list_modules()))
def test_family_trains_or_is_refused_with_the_reason(family: str) -> None:
    settings = NetworkSettings(smallest(family), decoder_channels=8, img_size=64)
    if family in TAKES_NO_64_PX:
        with pytest.raises(ValueError, match="does not take images of --img-size 64"):
            build_network(settings)
        return
    network: nn.Module = build_network(settings).train()
    side_logits = network(torch.rand(2, 3, 64, 64))
    torch.stack([logits.square().mean() for logits in side_logits]).sum().backward()
    assert all(torch.isfinite(logits).all() for logits in side_logits)
    parameters = network.named_parameters()
    without = {name for name, parameter in parameters if parameter.requires_grad and parameter.grad is None}
    assert without == UNREACHED.get(family, set())
