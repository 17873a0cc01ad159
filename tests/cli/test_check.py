"""The look at the data before training: what it counts, what it survives, what it prints."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_genseg.cli.check import check_data, summary
from lightning_genseg.data import (
    CamVidDataModule,
    FolderDataModule,
    Points,
    SegmentationDataModule,
    SparseMasks,
    SyntheticScenesDataModule,
)
from lightning_genseg.data.class_index import Cache, class_index

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
COUNTS = {"train": 6, "val": 3, "test": 2}


def colors_of(path):
    """How many pixels of a picture have each colour."""
    with Image.open(path) as picture:
        return {color: count for count, color in picture.convert("RGB").getcolors(10**6)}


def write_folder(root, names, mask, gray=0):
    """Images of one grey and equal masks in `FolderDataModule`'s layout."""
    for folder, array in (("images", np.full((*mask.shape, 3), gray, np.uint8)), ("masks", mask)):
        (root / folder).mkdir()
        for name in names:
            Image.fromarray(array).save(root / folder / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    """CamVid's layout: sky above, road below, a car in the first frame, a border without class."""
    root = tmp_path / "camvid"
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((20, 30), np.uint8)
            mask[10:] = 3
            mask[0] = 11
            if index == 0:
                mask[12:14, 5:10] = 8
            image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            name = f"{split}_{index}.png"
            Image.fromarray(image).save(root / split / name)
            Image.fromarray(mask).save(root / f"{split}annot" / name)
    return root


@pytest.fixture
def data(root, tmp_path):
    return CamVidDataModule(root, cache_dir=tmp_path / "cache", num_workers=0)


def check(data, folder, **arguments):
    """The report, which is also what was written."""
    report = check_data(data, folder, **arguments)
    assert json.loads((folder / "data_check.json").read_text()) == report
    return report


def test_a_good_copy(data, tmp_path):
    report = check(data, tmp_path / "out")
    assert report["problems"] == []
    assert report["shared"] == {}
    train = report["splits"]["train"]
    assert {split: found["images"] for split, found in report["splits"].items()} == COUNTS
    assert train["sizes"] == {"20x30": 6}
    assert train["ignored"] == pytest.approx(1 / 20)
    for name, pixels, images in (("sky", 6 * 270, 6), ("car", 10, 1)):
        share = pytest.approx(pixels / 3420)
        assert train["classes"][name] == {"pixels": pixels, "share": share, "images": images}
    assert train["classes"]["tree"]["images"] == 0
    drawn = {(128, 128, 128), (128, 64, 128), (64, 0, 128), (0, 0, 0)}
    assert drawn <= set(colors_of(tmp_path / "out" / "data_check.png"))  # and explained
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"data_check.json", "data_check.png"}


def test_the_class_index_is_there_afterwards(data, tmp_path):
    check(data, tmp_path / "out")
    counts, done = Cache(data.make_dataset("train", ()), tmp_path / "cache").load()
    assert done.all()
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(counts, class_index(data.make_dataset("train", ()), tmp_path / "cache"))


