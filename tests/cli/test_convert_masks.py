"""`genseg convert-masks`, and what `genseg fit` then reads."""

import base64
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import FolderDataModule
from lightning_genseg.data.annotations import decode_rle

NAMES = ["a", "b", "deep/c", "deep/d"]
SIZE = (20, 24)
EXPECTED = np.zeros(SIZE, np.uint8)
EXPECTED[:, 12:] = 1  # cow, the large one
EXPECTED[4:8, 10:16] = 2  # sky, the small one on top


@pytest.fixture
def photos(tmp_path):
    for name in NAMES:
        path = tmp_path / "photos" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), 99, np.uint8)).save(path)
    return tmp_path / "photos"


def box(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def runs(part):
    """COCO's uncompressed run lengths, counted one by one."""
    counts, value = [0], False
    for pixel in part.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def write_coco(path, twin=None, **parts):
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(NAMES)
        ],
        "categories": [{"id": 40, "name": "sky"}, {"id": 7, "name": "cow"}],
        "annotations": [
            shape | {"image_id": i}
            for i in range(len(NAMES))
            for shape in (
                {"category_id": 40, "segmentation": [box(10, 4, 16, 8)], "area": 24},
                {
                    "category_id": 7,
                    "segmentation": {"counts": runs(EXPECTED > 0), "size": SIZE}
                    if i
                    else [box(12, 0, 24, 20)],
                    "area": 240,
                    "iscrowd": int(i > 0),
                },
            )
        ],
    }
    if parts:
        content["annotations"] = [{"image_id": 0, "category_id": 7, **parts}]
    if twin:
        content["images"].append(content["images"][0] | {"id": 9, "file_name": twin})
    path.write_text(json.dumps(content))


def written(root):
    masks = {
        p.relative_to(root / "masks").with_suffix("").as_posix(): p
        for p in (root / "masks").rglob("*.png")
    }
    return {name: np.array(Image.open(path)) for name, path in masks.items()}


def test_from_coco_to_a_trained_network(genseg, photos, tmp_path, capsys):
    write_coco(tmp_path / "instances.json")
    genseg("convert-masks instances.json mine --images photos")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("4 masks are in mine/masks: background 4")
    masks = written(tmp_path / "mine")
    assert sorted(masks) == NAMES
    np.testing.assert_array_equal(masks["a"], EXPECTED)
    assert (masks["b"][:, 12:] == EXPECTED[:, 12:]).all()
    classes = json.loads((tmp_path / "mine" / "classes.json").read_text())
    assert [row["name"] for row in classes] == ["background", "cow", "sky", "ignored"]
    genseg(said[-1].removeprefix("look at them: genseg "))
    network = "--model SoftmaxSegmenter --model.encoder tu-test_resnet --model.decoder segformer"
    options = "--trainer.accelerator cpu --trainer.fast_dev_run true --data.num_workers 0"
    data = said[-1].split("check ")[1]
    genseg(f"fit {network} {data} {options} --data.batch_size 2")


@pytest.mark.parametrize("uncovered", ["background", "ignore"])
def test_what_it_says_holds_for_a_shell_and_names_images_without_outline(
    genseg, tmp_path, capsys, uncovered
):
    write_coco(tmp_path / "instances.json", segmentation=[box(0, 0, 9, 9)], area=81)
    genseg(f'convert-masks instances.json "it\'s mine" --uncovered {uncovered}')
    said = capsys.readouterr().out.splitlines()
    rest = {"background": "background", "ignore": "ignored"}[uncovered]
    note = f"{rest} as a whole: 3 images (b, deep/c, deep/d); remove these"
    assert sum(note in line for line in said) == 1
    words = shlex.split(said[-1])
    assert words[words.index("--data.root") + 1] == "it's mine"
    names = json.loads(words[words.index("--data.class_names") + 1])
    assert names == ["background", "cow", "sky"][uncovered == "ignore" :]


def test_run_lengths_as_cocos_own_tools_compress_them():
    # pycocotools.mask.encode of a 3 x 4 mask whose second and third columns are 1
    part = np.zeros((3, 4), bool)
    part[:, 1:3] = True
    np.testing.assert_array_equal(decode_rle("363", 3, 4), part)
    long = np.zeros((100, 100), bool)
    long[:, 40:90] = True
    assert (decode_rle(compress(runs(long)), 100, 100) == long).all()
    with pytest.raises(ValueError, match="reshape"):
        decode_rle([1, 2], 3, 4)


