import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import boundary_weights, deep_supervision_loss, structure_loss, uncertainty_loss


def square_mask(size: int = 64) -> torch.Tensor:
    mask = torch.zeros(2, 1, size, size)
    mask[:, :, 20:44, 20:44] = 1
    return mask


def test_boundary_weights_equal_a_two_dimensional_box_filter() -> None:
    masks = (torch.rand(2, 1, 50, 70) > 0.6).float()
    expected = 1 + 5 * (F.avg_pool2d(masks, 31, stride=1, padding=15) - masks).abs()
    torch.testing.assert_close(boundary_weights(masks), expected)


def test_structure_loss_equals_its_formula_pixel_by_pixel() -> None:
    logits, masks = torch.randn(2, 1, 9, 11, dtype=torch.float64), torch.rand(2, 1, 9, 11).round().double()
    weights = boundary_weights(masks)
    losses = []
    for b in range(2):
        cross_entropy = intersection = total = weight_sum = 0.0
        for y in range(9):
            for x in range(11):
                w, t = weights[b, 0, y, x].item(), masks[b, 0, y, x].item()
                p = torch.sigmoid(logits[b, 0, y, x])
                cross_entropy -= w * torch.log(p if t else 1 - p).item()
                intersection += w * p.item() * t
                total += w * (p.item() + t)
                weight_sum += w
        losses.append(cross_entropy / weight_sum + 1 - (intersection + 1) / (total - intersection + 1))
    assert structure_loss(logits, masks, weights).item() == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_a_mistake_costs_more_at_the_outline_than_far_from_it() -> None:
    """The published code's ``reduce='none'`` averages, so that both would cost the same."""
    masks = square_mask()
    weights = boundary_weights(masks)
    right = (masks * 2 - 1) * 6
    at_outline, far_away = right.clone(), right.clone()
    at_outline[:, :, 44:46, 28:36] = 6.0
    far_away[:, :, 60:62, 28:36] = 6.0
    assert structure_loss(at_outline, masks, weights) > 1.2 * structure_loss(far_away, masks, weights)


