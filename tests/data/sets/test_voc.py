"""PASCAL VOC: splits, boundaries, the masks of the augmentation."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import VOC, VOCDataModule
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.miniatures import make_voc

SIZE = (24, 32)


def test_own_masks_go_before_the_added_ones(tmp_path):
    root = make_voc(tmp_path, SIZE)
    dataset = VOC(root)
    assert dataset.class_names[15] == "person"
    assert dataset.palette[15] == (192, 128, 128)
    folders = {sample.name[:4]: sample.mask.parent.name for sample in dataset.samples}
    assert folders == {"2007": "SegmentationClass", "2011": "SegmentationClassAug"}
    for index, sample in enumerate(dataset.samples):
        raw = np.array(Image.open(sample.mask))
        assert (dataset.read_mask_labels(index) == raw).all()
        assert (255 in raw) == (sample.name[:4] == "2007")
    assert len(VOCDataModule(root, "train").split_dataset("train", ())) == 4


def test_list_of_paths(tmp_path):
    """DeepLab's trainaug.txt names image and mask."""
    root = make_voc(tmp_path, SIZE)
    expected = VOC(root).samples
    lines = [f"/JPEGImages/{s.name}.jpg /SegmentationClassAug/{s.name}.png" for s in expected]
    (root / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n".join(lines))
    assert VOC(root).samples == expected


def test_without_augmentation(tmp_path):
    root = make_voc(tmp_path, SIZE, augmented=False)
    assert len(VOC(root, "train")) == 4
    with pytest.raises(
        MissingFileError, match=r"SegmentationClassAug' does not exist.*1464 images"
    ):
        VOC(root)


def test_masks_of_colours(tmp_path):
    root = make_voc(tmp_path, SIZE)
    path = VOC(root, "train").samples[0].mask
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(
        GenSegError, match=r"is a RGB image but must hold one class number per pixel"
    ):
        VOC(root, "train")[0]
    Image.fromarray(np.array([[0, 38, 255]], np.uint8)).save(path)
    with pytest.raises(
        GenSegError, match=r"values 38, but masks of PASCAL VOC hold 0 to 20 and 255"
    ):
        VOC(root, "train")
