import pytest
import torch
import torch.nn.functional as F

from lightning_genseg.networks.losses import pixel_cross_entropy


@pytest.mark.parametrize("ignore", [255, -100])
def test_is_the_mean_over_labelled_pixels(ignore):
    scores, mask = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    mask[:, :2] = ignore
    expected = F.cross_entropy(scores, mask, ignore_index=ignore)
    torch.testing.assert_close(pixel_cross_entropy(scores, mask, ignore), expected)
    by_hand = -scores.log_softmax(1).gather(1, mask.clamp(0, 3)[:, None])[:, 0][mask != ignore]
    torch.testing.assert_close(pixel_cross_entropy(scores, mask, ignore), by_hand.mean())


def test_takes_rows_as_well_as_maps():
    scores, mask = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    rows = scores.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(
        pixel_cross_entropy(rows, mask.flatten()), pixel_cross_entropy(scores, mask)
    )


def test_the_memory_format_changes_nothing():
    scores, mask = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    mask[0, 0] = 255
    losses, gradients = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = scores.clone().to(memory_format=memory_format).requires_grad_()
        losses.append(pixel_cross_entropy(leaf, mask))
        gradients += torch.autograd.grad(losses[-1], leaf)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_nothing_labelled_is_zero_with_a_gradient_of_zero():
    scores = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = pixel_cross_entropy(scores, torch.full((1, 3, 3), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_give_a_float32_loss(dtype):
    scores, mask = torch.randn(1, 4, 3, 3).to(dtype), torch.randint(4, (1, 3, 3))
    loss = pixel_cross_entropy(scores, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, pixel_cross_entropy(scores.float(), mask), rtol=0, atol=0)
