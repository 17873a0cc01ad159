"""Sparse labels: drawn ones, files, and what becomes of them on the way to a batch."""

import copy
import json
import pickle

import albumentations as A
import numpy as np
import pytest
import torch

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
from tests.miniatures import make_cityscapes, make_voc, save

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
        save(image, tmp_path / "images" / f"{index}.png")
        save(mask, tmp_path / "masks" / f"{index}.png")
    return tmp_path


def own(root, sparse=None):
    """The folder of `root`, or its sparse labels."""
    folder = Folder(root, ["sky", "road", "tree"])
    return folder if sparse is None else SparseDataset(folder, sparse, root=root)


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
    again = copy.copy(sparse)
    again.seed = 1
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
    """A class of a tenth of the pixels gets half of the points, spread evenly (chi-square)."""
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
    expected = set() if kind == "void" else {2}
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


class Fixed(Points):
    """Given points, each of a class of its own."""

    def __init__(self, *points, size=1, **kwargs):
        super().__init__(size=size, **kwargs)
        self.points = np.array(points, float)

    def read(self, dataset, index, shape):
        each = np.arange(len(self.points))
        return Marks(self.points, each, each.astype(np.uint8))


def test_no_point_is_lost_to_a_smaller_image():
    """Of masks with the points in them, most would be."""
    scenes = SyntheticScenes(4, size=(128, 160))
    dataset = SparseDataset(scenes, Points(3), [A.Resize(32, 40)])
    sparse = SparseDataset(scenes, Points(3))
    for index in range(4):
        wanted = len(sparse.read_marks(index).classes)
        drawn = int((dataset[index]["mask"] != 255).sum())
        assert drawn >= wanted - 2  # two that fall on one pixel
        dense = {"image": sparse.read_pixels(index), "mask": sparse.read_mask_labels(index)}
        assert (A.Resize(32, 40)(**dense)["mask"] != 255).sum() < wanted / 3


def test_exact_zoom_by_two():
    """The middle of pixel 10 lies between 20 and 21 of the double image."""
    drawing, zoom = Drawing(np.zeros((30, 40), np.uint8)), RandomScaledCrop(60, 80, (2.0, 2.0))
    dataset = SparseDataset(drawing, Fixed((10, 6)), [zoom])
    ((y, x),) = (dataset[0]["mask"] == 0).nonzero().tolist()
    assert (x, y) == (21, 13)


@pytest.mark.parametrize(("scale", "pixels"), [(2.0, 36), (1.0, 9), (1 / 3, 1)])
def test_points_that_are_zoomed_with_the_image(scale, pixels):
    """Three pixels wide there, and not in the crop."""
    drawing = Drawing(np.zeros((30, 42), np.uint8))
    crop = RandomScaledCrop(60, 84, (scale, scale))
    dataset = SparseDataset(drawing, Fixed((10, 7), size=3, zoom=True), [crop])
    sample = dataset[0]
    labelled = sample["mask"] == 0
    assert labelled.sum() == pixels
    assert sample["image_classes"].nonzero().tolist() == [[0]]
    inside = round(30 * scale) * round(42 * scale)
    assert sample["unlabelled"].sum() == inside - pixels
    assert not (sample["unlabelled"] & labelled).any()


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
    message = r"clicks.json', image 'aachen_000000_000019': cls \d+ is no class.*ids"
    with pytest.raises(ValueError, match=message):
        SparseDataset(trained, sparse, root=root)[0]
    table = dict(Cityscapes.IDS)
    dataset = SparseDataset(trained, PointFiles(sparse.files, table, size=1), root=root)
    assert all((dataset.read_mask_labels(i) == one).all() for i, one in enumerate(expected))


