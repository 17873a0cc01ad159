"""Sparse labels: drawn ones, files, and what becomes of them on the way to a batch."""

import json
import pickle

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg.data import (
    VOC,
    Blocks,
    CamVid,
    Cityscapes,
    Folder,
    PointFiles,
    Points,
    ScribbleFiles,
    Scribbles,
    SparseDataset,
    SparseMasks,
    SyntheticScenes,
)
from lightning_genseg.data.class_index import class_index
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.sparse.labels import Marks, draw_marks
from lightning_genseg.data.transforms import RandomScaledCrop
from lightning_genseg.data.transforms.pipeline import default_train_transform
from tests.miniatures import make_cityscapes, make_voc

SIZE = (48, 64)
DRAWN = [Points(3), Points(20, per="image"), Scribbles(), Blocks(0.2, 8)]


def ids(sparse):
    return type(sparse).__name__ + getattr(sparse, "per", "")


@pytest.fixture
def root(tmp_path):
    """Four images of three classes in quarters, the first with a border that is no class."""
    for index in range(4):
        mask = np.zeros((40, 50), np.uint8)
        mask[20:] = 1
        mask[:, 25:] = 2
        mask[:3] = 255
        image = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        for folder, array in (("images", image), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{index}.png")
    return tmp_path


def own(root, **arguments):
    return Folder(root, ["sky", "road", "tree"], **arguments)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def clicks(**changes):
    return {**{str(i): [{"x": 5, "y": 6, "cls": 0}] for i in range(4)}, **changes}


# What is drawn from dense masks


@pytest.mark.parametrize("sparse", DRAWN, ids=ids)
def test_a_sample(sparse):
    scenes = SyntheticScenes(4)
    dataset = SparseDataset(scenes, sparse)
    for index in range(4):
        dense, sample = scenes[index], dataset[index]
        assert sample["name"] == dense["name"]
        assert torch.equal(sample["image"], dense["image"])
        assert (sample["mask"].dtype, sample["unlabelled"].dtype) == (torch.int64, torch.bool)
        labelled = sample["mask"] != 255
        assert labelled.any()
        # Void of the dense mask is unlabelled as well.
        assert torch.equal(sample["unlabelled"], ~labelled)
        expected = torch.zeros(6, dtype=torch.bool)
        expected[sample["mask"][labelled].unique()] = True
        assert torch.equal(sample["image_classes"], expected)
        right = sample["mask"][labelled] == dense["mask"][labelled]
        # Only a line of three pixels can step over a border.
        assert right.all() if not isinstance(sparse, Scribbles) else right.float().mean() > 0.9


@pytest.mark.parametrize("sparse", DRAWN, ids=ids)
def test_drawn_labels_depend_on_name_and_seed_only(sparse):
    dataset = SparseDataset(SyntheticScenes(4), sparse)
    other = pickle.loads(pickle.dumps(SparseDataset(SyntheticScenes(4), sparse)))
    expected = [dataset.read_mask_labels(index) for index in range(4)]
    for index in (3, 1, 1, 0, 2):
        assert (other.read_mask_labels(index) == expected[index]).all()
    again = type(sparse)(
        **{k: v for k, v in vars(sparse).items() if k not in ("seed", "size")}, seed=1
    )
    changed = SparseDataset(SyntheticScenes(4), again)
    assert (changed.read_mask_labels(0) != expected[0]).any()


def test_points_per_class():
    """Every class in the image has its three, a class of two pixels two."""
    dense = np.full((30, 40), 255, np.uint8)
    dense[:10], dense[10:20], dense[25, 5:7] = 0, 4, 7
    marks = Points(3).read(Drawing(dense), 0, dense.shape)
    assert np.bincount(marks.classes, minlength=8).tolist() == [3, 0, 0, 0, 3, 0, 0, 2]
    x, y = marks.vertices.astype(int).T
    assert (dense[y, x] == marks.classes).all()
    assert len(np.unique(marks.vertices, axis=0)) == 8


def test_points_per_image_are_uniform_over_classes_then_pixels():
    """A class of a tenth of the pixels gets half of the points; its pixels come up alike (chi-square)."""
    dense = np.zeros((10, 10), np.uint8)
    dense[0] = 1
    drawing = Drawing(dense)
    counts, at = np.zeros(2), np.zeros(10)
    for number in range(1000):
        drawing.name = str(number)
        marks = Points(4, per="image").read(drawing, 0, dense.shape)
        assert len(marks.classes) == 4
        counts += np.bincount(marks.classes, minlength=2)
        at += np.bincount(marks.vertices[marks.classes == 1, 0].astype(int), minlength=10)
    share = counts[1] / counts.sum()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / 4000)
    assert ((at - at.mean()) ** 2 / at.mean()).sum() < 27.9  # 0.1 % of chi-square with 9 degrees


