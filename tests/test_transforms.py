"""Augmentation: torchvision's ranges and formulas, image and mask together, a function of the seed."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from data.synthetic import camouflage_scene
from data.transforms import Augmentation, augment, augment_batch, draw_augmentation, to_rows

SIZE = 96


def scene(seed: int = 0) -> tuple[Tensor, Tensor]:
    image, mask = camouflage_scene(np.random.default_rng(seed), SIZE)
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(mask)[None] // 255


def by_torchvision(image: Tensor, mask: Tensor, drawn: Augmentation) -> tuple[Tensor, Tensor]:
    """Apply the same augmentation with torchvision's functions, one after the other."""
    picture, labels = tv_tensors.Image(image), tv_tensors.Mask(mask)
    if drawn.flip:
        picture, labels = reference.horizontal_flip(picture), reference.horizontal_flip(labels)
    crop = [drawn.top, drawn.left, drawn.height, drawn.width]
    picture = reference.resized_crop(picture, *crop, size=[SIZE, SIZE], antialias=True)
    exact = InterpolationMode.NEAREST_EXACT  # not accepted by torchvision for masks
    labels = tv_tensors.Mask(
        reference.resized_crop(labels.as_subclass(Tensor), *crop, size=[SIZE, SIZE], interpolation=exact)
    )
    if drawn.angle:
        picture = reference.rotate(picture, drawn.angle, interpolation=InterpolationMode.BILINEAR)
        labels = reference.rotate(labels, drawn.angle, interpolation=InterpolationMode.NEAREST)
    for name, factor in drawn.colour_steps:
        picture = getattr(reference, f"adjust_{name}")(picture, factor)
    return picture.as_subclass(Tensor), labels.as_subclass(Tensor)


def test_result_equals_torchvisions_up_to_rounding_and_one_resampling() -> None:
    rotated = 0
    for seed in range(60):
        image, mask = scene(seed)
        drawn = draw_augmentation(SIZE, seed)
        ours, theirs = augment(image, mask, drawn), by_torchvision(image, mask, drawn)
        difference = (ours[0].float() - theirs[0].float()).abs().mean().item()
        wrong = (ours[1] != theirs[1]).float().mean().item()
        if drawn.angle:
            assert difference < 8  # the second resampling blurs fine texture
            assert wrong < 0.02
            rotated += 1
        else:
            assert difference < 2.5
            assert wrong == 0
    assert 20 < rotated < 40


def test_everything_is_drawn_from_its_range() -> None:
    drawn = [draw_augmentation(352, seed) for seed in range(2000)]
    assert np.mean([one.flip for one in drawn]) == pytest.approx(0.5, abs=0.05)
    angles = np.array([one.angle for one in drawn])
    assert np.mean(angles != 0) == pytest.approx(0.5, abs=0.05)
    assert np.abs(angles).max() <= 15
    assert np.std(angles[angles != 0]) == pytest.approx(30 / math.sqrt(12), rel=0.05)
    areas = np.array([one.height * one.width / 352**2 for one in drawn])
    assert 0.895 <= areas.min() < 0.91
    assert np.mean(areas) == pytest.approx(0.95, abs=0.01)
    for one in drawn:
        assert 0 <= one.top <= 352 - one.height
        assert 0 <= one.left <= 352 - one.width
        assert min(one.height, one.width) > 0.92 * 352
        assert {name for name, _ in one.colour_steps} == {"brightness", "contrast", "saturation"}
        assert all(0.8 <= factor <= 1.2 for _, factor in one.colour_steps)
    rooms = [(one.top, 352 - one.height) for one in drawn], [(one.left, 352 - one.width) for one in drawn]
    for places in rooms:  # anywhere: a crop always at one edge would be in range too
        shares = np.array([place / room for place, room in places if room > 3])
        assert len(shares) > 1000
        assert np.mean(shares) == pytest.approx(0.5, abs=0.04)  # four standard errors of 1,000
        assert np.std(shares) == pytest.approx(1 / math.sqrt(12), rel=0.15)
    assert len({tuple(name for name, _ in one.colour_steps) for one in drawn}) == 6


