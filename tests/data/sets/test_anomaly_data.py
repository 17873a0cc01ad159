"""Data sets with anomalies: what their files mean, classes held out, and what people get wrong."""

import shutil

import albumentations as A
import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import (
    VOC,
    AnomalyFolder,
    CamVid,
    Cityscapes,
    COCOStuff10k,
    FishyscapesLostAndFound,
    Folder,
    RoadAnomaly,
    RoadAnomaly21,
    StreetHazards,
    SyntheticScenes,
)
from tests.miniatures import (
    make_anomaly_folder,
    make_cityscapes,
    make_coco_stuff_10k,
    make_fishyscapes,
    make_road_anomaly,
    make_road_anomaly21,
    make_street_hazards,
    make_voc,
    save,
)

SIZE = (24, 32)
NAMES = ["a", "b", "c", "d", "e"]
FOR_CITYSCAPES = [
    pytest.param(FishyscapesLostAndFound, make_fishyscapes, id="fishyscapes"),
    pytest.param(RoadAnomaly, make_road_anomaly, id="road_anomaly"),
    pytest.param(RoadAnomaly21, make_road_anomaly21, id="road_anomaly21"),
]


def values(path):
    return np.array(Image.open(path))


def striped(image):
    """Black and white pixels of a sample's image: the anomalies that the miniatures draw."""
    return ((image > 0.9).all(0) | (image < 0.1).all(0)).numpy()


# --- the official data sets --------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "make"), FOR_CITYSCAPES)
def test_data_made_for_cityscapes(tmp_path, kind, make):
    dataset = kind(make(tmp_path, (96, 128)))
    assert dataset.class_names == list(Cityscapes.CLASS_NAMES)
    assert dataset.palette == list(Cityscapes.PALETTE)
    for item in (dataset[index] for index in range(len(dataset))):
        assert (item["mask"] == 255).all()
        assert item["anomaly"].shape == item["image"].shape[1:]
        assert set(item["anomaly"].unique().tolist()) <= {0, 1, 255}
        evaluated = item["anomaly"].numpy() != 255
        # The labels lie on what is drawn; JPEG blurs it.
        drawn, unknown = striped(item["image"]), item["anomaly"].numpy() == 1
        assert unknown.sum() > 50
        assert drawn[unknown].mean() > 0.7
        assert drawn[evaluated & ~unknown].mean() < 0.05


def test_fishyscapes_finds_its_frames(tmp_path):
    root = make_fishyscapes(tmp_path, SIZE)
    dataset = FishyscapesLostAndFound(root)
    assert len(dataset) == 4  # Lost and Found has more
    sample = dataset.samples[1]
    assert sample.name == "13_Elly_Beinhorn_Str_000001_000030"
    assert sample.image == (
        root / "leftImg8bit/test/13_Elly_Beinhorn_Str" / f"{sample.name}_leftImg8bit.png"
    )
    assert (dataset[1]["anomaly"].numpy() == values(sample.mask)).all()


def test_road_anomaly_values(tmp_path):
    dataset = RoadAnomaly(make_road_anomaly(tmp_path, SIZE))
    seen = set()
    for index, sample in enumerate(dataset.samples):
        raw = values(sample.mask)
        seen |= set(np.unique(raw).tolist())
        assert ((dataset[index]["anomaly"].numpy() == 1) == (raw == 2)).all()
        assert (dataset[index]["anomaly"] != 255).all()
    assert seen == {0, 1, 2}


def test_road_anomaly_as_webp(tmp_path):
    root = make_road_anomaly(tmp_path, SIZE)
    for path in root.glob("frames/*.jpg"):
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    assert len(RoadAnomaly(root)) == 4


def test_road_anomaly21_leaves_out_what_has_no_labels(tmp_path):
    root = make_road_anomaly21(tmp_path, SIZE)
    assert len(list((root / "images").iterdir())) == 5
    assert [s.name for s in RoadAnomaly21(root).samples] == [
        f"validation000{number}" for number in range(3)
    ]


