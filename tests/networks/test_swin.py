import pytest
import torch

from lightning_genseg.networks.swin import SwinBlocks


def seen_by(blocks, size, cell):
    """Cells that the output of one cell depends on."""
    features = torch.randn(1, 32, *size, requires_grad=True)
    blocks(features)[0, 0, cell[0], cell[1]].backward()
    return features.grad[0].abs().sum(0) > 0


def rectangle(size, rows, columns):
    expected = torch.zeros(size, dtype=torch.bool)
    expected[rows, columns] = True
    return expected


def test_windows_of_seven_and_every_other_shifted_by_three():
    blocks = SwinBlocks(32, 2)
    size = (21, 28)
    plain, shifted = (SwinBlocks(32, 1) for _ in range(2))
    plain.blocks, shifted.blocks = blocks.blocks[:1], blocks.blocks[1:]
    first, inner = slice(0, 7), slice(3, 10)
    assert torch.equal(seen_by(plain, size, (0, 5)), rectangle(size, first, first))
    assert torch.equal(seen_by(shifted, size, (4, 5)), rectangle(size, inner, inner))
    # Rolled into one window with the opposite border, which the mask keeps apart.
    corner = slice(0, 3)
    assert torch.equal(seen_by(shifted, size, (0, 0)), rectangle(size, corner, corner))


def test_padding_takes_part_in_the_attention():
    attention = SwinBlocks(32, 1).blocks[0].attn
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.qkv.weight[64:] = torch.eye(32)  # values; queries and keys say nothing
        attention.proj.weight.copy_(torch.eye(32))
        features = torch.randn(1, 8, 8, 32)
        corner = attention(features)[0, 7, 7]
    torch.testing.assert_close(corner, features[0, 7, 7] / 49)


def test_any_size_and_no_block():
    for size in [(1, 1), (3, 20), (7, 9)]:
        assert SwinBlocks(64, 2)(torch.rand(2, 64, *size)).shape == (2, 64, *size)
    features = torch.rand(1, 5, 3, 3)
    assert torch.equal(SwinBlocks(5, 0)(features), features)
    assert not list(SwinBlocks(5, 0).parameters())


@pytest.mark.parametrize(
    ("channels", "depth", "message"),
    [(32, -1, "depth is -1; it must be at least 0"), (40, 1, "choose a multiple of 32")],
)
def test_wrong_arguments(channels, depth, message):
    with pytest.raises(ValueError, match=message):
        SwinBlocks(channels, depth)