def test_own_clicks(root):
    """By number or name of the class, by name or file of the image; 255 is no label."""
    file = write(
        root / "clicks.json",
        {
            "0": [{"x": 3, "y": 10, "cls": "sky"}, {"x": 49.6, "y": 39, "cls": 2}],
            "1.png": [{"x": 1, "y": 30, "cls": 1}, {"x": 9, "y": 9, "cls": 255}],
            "2": [],
            "3.JPG": [{"x": 30, "y": 10, "cls": 2}],
        },
    )
    sparse = own(root, PointFiles(file, size=1))
    assert np.argwhere(sparse.read_mask_labels(0) != 255).tolist() == [[10, 3], [39, 49]]
    assert sparse.read_mask_labels(0)[10, 3] == 0
    assert [len(sparse.read_marks(i).classes) for i in range(4)] == [2, 1, 0, 1]
    assert sparse[2]["unlabelled"].all()
    dataset = own(root)
    dataset.hold_out(["road"])
    sparse = SparseDataset(dataset, PointFiles(file, size=1))
    assert [sparse.read_marks(i).classes.tolist() for i in range(4)] == [[0, 1], [], [], [1]]


def test_own_numbers_of_classes_of_which_some_are_unknown(root):
    """`ids` leads to the classes of the files; those that remain are numbered anew."""
    dots = {str(i): [{"x": 3, "y": 10, "cls": 7}, {"x": 9, "y": 9, "cls": 8}] for i in range(4)}
    points = PointFiles(write(root / "clicks.json", dots), {7: 1, 8: 2}, size=1)
    sparse_files(root, 7)
    for sparse in (points, SparseMasks(7, "brushed", ids={1: 2})):
        dataset = own(root)
        dataset.hold_out(["road"])  # class 1, so that 2 becomes 1
        labels = SparseDataset(dataset, sparse, root=root).read_mask_labels(0)
        assert np.unique(labels).tolist() == [1, 255]


def test_images_of_one_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        save(np.zeros((9, 9, 3), np.uint8), tmp_path / "images" / folder / "x.png")
        save(np.zeros((9, 9), np.uint8), tmp_path / "masks" / folder / "x.png")
    file = write(tmp_path / "c.json", {"x": [{"x": 1, "y": 1, "cls": 0}], "a/x": []})
    with pytest.raises(MissingFiles, match=r"1 of 2 images are not in .*c.json' \('b/x'\)"):
        own(tmp_path, PointFiles(file))


POINT = {"x": 5, "y": 6, "cls": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"points.json' is no JSON that can be read \(.*correct or restore it"),
        ("[1]", r"points.json' must hold a list of points for each image name"),
        (clicks(**{"0": {"x": 1}}), "must hold a list of points"),
        ('{"0": [], "1": [], "0": [{"x": 1}]}', r"^'.*points.json' holds '0' twice"),
        ({str(i): [] for i in range(4)}, "holds no point of a class for any of the 4"),
        ({str(i): [{**POINT, "cls": 255}] for i in range(4)}, "holds no point of a class"),
        ([{"x": 1, "cls": 0}], r"points.json', image '0': \{'x': 1, 'cls': 0\} is no point, write"),
        ([5], "5 is no point"),
        ([{**POINT, "x": "a"}], "is no point"),
        ([{**POINT, "x": [1], "y": [2]}], "is no point"),
        ([{**POINT, "x": [1, 2], "y": [2, 3]}], "is no point"),
        *(([{**POINT, "cls": kind}], "image '0': .* is no point") for kind in ([1], True, 1.5)),
        ([{**POINT, "cls": 3}], r"image '0': cls 3 is no class.*ids"),
        ([{**POINT, "cls": "sea"}], r"there is no class 'sea' \(known: sky, road, tree\)"),
        ([{**POINT, "y": 45}], r"the point x=5, y=45 lies outside the image of 40x50"),
        ([{**POINT, "y": float("nan")}], "lies outside the image"),
    ],
)  # fmt: skip
def test_broken_point_files(root, content, message):
    content = clicks(**{"0": content}) if isinstance(content, list) else content
    file = write(root / "points.json", content)
    with pytest.raises(ValueError, match=message):
        own(root, PointFiles(file))[0]


def test_point_files_of_another_kind(root):
    with pytest.raises(ValueError, match=r"images' cannot be read"):
        own(root, PointFiles(root / "images"))
    marked = root / "bom.json"
    marked.write_text(json.dumps(clicks()), encoding="utf-8-sig")
    assert own(root, PointFiles(marked))[0]["image_classes"].tolist()[0]
    with pytest.raises(ValueError, match=r"ids leads to \[3\] but there are 3 classes"):
        own(root, PointFiles(marked, {0: 3}))


