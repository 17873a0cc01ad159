"""Own data: pairs of images and masks, splits, lists, and what may be missing."""

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_genseg.data import Folder, FolderDataModule, SegmentationDataModule
from lightning_genseg.data.pairing import read_names
from lightning_genseg.errors import GenSegError, MissingFileError

NAMES = [*(f"img{index}" for index in range(7)), "frame.0001", "sub/img8", "sub/img9"]


def write(root, names, suffix, channels=()):
    rng = np.random.default_rng(0)
    for name in names:
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 3, (20, 24, *channels), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "images", NAMES, ".jpg", (3,))
    write(tmp_path / "masks", NAMES, ".png")
    return tmp_path


def folder(root, **arguments):
    words = {"num_classes": 3, "batch_size": 2, "num_workers": 0, "crop_size": (16, 16)}
    return FolderDataModule(root, **{**words, **arguments})


def names(dataset):
    return [sample.name for sample in dataset.samples]


def splits(data):
    data.setup()
    return names(data.train_dataset), names(data.val_dataset), names(data.test_dataset)


# --- pairs -------------------------------------------------------------------------------------


def test_pairs_by_name(root):
    dataset = Folder(root, ["x", "y", "z"])
    assert names(dataset) == sorted(NAMES)
    for item, name in zip(dataset, sorted(NAMES), strict=True):
        assert item["name"] == name
        assert (item["mask"].numpy() == np.array(Image.open(root / f"masks/{name}.png"))).all()
    chosen = Folder(root, ["x", "y", "z"], names=["sub/img9", "img0"])
    assert [item["name"] for item in chosen] == ["sub/img9", "img0"]
    (root / "images").rename(root / "rgb")
    (root / "masks").rename(root / "gt")
    assert len(Folder(root, ["x"], images="rgb", masks="gt")) == 10


@pytest.mark.parametrize(
    ("images", "masks", "chosen", "message"),
    [
        (["p1", "p2", "p3", "p4"], [], None, r"4 .* no mask .*masks' \('p1', 'p2', 'p3' \.\.\.\)"),
        ([], ["a_mask"], None, r"1 masks have no image .*images' \('a_mask'\)"),
        ([], [], ["img0", "z"], r"1 names of the list have no image in '.*images' \('z'\)"),
        (["img0"], [], None, r"1 names .*img0\.jpg' and '.*img0\.png'\): rename"),
    ],
)  # fmt: skip
def test_wrong_pairs(root, images, masks, chosen, message):
    write(root / "images", images, ".png", (3,))
    write(root / "masks", masks, ".png")
    with pytest.raises(GenSegError, match=message):
        Folder(root, ["x"], names=chosen)
    if "p1" in images:  # names that are not asked for do no harm
        assert len(Folder(root, ["x"], names=["img0", "img1"])) == 2


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_and_empty_folder(root, folder):
    (root / folder).rename(root / "elsewhere")
    with pytest.raises(MissingFileError, match=f"{folder}' does not exist"):
        Folder(root, ["x"])
    (root / folder).mkdir()
    with pytest.raises(GenSegError, match=rf"no image in folder '.*{folder}'"):
        Folder(root, ["x"])