@pytest.mark.parametrize("sparse", DRAWN, ids=ids)
@pytest.mark.parametrize("kind", ["void", "one pixel", "one class"])
def test_poor_masks(sparse, kind):
    dense = np.full((20, 30), 255, np.uint8)
    if kind == "one pixel":
        dense[7, 9] = 2
    elif kind == "one class":
        dense[:] = 2
    sample = SparseDataset(Drawing(dense), sparse)[0]
    labelled = sample["mask"] != 255
    expected = {2} if kind == "one class" else set() if kind == "void" else {2}
    if not isinstance(sparse, Blocks):  # blocks may lie beside the pixel
        assert set(sample["mask"][labelled].tolist()) == expected
        assert sample["image_classes"].nonzero().flatten().tolist() == sorted(expected)
    assert torch.equal(sample["unlabelled"], ~labelled)


def test_scribbles_stay_inside_wide_regions():
    dense = np.zeros((100, 120), np.uint8)
    dense[30:80, 20:100] = 1
    dense[40:70, 50:60] = 255  # a hole
    labels = SparseDataset(Drawing(dense), Scribbles()).read_mask_labels(0)
    assert (labels[labels < 255] == dense[labels < 255]).all()
    assert np.bincount(labels.ravel())[:2].min() > 60  # long, not dots


def test_blocks_are_whole():
    dense = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50) % 3
    raster = Blocks(0.25, 4).read(Drawing(dense), 0, dense.shape)
    cells = (~raster.unlabelled).reshape(4, 10, 50)[:, :, [0, 13, 25, 38]]
    assert (cells == cells[:, :1]).all()
    assert (~raster.unlabelled).sum() == pytest.approx(0.25 * dense.size, rel=0.1)
    assert (raster.labels[~raster.unlabelled] == dense[~raster.unlabelled]).all()


class Drawing:
    """A data set of one image in memory."""

    def __init__(self, labels, num_classes=10):
        self.labels, self.num_classes, self.name = labels, num_classes, "drawing"

    def __len__(self):
        return 1

    def read_pixels(self, index):
        return np.zeros((*self.labels.shape, 3), np.uint8)

    def read_mask_labels(self, index):
        return self.labels.copy()

    def sample_name(self, index):
        return self.name


# Through the transforms


def follow(transforms, seed=0, size=(60, 80)):
    """Where points and the pixels under them go: pairs of (x, y), those inside."""
    rng = np.random.default_rng(seed)
    places = rng.choice(size[0] * size[1], 40, replace=False)
    dense = np.full(size, 255, np.uint8)
    dense.ravel()[places] = np.arange(40)
    dense = np.kron(dense, np.ones((5, 5), np.uint8))  # a pixel would vanish in a smaller image
    drawing = Drawing(dense, 40)
    marks = []
    for value in range(40):
        y, x = np.argwhere(dense == value).mean(0)
        marks.append((x, y))
    moved = SparseDataset(drawing, Fixed(np.array(marks)), transforms)[(0, seed)]["mask"]
    areas = SparseDataset(drawing, Fixed(dense), transforms)[(0, seed)]["mask"]
    return moved.numpy(), areas.numpy()