@pytest.mark.parametrize(
    "sparse", [PointFiles("p.json"), ScribbleFiles("xml"), SparseMasks(9, "x")], ids=ids
)
def test_files_for_data_without_files(sparse):
    expected = rf"{type(sparse).__name__} finds labels by .* which Synth"
    with pytest.raises(ValueError, match=expected):
        SparseDataset(SyntheticScenes(2), sparse)


def test_mask_and_image_classes_agree():
    """A point that another covers in the whole image is seen in a larger one."""
    drawing = Drawing(np.zeros((30, 40), np.uint8))
    fixed = Fixed((10, 10), (11, 10), (10, 11), (9, 10), (10, 9), size=3)
    assert 0 not in SparseDataset(drawing, fixed).read_mask_labels(0)
    sample = SparseDataset(drawing, fixed, [A.Resize(300, 400)])[0]
    assert (sample["mask"] == 0).any()
    assert sample["image_classes"].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_missing_files(root):
    with pytest.raises(FileNotFoundError, match=r"sparse labels 'p.json', '.*p.json' do not exist"):
        own(root, PointFiles("p.json"))
    write(root / "p.json", {"0": [], "2": []})
    (root / "xml").mkdir()
    for sparse, message in (
        (PointFiles("p.json"), r"2 of 4 images are not in '.*p.json' \('1', '3'\): add"),
        (ScribbleFiles("xml"), r"4 of 4 images have no scribbles \(expected: '.*0.xml'"),
        (SparseMasks(9, "xml", "_x.png"), r"4 of 4 .* no sparse masks \(expected: '.*0_x.png'"),
    ):
        with pytest.raises(MissingFiles, match=message):
            own(root, sparse)


def annotation(polygons, size="<size><width>50</width><height>40</height></size>"):
    return f"<annotation>{size}{polygons}</annotation>"


def polygon(tag, *points):
    xy = "".join(f"<point><X>{x}</X><Y>{y}</Y></point>" for x, y in points)
    return f"<polygon><tag>{tag}</tag>{xy}</polygon>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", r"scribbles '.*0.xml' cannot be read"),
        (annotation(polygon("sky", (1, 1)), size=""), "are for an image of 0x0 but it is 40x50"),
        (annotation(polygon("sea", (1, 1))), "no class 'sea'"),
        (annotation(polygon("sky", (1, ""))), "a line of sky has no number"),
        (annotation(polygon("sky", (60, 1))), "x=60, y=1 lies outside"),
        (annotation(polygon("sky")), r"none of the 4 files in '.*' holds a line"),
    ],
)
def test_broken_scribbles(root, text, message):
    for name in range(4):
        write(root / f"{name}.xml", text)
    with pytest.raises(ValueError, match=message):
        own(root, ScribbleFiles(root))[0]


def test_own_scribbles(root):
    """One file with a line is enough; tags can be translated."""
    for name in range(4):
        write(root / f"{name}.xml", annotation(polygon("sky")))
    write(root / "3.xml", annotation(polygon("water", (4, 9), (8, 9))))
    dataset = own(root, ScribbleFiles(root, {"water": "road"}, size=1))
    assert np.argwhere(dataset.read_mask_labels(3) == 1).tolist() == [[9, x] for x in range(4, 9)]
    assert dataset[3]["image_classes"].tolist() == [False, True, False]


def sparse_files(root, value, labelled=10, void=0):
    for name in range(4):
        raw = np.full(2000, value, np.uint8)
        raw[:labelled], raw[labelled : labelled + void] = 1, 255
        save(raw.reshape(40, 50), root / "brushed" / f"{name}.png")


def test_sparse_masks(root):
    """255 is ignored, the named value unlabelled; where that is 255, nothing is ignored."""
    sparse_files(root, 7, void=30)
    dataset = own(root, SparseMasks(7, "brushed"))
    sample = dataset[0]
    assert (sample["mask"] == 1).sum() == 10
    assert sample["unlabelled"].sum() == 2000 - 40
    assert sample["image_classes"].tolist() == [False, True, False]
    assert dataset.read_marks(0) is None
    sparse_files(root, 255)
    assert own(root, SparseMasks(255, "brushed"))[0]["unlabelled"].sum() == 2000 - 10
    assert (own(root, SparseMasks(255, "brushed", ids={1: 2}))[0]["mask"] == 2).sum() == 10