@pytest.mark.parametrize("unlabelled", [False, True])
def test_every_value_of_street_hazards(tmp_path, unlabelled):
    root = make_street_hazards(tmp_path, (4, 4))
    path = StreetHazards(root, "test").samples[0].mask
    Image.fromarray(np.arange(16, dtype=np.uint8).clip(0, 14).reshape(4, 4)).save(path)
    dataset = StreetHazards(root, "test", unlabelled_class=unlabelled)
    labels, anomaly = (array.flatten().tolist() for array in dataset.read_labels(0))
    # The order of the authors' create_dataset.py, whose loader subtracts one from the files.
    official = ["unlabelled", "building", "fence", "other", "pedestrian", "pole", "road line"]
    official += ["road", "sidewalk", "vegetation", "car", "wall", "traffic sign"]
    known = official if unlabelled else official[1:]
    names = ["" if label == 255 else dataset.class_names[label] for label in labels]
    assert names == ["", *(name if name in known else "" for name in official), "", ""]
    assert dataset.class_names == known
    assert anomaly == [255, 0 if unlabelled else 255, *[0] * 12, 1, 1]


def test_street_hazards_by_town(tmp_path):
    root = make_street_hazards(tmp_path, SIZE)
    names = {
        split: [s.name for s in StreetHazards(root, split).samples] for split in ("val", "test")
    }
    assert names == {"val": ["t4/0", "t4/1"], "test": ["t5/0", "t5/1", "t6/0", "t6/1"]}
    train = StreetHazards(root, "train")
    assert not any((train[index]["anomaly"] == 1).any() for index in range(len(train)))
    # Each archive unpacked in a folder of its name.
    for part in ("train", "test"):
        (root / f"streethazards_{part}").mkdir()
        (root / part).rename(root / f"streethazards_{part}" / part)
    assert len(StreetHazards(root, "train")) == len(StreetHazards(root, "test")) == 4


# --- what people get wrong with them -----------------------------------------------------------


@pytest.mark.parametrize(("kind", "make"), FOR_CITYSCAPES)
def test_a_level_too_high_or_too_low(tmp_path, kind, make):
    root = make(tmp_path / "data", SIZE)
    with pytest.raises(FileNotFoundError, match=f"must hold .*use '{root}' as root"):
        kind(root.parent)
    with pytest.raises(FileNotFoundError, match=f"must hold .*use '{root}' as root"):
        kind(next(path for path in root.iterdir() if path.is_dir()))
    with pytest.raises(FileNotFoundError, match="does not exist: give the folder of"):
        kind(tmp_path / "none")


def test_cityscapes_in_the_place_of_lost_and_found(tmp_path):
    root = make_fishyscapes(tmp_path / "fs", SIZE)
    shutil.rmtree(root / "leftImg8bit")
    cityscapes = make_cityscapes(tmp_path / "cs", SIZE)
    (cityscapes / "leftImg8bit").rename(root / "leftImg8bit")
    with pytest.raises(ValueError, match=r"holds none of the 4 frames .*not that of Cityscapes"):
        FishyscapesLostAndFound(root)


def test_lost_and_found_in_part(tmp_path):
    root = make_fishyscapes(tmp_path, SIZE)
    shutil.rmtree(root / "leftImg8bit" / "test")
    with pytest.raises(ValueError, match=r"^2 images are missing \(expected: '.*_leftImg8bit.png'"):
        FishyscapesLostAndFound(root)


@pytest.mark.parametrize(
    ("kind", "make", "folder", "name"),
    [
        (FishyscapesLostAndFound, make_fishyscapes, "fishyscapes_lostandfound", "_labels.png"),
        (RoadAnomaly21, make_road_anomaly21, "labels_masks", "_labels_semantic.png"),
    ],
)
def test_no_labels(tmp_path, kind, make, folder, name):
    root = make(tmp_path, SIZE)
    for path in (root / folder).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"no file '\*{name}' in '{root / folder}': unpack"):
        kind(root)