class Fixed(Points):
    def __init__(self, what):
        super().__init__()
        self.what, self.has_marks = what, what.shape[1] == 2

    def read(self, dataset, index, shape):
        from lightning_genseg.data.sparse.labels import Raster

        if not self.has_marks:
            return Raster(self.what, self.what == 255)
        return Marks(
            self.what, np.arange(len(self.what)), np.arange(len(self.what), dtype=np.uint8)
        )


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [A.ColorJitter()],
        [A.HorizontalFlip(p=1)],
        [A.Resize(170, 210)],
        [A.RandomScale((0.2, 0.5), p=1), A.PadIfNeeded(500, 500, fill=0, fill_mask=255)],
        [A.Rotate((30, 30), p=1, fill_mask=255), A.RandomCrop(200, 200)],
        [A.Affine(scale=1.3, shear=10, translate_percent=0.1, p=1, fill_mask=255)],
        [A.RandomRotate90(p=1), A.Transpose(p=1)],
        [RandomScaledCrop(250, 300)],
        [RandomScaledCrop(500, 600, scale=(0.6, 0.8))],
        default_train_transform((200, 300)),
    ],
    ids=lambda t: "+".join(type(x).__name__ for x in t) or "none",
)
def test_points_move_as_the_pixels_under_them(transforms):
    seen, offs = 0, []
    for seed in range(3):
        points, areas = follow(transforms, seed)
        for value in range(40):
            place = np.argwhere(points == value)
            assert len(place) <= 1
            if len(place):
                seen += 1
                # In the middle of an area, unless the border cuts it.
                own = np.argwhere(areas == value)
                if own.size and own.min() > 0 and (own.max(0) < np.array(areas.shape) - 1).all():
                    off = place[0] - (own.min(0) + own.max(0)) / 2
                    assert np.abs(off).max() <= 1, (value, seed, off)
                    offs.append(off)
    assert seen >= 20
    # Masks are cut down to the nearest pixel, which shifts areas by up to half of one; points would
    # shift all alike.
    assert np.abs(np.mean(offs, 0)).max() <= 0.6


def test_no_point_is_lost_to_a_smaller_image():
    """Of masks with the points in them, most would be."""
    scenes = SyntheticScenes(4, size=(128, 160))
    dataset = SparseDataset(scenes, Points(3), [A.Resize(32, 40)])
    sparse = SparseDataset(scenes, Points(3))
    for index in range(4):
        wanted = len(sparse.read_marks(index).classes)
        drawn = int((dataset[index]["mask"] != 255).sum())
        assert drawn >= wanted - 2  # two that fall on one pixel
        small = A.Resize(32, 40)(
            image=sparse.read_pixels(index), mask=sparse.read_mask_labels(index)
        )
        assert (small["mask"] != 255).sum() < wanted / 3


def test_exact_zoom_by_two():
    """The middle of pixel 10 lies between 20 and 21 of the double image."""
    dataset = SparseDataset(
        Drawing(np.zeros((30, 40), np.uint8)),
        Fixed(np.array([[10.0, 6.0]])),
        [RandomScaledCrop(60, 80, scale=(2.0, 2.0))],
    )
    ((y, x),) = (dataset[0]["mask"] == 0).nonzero().tolist()
    assert (x, y) == (21, 13)


def test_padding_is_neither_labelled_nor_unlabelled():
    dense = np.zeros((20, 30), np.uint8)
    pad = [A.PadIfNeeded(50, 50, position="top_left", fill=0, fill_mask=255)]
    for sparse in (Points(30, size=9), Scribbles(), Blocks(0.5)):
        sample = SparseDataset(Drawing(dense), sparse, pad)[0]
        inside = torch.zeros(50, 50, dtype=torch.bool)
        inside[:20, :30] = True
        assert torch.equal(sample["unlabelled"] | (sample["mask"] != 255), inside)
        assert not (sample["unlabelled"] & (sample["mask"] != 255)).any()


def test_classes_of_the_whole_image():
    """A crop without any label still knows them."""
    dense = np.full((40, 40), 255, np.uint8)
    dense[:5], dense[5:9] = 3, 1
    sample = SparseDataset(Drawing(dense), Points(2), [A.Crop(0, 20, 40, 40)])[0]
    assert (sample["mask"] == 255).all()
    assert sample["unlabelled"].all()
    assert sample["image_classes"].nonzero().flatten().tolist() == [1, 3]


class Shuffle(A.DualTransform):
    def apply(self, img, **params):
        return img[::-1].copy()


