import torch

from models.decoder import ForegroundBackgroundDecoder, group_norm


def features(batch: int = 2, requires_grad: bool = False) -> list[torch.Tensor]:
    sizes = ((24, 16), (40, 8), (112, 4), (320, 2))
    return [torch.randn(batch, channels, size, size, requires_grad=requires_grad) for channels, size in sizes]


def test_one_coarse_estimate_and_one_side_output_per_level() -> None:
    decoder = ForegroundBackgroundDecoder([24, 40, 112, 320], channels=16)
    assert [tuple(logits.shape) for logits in decoder(features())] == [
        *((2, 1, 2, 2), (2, 1, 2, 2), (2, 1, 4, 4), (2, 1, 8, 8), (2, 1, 16, 16)),
    ]


def test_every_parameter_gets_a_gradient_from_the_side_outputs() -> None:
    """No parameter is unused, so distributed training need not search for such parameters."""
    decoder = ForegroundBackgroundDecoder([24, 40, 112, 320], channels=16)
    sum(logits.square().mean() for logits in decoder(features())).backward()  # type: ignore[union-attr]
    assert [name for name, p in decoder.named_parameters() if p.grad is None] == []


def test_a_level_does_not_train_the_coarser_estimate() -> None:
    """The finest output sends no gradient into the coarser heads: the estimates are detached."""
    decoder = ForegroundBackgroundDecoder([24, 40, 112, 320], channels=16)
    decoder(features())[-1].square().mean().backward()
    assert decoder.coarse_head.weight.grad is None
    assert all(block.head.weight.grad is None for block in decoder.blocks[:-1])  # type: ignore[union-attr]
    assert decoder.context.reduce[0].weight.grad is not None  # but through the hidden state


def test_an_image_does_not_influence_its_batch_mates() -> None:
    decoder = ForegroundBackgroundDecoder([24, 40, 112, 320], channels=16)
    batch = features(batch=3)
    together = decoder(batch)[-1]
    alone = decoder([level[1:2] for level in batch])[-1]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_outputs_and_gradients_stay_finite_under_fp16_for_inputs_far_out_of_range() -> None:
    decoder = ForegroundBackgroundDecoder([24, 40, 112, 320], channels=16)
    with torch.autocast("cpu", dtype=torch.float16):
        outputs = decoder([level * 8 for level in features()])
    sum(logits.float().square().mean() for logits in outputs).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(logits).all() for logits in outputs)
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)


def test_group_norm_computes_in_fp32_under_autocast_and_otherwise_in_the_type_of_its_weights() -> None:
    norm, images = group_norm(16), torch.randn(2, 16, 8, 8).to(torch.bfloat16)
    expected = norm(images.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(images), expected)
    assert norm.to(torch.bfloat16)(images).dtype == torch.bfloat16
