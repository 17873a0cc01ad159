"""What users give as examples of an object."""

import numpy as np
import pytest
import torch

from lightning_genseg.data import SupportedImages, SupportFolder
from lightning_genseg.errors import GenSegError
from tests.miniatures import save


def write(root, name, mask, size=None):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*(size or mask.shape), 3), dtype=np.uint8)
    save(image, root / "images" / f"{name}.png")
    save(mask, root / "masks" / f"{name}.png")


def square(value=1, shape=(32, 48)):
    mask = np.zeros(shape, np.uint8)
    mask[4:12, 8:24] = value
    return mask


def test_supports_of_different_sizes(tmp_path):
    mask = square()
    mask[0] = 255
    write(tmp_path, "a", mask)
    write(tmp_path, "b", square(shape=(64, 32)))
    supports = SupportFolder(tmp_path, 24).read()
    assert supports["support_image"].shape == (2, 3, 24, 24)
    assert supports["support_valid"][0].sum() == 16 * 24
    assert supports["support_valid"][1].sum() == 24 * 8  # 12 columns are cut to 8
    assert set(supports["support_mask"][0, :16].unique().tolist()) == {0, 1, 255}
    assert supports["support_mask"][0, 2:6, 4:12].eq(1).all()


def test_black_and_white_masks(tmp_path):
    write(tmp_path, "a", square(255))
    supports = SupportFolder(tmp_path, 16, {0: 0, 255: 1}).read()
    assert (supports["support_mask"][0] == 1).any()


@pytest.mark.parametrize(
    ("mask", "ids", "message"),
    [
        (square(7), None, "holds the values 7, but 1 is the object, 0 is not"),
        (square(7), {0: 0, 7: 0}, "marks no object: draw it with the value 1"),
        (square(0), None, "holds only 0 and 255"),
        (square(255), None, r"holds only 0 and 255.*support_ids to \{0: 0, 255: 1\}"),
        (square(), {0: 3}, r"support_ids is \{0: 3\} but must lead .* to 1 \(object\)"),
    ],
)
def test_wrong_masks(tmp_path, mask, ids, message):
    write(tmp_path, "a", mask)
    with pytest.raises(ValueError, match=message) as error:
        SupportFolder(tmp_path, 16, ids).read()
    assert "a.png'" in str(error.value) or "support_ids is" in message


def test_an_object_without_anything_around(tmp_path):
    """Padding is no background."""
    write(tmp_path, "a", np.ones((16, 32), np.uint8))
    with pytest.raises(GenSegError, match="no support shows what is not the object"):
        SupportFolder(tmp_path, 16).read()
    write(tmp_path, "b", square())
    assert SupportFolder(tmp_path, 16).read()["support_mask"].shape == (2, 16, 16)


def test_an_object_that_vanishes(tmp_path):
    mask = np.zeros((160, 160), np.uint8)
    mask[3, 3] = 1
    write(tmp_path, "a", mask)
    with pytest.raises(ValueError, match=r"'.*a\.png' is too small to be left at size 16: set"):
        SupportFolder(tmp_path, 16).read()
    assert (SupportFolder(tmp_path, 160).read()["support_mask"] == 1).sum() == 1


def test_files_that_do_not_match(tmp_path):
    write(tmp_path, "a", square(), size=(32, 40))
    with pytest.raises(ValueError, match=r"mask '.*' is 32x48 but image"):
        SupportFolder(tmp_path, 16).read()
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match="masks have no image of the same name"):
        SupportFolder(tmp_path, 16)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SupportFolder(tmp_path / "nowhere", 16)


def test_digest(tmp_path):
    write(tmp_path, "a", square())
    same = [SupportFolder(tmp_path, 16).digest() for _ in range(2)]
    others = [
        SupportFolder(tmp_path, size, ids).digest()
        for size, ids in ((24, None), (16, {1: 0, 0: 1}))
    ]
    write(tmp_path, "a", square(shape=(32, 40)))
    digests = {*same, *others, SupportFolder(tmp_path, 16).digest()}
    assert len(digests) == 4


def test_every_image_comes_with_the_supports(tmp_path):
    write(tmp_path / "support", "a", square())
    for name, shape in (("x", (20, 30, 3)), ("y", (50, 40, 3))):
        save(np.zeros(shape, np.uint8), tmp_path / "queries" / f"{name}.jpg")
    dataset = SupportedImages(tmp_path / "queries", tmp_path / "support", 16)
    assert [tuple(s["image"].shape) for s in dataset] == [(3, 20, 30), (3, 50, 40)]
    assert dataset[0]["name"] == "x"
    assert torch.equal(dataset[0]["support_image"], dataset[1]["support_image"])