def test_a_transform_that_cannot_move_points():
    dense = Drawing(np.zeros((20, 30), np.uint8))
    for transforms in ([Shuffle()], [A.OneOf([A.HorizontalFlip(), Shuffle()])]):
        with pytest.raises(ValueError, match="Shuffle moves pixels but not points"):
            SparseDataset(dense, Points(), transforms)
    assert (SparseDataset(dense, Blocks(1.0), [Shuffle(p=1)])[0]["mask"] == 0).all()


@pytest.mark.parametrize(("size", "pixels"), [(1, 1), (2, 4), (3, 9), (4, 12), (5, 21)])
def test_discs(size, pixels):
    """Pixels whose middle is at most half the diameter from the middle, counted by hand."""
    marks = Marks(np.array([[10.0, 10.0]]), np.zeros(1, int), np.array([4], np.uint8))
    canvas = draw_marks(marks, (21, 21), size)
    assert (canvas == 4).sum() == pixels
    at_corner = marks._replace(vertices=np.array([[0.0, 0.0]]))
    assert draw_marks(at_corner, (21, 21), size)[0, 0] == 4
    outside = marks._replace(vertices=np.array([[-50.0, 1e30]]))
    assert (draw_marks(outside, (21, 21), size) == 255).all()


def test_a_line_that_crosses_the_image():
    marks = Marks(np.array([[-30.0, 10], [60, 10]]), np.zeros(2, int), np.array([0], np.uint8))
    assert (draw_marks(marks, (20, 20), 3)[9:12] == 0).all()


# Files


def test_points_of_voc(tmp_path):
    root = make_voc(tmp_path, SIZE)
    files = ["voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"]
    voc = VOC(root)
    dataset = SparseDataset(voc, PointFiles(files), root=root)
    listed = [json.loads((root / file).read_text()) for file in files]
    for index, sample in enumerate(voc.samples):
        points = [point for file in listed for point in file[sample.name]]
        labels = dataset.read_mask_labels(index)
        assert set(np.unique(labels)) - {255} == {point["cls"] for point in points}
        marks = dataset.read_marks(index)
        assert marks.vertices.tolist() == [[point["x"], point["y"]] for point in points]
        dense = voc.read_mask_labels(index)
        assert all(dense[int(p["y"]), int(p["x"])] in (p["cls"], 255) for p in points)
    assert not dataset[0]["image_classes"][0]  # an image without background point
    assert dataset[1]["image_classes"][0]


def test_scribbles_of_voc(tmp_path):
    root = make_voc(tmp_path, SIZE)
    voc = VOC(root)
    dataset = SparseDataset(voc, ScribbleFiles("voc_scribbles"), root=root)
    for index in range(len(voc)):
        labels, dense = dataset.read_mask_labels(index), voc.read_mask_labels(index)
        present = set(np.unique(dense)) - {255}
        assert set(np.unique(labels)) - {255} <= present
        assert present - set(np.unique(labels)) <= {0}  # drawn over by a neighbour's line
        thin = SparseDataset(voc, ScribbleFiles("voc_scribbles", size=1), root=root)
        line = thin.read_mask_labels(index)
        drawn = (line < 255) & (dense < 255)
        assert (line[drawn] == dense[drawn]).all()


def test_clicks_of_cityscapes(tmp_path):
    root = make_cityscapes(tmp_path, SIZE, train_ids=True)
    sparse = PointFiles("cityscapes_synthetic_clicks.json", size=1)
    cityscapes = Cityscapes(root)
    dataset = SparseDataset(cityscapes, sparse, root=root)
    expected = [dataset.read_mask_labels(index) for index in range(len(dataset))]
    for index, labels in enumerate(expected):
        drawn = labels < 255
        assert drawn.sum() > 2
        assert (labels[drawn] == cityscapes.read_mask_labels(index)[drawn]).all()
    # The numbers of the file are labelIds, whatever the masks hold.
    trained = Cityscapes(root, labels="labelTrainIds")
    with pytest.raises(
        ValueError, match=r"clicks.json', image 'aachen_000000_000019': cls \d+ is no class.*ids"
    ):
        SparseDataset(trained, sparse, root=root)[0]
    table = dict(Cityscapes.IDS)
    dataset = SparseDataset(trained, PointFiles(sparse.files, table, size=1), root=root)
    assert all((dataset.read_mask_labels(i) == one).all() for i, one in enumerate(expected))


