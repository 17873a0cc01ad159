"""Samples of a data set, tables of labels, palettes."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg.data import Sample, SegmentationDataset
from lightning_genseg.data.labels import label_table, map_labels, voc_palette
from lightning_genseg.data.transforms.pipeline import default_train_transform
from lightning_genseg.errors import GenSegError, MissingFileError

NAMES = ["a", "b", "c"]


@pytest.fixture
def sample(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    mask = rng.integers(0, 3, (8, 12), dtype=np.uint8)
    mask[0] = 255
    Image.fromarray(mask).save(tmp_path / "m.tif")
    return Sample("x", tmp_path / "x.png", tmp_path / "m.tif")


def test_sample(sample):
    item = SegmentationDataset([sample], NAMES)[0]
    assert item.keys() == {"image", "mask", "name"}
    assert item["name"] == "x"
    assert item["image"].dtype == torch.float32
    assert item["mask"].dtype == torch.int64
    assert np.array_equal(item["mask"].numpy(), np.array(Image.open(sample.mask)))
    pixels = (item["image"].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(pixels, np.array(Image.open(sample.image)))


def test_augmentation_follows_the_seed(sample):
    dataset = SegmentationDataset([sample], NAMES, transform=default_train_transform((8, 8)))
    assert torch.equal(dataset[0, 5]["image"], dataset[0, 5]["image"])
    assert not torch.equal(dataset[0, 5]["image"], dataset[0, 6]["image"])


def test_ids_table(sample):
    dataset = SegmentationDataset([sample], NAMES, ids={33: 2, 0: 255})
    for raw, label in ((33, 2), (0, 255), (255, 255)):  # 255 stays ignored
        Image.fromarray(np.full((8, 12), raw, np.uint8)).save(sample.mask)
        assert (dataset[0]["mask"] == label).all()
    assert dataset.label_values() == {0: 255, 33: 2, 255: 255}
    raw = np.array([[1000, 26001, 255]], np.int32)
    table = label_table({1000: 1, 26001: 2}, 3)
    assert map_labels(raw, table, sample.mask).tolist() == [[1, 2, 255]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_label_outside_the_classes(sample, dtype):
    mask = np.zeros((8, 12), dtype)
    mask[0, :3] = [3, 7, 200]
    Image.fromarray(mask).save(sample.mask)
    with pytest.raises(GenSegError, match=r"m\.tif' holds the values 3, 7, 200, .*known: 0 to 2"):
        SegmentationDataset([sample], NAMES)[0]
    with pytest.raises(GenSegError, match=r"holds the values 3, 7, 200, .*known: \[0, 9\]"):
        SegmentationDataset([sample], NAMES, ids={0: 0, 9: 1})[0]


@pytest.mark.parametrize("value", [256, 4000, 70000, -1, -255])
def test_large_and_negative_labels_are_not_wrapped(tmp_path, value):
    with pytest.raises(
        GenSegError, match=rf"holds the values {value}, (which are no cl|and labels are not neg)"
    ):
        map_labels(np.array([[0, value]], np.int32), label_table(None, 3), tmp_path)


def test_files_that_do_not_fit(sample):
    dataset = SegmentationDataset([sample], NAMES)
    Image.fromarray(np.zeros((12, 8), np.uint8)).save(sample.mask)
    with pytest.raises(GenSegError, match=r"mask '.*m\.tif' is 12x8 but image '.*x\.png' is 8x12"):
        dataset[0]
    for part in ("mask", "image"):
        getattr(sample, part).unlink()
        with pytest.raises(MissingFileError, match=r"(mask|image) '.*' does not exist: restore"):
            dataset[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": {}}, "ids is empty"),
        ({"ids": {0: 3}}, r"ids leads to \[3\] but there are 3 classes"),
        ({"ids": {0: -1}}, r"ids leads to \[-1\]"),
        ({"ids": {-1: 0}}, "ids has the keys -1 to -1"),
        ({"ids": {2**25: 0}}, "but masks hold values from 0 to 16777216"),
        ({"class_names": []}, "num_classes is 0 but must be 1 to 255"),
        ({"class_names": ["x"] * 256}, "num_classes is 256 but must be 1 to 255"),
        ({"samples": []}, "no samples"),
        ({"palette": [(0, 0, 0)]}, "palette has 1 colours but there are 3"),
        ({"palette": [(0, 0, 256)] * 3}, "from 0 to 255"),
        ({"palette": [(0, 0)] * 3}, "red"),
    ],
)
def test_wrong_arguments(sample, arguments, message):
    with pytest.raises(GenSegError, match=message):
        SegmentationDataset(**{"samples": [sample], "class_names": NAMES, **arguments})


def test_voc_palette():
    """First colours as in the VOC development kit."""
    assert voc_palette(5) == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert voc_palette(22)[20:] == [(0, 64, 128), (128, 64, 128)]
    assert len(set(voc_palette(255))) == 255