def test_frames_without_labels(tmp_path):
    root = make_road_anomaly(tmp_path, SIZE)
    (root / "frames/animals01_cow.labels/labels_semantic.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask .*animals01_cow.labels"):
        RoadAnomaly(root)


@pytest.mark.parametrize(
    ("kind", "make", "wrong", "message"),
    [
        (
            FishyscapesLostAndFound,
            make_fishyscapes,
            2,
            "holds the values 2, but the labels of Fish",
        ),
        (
            RoadAnomaly,
            make_road_anomaly,
            255,
            "values 255, but the labels of Road Anomaly are 0, 1",
        ),
        (RoadAnomaly21, make_road_anomaly21, 254, "values 254, but the labels of RoadAnomaly21"),
        (
            StreetHazards,
            make_street_hazards,
            21,
            "values 21, but the masks of StreetHazards hold 1",
        ),
    ],
)
def test_values_of_something_else(tmp_path, kind, make, wrong, message):
    root = make(tmp_path, SIZE)
    save(np.full(SIZE, wrong, np.uint8), kind(root).samples[0].mask)
    with pytest.raises(ValueError, match=message):
        kind(root)


def test_street_hazards_without_the_test_archive(tmp_path):
    root = make_street_hazards(tmp_path, SIZE)
    shutil.rmtree(root / "test")
    assert len(StreetHazards(root)) == 4
    with pytest.raises(
        FileNotFoundError, match=r"holds neither 'test' nor .*streethazards_test.tar"
    ):
        StreetHazards(root, "test")
    shutil.rmtree(root / "train/annotations/validation")
    with pytest.raises(FileNotFoundError, match="the val split of StreetHazards is missing"):
        StreetHazards(root, "val")
    (root / "train/annotations/training/t1-3/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask .*'t1-3/1'"):
        StreetHazards(root)


# --- own folders -------------------------------------------------------------------------------


def test_own_folder(tmp_path):
    root = make_anomaly_folder(tmp_path)
    plain = AnomalyFolder(root, NAMES)
    assert [sample.name for sample in plain.samples] == [f"street/{n}" for n in range(4)]
    classes = AnomalyFolder(root, NAMES, class_masks="class_masks", names=["street/2"])
    assert len(classes) == 1
    item, same = plain[2], classes[0]
    anomaly = values(root / "masks/street/2.png")
    assert set(np.unique(anomaly).tolist()) == {0, 1, 255}
    assert (item["anomaly"].numpy() == anomaly).all()
    assert (same["anomaly"].numpy() == anomaly).all()
    assert (item["mask"] == 255).all()
    raw = values(root / "class_masks/street/2.png")
    # Unknown is ignored; where nothing is evaluated, classes stay.
    assert (same["mask"].numpy() == np.where(anomaly == 1, 255, raw)).all()


def test_black_and_white_masks(tmp_path):
    root = make_anomaly_folder(tmp_path)
    with pytest.raises(ValueError, match=r"hold 0 and 255 only, .*anomaly_ids to \{0: 0, 255: 1\}"):
        AnomalyFolder(root, NAMES, masks="white")
    white = AnomalyFolder(root, NAMES, masks="white", anomaly_ids={0: 0, 255: 1})
    assert ((white[0]["anomaly"].numpy() == 1) == (values(white.samples[0].mask) == 255)).all()
    assert (white[0]["mask"] == 255).all()
    classes = AnomalyFolder(
        root, NAMES, masks="white", class_masks="class_masks", anomaly_ids={0: 0, 255: 1}
    )
    assert (classes[0]["anomaly"] == white[0]["anomaly"]).all()
    assert ((classes[0]["mask"] == 255) == (white[0]["anomaly"] == 1)).all()
    # A set without any anomaly is no mistake: its false alarms can be counted.
    for path in (root / "masks").rglob("*.png"):
        save(values(path) * 0, path)
    assert (AnomalyFolder(root, NAMES)[0]["anomaly"] == 0).all()