def compress(counts):
    """The reverse, by its description in COCO's maskApi."""
    text = ""
    for i, count in enumerate(counts):
        value = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def test_from_labelme(genseg, photos, tmp_path, capsys):
    drawn = io.BytesIO()
    Image.fromarray(np.ones((4, 6), np.uint8)).save(drawn, "PNG")
    bitmap = base64.b64encode(drawn.getvalue()).decode()
    shapes = [
        {"label": "cow", "shape_type": "rectangle", "points": [[24, 20], [12, 0]]},
        {"label": "sky", "shape_type": "mask", "points": [[10, 4], [15, 7]], "mask": bitmap},
        {"label": "cow", "shape_type": "point", "points": [[1, 1]]},
    ]
    for name in NAMES:
        content = {"shapes": shapes, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (photos / f"{name}.json").write_text(json.dumps(content))
    genseg("convert-masks photos mine")
    said = capsys.readouterr().out
    assert "left out, since they have no area: 4 point" in said
    assert "without any outline" not in said
    for mask in written(tmp_path / "mine").values():
        np.testing.assert_array_equal(mask, EXPECTED)
    assert sorted(p.name for p in (tmp_path / "mine/images").rglob("*.*")) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
        "d.jpg",
    ]
    genseg("convert-masks photos other --classes [sky,cow] --uncovered ignore")
    table = np.array([255, 1, 0], np.uint8)  # of background, cow, sky
    np.testing.assert_array_equal(written(tmp_path / "other")["a"], table[EXPECTED])


