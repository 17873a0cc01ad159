"""Cityscapes' ids, and labels of the other kind."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import Cityscapes, CityscapesDataModule
from lightning_genseg.errors import GenSegError
from tests.miniatures import make_cityscapes

SIZE = (24, 32)
# The names of cityscapesScripts' table, by id.
# fmt: off
NAMES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}
# fmt: on


def test_every_id(tmp_path):
    root = make_cityscapes(tmp_path, (5, 8))
    path = Cityscapes(root).samples[0].mask
    Image.fromarray(np.arange(40, dtype=np.uint8).clip(0, 33).reshape(5, 8)).save(path)
    labels = Cityscapes(root).read_mask_labels(0).flatten()[:34]
    found = {raw: Cityscapes.CLASS_NAMES[c] for raw, c in enumerate(labels) if c != 255}
    assert found == NAMES


def test_both_kinds_of_labels_agree(tmp_path):
    root = make_cityscapes(tmp_path, SIZE, train_ids=True)
    raw, converted = Cityscapes(root), Cityscapes(root, labels="labelTrainIds")
    assert [sample.name for sample in raw.samples] == [sample.name for sample in converted.samples]
    assert raw.samples[0].name == "aachen_000000_000019"
    for index in range(len(raw)):
        assert (raw.read_mask_labels(index) == converted.read_mask_labels(index)).all()
    assert raw.samples[0].mask != converted.samples[0].mask
    data = CityscapesDataModule(root, "labelTrainIds", num_workers=0)
    assert data.split_dataset("train", ()).samples[0].mask.name.endswith("_labelTrainIds.png")


def test_labels_of_the_other_kind(tmp_path):
    root = make_cityscapes(tmp_path / "converted", SIZE, train_ids=True)
    for path in root.glob("gtFine/train/*/*_labelTrainIds.png"):
        path.rename(path.with_name(path.name.replace("labelTrainIds", "labelIds")))
    with pytest.raises(
        GenSegError, match=r"holds the values 255, but labelIds are 0 to 33.*labelT"
    ):
        Cityscapes(root)
    root = make_cityscapes(tmp_path / "official", SIZE)
    with pytest.raises(GenSegError, match=r"no .*labelTrainIds\.png' .*: set labels to labelIds\."):
        Cityscapes(root, labels="labelTrainIds")
    for path in root.glob("gtFine/train/*/*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(
        GenSegError, match=r"holds the values .*, but labelTrainIds are 0 to 18 and"
    ):
        Cityscapes(root, labels="labelTrainIds")
    with pytest.raises(GenSegError, match=r"no .*labelIds\.png' .*: set labels to labelTrainIds\."):
        Cityscapes(root)
    for kind in (Cityscapes, CityscapesDataModule):
        with pytest.raises(
            GenSegError, match=r"labels is 'ids'; it must be one of labelIds, labelT"
        ):
            kind(root, labels="ids")


def test_an_unreadable_mask_is_reported_when_it_is_read(tmp_path):
    root = make_cityscapes(tmp_path, SIZE)
    path = Cityscapes(root).samples[0].mask
    path.write_bytes(b"broken")
    dataset = Cityscapes(root)
    with pytest.raises(GenSegError, match=f"mask '{path}' cannot be read"):
        dataset[0]