def test_own_clicks(root):
    """By number or name of the class, by name or file of the image; 255 and held out classes are no labels."""
    file = write(
        root / "clicks.json",
        {
            "0": [{"x": 3, "y": 10, "cls": "sky"}, {"x": 49.6, "y": 39, "cls": 2}],
            "1.png": [{"x": 1, "y": 30, "cls": 1}, {"x": 9, "y": 9, "cls": 255}],
            "2": [],
            "3.JPG": [{"x": 30, "y": 10, "cls": 2}],
        },
    )
    dataset = own(root)
    sparse = SparseDataset(dataset, PointFiles(file, size=1))
    assert np.argwhere(sparse.read_mask_labels(0) != 255).tolist() == [[10, 3], [39, 49]]
    assert sparse.read_mask_labels(0)[10, 3] == 0
    assert [len(sparse.read_marks(i).classes) for i in range(4)] == [2, 1, 0, 1]
    assert sparse[2]["unlabelled"].all()
    dataset.hold_out(["road"])
    sparse = SparseDataset(dataset, PointFiles(file, size=1))
    assert [sparse.read_marks(i).classes.tolist() for i in range(4)] == [[0, 1], [], [], [1]]


def test_images_of_one_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        for kind, shape in (("images", (9, 9, 3)), ("masks", (9, 9))):
            (tmp_path / kind / folder).mkdir(parents=True)
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / kind / folder / "x.png")
    file = write(tmp_path / "c.json", {"x": [{"x": 1, "y": 1, "cls": 0}], "a/x": []})
    with pytest.raises(MissingFiles, match=r"1 of 2 images are not in .*c.json' \('b/x'\)"):
        SparseDataset(own(tmp_path), PointFiles(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"points.json' is no JSON file \(.*correct or restore it"),
        ([1], r"points.json' must hold a list of points for each image name"),
        (clicks(**{"0": {"x": 1}}), "must hold a list of points"),
        (clicks(**{"0": [{"x": 1, "cls": 0}]}), r"points.json', image '0': \{'x': 1, 'cls': 0\} is no point, write"),
        (clicks(**{"0": [5]}), "5 is no point"),
        (clicks(**{"0": [{"x": "a", "y": 1, "cls": 0}]}), "is no point"),
        (clicks(**{"0": [{"x": 5, "y": 6, "cls": 3}]}), r"image '0': cls 3 is no class.*ids"),
        (clicks(**{"0": [{"x": 5, "y": 6, "cls": "sea"}]}), r"there is no class 'sea' \(known: sky, road, tree\)"),
        (clicks(**{"0": [{"x": 5, "y": 45, "cls": 0}]}), r"the point x=5, y=45 lies outside the image of 40x50"),
        (clicks(**{"0": [{"x": float("nan"), "y": 5, "cls": 0}]}), "lies outside the image"),
    ],
)  # fmt: skip
def test_broken_point_files(root, content, message):
    file = write(root / "points.json", content)
    with pytest.raises(ValueError, match=message):
        SparseDataset(own(root), PointFiles(file))[0]


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"x": 5, "y": 6, "cls": [1]}, "is no point"),
        ({"x": 5, "y": 6, "cls": True}, "is no point"),
        ({"x": 5, "y": 6, "cls": 1.5}, "is no point"),
        ({"x": [1], "y": [2], "cls": 1}, "is no point"),
        ({"x": [1, 2], "y": [2, 3], "cls": 1}, "is no point"),
    ],
)  # fmt: skip
def test_points_of_the_wrong_kind(root, point, message):
    file = write(root / "points.json", clicks(**{"0": [point]}))
    with pytest.raises(ValueError, match=rf"points.json', image '0': .*{message}"):
        SparseDataset(own(root), PointFiles(file))[0]