def test_other_values_in_own_masks(tmp_path):
    root = make_anomaly_folder(tmp_path)
    path = root / "masks/street/0.png"
    save(values(path) * 0 + 128, path)
    message = r"masks/street/0.png' holds the values 128, but an anomaly mask holds 1 .*anomaly_ids"
    for class_masks in (None, "class_masks"):
        with pytest.raises(ValueError, match=message):
            AnomalyFolder(root, NAMES, class_masks=class_masks)[0]
    listed = AnomalyFolder(root, NAMES, anomaly_ids={0: 0, 128: 1})
    assert (listed[0]["anomaly"] == 1).all()


def test_own_masks_of_another_size(tmp_path):
    root = make_anomaly_folder(tmp_path)
    save(np.zeros((5, 6), np.uint8), root / "masks/street/0.png")
    with pytest.raises(ValueError, match=r"mask '.*masks/street/0.png' is 5x6 but image '.*0.jpg'"):
        AnomalyFolder(root, NAMES)[0]
    with pytest.raises(
        ValueError, match=r"anomaly mask '.*masks/.*' is 5x6 but mask '.*class_masks"
    ):
        AnomalyFolder(root, NAMES, class_masks="class_masks")[0]


def test_own_masks_that_are_missing(tmp_path):
    root = make_anomaly_folder(tmp_path)
    (root / "class_masks/street/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask .*class_masks' \('street/1'\)"):
        AnomalyFolder(root, NAMES, class_masks="class_masks")
    (root / "masks/street/3.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask .*masks' \('street/3'\)"):
        AnomalyFolder(root, NAMES)


@pytest.mark.parametrize("ids", [{}, {0: 0, 1: 2}, {-1: 0}])
def test_wrong_tables(tmp_path, ids):
    with pytest.raises(
        ValueError, match=r"anomaly_ids is .* but must lead from values of the masks"
    ):
        AnomalyFolder(make_anomaly_folder(tmp_path), NAMES, anomaly_ids=ids)


def test_composite_set(shared_dir):
    root = shared_dir / "data" / "camvid_ood_composite"
    if not root.is_dir():
        pytest.skip("no composite set")
    dataset = AnomalyFolder(root, CamVid.CLASS_NAMES)
    assert len(dataset) == 233
    counts = np.zeros(256, int)
    for index in range(0, 233, 8):
        item = dataset[index]
        assert (item["mask"] == 255).all()
        counts += np.bincount(item["anomaly"].flatten(), minlength=256)
    assert counts[[0, 1, 255]].sum() == counts.sum()
    assert 0.01 < counts[1] / counts[:2].sum() < 0.08
    # With CamVid's own masks, which lie beside it.
    classes = AnomalyFolder(
        root, CamVid.CLASS_NAMES, class_masks="../camvid/testannot", ids={i: i for i in range(11)} | {11: 255}
    )  # fmt: skip
    item = classes[40]
    assert (item["mask"][item["anomaly"] == 1] == 255).all()
    assert (item["mask"] != 255).float().mean() > 0.5


# --- classes held out --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = make_anomaly_folder(tmp_path)
    save(np.arange(5, dtype=np.uint8)[None].repeat(5, 0), root / "class_masks/street/0.png")
    save(np.zeros((5, 5, 3), np.uint8), root / "images/street/0.jpg")
    return root


def test_held_out_classes(folder):
    colors = [(c, c, c) for c in range(5)]
    dataset = Folder(folder, NAMES, masks="class_masks", palette=colors)
    before = dataset[0]
    assert "anomaly" not in before
    dataset.hold_out(["d", "b"])
    assert dataset.class_names == ["a", "c", "e"]
    assert dataset.palette == [colors[0], colors[2], colors[4]]
    assert dataset.num_classes == 3
    item = dataset[0]
    assert item["mask"][0].tolist() == [0, 255, 1, 255, 2]
    assert item["anomaly"][0].tolist() == [0, 1, 0, 1, 0]
    assert (dataset.read_mask_labels(0) == item["mask"].numpy()).all()


