"""Own data: splits, lists, and what may be missing."""

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_genseg.data import FolderDataModule, SegmentationDataModule

NAMES = [*(f"img{index}" for index in range(8)), "sub/img8", "sub/img9"]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        for folder, shape, suffix in (("images", (20, 24, 3), ".jpg"), ("masks", (20, 24), ".png")):
            path = tmp_path / folder / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, shape, dtype=np.uint8)).save(path)
    return tmp_path


def folder(root, **arguments):
    return FolderDataModule(
        root,
        **{"num_classes": 3, "batch_size": 2, "num_workers": 0, "crop_size": (16, 16), **arguments},
    )


def names(dataset):
    return [sample.name for sample in dataset.samples]


def splits(data):
    data.setup()
    return names(data.train_dataset), names(data.val_dataset), names(data.test_dataset)


def test_classes():
    data = folder("anywhere", num_classes=3)
    assert data.class_names == ["class_0", "class_1", "class_2"]
    assert data.palette[1] == (128, 0, 0)
    data = folder(
        "anywhere", num_classes=None, class_names=["x", "y"], palette=[(1, 2, 3), (4, 5, 6)]
    )
    assert data.num_classes == 2
    assert data.palette == [(1, 2, 3), (4, 5, 6)]


def test_drawn_split(root):
    train, val, test = splits(folder(root))
    assert len(train) == 8
    assert len(val) == 2
    assert sorted(train + val) == NAMES
    assert test == val
    assert splits(folder(root, seed=1)) == (
        train,
        val,
        test,
    )  # runs with other seeds are scored on the same images
    assert splits(folder(root, split_seed=1)) != (train, val, test)
    assert len(splits(folder(root, val_fraction=0.5))[1]) == 5


def test_split_is_the_same_in_every_stage(root):
    data = folder(root)
    data.setup("validate")
    val = names(data.val_dataset)
    data.setup("fit")
    assert names(data.val_dataset) == val


def test_lists(root, monkeypatch, tmp_path):
    (root / "train.txt").write_text("img0\nimg1.jpg\nsub/img8\n")
    (root / "val.txt").write_text("img2\n")
    (root / "test.txt").write_text("img3\n")
    lists = {f"{split}_list": f"{split}.txt" for split in ("train", "val", "test")}
    assert splits(folder(root, **lists)) == (["img0", "img1", "sub/img8"], ["img2"], ["img3"])
    assert splits(folder(root, train_list=root / "train.txt", val_list=root / "val.txt"))[2] == [
        "img2"
    ]
    train, val, test = splits(folder(root, test_list=root / "test.txt"))
    assert test == ["img3"]
    assert sorted(train + val + test) == NAMES


def test_batch(root):
    batch = next(iter(folder(root).train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 255}
    assert next(iter(folder(root).val_dataloader()))["image"].shape == (1, 3, 20, 24)


def test_predict_needs_neither_masks_nor_root(root, tmp_path):
    (root / "masks").rename(root / "elsewhere")
    data = folder(tmp_path / "nowhere", predict_root=root / "images")
    data.setup("predict")
    assert [batch["name"] for batch in data.predict_dataloader()] == [[name] for name in NAMES]


def test_from_yaml(root):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    text = f"""
data:
  class_path: FolderDataModule
  init_args:
    root: {root}
    class_names: [sky, road]
    ids: {{0: 0, 1: 1, 2: 255}}
    palette: [[0, 0, 255], [90, 90, 90]]
    batch_size: 2
    num_workers: 0
    crop_size: [12, 14]
    eval_transform:
    - class_path: Resize
      init_args: {{height: 10, width: 11}}
"""
    config = parser.parse_string(text)
    config = parser.parse_string(
        parser.dump(config)
    )  # what Lightning writes beside a run can be used again
    data = parser.instantiate(config).data
    assert data.ids == {0: 0, 1: 1, 2: 255}
    assert data.palette == [(0, 0, 255), (90, 90, 90)]
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 12, 14)
    assert next(iter(data.val_dataloader()))["image"].shape == (1, 3, 10, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": None}, "give num_classes or class_names"),
        ({"class_names": ["a", "b"]}, "num_classes is 3 but class_names has 2 names"),
        ({"train_list": "train.txt"}, "train_list and val_list belong together"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0 but must lie between 0 and 1"),
        ({"num_classes": 0}, "num_classes is 0 but must be 1 to 255"),
        ({"ids": {5: 3}}, r"ids leads to \[3\] but there are 3 classes"),
        ({"palette": [(0, 0, 0)]}, "palette has 1 colours but there are 3 classes"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        folder("anywhere", **arguments)


def test_overlapping_lists(root):
    (root / "train.txt").write_text("img0\nimg1\n")
    (root / "val.txt").write_text("img1.jpg\n")
    with pytest.raises(ValueError, match=r"train_list and val_list share 1 images \(img1\)"):
        folder(root, train_list="train.txt", val_list="val.txt").setup("fit")


def test_missing_list(root):
    with pytest.raises(FileNotFoundError, match=r"list '.*train\.txt' does not exist"):
        folder(root, train_list="train.txt", val_list="val.txt").setup("fit")


def test_list_with_unknown_name(root):
    (root / "train.txt").write_text("img0\nimg77\n")
    (root / "val.txt").write_text("img1\n")
    with pytest.raises(ValueError, match=r"1 names of the list have no image .*'img77'"):
        folder(root, train_list="train.txt", val_list="val.txt").setup("fit")


def test_too_few_images(root):
    for name in NAMES[1:]:
        (root / "images" / f"{name}.jpg").unlink()
        (root / "masks" / f"{name}.png").unlink()
    with pytest.raises(ValueError, match="has 1 images for training and validation, too few"):
        folder(root).setup("fit")


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere.images' does not exist"):
        folder(tmp_path / "nowhere").setup("fit")


def test_label_outside_the_classes_names_the_file(root):
    with pytest.raises(
        ValueError, match=r"mask '.*masks.*\.png' holds the values 2, which are no classes"
    ):
        next(iter(folder(root, num_classes=2).train_dataloader()))


def test_a_folder_to_test_on(root):
    (root / "all.txt").write_text("\n".join(NAMES))
    data = folder(root, test_list=root / "all.txt")
    data.setup("test")
    assert names(data.test_dataset) == NAMES
    with pytest.raises(ValueError, match="has 0 images for training and validation, too few"):
        data.setup("fit")
