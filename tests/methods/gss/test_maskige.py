import pytest
import torch

from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.maskige import (
    ConvInverse,
    LeastSquares,
    Maskige,
    NearestColor,
    SwinInverse,
)

TABLES = {"ade20k": 150, "cityscapes": 19, "mseg": 194, "lattice": 11}


def colors_of(kind):
    return torch.tensor(class_colors(kind, TABLES[kind])[:-1]) / 255


@pytest.mark.parametrize("kind", TABLES)
def test_nearest_color_is_the_smallest_distance(kind):
    colors = colors_of(kind)
    picture = torch.rand(2, 3, 20, 30)
    scores = NearestColor(colors)(picture)
    distance = (picture[:, None] - colors[None, :, :, None, None]).square().sum(2)
    assert torch.equal(scores.argmax(1), distance.argmin(1))
    minus = 2 * scores - picture.square().sum(1, keepdim=True)
    torch.testing.assert_close(minus, -distance, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TABLES)
def test_masks_come_back(kind):
    maskige = Maskige(class_colors(kind, TABLES[kind]))
    mask = torch.arange(TABLES[kind]).view(1, 1, -1)
    inverse = NearestColor(maskige.colors[:-1])
    assert torch.equal(inverse(maskige(mask)).argmax(1), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # mixed precision of a Trainer
        assert torch.equal(inverse(maskige(mask)).argmax(1), mask)


@pytest.mark.parametrize(("kind", "recovered"), [("ade20k", 14), ("cityscapes", 5), ("mseg", 9)])
def test_least_squares_recovers_few_classes(kind, recovered):
    colors = colors_of(kind)
    scores = LeastSquares(colors)(colors.T[None, :, None])[0, :, 0]
    gamma = torch.linalg.inv(colors.double().T @ colors.double()) @ colors.double().T
    torch.testing.assert_close(scores, (colors.double() @ gamma).T.float(), atol=1e-5, rtol=0)
    assert int((scores.argmax(0) == torch.arange(len(colors))).sum()) == recovered


def test_unlabelled_pixels_have_their_colour():
    maskige = Maskige(class_colors("cityscapes", 19))
    assert maskige(torch.full((1, 2, 2), 255)).eq(0).all()
    with pytest.raises(ValueError, match="label 19 and there are colours for 19 classes"):
        maskige(torch.full((1, 2, 2), 19))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([(1, 1, 1), (1, 1, 1), (0, 0, 0)], "one colour to two classes"),
        ([(1, 1, 1), (1, 1, 256), (0, 0, 0)], "each from 0 to 255"),
        ([(1, 1, 1), (0, 0, 0)], "at least two classes"),
    ],
)
def test_wrong_tables(table, message):
    with pytest.raises(ValueError, match=message):
        Maskige(table)


def test_fingerprint():
    table = class_colors("lattice", 5)
    assert Maskige(table).fingerprint() == Maskige(table).double().fingerprint()
    assert Maskige(table).fingerprint() != Maskige(table[::-1]).fingerprint()


# --- learned inverses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inverse", "count"),
    [
        (SwinInverse(19), 136_503),
        (SwinInverse(150, depth=2), 286_558),
        (SwinInverse(194, depth=2), 292_234),
        (ConvInverse(150), 167_702),
    ],
)
def test_size_of_the_published_ones(inverse, count):
    assert sum(p.numel() for p in inverse.parameters()) == count


@pytest.mark.parametrize("kind", [ConvInverse, SwinInverse])
def test_it_learns_what_the_nearest_color_cannot(kind):
    """Two classes of one colour, told apart by what is around them."""
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
