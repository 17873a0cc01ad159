"""CamVid in SegNet's layout, generated and real."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import CamVid


def write_camvid(root, stems=("f1", "f2", "f3"), suffix=".png"):
    """A data set of that layout with random masks of 0 to 11."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for stem in stems:
            for folder, end, shape, high in (
                (split, suffix, (24, 32, 3), 256),
                (f"{split}annot", ".png", (24, 32), 12),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                array = rng.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(array).save(root / folder / f"{split}_{stem}{end}")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_layout(tmp_path, suffix):
    write_camvid(tmp_path, suffix=suffix)
    dataset = CamVid(tmp_path, "val")
    assert [item["name"] for item in dataset] == ["val_f1", "val_f2", "val_f3"]
    assert dataset.num_classes == len(dataset.palette) == 11
    mask = dataset[0]["mask"]
    raw = np.array(Image.open(tmp_path / "valannot" / "val_f1.png"))
    assert np.array_equal(mask.numpy() == 255, raw == 11)
    assert np.array_equal(mask.numpy()[raw < 11], raw[raw < 11])


@pytest.mark.parametrize(
    "line", ["train_f2", "/SegNet/CamVid/train/train_f2.png /SegNet/CamVid/trainannot/train_f2.png"]
)
def test_lists(tmp_path, line):
    write_camvid(tmp_path)
    (tmp_path / "train.txt").write_text(f"{line}\n\n")
    assert [item["name"] for item in CamVid(tmp_path)] == ["train_f2"]


def test_wrong_root(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train' does not exist: root must be CamVid in SegNet's layout"
    ):
        CamVid(tmp_path)


def test_list_of_frames_that_do_not_exist(tmp_path):
    write_camvid(tmp_path)
    (tmp_path / "train.txt").write_text("train_f1\nother\n")
    with pytest.raises(ValueError, match=r"train\.txt' lists 1 frames that are not in .*other"):
        CamVid(tmp_path)


def test_frame_without_mask(tmp_path):
    write_camvid(tmp_path)
    (tmp_path / "trainannot" / "train_f2.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of '.*train' have no mask .*train_f2"):
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
