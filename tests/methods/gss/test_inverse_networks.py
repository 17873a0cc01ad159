import pytest
import torch

from lightning_genseg.methods.gss.inverse_networks import ConvInverse, SwinInverse


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("classes", "depth", "count"), [(19, 1, 136_503), (150, 2, 286_558), (194, 2, 292_234)]
)
def test_swin_has_the_size_of_the_published_one(classes, depth, count):
    assert parameters(SwinInverse(classes, depth=depth)) == count


def test_conv_has_the_size_of_the_published_one():
    assert parameters(ConvInverse(150)) == 167_702


@pytest.mark.parametrize("kind", [ConvInverse, SwinInverse])
def test_it_learns_what_the_nearest_color_cannot(kind):
    """Two classes of one colour, told apart by what is around them."""
    torch.manual_seed(0)
    inverse = kind(3, width=32)
    optimizer = torch.optim.AdamW(inverse.parameters(), lr=1e-2)
    mask = torch.zeros(2, 14, 15, dtype=torch.long)
    mask[:, ::4, ::4] = 1  # spots in class 0
    mask[:, :, 9:] = 2
    picture = (mask == 0).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(inverse(picture), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inner = (slice(None), slice(1, -1), slice(1, -2))
    right = (inverse.eval()(picture).argmax(1) == mask)[inner].float().mean()
    assert right > 0.95