def test_wrong_files_of_points(root):
    twice = write(root / "twice.json", '{"0": [], "1": [], "0": [{"x": 1, "y": 1, "cls": 0}]}')
    with pytest.raises(ValueError, match=r"^'.*twice.json' holds '0' twice"):
        SparseDataset(own(root), PointFiles(twice))
    with pytest.raises(ValueError, match=r"images' is no file: give the JSON file"):
        SparseDataset(own(root), PointFiles(root / "images"))
    marked = root / "bom.json"
    marked.write_text(json.dumps(clicks()), encoding="utf-8-sig")
    assert SparseDataset(own(root), PointFiles(marked))[0]["image_classes"].tolist()[0]
    with pytest.raises(ValueError, match=r"ids leads to \[3\] but there are 3 classes"):
        SparseDataset(own(root), PointFiles(marked, {0: 3}))


@pytest.mark.parametrize("points", [[], [{"x": 5, "y": 6, "cls": 255}]])
def test_files_without_any_point(root, points):
    file = write(root / "points.json", {str(i): points for i in range(4)})
    with pytest.raises(
        ValueError, match=r"points.json' holds no point of a class for any of the 4"
    ):
        SparseDataset(own(root), PointFiles(file))


def test_scribbles_without_any_line(root):
    text = "<annotation><size><width>50</width><height>40</height></size>{}</annotation>"
    for name in range(4):
        write(root / f"{name}.xml", text.format("<polygon><tag>sky</tag></polygon>"))
    with pytest.raises(ValueError, match=r"none of the 4 files in '.*' holds a line"):
        SparseDataset(own(root), ScribbleFiles(root))
    line = "<polygon><tag>sky</tag><point><X>1</X><Y>1</Y></point></polygon>"
    write(root / "3.xml", text.format(line))
    assert SparseDataset(own(root), ScribbleFiles(root))[3]["image_classes"][0]


@pytest.mark.parametrize(
    "sparse", [PointFiles("p.json"), ScribbleFiles("xml"), SparseMasks(9, "x")], ids=ids
)
def test_files_for_data_without_files(sparse):
    with pytest.raises(
        ValueError, match=rf"{type(sparse).__name__} finds labels by .* which Synth"
    ):
        SparseDataset(SyntheticScenes(2), sparse)


def test_mask_and_image_classes_agree():
    """A point that another covers in the whole image is seen in a larger one."""
    marks = np.array([[10.0, 10.0], [11.0, 10.0], [10.0, 11.0], [9.0, 10.0], [10.0, 9.0]])
    drawing = Drawing(np.zeros((30, 40), np.uint8))
    fixed = Fixed(marks)
    fixed.size = 3
    assert 0 not in SparseDataset(drawing, fixed).read_mask_labels(0)
    sample = SparseDataset(drawing, fixed, [A.Resize(300, 400)])[0]
    assert (sample["mask"] == 0).any()
    assert sample["image_classes"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_missing_files(root):
    with pytest.raises(FileNotFoundError, match=r"sparse labels 'p.json', '.*p.json' do not exist"):
        SparseDataset(own(root), PointFiles("p.json"), root=root)
    file = write(root / "p.json", {"0": [], "2": []})
    with pytest.raises(
        MissingFiles, match=r"2 of 4 images are not in '.*p.json' \('1', '3'\): add"
    ):
        SparseDataset(own(root), PointFiles("p.json"), root=root)
    assert file.is_file()
    (root / "xml").mkdir()
    with pytest.raises(
        MissingFiles, match=r"4 of 4 images have no scribbles \(expected: '.*0.xml'"
    ):
        SparseDataset(own(root), ScribbleFiles("xml"), root=root)
    with pytest.raises(
        MissingFiles, match=r"4 of 4 images have no sparse masks \(expected: '.*0_x.png'"
    ):
        SparseDataset(own(root), SparseMasks(9, "xml", "_x.png"), root=root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>", r"scribbles '.*0.xml' cannot be read"),
        ("<annotation><polygon><point><X>1</X><Y>1</Y></point></polygon></annotation>", r"are for an image of 0x0 but it is 40x50"),
        ("{size}<polygon><tag>sea</tag><point><X>1</X><Y>1</Y></point></polygon>", "no class 'sea'"),
        ("{size}<polygon><tag>sky</tag><point><X>1</X></point></polygon>", "cannot be read"),
        ("{size}<polygon><tag>sky</tag><point><X>60</X><Y>1</Y></point></polygon>", "x=60, y=1 lies outside"),
    ],
)  # fmt: skip
def test_broken_scribbles(root, content, message):
    size = "<size><width>50</width><height>40</height></size>"
    for name in range(4):
        text = f"<annotation>{content}</annotation>" if "{" in content else content
        write(root / f"{name}.xml", text.replace("{size}", size))
    with pytest.raises(ValueError, match=message):
        SparseDataset(own(root), ScribbleFiles(root))[0]