def spoil(root):
    """One of everything, in `train` but for the last; what is to be found of which file."""
    (root / "trainannot" / "train_0.png").unlink()
    (root / "trainannot" / "train_1.png").unlink()
    (root / "train" / "train_2.png").write_bytes(b"")
    whole = (root / "trainannot" / "train_3.png").read_bytes()
    (root / "trainannot" / "train_3.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((20, 29), np.uint8)).save(root / "trainannot" / "train_4.png")
    Image.fromarray(np.full((20, 30), 77, np.uint8)).save(root / "valannot" / "val_1.png")
    return {
        "trainannot/train_0.png": "does not exist",
        "trainannot/train_1.png": "does not exist",
        "train/train_2.png": "cannot be read",
        "trainannot/train_3.png": "cannot be read",
        "trainannot/train_4.png": "is 20x29 but image",
        "valannot/val_1.png": "holds the values 77",
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_that_is_wrong_is_found_in_one_go(data, root, tmp_path, num_workers):
    expected = spoil(root)
    data.num_workers = num_workers
    report = check(data, tmp_path / "out")
    whole, *single = report["problems"]
    assert whole["problem"].startswith("2 images have no mask")
    assert (whole["splits"], whole["name"], whole["file"]) == (["train"], None, None)
    found = {str(Path(p["file"]).relative_to(root)): p["problem"] for p in single}
    assert found.keys() == expected.keys()
    for file, text in expected.items():
        assert text in found[file]
        assert file in found[file]
    train = report["splits"]["train"]
    assert train["images"] == 6
    assert train["classes"]["road"]["images"] == 2  # of train_2 and train_5, whose masks are whole
    assert train["classes"]["sky"]["images"] == 3
    text = summary(report)
    assert all(file in text for file in expected)
    # What was counted is kept, what was not is counted once it is mended.
    dataset = CamVidDataModule(root).make_dataset("val", ())
    assert Cache(dataset, tmp_path / "cache").load()[1].tolist() == [True, False, True]


def test_the_screen_shows_some_the_report_all(data, root, tmp_path):
    for index in range(25):
        Image.new("RGB", (30, 20)).save(root / "train" / f"x{index:02}.png")
    report = check(data, tmp_path / "out")
    assert len(report["problems"]) == 26
    lines = summary(report).splitlines()
    assert "26 problems:" in lines
    assert sum(line.startswith("- train: ") for line in lines) == 20
    assert lines[-1] == "- and 6 more, all in data_check.json"


def test_a_split_that_is_not_there(data, root, tmp_path):
    shutil.rmtree(root / "test")
    report = check(data, tmp_path / "out")
    (problem,) = report["problems"]
    assert problem["splits"] == ["test"]
    assert "does not exist" in problem["problem"]
    assert set(report["splits"]) == {"train", "val"}


def test_nothing_readable_leaves_no_old_picture(data, root, tmp_path):
    check(data, tmp_path / "out")
    for split in COUNTS:
        for path in (root / split).iterdir():
            path.write_bytes(b"")
    report = check(data, tmp_path / "out")
    assert len(report["problems"]) == sum(COUNTS.values())
    assert report["splits"]["val"]["sizes"] == {}
    assert "none readable" in summary(report)
    assert not (tmp_path / "out" / "data_check.png").exists()


def test_images_of_two_splits(tmp_path):
    write_folder(tmp_path, "abcd", np.zeros((8, 9), np.uint8))
    for split, names in {"train": "abc", "val": "d"}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(names))
    data = FolderDataModule(
        tmp_path, num_classes=2, train_list=Path("train.txt"), val_list=Path("val.txt"),
        cache_dir=tmp_path / "cache", num_workers=0, absent_classes="warn",
    )  # fmt: skip
    report = check(data, tmp_path / "out")
    assert report["splits"]["test"] == {"images": 1, "same_as": "val"}
    assert report["shared"] == {}
    assert "test        1 images, those of val" in summary(report)
    assert summary(report).splitlines()[-1].endswith("never")  # class_1 occurs nowhere

    class Leaky(FolderDataModule):
        def make_dataset(self, split, transform):
            self._names = {"train": ["a", "b"], "val": ["b", "c"], "test": ["d"]}
            return super().make_dataset(split, transform)

    leaky = Leaky(tmp_path, num_classes=2, cache_dir=tmp_path / "cache", num_workers=0)
    report = check(leaky, tmp_path / "out")
    assert report["shared"] == {"train, val": 1}
    assert "WARNING: 1 images are in train, val" in summary(report)


def test_a_mask_without_image_does_not_hide_the_rest(tmp_path):
    write_folder(tmp_path, "abcdefgh", np.zeros((8, 9), np.uint8))
    (tmp_path / "images" / "c.png").unlink()
    (tmp_path / "masks" / "e.png").unlink()
    (tmp_path / "masks" / "f.png").write_bytes(b"")
    data = FolderDataModule(tmp_path, num_classes=1, cache_dir=tmp_path / "cache", num_workers=0)
    report = check(data, tmp_path / "out")
    files = {str(Path(p["file"]).relative_to(tmp_path)) for p in report["problems"] if p["file"]}
    assert files == {"images/c.png", "masks/e.png", "masks/f.png"}


def test_scenes_that_are_drawn(tmp_path):
    data = SyntheticScenesDataModule((48, 64), 3, 2, 2, held_out=True, num_workers=0)
    report = check(data, tmp_path, num_pictures=1)
    assert report["problems"] == []
    assert report["splits"]["train"]["sizes"] == {"48x64": 3}
    assert report["splits"]["test"]["ignored"] > 0


def test_ignored_pixels_are_not_drawn_like_a_class(tmp_path):
    """VOC's background is black."""
    mask = np.zeros((20, 30), np.uint8)
    mask[:9] = 255
    write_folder(tmp_path, "ab", mask, gray=90)
    data = FolderDataModule(tmp_path, num_classes=2, cache_dir=tmp_path / "c", num_workers=0)
    assert data.palette[0] == (0, 0, 0)
    check(data, tmp_path / "out", num_pictures=1)
    with Image.open(tmp_path / "out" / "data_check.png") as picture:
        labels = np.array(picture)[:, 328 + 10 : 648 - 10]  # the second column
    rows = [tuple(row[100]) for row in labels]
    assert (255, 255, 255) in rows
    assert rows.count((0, 0, 0)) >= 2 * 100


def test_no_pictures(data, tmp_path):
    check(data, tmp_path / "out", num_pictures=0)
    assert not (tmp_path / "out" / "data_check.png").exists()
    with pytest.raises(ValueError, match="num_pictures is -1"):
        check_data(data, tmp_path, -1)


def test_a_data_set_that_cannot_be_checked(tmp_path):
    class Foreign(SegmentationDataModule):
        def make_dataset(self, split, transform):
            return torch.utils.data.TensorDataset(torch.zeros(3))

    with pytest.raises(ValueError, match=r"TensorDataset has no read_pixels\(index\)"):
        check_data(Foreign(["a"]), tmp_path)


def test_sparse_labels(root, tmp_path):
    """Counted as they are, one pixel a point; drawn so that they can be seen."""
    cache = tmp_path / "cache"
    data = CamVidDataModule(root, sparse=Points(2), cache_dir=cache, num_workers=0)
    report = check(data, tmp_path / "out", num_pictures=1)
    train, val = report["splits"]["train"], report["splits"]["val"]
    pixels, points = 6 * 600, 2 * (2 * 6 + 1)  # sky and road in six images, a car in one
    assert train["classes"]["sky"] == {"pixels": 12, "share": pytest.approx(12 / 26), "images": 6}
    assert train["sparse"] == {
        "labelled": pytest.approx(points / pixels),
        "unlabelled": pytest.approx(1 - points / pixels),
        "marks": points,
        "empty": 0,
    }
    assert train["ignored"] == 0  # the border of the dense masks is unlabelled
    assert "sparse" not in val
    assert val["ignored"] == pytest.approx(1 / 20)
    shown = summary(report)
    text = "0.722% of the pixels in 6 images, 26 points or scribbles; 0 images without any"
    assert f"sparse labels: {text}" in shown
    assert (data.class_index() == class_index(data.split_dataset("train", ()), cache)).all()
    colors = colors_of(tmp_path / "out" / "data_check.png")
    assert colors[200, 200, 200] > 10_000  # unlabelled
    assert colors[64, 0, 128] > 200  # two points of a car in a picture of 320 x 213, twice


def test_sparse_labels_that_are_missing_or_broken(root, tmp_path):
    """All problems at once, and the good images are counted."""
    folder = tmp_path / "brushed"
    folder.mkdir()
    for index in range(5):
        raw = np.full((20, 30), 99, np.uint8)
        raw[5, :6], raw[6, :3] = 3, 255
        if index == 1:
            raw[raw == 99] = 255
        Image.fromarray(raw).save(folder / f"train_{index}.png")
    data = CamVidDataModule(root, sparse=SparseMasks(99, folder), num_workers=0, cache_dir=tmp_path)
    report = check(data, tmp_path / "out")
    beginnings = [
        "1 of 6 images have no sparse masks (expected",
        f"mask '{folder}/train_1.png' holds no pixel of the value 99 (unlabelled)",
        f"mask '{folder}/train_5.png' does not exist",
    ]
    for problem, beginning in zip(report["problems"], beginnings, strict=True):
        assert problem["problem"].startswith(beginning)
    train = report["splits"]["train"]
    assert train["classes"]["road"] == {"pixels": 24, "share": 1.0, "images": 4}
    assert train["sparse"]["marks"] is None
    assert train["ignored"] == pytest.approx(3 / 600)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def config(root, tmp_path):
    """A configuration of `fit`; its model need not even exist."""
    content = {
        "seed_everything": 1,
        "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "NoSuchCallback"}]},
        "model": {"class_path": "NoSuchModel", "init_args": {"encoder": "none"}},
        "report": {"num_pictures": 3},
        "data": {
            "class_path": "CamVidDataModule",
            "init_args": {"root": str(root), "num_workers": 0, "cache_dir": "cache"},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))


def test_the_command(genseg, config, tmp_path, capsys):
    genseg("check --config config.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CamVidDataModule, 11 classes"
    assert lines[2].split() == [
        "train",
        "6",
        "images,",
        "20x30,",
        "5.0%",
        "of",
        "the",
        "pixels",
        "ignored",
    ]
    assert any(line.split()[:3] == ["sky", "47.368%", "6"] for line in lines)
    assert lines[-1] == "the report is in data_check"
    assert (tmp_path / "data_check" / "data_check.png").exists()


def test_the_command_without_a_file(genseg, root, tmp_path):
    options = "--data.num_workers 0 --data.cache_dir cache --output_dir elsewhere"
    genseg(f"check --data CamVidDataModule --data.root {root} {options}")
    assert (tmp_path / "elsewhere" / "data_check.json").exists()


def test_problems_fail_the_command(genseg, config, root, capsys):
    spoil(root)
    with pytest.raises(SystemExit) as exit:
        genseg("check --config config.yaml")
    assert exit.value.code == 2
    written = capsys.readouterr()
    assert "valannot/val_1.png" in written.out
    problems = "7 problems with the data, all listed in the report in data_check."
    assert written.err.splitlines() == [f"genseg: error: {problems}"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--data.rot x", "Option 'rot' is not accepted; did you mean root?"),
        ("--data CamVidDatModule", "did you mean CamVidDataModule?"),
        ("--data.batch_size 0", "batch_size is 0"),
        ("--config missing.yaml", "missing.yaml"),
        ("--num_pictures -1", "num_pictures is -1"),
        ("--output_dir config.yaml/x", "config.yaml"),
    ],
)
def test_mistakes_are_one_line(args, message, config, fails):
    assert message in fails(f"check --config config.yaml {args}")


def test_no_data(fails):
    assert "data" in fails("check")