def test_list(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a\n\n sub/b.jpg \nframe.0001\nwith space.PNG\n", encoding="utf-8-sig")
    assert read_names(path) == ["a", "sub/b", "frame.0001", "with space"]
    for text, message in (
        ("\n", r"train\.txt' is empty"),
        ("a\nb\na.png\n", "1 names twice, for instance 'a'"),
    ):
        path.write_text(text)
        with pytest.raises(GenSegError, match=message):
            read_names(path)
    path.unlink()
    with pytest.raises(MissingFileError, match=r"list '.*train\.txt' does not exist"):
        read_names(path)


# --- the datamodule ----------------------------------------------------------------------------


def test_classes():
    data = folder("anywhere")
    assert data.class_names == ["class_0", "class_1", "class_2"]
    assert data.palette[1] == (128, 0, 0)
    colors = [(1, 2, 3), (4, 5, 6)]
    data = folder("anywhere", num_classes=None, class_names=["x", "y"], palette=colors)
    assert data.num_classes == 2
    assert data.palette == colors


def test_drawn_split(root):
    train, val, test = splits(folder(root))
    assert len(train) == 8
    assert len(val) == 2
    assert sorted(train + val) == sorted(NAMES)
    assert test == val
    # Runs with other seeds are scored on the same images.
    assert splits(folder(root, seed=1)) == (train, val, test)
    assert splits(folder(root, split_seed=1)) != (train, val, test)
    assert len(splits(folder(root, val_fraction=0.5))[1]) == 5
    data = folder(root)
    data.setup("validate")
    assert names(data.val_dataset) == val
    data.setup("fit")
    assert names(data.val_dataset) == val


def test_lists(root):
    (root / "train.txt").write_text("img0\nimg1.jpg\nsub/img8\n")
    (root / "val.txt").write_text("img2\n")
    (root / "test.txt").write_text("img3\n")
    lists = {f"{split}_list": f"{split}.txt" for split in ("train", "val", "test")}
    assert splits(folder(root, **lists)) == (["img0", "img1", "sub/img8"], ["img2"], ["img3"])
    two = {"train_list": root / "train.txt", "val_list": root / "val.txt"}
    assert splits(folder(root, **two))[2] == ["img2"]
    train, val, test = splits(folder(root, test_list=root / "test.txt"))
    assert test == ["img3"]
    assert sorted(train + val + test) == sorted(NAMES)


def test_a_folder_to_test_on(root):
    (root / "all.txt").write_text("\n".join(NAMES))
    data = folder(root, test_list=root / "all.txt")
    data.setup("test")
    assert names(data.test_dataset) == NAMES
    with pytest.raises(GenSegError, match="has 0 images for training and validation, too few"):
        data.setup("fit")


def test_batch(root):
    batch = next(iter(folder(root).train_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 255}
    assert next(iter(folder(root).val_dataloader()))["image"].shape == (1, 3, 20, 24)
    with pytest.raises(
        GenSegError, match=r"mask '.*masks.*\.png' holds the values 2, which are no"
    ):
        next(iter(folder(root, num_classes=2).train_dataloader()))


def test_predict_needs_neither_masks_nor_root(root, tmp_path):
    (root / "masks").rename(root / "elsewhere")
    data = folder(tmp_path / "nowhere", predict_root=root / "images")
    data.setup("predict")
    assert sorted(batch["name"][0] for batch in data.predict_dataloader()) == sorted(NAMES)


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
    # What Lightning writes beside a run can be used again.
    config = parser.parse_string(parser.dump(parser.parse_string(text)))
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
        ({"val_fraction": 0.0}, "val_fraction is 0.0; it must be positive and less than 1"),
        ({"split_seed": -1}, "split_seed is -1; it must be at least 0"),
        ({"num_classes": 0}, "num_classes is 0; it must be between 1 and 255"),
        ({"num_classes": -3}, "num_classes is -3; it must be between 1 and 255"),
        ({"masks": None}, "masks is null; it must be a word"),
        ({"ids": {5: 3}}, r"ids leads to \[3\] but there are 3 classes"),
        ({"palette": [(0, 0, 0)]}, "palette has 1 colours but there are 3 classes"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        folder("anywhere", **arguments)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("img0\nimg1\n", "img1.jpg\n", r"train_list and val_list share 1 images \(img1\)"),
        ("img0\nimg77\n", "img1\n", "1 names of the list have no image .*'img77'"),
        (None, "img1\n", r"list '.*train\.txt' does not exist"),
    ],
)
def test_wrong_lists(root, train, val, message):
    if train:
        (root / "train.txt").write_text(train)
    (root / "val.txt").write_text(val)
    with pytest.raises(GenSegError, match=message):
        folder(root, train_list="train.txt", val_list="val.txt").setup("fit")


def test_too_few_images(root, tmp_path):
    for name in NAMES[1:]:
        (root / "images" / f"{name}.jpg").unlink()
        (root / "masks" / f"{name}.png").unlink()
    with pytest.raises(GenSegError, match="has 1 images for training and validation, too few"):
        folder(root).setup("fit")
    with pytest.raises(MissingFileError, match=r"'.*nowhere.images' does not exist"):
        folder(tmp_path / "nowhere").setup("fit")