def test_names_of_scribbles(root):
    text = (
        "<annotation><size><width>50</width><height>40</height></size><polygon><tag>water</tag>"
        "<point><X>4</X><Y>9</Y></point><point><X>8</X><Y>9</Y></point></polygon></annotation>"
    )
    for name in range(4):
        write(root / f"{name}.xml", text)
    dataset = SparseDataset(own(root), ScribbleFiles(root, {"water": "road"}, size=1))
    assert np.argwhere(dataset.read_mask_labels(0) == 1).tolist() == [[9, x] for x in range(4, 9)]


def sparse_files(root, value, labelled=10, void=0):
    (root / "brushed").mkdir(exist_ok=True)
    for name in range(4):
        raw = np.full(2000, value, np.uint8)
        raw[:labelled], raw[labelled : labelled + void] = 1, 255
        Image.fromarray(raw.reshape(40, 50)).save(root / "brushed" / f"{name}.png")


def test_sparse_masks(root):
    """255 is ignored, the named value unlabelled; where that is 255, nothing is ignored."""
    sparse_files(root, 7, void=30)
    dataset = SparseDataset(own(root), SparseMasks(7, "brushed"), root=root)
    sample = dataset[0]
    assert (sample["mask"] == 1).sum() == 10
    assert sample["unlabelled"].sum() == 2000 - 40
    assert sample["image_classes"].tolist() == [False, True, False]
    assert dataset.read_marks(0) is None
    sparse_files(root, 255)
    sample = SparseDataset(own(root), SparseMasks(255, "brushed"), root=root)[0]
    assert sample["unlabelled"].sum() == 2000 - 10
    table = SparseMasks(255, "brushed", ids={1: 2})
    assert (SparseDataset(own(root), table, root=root)[0]["mask"] == 2).sum() == 10


def test_unlabelled_fed_as_ignore(root):
    """Acceptance g of the method: the trap that switches it off silently."""
    sparse_files(root, 255)
    with pytest.raises(
        ValueError,
        match=r"0.png' holds no pixel of the value 3 \(unlabelled\), but 100% of 255, which means ignored",
    ):
        SparseDataset(own(root), SparseMasks(3, "brushed"), root=root)[0]


def test_dense_masks_are_refused(root):
    sparse_files(root, 7, labelled=500)
    dataset = SparseDataset(own(root), SparseMasks(7, "brushed"), root=root)
    with pytest.raises(
        ValueError, match=r"0.png' labels 25% of its pixels, more than max_labelled \(20%\)"
    ):
        dataset[0]
    dataset = SparseDataset(own(root), SparseMasks(7, "brushed", max_labelled=0.3), root=root)
    assert (dataset[0]["mask"] == 1).sum() == 500
    with pytest.raises(ValueError, match="holds no pixel of the value 9"):
        SparseDataset(own(root), SparseMasks(9))[0]  # the dense masks themselves
    with pytest.raises(ValueError, match="unlabelled is 0, which is class 'sky'"):
        SparseDataset(own(root), SparseMasks(0, "brushed"), root=root)
    with pytest.raises(ValueError, match="holds the values 7, which are no classes"):
        SparseDataset(own(root), SparseMasks(255, "brushed"), root=root)[0]