@pytest.mark.parametrize(
    ("value", "labelled", "sparse", "message"),
    [
        # Acceptance g of the method: the trap that switches it off silently.
        (255, 10, SparseMasks(3, "brushed"),
         r"0.png' holds no pixel of the value 3 \(unlabelled\).* 100% of 255, which means ignored"),
        (7, 500, SparseMasks(7, "brushed"),
         r"0.png' labels 25% of its pixels, more than max_labelled \(20%\)"),
        (7, 500, SparseMasks(9), "holds no pixel of the value 9"),  # the dense masks themselves
        (7, 500, SparseMasks(0, "brushed"), "unlabelled is 0, which is class 'sky'"),
        (7, 500, SparseMasks(255, "brushed"), "holds the values 7, which are no classes"),
    ],
)  # fmt: skip
def test_masks_that_are_not_sparse(root, value, labelled, sparse, message):
    sparse_files(root, value, labelled)
    with pytest.raises(ValueError, match=message):
        own(root, sparse)[0]


def test_a_larger_share_of_labels(root):
    sparse_files(root, 7, labelled=500)
    sample = own(root, SparseMasks(7, "brushed", max_labelled=0.3))[0]
    assert (sample["mask"] == 1).sum() == 500


def test_sizes_that_differ(root):
    sparse_files(root, 7)
    save(np.full((20, 25), 7, np.uint8), root / "brushed" / "0.png")
    save(np.zeros((20, 25), np.uint8), root / "masks" / "0.png")
    for sparse, folder in ((SparseMasks(7, "brushed"), "brushed"), (Points(), "masks")):
        expected = rf"mask '.*{folder}/0.png' is 20x25 but image '.*' is 40x50"
        with pytest.raises(ValueError, match=expected):
            own(root, sparse)[0]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Points, {"count": 0}),
        (Points, {"per": "pixel"}),
        (Points, {"seed": -1}),
        (Points, {"size": 0}),
        (Scribbles, {"min_area": 2.0}),
        (Scribbles, {"min_area": float("nan")}),
        (Blocks, {"share": 0.0}),
        (Blocks, {"grid": 0}),
        (PointFiles, {"files": []}),
        (SparseMasks, {"unlabelled": -1}),
        (SparseMasks, {"unlabelled": 3, "max_labelled": 0.0}),
        (SparseMasks, {"unlabelled": 3, "ids": {3: 1}}),
    ],
    ids=str,
)
def test_wrong_arguments(kind, arguments):
    with pytest.raises(ValueError, match=rf"^{list(arguments)[-1]} "):
        kind(**arguments)


def test_a_data_set_of_another_kind():
    with pytest.raises(ValueError, match=r"list has no sample_name\(index\), by which sparse"):
        SparseDataset([1, 2], Points())


# Counting


def test_class_index_counts_the_sparse_labels(root, tmp_path):
    cache = tmp_path / "cache"
    dense = class_index(own(root), cache)
    counts = class_index(own(root, Points(2)), cache)
    assert counts.tolist() == [[2, 2, 2]] * 4
    assert (class_index(own(root), cache) == dense).all()
    assert class_index(own(root, Points(3)), cache).tolist() == [[3, 3, 3]] * 4
    assert len(list(cache.iterdir())) == 3
    file = write(root / "p.json", clicks())
    sparse = PointFiles(file, size=1)
    assert class_index(own(root, sparse), cache).tolist() == [[1, 0, 0]] * 4
    write(file, clicks(**{"0": [{"x": 5, "y": 30, "cls": 1}, {"x": 5, "y": 34, "cls": 1}]}))
    sparse = PointFiles(file, size=1)
    assert class_index(own(root, sparse), cache)[0].tolist() == [0, 2, 0]


def test_counts_come_from_the_cache(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = class_index(own(root, Points(2)), cache)
    monkeypatch.setattr(Points, "read", lambda *_: pytest.fail("counted again"))
    assert (class_index(own(root, Points(2)), cache) == expected).all()


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
