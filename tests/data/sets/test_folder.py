"""Pairs of images and masks in two folders."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import Folder
from lightning_genseg.data.sets.folder import match_masks, read_names


def write(root, names, suffix=".png", value=0):
    for name in names:
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = (
            np.full((4, 6, 3), value, np.uint8)
            if "images" in path.parts
            else np.full((4, 6), value, np.uint8)
        )
        Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "images", ["b", "a", "sub/a", "frame.0001"], ".jpg", 255)
    write(tmp_path / "masks", ["b", "a", "sub/a", "frame.0001"], ".png", 1)
    return tmp_path


def test_pairs_by_name(root):
    dataset = Folder(root, ["x", "y"])
    assert [sample.name for sample in dataset.samples] == ["a", "b", "frame.0001", "sub/a"]
    assert dataset[3]["name"] == "sub/a"
    assert (dataset[3]["mask"] == 1).all()
    assert dataset.num_classes == 2


def test_chosen_names_in_their_order(root):
    assert [item["name"] for item in Folder(root, ["x", "y"], names=["sub/a", "a"])] == [
        "sub/a",
        "a",
    ]


def test_other_folder_names(root):
    (root / "images").rename(root / "rgb")
    (root / "masks").rename(root / "gt")
    assert len(Folder(root, ["x", "y"], images="rgb", masks="gt")) == 4


def test_image_without_mask(root):
    write(root / "images", ["p1", "p2", "p3", "p4"])
    with pytest.raises(
        ValueError,
        match=r"4 images have no mask of the same name in '.*masks' \('p1', 'p2', 'p3' \.\.\.\)",
    ):
        match_masks(root / "images", root / "masks")
    assert len(match_masks(root / "images", root / "masks", ["a", "b"])) == 2


def test_mask_without_image(root):
    write(root / "masks", ["a_mask"])
    with pytest.raises(ValueError, match=r"1 masks have no image .*'a_mask'"):
        match_masks(root / "images", root / "masks")


def test_name_without_image(root):
    with pytest.raises(
        ValueError, match=r"1 names of the list have no image in '.*images' \('z'\)"
    ):
        match_masks(root / "images", root / "masks", ["a", "z"])


def test_two_images_of_one_name(root):
    write(root / "images", ["a"], ".png")
    with pytest.raises(ValueError, match=r"a\.jpg' and '.*a\.png' share the name 'a'"):
        match_masks(root / "images", root / "masks")


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_folder(root, folder):
    (root / folder).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{folder}' does not exist"):
        Folder(root, ["x", "y"])


def test_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"no image in folder '.*images'"):
        Folder(tmp_path, ["x"])


def test_list(tmp_path):
    (tmp_path / "train.txt").write_text(
        "a\n\n sub/b.jpg \nframe.0001\nwith space.PNG\n", encoding="utf-8-sig"
    )
    assert read_names(tmp_path / "train.txt") == ["a", "sub/b", "frame.0001", "with space"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n", r"train\.txt' is empty"), ("a\nb\na.png\n", "1 names twice, for instance 'a'")],
)
def test_wrong_list(tmp_path, text, message):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_names(tmp_path / "train.txt")


def test_missing_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"list '.*train\.txt' does not exist"):
        read_names(tmp_path / "train.txt")