def test_sizes_that_differ(root):
    sparse_files(root, 7)
    Image.fromarray(np.full((20, 25), 7, np.uint8)).save(root / "brushed" / "0.png")
    with pytest.raises(
        ValueError, match=r"mask '.*brushed/0.png' is 20x25 but image '.*' is 40x50"
    ):
        SparseDataset(own(root), SparseMasks(7, "brushed"), root=root)[0]
    Image.fromarray(np.zeros((20, 25), np.uint8)).save(root / "masks" / "1.png")
    with pytest.raises(ValueError, match=r"mask '.*masks/1.png' is 20x25 but image"):
        SparseDataset(own(root), Points())[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Points(0), "count is 0 but must be at least 1"),
        (lambda: Points(seed=-1), "seed of sparse labels is -1"),
        (lambda: Points(size=0), "size of sparse labels is 0"),
        (lambda: Scribbles(min_area=2), "min_area is 2 but must be a share"),
        (lambda: Blocks(0), "share is 0 but must be above 0"),
        (lambda: Blocks(grid=0), "grid is 0 but"),
        (lambda: PointFiles([]), "files is empty"),
        (lambda: SparseMasks(-1), "unlabelled is -1"),
        (lambda: SparseMasks(3, max_labelled=0), "max_labelled is 0"),
        (lambda: SparseMasks(3, ids={3: 1}), "ids maps 3 to class 1 but unlabelled says"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_data_set_of_another_kind():
    with pytest.raises(
        ValueError, match=r"list has no read_pixels\(index\), which sparse labels need"
    ):
        SparseDataset([1, 2], Points())


# Counting


def test_class_index_counts_the_sparse_labels(root, tmp_path):
    cache = tmp_path / "cache"
    dense = class_index(own(root), cache)
    counts = class_index(SparseDataset(own(root), Points(2)), cache)
    assert counts.tolist() == [[2, 2, 2]] * 4
    assert (class_index(own(root), cache) == dense).all()
    assert class_index(SparseDataset(own(root), Points(3)), cache).tolist() == [[3, 3, 3]] * 4
    assert len(list(cache.iterdir())) == 3
    file = write(root / "p.json", clicks())
    sparse = PointFiles(file, size=1)
    assert class_index(SparseDataset(own(root), sparse), cache).tolist() == [[1, 0, 0]] * 4
    write(file, clicks(**{"0": [{"x": 5, "y": 30, "cls": 1}, {"x": 5, "y": 34, "cls": 1}]}))
    sparse = PointFiles(file, size=1)
    assert class_index(SparseDataset(own(root), sparse), cache)[0].tolist() == [0, 2, 0]


def test_counts_come_from_the_cache(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = class_index(SparseDataset(own(root), Points(2)), cache)
    monkeypatch.setattr(Points, "read", lambda *_: pytest.fail("counted again"))
    assert (class_index(SparseDataset(own(root), Points(2)), cache) == expected).all()


# Real data


def test_camvid(shared_dir):
    dataset = SparseDataset(CamVid(shared_dir / "data" / "camvid"), Points(3))
    dense = dataset.dataset
    for index in range(0, len(dataset), 60):
        labels, truth = dataset.read_mask_labels(index), dense.read_mask_labels(index)
        counts = np.bincount(labels[labels < 255], minlength=11)
        assert (
            counts.tolist() == np.minimum(3, np.bincount(truth[truth < 255], minlength=11)).tolist()
        )
        assert (labels[labels < 255] == truth[labels < 255]).all()


def test_published_files_of_voc(shared_dir):
    """Sizes of the lists and of what was clicked, as the authors' files hold them."""
    root = shared_dir / "data" / "VOCdevkit" / "VOC2012"
    files = ["voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"]
    if not all((root / file).is_file() for file in files):
        pytest.skip(f"no PASCAL VOC with points in {root}")
    listed = [json.loads((root / file).read_text()) for file in files]
    assert [len(one) for one in listed] == [12180, 12031]
    assert [round(np.mean([len(p) for p in one.values()]), 2) for one in listed] == [2.75, 2.72]
    dataset = SparseDataset(VOC(root), PointFiles(files), root=root)
    assert len(dataset) == 10582
    classes = [{p["cls"] for one in listed for p in one.get(s.name, [])} for s in dataset.samples]
    assert sum(0 not in held for held in classes) == 21
    assert sum(not held - {0} for held in classes) == 17