def write_labelme(folder, **parts):
    shape = {"label": "cow", "shape_type": "polygon", "points": [[1, 1], [9, 1], [9, 9]], **parts}
    content = {"shapes": [shape], "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    (folder / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    (folder / "._a.json").write_bytes(b"of a Mac")


def test_four_corners_of_a_rectangle(genseg, photos, tmp_path):
    corners = [[12, 0], [24, 0], [24, 20], [12, 20]]
    write_labelme(photos, shape_type="rectangle", points=corners)
    genseg("convert-masks photos mine")
    mask = written(tmp_path / "mine")["a"]
    assert (mask[:, 12:] == 1).all()
    assert not mask[:, :12].any()


def test_what_is_ignored_is_no_class(genseg, photos, tmp_path, capsys):
    """And images behind relative links stay images."""
    mask = np.where(EXPECTED == 2, 255, EXPECTED)
    write_masks(tmp_path / "masks", mask, ".png")
    (tmp_path / "links").mkdir()
    for name in NAMES:
        link = tmp_path / "links" / f"{name}.jpg"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to("../" * (name.count("/") + 1) + f"photos/{name}.jpg")
    genseg("convert-masks masks mine --images links")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "class_0 48.3%, class_1 46.7%, ignored 5.0%" in first
    assert '--data.class_names \'["class_0", "class_1"]\'' in last
    assert [row["name"] for row in json.loads((tmp_path / "mine/classes.json").read_text())] == [
        "class_0",
        "class_1",
        "ignored",
    ]
    assert (tmp_path / "mine/images/deep/c.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_categories_of_one_name_are_one_class(genseg, tmp_path):
    write_coco(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["categories"].append({"id": 8, "name": "cow"})
    content["annotations"][1]["category_id"] = 8
    (tmp_path / "a.json").write_text(json.dumps(content))
    genseg("convert-masks a.json mine")
    np.testing.assert_array_equal(written(tmp_path / "mine")["a"], EXPECTED)


def test_circles_of_labelme(genseg, tmp_path):
    (tmp_path / "json").mkdir()
    circle = {"label": "x", "shape_type": "circle", "points": [[12, 10], [12, 5]]}
    content = {"shapes": [circle], "imageHeight": 20, "imageWidth": 24, "imagePath": "a.jpg"}
    (tmp_path / "json" / "a.json").write_text(json.dumps(content))
    genseg("convert-masks json mine")
    assert (written(tmp_path / "mine")["a"] == 1).sum() == pytest.approx(np.pi * 25, rel=0.05)


COLORS = np.array([[0, 0, 0], [128, 64, 0], [0, 128, 0], [224, 224, 192]], np.uint8)
TABLE = "name,r,g,b\nground,0,0,0\ncow,128,64,0\nsky,0,128,0\nvoid,224,224,192\n"


def write_masks(root, pixels, suffix="_mask.png"):
    for name in NAMES:
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix.endswith("npy"):
            np.save(path, pixels)
        else:
            Image.fromarray(pixels).save(path)


def with_void():
    mask = EXPECTED.copy()
    mask[:2] = 3
    return mask


def test_colours_and_suffixes(genseg, photos, tmp_path):
    write_masks(tmp_path / "colored", COLORS[with_void()])
    (tmp_path / "table.csv").write_text(TABLE)
    expected = np.array([0, 1, 2, 255], np.uint8)[with_void()]
    line = "convert-masks colored mine --images photos --mask_suffix _mask --colors table.csv"
    genseg(f"{line} --classes [ground,cow,sky]")
    for mask in written(tmp_path / "mine").values():
        np.testing.assert_array_equal(mask, expected)
    assert (
        np.array(Image.open(tmp_path / "mine/masks/a.png").convert("RGB"))
        == np.where(expected[..., None] == 255, 255, COLORS[with_void()])
    ).all()


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (lambda root: write_masks(root, EXPECTED), {}),
        (lambda root: write_masks(root, EXPECTED[..., None].repeat(3, 2)), {}),
        (lambda root: write_masks(root, EXPECTED.astype(np.int64), "_mask.npy"), {}),
        (lambda root: write_masks(root, EXPECTED[None], "_mask.npy"), {}),
        (lambda root: write_masks(root, COLORS[EXPECTED]), {"colors": COLORS[:3].tolist()}),
        (lambda root: write_masks(root, COLORS[EXPECTED]), {"colors": COLORS.tolist()}),
    ],
    ids=["grey", "equal channels", "npy", "npy 1HW", "colours", "colours and void"],
)
def test_the_same_files_directly(write, arguments, photos):
    """Also in one folder with the images."""
    write(photos)
    (photos / "table.csv").write_text(TABLE)
    data = FolderDataModule(
        photos, 3, images=".", masks=".", mask_suffix="_mask", num_workers=0, **arguments
    )
    dataset = data.split_dataset("train", ())
    for index in range(len(dataset)):
        np.testing.assert_array_equal(dataset.read_mask_labels(index), EXPECTED)
    if arguments:
        assert data.palette == [tuple(color) for color in COLORS[:3].tolist()]


def test_a_table_names_the_classes(photos):
    write_masks(photos, COLORS[with_void()])
    (photos / "table.txt").write_text("0 0 0\tground\n128 64 0\tcow\n0 128 0 sky\n224 224 192 void")
    options = {"images": ".", "masks": ".", "mask_suffix": "_mask", "colors": photos / "table.txt"}
    assert FolderDataModule(photos, **options).class_names == ["ground", "cow", "sky", "void"]
    data = FolderDataModule(photos, class_names=["sky", "cow"], **options)
    mask = data.split_dataset("train", ()).read_mask_labels(0)
    np.testing.assert_array_equal(mask, np.array([255, 1, 0, 255], np.uint8)[with_void()])


FIT = "check --data FolderDataModule --data.root . --data.images photos --data.num_classes 3"


@pytest.mark.parametrize(
    ("write", "line", "message"),
    [
        (
            lambda root: write_masks(root / "masks", EXPECTED),
            FIT,
            "deep/c_mask' ...): set mask_suffix to _mask.",
        ),
        (
            lambda root: write_masks(root / "masks", COLORS[EXPECTED], ".png"),
            f"{FIT} --data.colors [[0,0,0],[128,64,0],[1,2,3]]",
            "holds 1 colours that are not in colors ((0, 128, 0))",
        ),
        (
            lambda root: write_masks(root / "masks", COLORS[EXPECTED], ".png"),
            FIT,
            "is a RGB image but must hold one class number per pixel (grey or palette PNG, 255 = "
            "ignore): list the colours",
        ),
        (
            lambda root: write_masks(root / "masks", EXPECTED * 0.5, ".npy"),
            FIT,
            "is (20, 24) of float64 but must be height x width of integers",
        ),
        (
            lambda root: [(root / "masks" / f"{i}.json").touch() for i in range(120)],
            FIT,
            "no image in folder 'masks', but 120 .json files (0.json, 1.json, 10.json ...): "
            "make masks of them with `genseg convert-masks`.",
        ),
        (
            lambda root: (
                write_masks(root / "photos", EXPECTED, ".npy")
                or [path.unlink() for path in (root / "photos").rglob("*.jpg")]
            ),
            FIT,
            "no image in folder 'photos', but 4 .npy files (a.npy, b.npy, c.npy ...): put images",
        ),
        (lambda root: None, "convert-masks nowhere mine", "source 'nowhere' does not exist"),
        (
            lambda root: write_masks(root / "masks", EXPECTED),
            "convert-masks photos .",
            "masks' is there already",
        ),
        (
            lambda root: write_masks(root / "mine/masks.unfinished", EXPECTED),
            "convert-masks photos mine",
            "masks.unfinished' is there already",
        ),
        (
            lambda root: (
                write_coco(root / "a.json")
                or (root / "mine/images").mkdir(parents=True)
                or (root / "mine/images/a.jpg").write_text("another")
            ),
            "convert-masks a.json mine --images photos",
            "'mine/images/a.jpg' is there already and is not 'photos/a.jpg'",
        ),
        (
            lambda root: (root / "a.json").write_text("{"),
            "convert-masks a.json mine",
            "annotations 'a.json' is no JSON that can be read",
        ),
        (
            lambda root: (root / "a.json").write_text("{}"),
            "convert-masks a.json mine",
            "'a.json' is no COCO file",
        ),
        (
            lambda root: write_coco(root / "a.json", segmentation={"counts": [3, 4]}, area=4),
            "convert-masks a.json mine",
            "has run lengths of 'a.jpg' that cannot be drawn on 24 x 20 pixels",
        ),
        (
            lambda root: write_coco(
                root / "a.json", segmentation={"counts": [480], "size": [24, 20]}
            ),
            "convert-masks a.json mine",
            "has run lengths of 'a.jpg' that cannot be drawn on 24 x 20 pixels (size is [24, 20])",
        ),
        (
            lambda root: write_coco(root / "a.json", segmentation=[[1, 2, 3]]),
            "convert-masks a.json mine",
            "has an outline of 'a.jpg' that cannot be drawn",
        ),
        (
            lambda root: write_coco(root / "a.json", image_id="0"),
            "convert-masks a.json mine",
            "'a.json' has an annotation of image_id '0', which is none of its images (0, 1, 2, 3)",
        ),
        (
            lambda root: write_coco(root / "a.json", twin="../photos/a.png"),
            "convert-masks a.json mine",
            "'a.json' has the file_name '../photos/a.png', which leads out of a folder",
        ),
        (
            lambda root: write_coco(root / "a.json", image_id=None),
            "convert-masks a.json mine",
            "has, among its annotations, one without a proper image_id ({",
        ),
        (
            lambda root: (root / "a.json").write_text(
                '{"images": [], "annotations": [], "categories": null}'
            ),
            "convert-masks a.json mine",
            "'a.json' has no list of categories",
        ),
        (
            lambda root: write_coco(root / "a.json"),
            "convert-masks a.json mine --classes [dog]",
            "classes does nothing where SOURCE is a COCO file: leave it out.",
        ),
        (
            lambda root: write_masks(root, EXPECTED),
            "convert-masks photos mine --uncovered ignore",
            "uncovered does nothing where SOURCE is masks: leave it out.",
        ),
        (
            lambda root: write_labelme(root / "photos", label=None),
            "convert-masks photos mine",
            "'photos/a.json' has, among its shapes, one without a proper label ({",
        ),
        (
            lambda root: write_labelme(root / "photos", points=[[1, 2, 3]]),
            "convert-masks photos mine",
            "'photos/a.json' has a polygon of 'cow' that cannot be drawn",
        ),
        (
            lambda root: [write_masks(root / "two" / x, EXPECTED, ".png") for x in "mn"],
            "convert-masks two mine --images photos",
            "two masks are of the image 'photos/a.jpg', one of them 'n/a'",
        ),
        (
            lambda root: write_masks(root / "mine/masks", EXPECTED, ".png"),
            "convert-masks mine/masks mine",
            "'mine/masks' is there already: give another ROOT.",
        ),
        (
            lambda root: write_coco(root / "a.json", category_id=9),
            "convert-masks a.json mine",
            "'a.json' has an annotation of category_id 9, which is none of its categories (7, 40)",
        ),
        (
            lambda root: write_coco(root / "a.json", twin="a.png"),
            "convert-masks a.json mine",
            "'a.json' has 'a.jpg' and 'a.png', whose masks would share a name",
        ),
        (
            lambda root: write_coco(root / "a.json") or (root / "photos/a.jpg").unlink(),
            "convert-masks a.json mine --images photos",
            "1 masks have no image in 'photos' (a)",
        ),
        (
            lambda root: write_masks(root / "big", EXPECTED.astype(np.int32) * 1000, ".npy"),
            "convert-masks big mine",
            "mask 'a' holds numbers from 0 to 2000",
        ),
        (
            lambda root: (root / "t.txt").write_text("cow 1 2 3") and write_masks(root, EXPECTED),
            "convert-masks photos mine --colors t.txt --classes [cwo]",
            "the table of colours 't.txt' has no class cwo; did you mean cow?",
        ),
    ],
)
def test_one_line_on_what_can_be_mended(write, line, message, fails, photos, tmp_path):
    (tmp_path / "masks").mkdir()
    write(tmp_path)
    if "convert" in line and not line.endswith("."):
        (tmp_path / "masks").rmdir()
    report = fails(line)
    if line.startswith("check") and "problems" in report:
        (path,) = (tmp_path / "data_check").glob("*.json")
        report = str([p["problem"] for p in json.loads(path.read_text())["problems"]])
    assert message in report
    assert "mine/masks mine" in line or not (tmp_path / "mine/masks").exists()
    assert all(path.read_bytes()[:2] == b"\xff\xd8" for path in photos.rglob("*.jpg"))
