import pytest
import torch

from models.network import NetworkSettings, build_network
from models.zoom import ScaleSelection, ZoomedFeatures, zoomed_side

SIZES = ((24, 16), (40, 8), (112, 4), (320, 2))


class Recorder(torch.nn.Module):
    """Backbone whose levels are filled with the width of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(tuple(images.shape[-2:]))
        height, width = images.shape[-2:]
        return [torch.full((len(images), 8, height // stride, width // stride), float(width)) for stride in (4, 8)]


@pytest.mark.parametrize(
    ("size", "zooms", "seen", "middle"),
    [
        ((64, 64), [1, 0.5, 1.5], [(32, 32), (64, 64), (96, 96)], (64, 64)),
        ((64, 96), [0.5, 1, 1.5], [(32, 64), (64, 96), (96, 128)], (64, 96)),
        ((224, 224), [1, 1.5], [(224, 224), (320, 320)], (320, 320)),
        ((224, 224), [1.25], [(288, 288)], (288, 288)),
    ],
)
def test_backbone_sees_the_image_at_each_zoom_with_sides_in_multiples_of_32(
    size: tuple[int, int], zooms: list[float], seen: list[tuple[int, int]], middle: tuple[int, int]
) -> None:
    backbone = Recorder()
    levels = ZoomedFeatures([8, 8], channels=8, zooms=zooms)(backbone, torch.rand(1, 3, *size))  # type: ignore[arg-type]
    assert backbone.seen == seen
    assert [tuple(level.shape) for level in levels] == [(1, 8, middle[0] // s, middle[1] // s) for s in (4, 8)]


@pytest.mark.parametrize(
    ("side", "zoom", "zoomed"), [(64, 1.5, 96), (224, 1.25, 288), (32, 0.25, 32), (64, 1.25, 64), (192, 1.25, 256)]
)
def test_sides_are_the_nearest_multiples_of_32_and_ties_go_to_the_even_one(side: int, zoom: float, zoomed: int) -> None:
    assert zoomed_side(side, zoom) == zoomed
    assert type(zoomed_side(side, zoom)) is int


def test_each_pixel_is_a_mean_of_the_three_maps() -> None:
    selection = ScaleSelection(8, channels=8, num_zooms=3)
    maps = [torch.rand(2, 8, size, size) for size in (3, 6, 9)]
    merged = selection(maps)
    assert merged.shape == (2, 8, 6, 6)
    assert merged.min() >= min(m.min() for m in maps)
    assert merged.max() <= max(m.max() for m in maps)
    # with all weight on the largest map
    weights = {"weight": torch.zeros_like(selection.choose.weight), "bias": torch.tensor([-40.0, -40.0, 40.0])}
    selection.choose.load_state_dict(weights)
    near = torch.nn.functional.interpolate(maps[2], size=(6, 6), mode="bilinear")
    torch.testing.assert_close(selection(maps), near)


@pytest.mark.parametrize("zooms", [(0.5, 1, 1.5), (1, 1.5), (1.5,)])
def test_every_parameter_of_a_zoomed_network_gets_a_gradient(zooms: tuple[float, ...]) -> None:
    model = build_network(NetworkSettings("test_efficientnet", decoder_channels=16, img_size=64, zooms=zooms))
    outputs = model(torch.rand(2, 3, 64, 64))
    assert outputs[-1].shape == (2, 1, 64, 64)
    sum(logits.square().mean() for logits in outputs).backward()  # type: ignore[union-attr]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("zooms", [(1,), (0.5, 1, 1.5)])
def test_fp16_forward_and_backward_stay_finite_for_images_far_out_of_range(zooms: tuple[float, ...]) -> None:
    """No loss scaling: if values are not finite here, no scale can help."""
    model = build_network(NetworkSettings("test_efficientnet", decoder_channels=16, img_size=64, zooms=zooms))
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = model(torch.rand(2, 3, 64, 64) * 8)
    sum(logits.float().square().mean() for logits in outputs).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(logits).all() for logits in outputs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("zooms", [(1,), (0.5, 1, 1.5)])
def test_network_is_made_of_operations_that_can_be_exported(zooms: tuple[float, ...]) -> None:
    model = build_network(NetworkSettings("test_efficientnet", decoder_channels=16, img_size=64, zooms=zooms)).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(model, (torch.rand(2, 3, 64, 64),), dynamic_shapes=({0: batch},)).module()
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(exported(images)[-1], model(images)[-1])


@pytest.mark.parametrize("zooms", [(1.25,), (1, 1.1), (0.25, 0.5)])
def test_zooms_that_give_the_same_size_are_refused(zooms: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"--zoom .* at --img-size 64 that is \[.*\] pixels"):
        build_network(NetworkSettings("test_efficientnet", decoder_channels=16, img_size=64, zooms=zooms))
