"""CamVid in SegNet's layout, generated and real."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import CamVid, CamVidDataModule
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.miniatures import make_camvid

SIZE = (24, 32)


def test_layout(tmp_path):
    root = make_camvid(tmp_path, SIZE)
    for path in root.glob("val/*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    for split in ("train", "val"):
        dataset = CamVid(root, split)
        assert [item["name"] for item in dataset] == [f"{split}_{number}" for number in range(4)]
        mask, raw = dataset[0]["mask"].numpy(), np.array(Image.open(dataset.samples[0].mask))
        assert np.array_equal(mask, np.where(raw == 11, 255, raw))


@pytest.mark.parametrize(
    "line", ["train_2", "/SegNet/CamVid/train/train_2.png /SegNet/CamVid/trainannot/train_2.png"]
)
def test_lists(tmp_path, line):
    root = make_camvid(tmp_path, SIZE)
    (root / "train.txt").write_text(f"{line}\n\n")
    assert [item["name"] for item in CamVid(root)] == ["train_2"]
    (root / "train.txt").write_text("train_1\nother\n")
    with pytest.raises(GenSegError, match=r"1 images are missing \(expected: '.*train/other.png'"):
        CamVid(root)


def test_wrong_root(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"train' does not exist: root must be CamVid in Seg"
    ):
        CamVid(tmp_path)


def test_real_camvid(shared_dir):
    root = shared_dir / "data" / "camvid"
    counts = {split: len(CamVid(root, split)) for split in ("train", "val", "test")}
    assert counts == {"train": 367, "val": 101, "test": 233}
    train = CamVid(root, "train")
    pixels = sum(
        train[index]["mask"].flatten().bincount(minlength=256) for index in range(0, 367, 20)
    )
    assert train[0]["image"].shape == (3, 360, 480)
    assert pixels[11:255].sum() == 0
    assert (pixels[:11] > 0).all()
    # Road, building and sky fill most of a street; an off-by-one in the table would not show this.
    share = pixels[:11] / pixels[:11].sum()
    assert share[[0, 1, 3]].sum() > 0.55
    assert share[[2, 6, 9, 10]].sum() < 0.08


def test_real_batches(shared_dir):
    root = shared_dir / "data" / "camvid"
    data = CamVidDataModule(root, batch_size=2, num_workers=0, crop_size=(96, 128))
    assert data.class_names[3] == "road"
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 96, 128)
    assert len(data.train_dataloader()) == 183
    assert next(iter(data.val_dataloader()))["image"].shape == (1, 3, 360, 480)
    assert len(data.val_dataloader()) == 101
