"""What goes wrong with a copy of a public data set, and what is said about it: one sentence each."""

import shutil

import pytest

from lightning_genseg.data import ADE20K, VOC, CamVid, Cityscapes, COCOStuff10k, COCOStuff164k
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.layout import list_files
from tests.miniatures import (
    make_ade20k,
    make_cityscapes,
    make_coco_stuff_10k,
    make_coco_stuff_164k,
    make_voc,
)

ZOO = [
    pytest.param(Cityscapes, make_cityscapes, id="cityscapes"),
    pytest.param(ADE20K, make_ade20k, id="ade20k"),
    pytest.param(COCOStuff10k, make_coco_stuff_10k, id="coco10k"),
    pytest.param(COCOStuff164k, make_coco_stuff_164k, id="coco164k"),
    pytest.param(VOC, make_voc, id="voc"),
]
SIZE = (24, 32)


def one_sentence(error):
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_split_with_its_classes(tmp_path, dataset, make):
    data = dataset(make(tmp_path, SIZE))
    names = [item["name"] for item in data]
    assert len(set(names)) == len(data) >= 4
    assert len(data.class_names) == len(set(data.class_names)) == len(data.palette)
    values = {value for item in data for value in item["mask"].unique().tolist()}
    assert values <= {*range(data.num_classes), 255}
    assert len(values) > 4
    assert 255 in values
    for index, item in enumerate(data):
        assert item["image"].shape[1:] == item["mask"].shape
        assert (data.read_mask_labels(index) == item["mask"].numpy()).all()


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_splits_are_disjoint(tmp_path, dataset, make):
    root = make(tmp_path, SIZE)
    other = "test" if dataset is COCOStuff10k else "val"
    train, held = dataset(root), dataset(root, other)
    assert not {sample.image for sample in train.samples} & {
        sample.image for sample in held.samples
    }


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_root_does_not_exist(tmp_path, dataset, make):
    with pytest.raises(
        FileNotFoundError,
        match=r"root '.*nowhere' does not exist: give the folder of .* that holds",
    ):
        dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_root_a_level_too_high(tmp_path, dataset, make):
    root = make(tmp_path / "data", SIZE)
    with pytest.raises(FileNotFoundError, match="must hold") as error:
        dataset(root.parent)
    assert f"use '{root}' as root." in one_sentence(error)
    if dataset is VOC:  # two levels
        with pytest.raises(FileNotFoundError, match=f"found: VOCdevkit.: use '{root}' as root"):
            dataset(root.parents[1])


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_root_a_level_too_low(tmp_path, dataset, make):
    root = make(tmp_path, SIZE)
    folder = next(path for path in sorted(root.iterdir()) if path.is_dir())
    with pytest.raises(FileNotFoundError, match=f"use '{root}' as root"):
        dataset(folder)


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_root_of_something_else(tmp_path, dataset, make):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(
        FileNotFoundError, match=r"found: holiday\.jpg.: give the folder that holds"
    ) as error:
        dataset(tmp_path)
    assert ("download" in one_sentence(error)) == (dataset is not Cityscapes)


def test_only_one_archive_was_unpacked(tmp_path):
    root = make_cityscapes(tmp_path, SIZE)
    shutil.rmtree(root / "gtFine")
    with pytest.raises(FileNotFoundError, match=r"has no 'gtFine' \(found: .*leftImg8bit\)"):
        Cityscapes(root)


@pytest.mark.parametrize(
    ("dataset", "make", "folder", "said"),
    [
        (Cityscapes, make_cityscapes, "leftImg8bit/val", "found beside it: test, train"),
        (Cityscapes, make_cityscapes, "gtFine/val", "found beside it: test, train"),
        (ADE20K, make_ade20k, "images/validation", "found beside it: training"),
        (ADE20K, make_ade20k, "annotations/validation", "found beside it: training"),
        (COCOStuff164k, make_coco_stuff_164k, "images/val2017", "found beside it: train2017"),
        (COCOStuff164k, make_coco_stuff_164k, "annotations/val2017", "found beside it: train2017"),
    ],
)
def test_missing_split(tmp_path, dataset, make, folder, said):
    root = make(tmp_path, SIZE)
    shutil.rmtree(root / folder)
    dataset(root, "train")
    with pytest.raises(
        FileNotFoundError, match=f"the val split of .*{folder}' does not exist.*{said}"
    ):
        dataset(root, "val")


@pytest.mark.parametrize(
    ("dataset", "make", "path"),
    [
        (COCOStuff10k, make_coco_stuff_10k, "imageLists/test.txt"),
        (VOC, make_voc, "ImageSets/Segmentation/val.txt"),
    ],
)
def test_missing_and_empty_list(tmp_path, dataset, make, path):
    root = make(tmp_path, SIZE)
    (root / path).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"the list '.*{path}' of .* does not exist .*train"
    ):
        dataset(root, path.split("/")[-1][:-4])
    (root / path).write_text("\n\n")
    with pytest.raises(ValueError, match=rf"the list '.*{path}' of .* is empty"):
        dataset(root, path.split("/")[-1][:-4])


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        (Cityscapes, "leftImg8bit/train"),
        (ADE20K, "images/training"),
        (COCOStuff164k, "images/train2017"),
    ],
)
def test_split_without_images(tmp_path, dataset, folder):
    make = {Cityscapes: make_cityscapes, ADE20K: make_ade20k}.get(dataset, make_coco_stuff_164k)
    root = make(tmp_path, SIZE)
    for path in list((root / folder).rglob("*.*")):
        path.unlink()
    with pytest.raises(ValueError, match=rf"no .*(jpg|png).* in '.*{folder}'"):
        dataset(root)


@pytest.mark.parametrize(("dataset", "make"), ZOO)
def test_image_without_mask(tmp_path, dataset, make):
    root = make(tmp_path, SIZE)
    gone = dataset(root).samples[1]
    gone.mask.unlink()
    with pytest.raises(
        MissingFiles, match=rf"1 images have no mask \(expected: '{gone.mask}'\)"
    ) as error:
        dataset(root)
    one_sentence(error)
    # What `genseg check` goes on with: everything, the missing file included.
    assert error.value.dataset.samples[1] == gone
    assert error.value.dataset[0]["mask"].ndim == 2


@pytest.mark.parametrize(("dataset", "make"), [ZOO[2].values, ZOO[4].values])
def test_list_names_an_image_that_is_missing(tmp_path, dataset, make):
    root = make(tmp_path, SIZE)
    gone = dataset(root).samples[0].image
    gone.unlink()
    with pytest.raises(MissingFiles, match=rf"1 images are missing \(expected: '{gone}'\)"):
        dataset(root)


def test_hidden_files_are_no_images(tmp_path):
    for name in ("b.jpg", "a.jpg", "._a.jpg", "a.png"):
        (tmp_path / name).touch()
    assert list(list_files(tmp_path, ".jpg")) == ["a", "b"]


def test_camvid_is_not_taken_for_cityscapes(shared_dir):
    root = shared_dir / "data" / "camvid"
    assert len(CamVid(root)) == 367
    with pytest.raises(
        FileNotFoundError, match=r"has no 'leftImg8bit' and 'gtFine' \(found: .*test"
    ):
        Cityscapes(root)
