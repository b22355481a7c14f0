import torch
from torchvision import tv_tensors

from data.transforms import seeded, training_augmentation


def augment(seed: int, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(seed):
        return training_augmentation(64)(tv_tensors.Image(image), tv_tensors.Mask(mask))


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A bright rectangle, off centre, and its mask."""
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:30, 8:40] = 1
    return (mask * 200 + 20).expand(3, -1, -1).contiguous(), mask


def test_same_seed_same_result_and_different_seeds_differ() -> None:
    image, mask = scene()
    first, again, other = augment(3, image, mask), augment(3, image, mask), augment(4, image, mask)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    augment(99, *scene())
    assert torch.equal(torch.rand(3), expected)


def test_mask_stays_binary_and_follows_the_image() -> None:
    image, mask = scene()
    moved = 0
    for seed in range(40):
        new_image, new_mask = augment(seed, image, mask)
        assert new_image.shape == (3, 64, 64)
        assert new_image.dtype == torch.uint8
        assert set(new_mask.unique().tolist()) <= {0, 1}
        grey = new_image.float().mean(dim=0)
        bright = grey > grey[new_mask[0] == 1].median() / 2
        union = (bright | new_mask[0].bool()).sum()
        assert (bright & new_mask[0].bool()).sum() / union > 0.85
        moved += not torch.equal(new_mask, mask)
    assert moved > 30


def test_crop_takes_away_at_most_a_tenth_of_either_side() -> None:
    """A one-pixel grid line at 12 % of the side survives every crop of at most 10 %, flips and rotations aside."""
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64).contiguous()
    for seed in range(60):
        crop = training_augmentation(64).transforms[1]  # type: ignore[attr-defined]
        with seeded(seed):
            out = crop(tv_tensors.Image(ramp))
        assert int(out.max()) - int(out.min()) >= 0.9 * 252 - 8
