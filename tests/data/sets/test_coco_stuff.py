"""COCO-Stuff's ids in its four kinds of masks."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lightning_genseg.data import COCOStuff10k, COCOStuff164k
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.miniatures import UNUSED_COCO_IDS, make_coco_stuff_10k, make_coco_stuff_164k

SIZE = (24, 32)
# From the authors' labels.txt, by id.
# fmt: off
ANCHORS = {
    1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 44: "bottle",
    67: "dining table", 90: "toothbrush", 92: "banner", 106: "clouds", 142: "plant-other",
    169: "tree", 182: "wood",
}
# fmt: on


@pytest.mark.parametrize("kind", [COCOStuff10k, COCOStuff164k])
def test_every_id(tmp_path, kind):
    used = [value for value in range(183) if value not in UNUSED_COCO_IDS]
    raw = np.array(used, np.uint8).reshape(4, 43)
    if kind is COCOStuff10k:
        root = make_coco_stuff_10k(tmp_path, SIZE)
        savemat(kind(root).samples[0].mask, {"S": raw.astype(float)})  # as MATLAB itself would
    else:
        root = make_coco_stuff_164k(tmp_path, SIZE)
        Image.fromarray(raw - np.uint8(1)).save(kind(root).samples[0].mask)  # 0 becomes 255
    labels = dict(zip(used, kind(root).read_mask_labels(0).flatten().tolist(), strict=True))
    assert labels.pop(0) == 255
    assert list(labels.values()) == list(range(171))
    assert {value: kind.CLASS_NAMES[labels[value]] for value in ANCHORS} == ANCHORS


def test_no_two_classes_share_a_colour():
    assert len(set(COCOStuff10k.PALETTE)) == 171
    assert (0, 0, 0) not in COCOStuff10k.PALETTE  # the colour of ignored pixels


@pytest.mark.parametrize("split", ["train", "test"])
def test_converted_10k(tmp_path, split):
    official = COCOStuff10k(make_coco_stuff_10k(tmp_path / "mat", SIZE), split)
    converted = COCOStuff10k(make_coco_stuff_10k(tmp_path / "png", SIZE, mat=False), split)
    assert converted.samples[0].mask.suffix == ".png"
    assert official.samples[0].mask.suffix == ".mat"
    for index in range(len(official)):
        assert (official.read_mask_labels(index) == converted.read_mask_labels(index)).all()
        assert converted[index]["mask"].shape == official[index]["mask"].shape


def test_converted_10k_without_the_original_images(tmp_path):
    root = make_coco_stuff_10k(tmp_path, SIZE, mat=False)
    for path in root.glob("images/*.jpg"):
        path.unlink()
    assert COCOStuff10k(root, "test").samples[0].image.parent.name == "test2014"
    assert COCOStuff10k(root, "test")[0]["image"].ndim == 3


def test_converted_164k(tmp_path):
    root = make_coco_stuff_164k(tmp_path, SIZE, train_ids=True)
    official = COCOStuff164k(root, "val")
    expected = [official.read_mask_labels(index) for index in range(len(official))]
    for sample in official.samples:
        assert not sample.mask.name.endswith("_labelTrainIds.png")
        sample.mask.unlink()
    converted = COCOStuff164k(root, "val")
    for index, labels in enumerate(expected):
        assert (converted.read_mask_labels(index) == labels).all()


def test_converted_ids_in_the_place_of_official_ones(tmp_path):
    root = make_coco_stuff_164k(tmp_path, SIZE, train_ids=True)
    for path in root.glob("annotations/train2017/*_labelTrainIds.png"):
        path.replace(path.with_name(path.name.replace("_labelTrainIds", "")))
    with pytest.raises(
        GenSegError, match=r"holds the values 11.*, but official masks hold 0 to 181.*converted"
    ):
        COCOStuff164k(root)


def test_official_ids_in_the_place_of_converted_ones(tmp_path):
    root = make_coco_stuff_164k(tmp_path, SIZE)
    for path in root.glob("annotations/train2017/*.png"):
        path.rename(path.with_name(path.stem + "_labelTrainIds.png"))
    with pytest.raises(
        GenSegError, match=r"holds the values 181, but labelTrainIds are 0 to 170 and 255"
    ):
        COCOStuff164k(root)
    root = make_coco_stuff_10k(tmp_path / "10k", SIZE, mat=False)
    path = COCOStuff10k(root).samples[0].mask
    Image.fromarray(np.full((3, 3), 182, np.uint8)).save(path)
    with pytest.raises(GenSegError, match=r"holds the values 182, but labelTrainIds are 0 to 171"):
        COCOStuff10k(root)


def test_first_version_of_10k(tmp_path):
    """Version 1.0 numbers the 171 classes without gaps, from 2."""
    root = make_coco_stuff_10k(tmp_path, SIZE)
    savemat(COCOStuff10k(root).samples[0].mask, {"S": np.array([[1, 2, 12, 172]], np.uint8)})
    with pytest.raises(GenSegError, match=r"holds the values 12, but version 1\.1 holds"):
        COCOStuff10k(root)


@pytest.mark.parametrize("content", [b"broken", None])
def test_unreadable_mat(tmp_path, content):
    root = make_coco_stuff_10k(tmp_path, SIZE)
    path = COCOStuff10k(root).samples[0].mask
    if content is None:
        savemat(path, {"T": np.zeros((2, 2))})
    else:
        path.write_bytes(content)
    dataset = COCOStuff10k(root)
    with pytest.raises(
        GenSegError, match=r"\.mat' cannot be read as a \.mat file with a label map S"
    ):
        dataset[0]
    path.unlink()
    with pytest.raises(MissingFileError, match=r"mask '.*\.mat' does not exist"):
        dataset[0]