def test_held_out_with_a_table_of_ids(folder):
    dataset = Folder(folder, ["x", "y"], masks="class_masks", ids={0: 1, 1: 0, 2: 255, 3: 0, 4: 1})
    dataset.hold_out(["x"])
    assert dataset[0]["mask"][0].tolist() == [0, 255, 255, 255, 0]
    assert dataset[0]["anomaly"][0].tolist() == [0, 1, 255, 1, 0]
    save(np.full((5, 5), 9, np.uint8), folder / "class_masks/street/0.png")
    with pytest.raises(ValueError, match="holds the values 9, which are no classes"):
        dataset[0]


def test_held_out_names(folder):
    dataset = Folder(folder, NAMES, masks="class_masks")
    with pytest.raises(
        ValueError, match="holds 'dog', which is no class: choose among a, b, c, d, e"
    ):
        dataset.hold_out(["a", "dog"])
    with pytest.raises(ValueError, match="unknown_classes holds all classes"):
        dataset.hold_out(NAMES)
    assert dataset.class_names == NAMES
    dataset.hold_out(["a"])
    with pytest.raises(ValueError, match="Folder has anomalies already"):
        dataset.hold_out(["b"])


@pytest.mark.parametrize(
    ("kind", "make", "name"),
    [
        (Cityscapes, make_cityscapes, "road"),
        (VOC, make_voc, "tvmonitor"),
        (COCOStuff10k, make_coco_stuff_10k, "person"),
    ],
)
def test_held_out_of_public_data(tmp_path, kind, make, name):
    root = make(tmp_path, SIZE)
    whole, part = kind(root), kind(root)
    part.hold_out([name])
    unknown, found = whole.class_names.index(name), 0
    for index in range(len(whole)):
        full, labels = whole[index]["mask"], part[index]["mask"]
        anomaly = part[index]["anomaly"]
        assert ((anomaly == 1) == (full == unknown)).all()
        assert ((anomaly == 255) == (full == 255)).all()
        assert (labels[full < unknown] == full[full < unknown]).all()
        later = (full > unknown) & (full != 255)
        assert (labels[later] == full[later] - 1).all()
        found += int((anomaly == 1).sum())
    assert found > 0


def test_augmentation_moves_both(tmp_path):
    root = make_cityscapes(tmp_path)
    moves = [
        A.OneOf(
            [A.RandomScale((-0.5, 1), p=1), A.Affine(rotate=(-30, 30), fill_mask=255, p=1)], p=1
        ),
        A.PadIfNeeded(140, 140, border_mode=0, fill_mask=255),
        A.Compose([A.RandomCrop(90, 110), A.HorizontalFlip(p=0.5)]),
    ]
    whole, part = Cityscapes(root, transform=moves), Cityscapes(root, transform=moves)
    part.hold_out(["person", "road"])
    for seed in range(12):
        full, item = whole[seed % 4, seed], part[seed % 4, seed]
        assert (full["image"] == item["image"]).all()
        assert ((item["anomaly"] == 1) == ((full["mask"] == 0) | (full["mask"] == 11))).all()
        assert ((item["anomaly"] == 255) == (full["mask"] == 255)).all()
        assert (item["mask"][item["anomaly"] == 1] == 255).all()


def test_synthetic_scenes_tell_their_anomalies():
    scenes = SyntheticScenes(3, (48, 64), held_out=True)
    labels, anomaly = scenes.read_labels(1)
    assert (scenes[1]["mask"].numpy() == labels).all()
    assert (scenes[1]["anomaly"].numpy() == anomaly).all()
    assert (anomaly == 1).any()
    assert SyntheticScenes(3, (48, 64)).read_labels(1)[1] is None