def test_augmentation_depends_only_on_the_seed() -> None:
    image, mask = scene()
    torch.manual_seed(1)
    first = augment(image, mask, draw_augmentation(SIZE, 3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = augment(image, mask, draw_augmentation(SIZE, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = augment(image, mask, draw_augmentation(SIZE, 4))
    assert not torch.equal(first[0], other[0])


def test_a_batch_on_the_device_gets_the_augmentation_of_each_image() -> None:
    """Up to rounding: torch resizes bytes in fixed point if nothing is rotated."""
    scenes, drawn = [scene(seed) for seed in range(40)], [draw_augmentation(SIZE, seed) for seed in range(40)]
    images, masks = (torch.stack(tensors) for tensors in zip(*scenes, strict=True))
    on_device = augment_batch(images.contiguous(memory_format=torch.channels_last), masks, to_rows(drawn))
    assert {tensor.dtype for tensor in on_device} == {torch.float32}
    for n, augmentation in enumerate(drawn):
        image, mask = augment(*scenes[n], augmentation)
        differences = (on_device[0][n] - image).abs()
        assert differences.max() <= 2
        assert (differences > 1).float().mean() < 0.005
        assert torch.equal(on_device[1][n], mask.float())
        alone = augment_batch(images[n : n + 1], masks[n : n + 1], to_rows(drawn[n : n + 1]))
        assert torch.equal(alone[0][0], on_device[0][n])  # whatever else is in the batch


def test_a_nan_pixel_stays_nan_on_the_device() -> None:
    images, masks = scene()[0][None] * torch.nan, scene()[1][None]
    assert augment_batch(images, masks, to_rows([draw_augmentation(SIZE, 1)]))[0].isnan().any()


def test_inputs_are_unchanged_and_outputs_are_bytes() -> None:
    image, mask = scene()
    before = image.clone(), mask.clone()
    for seed in range(20):
        new_image, new_mask = augment(image, mask, draw_augmentation(SIZE, seed))
        assert (new_image.shape, new_image.dtype) == (image.shape, torch.uint8)
        assert (new_mask.shape, new_mask.dtype) == (mask.shape, torch.uint8)
        assert set(new_mask.unique().tolist()) <= {0, 1}
        assert new_image.is_contiguous()
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


def test_mask_follows_the_image() -> None:
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    mask[:, 15:45, 12:60] = 1
    image = (mask * 200 + 20).expand(3, -1, -1).contiguous()
    moved = 0
    for seed in range(40):
        new_image, new_mask = augment(image, mask, draw_augmentation(SIZE, seed))
        grey = new_image.float().mean(dim=0)
        bright = grey > grey[new_mask[0] == 1].median() / 2
        union = (bright | new_mask[0].bool()).sum()
        assert (bright & new_mask[0].bool()).sum() / union > 0.9
        moved += not torch.equal(new_mask, mask)
    assert moved > 30


@pytest.mark.parametrize("rotated", [False, True])
def test_mask_is_not_shifted_against_its_image(rotated: bool) -> None:
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    mask = ((y - 48) ** 2 + (x - 44) ** 2 < 900).to(torch.uint8)[None]
    image = (mask * 255).expand(3, -1, -1).contiguous()
    shifts = []
    for seed in range(80):
        drawn = dataclasses.replace(draw_augmentation(SIZE, seed), colour_steps=())
        if bool(drawn.angle) == rotated:
            new_image, new_mask = augment(image, mask, drawn)
            centres = [
                torch.stack([(y * weight).sum() / weight.sum(), (x * weight).sum() / weight.sum()])
                for weight in (new_image[0].float(), new_mask[0].float())
            ]
            shifts.append(centres[1] - centres[0])
    assert torch.stack(shifts).mean(dim=0).abs().max() < 0.1