def test_loss_of_a_batch_is_the_mean_over_its_images() -> None:
    logits, masks = torch.randn(4, 1, 32, 32), (torch.rand(4, 1, 32, 32) > 0.5).float()
    weights = boundary_weights(masks)
    single = [structure_loss(logits[i : i + 1], masks[i : i + 1], weights[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(structure_loss(logits, masks, weights), torch.stack(single).mean())


@settings(deadline=None)
@given(
    fill=st.sampled_from([0.0, 1.0, None]),
    magnitude=st.sampled_from([0.0, 1.0, 60.0, 1e4, 6e4]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_finite_for_empty_full_and_extreme_inputs(
    fill: float | None, magnitude: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    masks = (torch.rand(2, 1, 32, 32) > 0.7).float() if fill is None else torch.full((2, 1, 32, 32), fill)
    logits = [(torch.randn(2, 1, s, s).sign() * magnitude).to(dtype).requires_grad_() for s in (4, 8, 32)]
    loss = deep_supervision_loss(logits, masks, uncertainty_weight=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(level.grad is not None and torch.isfinite(level.grad).all() for level in logits)


def test_confidently_wrong_pixels_keep_a_gradient() -> None:
    logits = torch.full((1, 1, 32, 32), -50.0, requires_grad=True)
    masks = torch.ones(1, 1, 32, 32)
    structure_loss(logits, masks, boundary_weights(masks)).backward()
    assert logits.grad is not None
    assert (logits.grad < -1e-5).all()


def test_computes_in_float32_under_autocast() -> None:
    logits, masks = [torch.randn(2, 1, 32, 32, dtype=torch.bfloat16)], square_mask(32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = deep_supervision_loss(logits, masks, 0.5)
    assert torch.equal(inside, deep_supervision_loss(logits, masks, 0.5))


def test_side_outputs_weigh_half_of_the_next_finer_one() -> None:
    masks = square_mask(32)
    levels = [torch.randn(2, 1, 8, 8), torch.randn(2, 1, 16, 16), torch.randn(2, 1, 32, 32)]
    weights = boundary_weights(masks)
    single = [structure_loss(F.interpolate(level, (32, 32), mode="bilinear"), masks, weights) for level in levels]
    torch.testing.assert_close(deep_supervision_loss(levels, masks, 0.0), single[0] / 4 + single[1] / 2 + single[2])


def test_uncertainty_loss_is_one_at_a_half_and_zero_at_certainty() -> None:
    assert uncertainty_loss(torch.zeros(1, 1, 4, 4)) == 1
    assert uncertainty_loss(torch.full((1, 1, 4, 4), 200.0)) == 0
    levels, masks = [torch.zeros(2, 1, 32, 32)], square_mask(32)
    without, fully = (deep_supervision_loss(levels, masks, weight) for weight in (0.0, 1.0))
    torch.testing.assert_close(fully - without, torch.tensor(1.0))


def test_only_the_finest_output_has_an_uncertainty_loss() -> None:
    levels, masks = [torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 32, 32)], square_mask(32)
    without, fully = (deep_supervision_loss(levels, masks, weight) for weight in (0.0, 1.0))
    torch.testing.assert_close(fully - without, torch.tensor(1.0))


def marked(masks: torch.Tensor) -> torch.Tensor:
    """Mark the lower quarter of each mask, and the outline of its object, as pixels that do not count."""
    marked = masks.clone()
    marked[:, :, -16:] = 2
    marked[:, :, 18:46, 18:22] = 2
    return marked


def test_pixels_that_do_not_count_are_background_to_the_boundary_weights_of_others() -> None:
    masks, logits = marked(square_mask()), torch.randn(2, 1, 64, 64)
    counts = masks < 2
    expected = structure_loss(logits, masks * counts, boundary_weights((masks * counts).float()) * counts)
    torch.testing.assert_close(deep_supervision_loss([logits], masks, 0.0), expected)


def test_pixels_that_do_not_count_change_no_loss_and_get_no_gradient() -> None:
    masks = marked(square_mask())
    losses, gradients = [], []
    for noise in (0.0, 5.0):
        torch.manual_seed(0)
        logits = (torch.randn(2, 1, 64, 64) + noise * (masks == 2)).requires_grad_()
        loss = deep_supervision_loss([logits * 0.5, logits], masks, 0.7)
        (gradient,) = torch.autograd.grad(loss, logits)
        losses.append(loss)
        gradients.append(gradient)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])
    assert (gradients[0][masks == 2] == 0).all()
    assert (gradients[0][masks != 2] != 0).all()


def test_loss_of_an_image_is_averaged_over_the_pixels_that_count() -> None:
    """The mean loss stays, however many pixels count: for a constant logit and an empty mask it is the same."""
    logits, masks = torch.full((1, 1, 64, 64), -1.0), torch.zeros(1, 1, 64, 64)
    half = masks.clone()
    half[..., 32:] = 2
    torch.testing.assert_close(
        uncertainty_loss(logits),
        deep_supervision_loss([logits], masks, 1.0) - deep_supervision_loss([logits], masks, 0.0),
    )
    torch.testing.assert_close(
        uncertainty_loss(logits),
        deep_supervision_loss([logits], half, 1.0) - deep_supervision_loss([logits], half, 0.0),
    )


def test_an_image_without_a_pixel_that_counts_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(1, 1, 32, 32, requires_grad=True)
    loss = deep_supervision_loss([logits], torch.full((1, 1, 32, 32), 2.0), 1.0)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("size", [64, 352])
def test_without_marked_pixels_loss_and_gradient_are_bitwise_those_of_the_plain_formula(size: int) -> None:
    torch.manual_seed(0)
    masks = (torch.rand(2, 1, size, size) > 0.7).float()
    coarse, fine = (torch.randn(2, 1, size // side, size // side, requires_grad=True) for side in (8, 4))
    loss = deep_supervision_loss([coarse, fine], masks, 0.3)
    weights, plain = boundary_weights(masks), torch.zeros(())
    for level, logits in enumerate((fine, coarse)):
        full_size = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
        plain = plain + structure_loss(full_size, masks, weights) / 2**level
        if level == 0:
            plain = plain + 0.3 * (1 - (2 * full_size.sigmoid() - 1).square()).mean()
    assert torch.equal(loss, plain)
    expected = torch.autograd.grad(plain, [coarse, fine])
    for gradient, other in zip(torch.autograd.grad(loss, [coarse, fine]), expected, strict=True):
        assert torch.equal(gradient, other)
