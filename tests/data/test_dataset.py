"""Reading samples, and the sentence for everything that can be wrong with a file."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg.data import ImageFolder, Sample, SegmentationDataset
from lightning_genseg.data.dataset import read_image, read_mask
from lightning_genseg.data.labels import label_table, map_labels, voc_palette
from lightning_genseg.data.transforms.pipeline import default_train_transform

NAMES = ["a", "b", "c"]


@pytest.fixture
def sample(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    mask = rng.integers(0, 3, (8, 12), dtype=np.uint8)
    mask[0] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    return Sample("x", tmp_path / "x.png", tmp_path / "m.png")


def save_mask(sample, array):
    Image.fromarray(array).save(sample.mask)


def test_sample(sample):
    item = SegmentationDataset([sample], NAMES)[0]
    assert item.keys() == {"image", "mask", "name"}
    assert item["name"] == "x"
    assert item["image"].dtype == torch.float32
    assert item["mask"].dtype == torch.int64
    assert np.array_equal(item["mask"].numpy(), np.array(Image.open(sample.mask)))
    assert np.array_equal(
        (item["image"].permute(1, 2, 0) * 255).round().byte().numpy(),
        np.array(Image.open(sample.image)),
    )


def test_ids_table(sample):
    save_mask(sample, np.full((8, 12), 33, np.uint8))
    dataset = SegmentationDataset([sample], NAMES, ids={33: 2, 0: 255})
    assert (dataset[0]["mask"] == 2).all()


def test_255_stays_ignored_with_a_table(sample):
    save_mask(sample, np.full((8, 12), 255, np.uint8))
    assert (SegmentationDataset([sample], NAMES, ids={33: 2})[0]["mask"] == 255).all()


def test_augmentation_follows_the_seed(sample):
    dataset = SegmentationDataset([sample], NAMES, transform=default_train_transform((8, 8)))
    assert torch.equal(dataset[0, 5]["image"], dataset[0, 5]["image"])
    assert not torch.equal(dataset[0, 5]["image"], dataset[0, 6]["image"])


# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8
    assert image.min() >= 250


def test_palette_image_with_transparency_raises_no_warning(tmp_path):
    Image.new("P", (5, 4)).save(tmp_path / "x.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.png").shape == (4, 5, 3)


def test_16_bit_image_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_image_is_refused(tmp_path, dtype):
    Image.fromarray(np.zeros((2, 2), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif' has 32-bit pixels.*save it with 8 bits"):
        read_image(tmp_path / "x.tif")


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (6, 4, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_integer_masks(tmp_path, dtype):
    array = np.array([[0, 1, 2, 255]], dtype)
    Image.fromarray(array).save(tmp_path / "m.tif")
    assert np.array_equal(read_mask(tmp_path / "m.tif"), array)


def test_palette_mask_is_read_as_indices(tmp_path):
    mask = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8))
    mask.putpalette([value for color in voc_palette(256) for value in color])
    mask.save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as file:
        assert file.mode == "P"
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1, 2, 255]]


def test_binary_mask_is_0_and_1(tmp_path):
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1]]


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_missing_file(sample, kind):
    getattr(sample, kind).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{kind} '.*\.png' does not exist: restore"):
        SegmentationDataset([sample], NAMES)[0]


@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=["empty", "text", "truncated"])
def test_unreadable_file(sample, kind, content):
    path = getattr(sample, kind)
    path.write_bytes(path.read_bytes()[:60] if content == "half" else content)
    with pytest.raises(ValueError, match=rf"{kind} '.*{path.name}' cannot be read .*replace it"):
        SegmentationDataset([sample], NAMES)[0]


def test_truncated_jpeg(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"image '.*x\.jpg' cannot be read .*truncated"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_mask(sample, mode):
    Image.new(mode, (12, 8)).save(sample.mask)
    with pytest.raises(
        ValueError, match=rf"m\.png' is a {mode} image but must hold one class number"
    ):
        SegmentationDataset([sample], NAMES)[0]


def test_float_mask(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=r"m\.tif' is a F image but must hold one class number"):
        read_mask(tmp_path / "m.tif")


def test_mask_of_another_size(sample):
    save_mask(sample, np.zeros((12, 8), np.uint8))
    with pytest.raises(ValueError, match=r"mask '.*m\.png' is 12x8 but image '.*x\.png' is 8x12"):
        SegmentationDataset([sample], NAMES)[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_label_outside_the_classes(sample, dtype):
    mask = np.zeros((8, 12), dtype)
    mask[0, :3] = [3, 7, 200]
    save_mask(sample._replace(mask=sample.mask.with_suffix(".tif")), mask)
    sample = sample._replace(mask=sample.mask.with_suffix(".tif"))
    with pytest.raises(ValueError, match=r"m\.tif' holds the values 3, 7, 200, .*known: 0 to 2"):
        SegmentationDataset([sample], NAMES)[0]


@pytest.mark.parametrize("value", [256, 4000, 70000, -1, -255])
def test_large_and_negative_labels_are_not_wrapped(tmp_path, value):
    table = label_table(None, 3)
    with pytest.raises(ValueError, match=rf"holds the values {value}, which are no classes"):
        map_labels(np.array([[0, value]], np.int32), table, tmp_path)


def test_label_outside_the_table(sample):
    with pytest.raises(ValueError, match=r"holds the values 0, 2, .*known: \[1, 9\]"):
        SegmentationDataset([sample], NAMES, ids={1: 0, 9: 1})[0]


def test_large_raw_ids(tmp_path):
    table = label_table({1000: 1, 26001: 2}, 3)
    raw = np.array([[1000, 26001, 255]], np.int32)
    assert map_labels(raw, table, tmp_path).tolist() == [[1, 2, 255]]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({}, "ids is empty"),
        ({0: 3}, r"ids leads to \[3\] but there are 3 classes"),
        ({0: -1}, r"ids leads to \[-1\]"),
        ({-1: 0}, "ids has the keys -1 to -1"),
        ({255: 1}, "ids maps 255 to 1 but 255 always means ignore"),
    ],
)
def test_wrong_tables(sample, ids, message):
    with pytest.raises(ValueError, match=message):
        SegmentationDataset([sample], NAMES, ids=ids)


@pytest.mark.parametrize("count", [0, 256])
def test_number_of_classes(sample, count):
    with pytest.raises(ValueError, match=f"num_classes is {count} but must be 1 to 255"):
        SegmentationDataset([sample], ["x"] * count)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        SegmentationDataset([], NAMES)


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ([(0, 0, 0)], "palette has 1 colours but there are 3"),
        ([(0, 0, 256)] * 3, "from 0 to 255"),
        ([(0, 0)] * 3, "red"),
    ],
)
def test_wrong_palettes(sample, palette, message):
    with pytest.raises(ValueError, match=message):
        SegmentationDataset([sample], NAMES, palette)


def test_voc_palette():
    """First colours as in the VOC development kit."""
    assert voc_palette(5) == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert voc_palette(22)[20:] == [(0, 64, 128), (128, 64, 128)]
    assert len(set(voc_palette(255))) == 255


# --- images to predict -------------------------------------------------------------------------


def test_image_folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "a.jpg", "sub/a.png", "c.bmp", "d.gif", "e.webp"):
        Image.new("RGB", (6, 4)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_text("no image")
    dataset = ImageFolder(tmp_path / "in")
    assert [item["name"] for item in dataset] == ["a_jpg", "a_png", "b", "c", "d", "e", "sub/a"]
    assert dataset[6].keys() == {"image", "name", "path"}
    assert dataset[6]["image"].shape == (3, 4, 6)
    assert dataset[6]["path"] == str(tmp_path / "in" / "sub" / "a.png")
    dataset.skip({"a_png", "sub/a", "unknown"})
    assert [item["name"] for item in dataset] == ["a_jpg", "b", "c", "d", "e"]


def test_image_folder_names_stay_distinct(tmp_path):
    for name in ("a.jpg", "a.png", "a_png.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    names = [item["name"] for item in ImageFolder(tmp_path)]
    assert sorted(names) == ["a_jpg", "a_png", "a_png_"]


def test_single_image(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "one.png")
    dataset = ImageFolder(tmp_path / "one.png")
    assert [item["name"] for item in dataset] == ["one"]


def test_folder_without_image(tmp_path):
    with pytest.raises(ValueError, match=f"no image in folder '{re.escape(str(tmp_path))}'"):
        ImageFolder(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist"):
        ImageFolder(tmp_path / "nowhere")


def test_unreadable_image_in_folder(tmp_path):
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"image '.*x\.png' cannot be read"):
        ImageFolder(tmp_path)[0]
