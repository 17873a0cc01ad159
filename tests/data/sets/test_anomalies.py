"""Data with anomalies: what their files mean, own folders, classes left out."""

import shutil

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg import SegmentationModule
from lightning_genseg.cli.check import check_data, summary
from lightning_genseg.data import (
    VOC,
    AnomalyFolder,
    AnomalyFolderDataModule,
    CamVid,
    CamVidDataModule,
    Cityscapes,
    COCOStuff10k,
    FishyscapesDataModule,
    FishyscapesLostAndFound,
    Folder,
    FolderDataModule,
    RoadAnomaly,
    RoadAnomaly21,
    RoadAnomaly21DataModule,
    StreetHazards,
    StreetHazardsDataModule,
    VOCDataModule,
)
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.contract import trainer
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

SIZE = (48, 64)
NAMES = ["a", "b", "c", "d", "e"]


def values(path):
    return np.array(Image.open(path))


# --- the official data sets --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (FishyscapesLostAndFound, make_fishyscapes),
        (RoadAnomaly, make_road_anomaly),
        (RoadAnomaly21, make_road_anomaly21),
    ],
)
def test_labels_lie_on_what_is_drawn(tmp_path, kind, make):
    dataset = kind(make(tmp_path, (96, 128)))
    for item in (dataset[index] for index in range(len(dataset))):
        assert (item["mask"] == 255).all()
        anomaly = item["anomaly"].numpy()
        # The anomalies of the miniatures are black and white; JPEG blurs them.
        image = item["image"].numpy()
        drawn = (image > 0.9).all(0) | (image < 0.1).all(0)
        assert (anomaly == 1).sum() > 50
        assert drawn[anomaly == 1].mean() > 0.7
        assert drawn[anomaly == 0].mean() < 0.05


def test_fishyscapes_finds_its_frames(tmp_path):
    root = make_fishyscapes(tmp_path / "fs", SIZE)
    dataset = FishyscapesLostAndFound(root)  # Lost and Found has more
    sample = dataset.samples[1]
    assert sample.name == "13_Elly_Beinhorn_Str_000001_000030"
    street = root / "leftImg8bit" / "test" / "13_Elly_Beinhorn_Str"
    assert sample.image == street / f"{sample.name}_leftImg8bit.png"
    assert (dataset[1]["anomaly"].numpy() == values(sample.mask)).all()
    shutil.rmtree(root / "leftImg8bit" / "test")
    with pytest.raises(
        GenSegError, match=r"^2 images are missing \(expected: '.*_leftImg8bit.png'"
    ):
        FishyscapesLostAndFound(root)
    shutil.rmtree(root / "leftImg8bit")
    shutil.move(make_cityscapes(tmp_path / "cs", SIZE) / "leftImg8bit", root)
    with pytest.raises(GenSegError, match=r"holds none of the 4 frames .*not that of Cityscapes"):
        FishyscapesLostAndFound(root)


def test_road_anomaly_values(tmp_path):
    root = make_road_anomaly(tmp_path, SIZE)
    dataset, seen = RoadAnomaly(root), set()
    for index, sample in enumerate(dataset.samples):
        raw = values(sample.mask)
        seen |= set(np.unique(raw).tolist())
        assert (dataset[index]["anomaly"].numpy() == (raw == 2)).all()
    assert seen == {0, 1, 2}
    for path in root.glob("frames/*.jpg"):
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    assert len(RoadAnomaly(root)) == 4


def test_road_anomaly21_leaves_out_what_has_no_labels(tmp_path):
    root = make_road_anomaly21(tmp_path, SIZE)
    names = [sample.name for sample in RoadAnomaly21(root).samples]
    assert names == [f"validation000{number}" for number in range(3)]
    data = RoadAnomaly21DataModule(root, num_workers=0, predict_root=root / "images")
    assert len(list(data.predict_dataloader())) == 5  # those of the organisers as well


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
    data = StreetHazardsDataModule(root, unlabelled_class=unlabelled)
    assert dataset.class_names == data.class_names == known
    assert dataset.palette == data.palette
    assert anomaly == [255, 0 if unlabelled else 255, *[0] * 12, 1, 1]


def test_street_hazards_by_town(tmp_path):
    root = make_street_hazards(tmp_path, SIZE)
    names = [[s.name for s in StreetHazards(root, split).samples] for split in ("val", "test")]
    assert names == [["t4/0", "t4/1"], ["t5/0", "t5/1", "t6/0", "t6/1"]]
    train = StreetHazards(root, "train")
    assert not any((train[index]["anomaly"] == 1).any() for index in range(len(train)))
    # Each archive unpacked in a folder of its name.
    for part in ("train", "test"):
        (root / f"streethazards_{part}").mkdir()
        (root / part).rename(root / f"streethazards_{part}" / part)
    assert len(StreetHazards(root, "train")) == len(StreetHazards(root, "test")) == 4
    shutil.rmtree(root / "streethazards_test")
    assert len(StreetHazards(root)) == 4
    with pytest.raises(
        MissingFileError, match=r"holds neither 'test' nor .*streethazards_test.tar"
    ):
        StreetHazards(root, "test")


class BlackAndWhite(SegmentationModule):
    """Sure of everything but what is black or white, as the anomalies of the miniatures are."""

    def __init__(self):
        super().__init__(19, anomaly_score="msp")
        self.features = torch.nn.Identity()

    def outputs(self, image):
        striped = (image > 0.95).all(1) | (image < 0.05).all(1)
        logits = torch.zeros(len(image), 19, *image.shape[2:])
        logits[:, 0] = 9.0 * ~striped
        return {"logits": logits, "features": image}

    def compute_loss(self, batch):
        raise NotImplementedError


@pytest.mark.filterwarnings("error:every pixel of the first batch")
def test_scores(tmp_path):
    data = FishyscapesDataModule(make_fishyscapes(tmp_path, SIZE), num_workers=0)
    (scores,) = trainer(tmp_path).test(BlackAndWhite(), datamodule=data, verbose=False)
    assert scores["test_AUROC"] > 0.99
    assert scores["test_AP"] > 0.95


# --- own folders -------------------------------------------------------------------------------


def test_own_folder(tmp_path):
    root = make_anomaly_folder(tmp_path)
    plain = AnomalyFolder(root, NAMES)
    assert [sample.name for sample in plain.samples] == [f"street/{n}" for n in range(4)]
    (root / "some.txt").write_text("street/2.jpg\nstreet/3\n")
    data = AnomalyFolderDataModule(
        root, class_names=NAMES, class_masks="class_masks", test_list="some.txt", num_workers=0
    )
    same, other = data.test_dataloader()
    assert [same["name"], other["name"]] == [["street/2"], ["street/3"]]
    anomaly = values(root / "masks/street/2.png")
    assert set(np.unique(anomaly).tolist()) == {0, 1, 255}
    assert (plain[2]["anomaly"].numpy() == anomaly).all()
    assert (plain[2]["mask"] == 255).all()
    assert (same["anomaly"][0].numpy() == anomaly).all()
    # Unknown is ignored; where nothing is evaluated, classes stay.
    raw = values(root / "class_masks/street/2.png")
    assert (same["mask"][0].numpy() == np.where(anomaly == 1, 255, raw)).all()


def test_black_and_white_masks(tmp_path):
    root = make_anomaly_folder(tmp_path)
    with pytest.raises(GenSegError, match=r"0 and 255 only, .*anomaly_ids to \{0: 0, 255: 1\}"):
        AnomalyFolder(root, NAMES, masks="white")
    words = {"masks": "white", "anomaly_ids": {0: 0, 255: 1}}
    white = AnomalyFolder(root, NAMES, **words)
    assert ((white[0]["anomaly"].numpy() == 1) == (values(white.samples[0].mask) == 255)).all()
    assert (white[0]["mask"] == 255).all()
    classes = AnomalyFolder(root, NAMES, class_masks="class_masks", **words)
    assert (classes[0]["anomaly"] == white[0]["anomaly"]).all()
    assert ((classes[0]["mask"] == 255) == (white[0]["anomaly"] == 1)).all()
    # A set without any anomaly is no mistake: its false alarms can be counted.
    for path in (root / "masks").rglob("*.png"):
        save(values(path) * 0, path)
    assert (AnomalyFolder(root, NAMES)[0]["anomaly"] == 0).all()


def test_wrong_masks_of_ones_own(tmp_path):
    root = make_anomaly_folder(tmp_path)
    path = root / "masks/street/0.png"
    save(values(path) * 0 + 128, path)
    message = r"masks/street/0.png' holds the values 128, but an anomaly mask holds 1 .*anomaly_ids"
    for class_masks in (None, "class_masks"):
        with pytest.raises(GenSegError, match=message):
            AnomalyFolder(root, NAMES, class_masks=class_masks)[0]
    listed = AnomalyFolder(root, NAMES, anomaly_ids={0: 0, 128: 1})
    assert (listed[0]["anomaly"] == 1).all()
    save(np.zeros((5, 6), np.uint8), path)
    with pytest.raises(
        GenSegError, match=r"mask '.*masks/street/0.png' is 5x6 but image '.*0.jpg'"
    ):
        AnomalyFolder(root, NAMES)[0]
    with pytest.raises(
        GenSegError, match=r"anomaly mask '.*masks/.*' is 5x6 but mask '.*class_mas"
    ):
        AnomalyFolder(root, NAMES, class_masks="class_masks")[0]
    (root / "class_masks/street/1.png").unlink()
    with pytest.raises(GenSegError, match=r"1 images have no mask .*class_masks' \('street/1'\)"):
        AnomalyFolder(root, NAMES, class_masks="class_masks")
    (root / "masks/street/3.png").unlink()
    with pytest.raises(GenSegError, match=r"1 images have no mask .*masks' \('street/3'\)"):
        AnomalyFolder(root, NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the number of classes is not known"),
        ({"num_classes": 4, "class_names": NAMES}, "num_classes is 4 but class_names has 5"),
        ({"num_classes": 5, "ids": {0: 0}}, "ids is about class masks, of which there are none"),
        *(
            ({"num_classes": 5, "anomaly_ids": ids}, "anomaly_ids is .* but must lead from values")
            for ids in ({0: 7}, {}, {0: 0, 1: 2}, {-1: 0})
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        AnomalyFolderDataModule("nowhere", **arguments)


def test_counts_follow_the_anomaly_masks(tmp_path):
    root = make_anomaly_folder(tmp_path)
    arguments = {"class_names": NAMES, "class_masks": "class_masks", "num_workers": 0}
    data = AnomalyFolderDataModule(root, cache_dir=tmp_path / "cache", **arguments)
    first = data.class_index("test")
    path = root / "masks" / "street" / "0.png"
    save(np.ones_like(values(path)), path)
    second = data.class_index("test")
    assert second[0].sum() == 0 < first[0].sum()
    assert (second[1:] == first[1:]).all()


def test_check_with_classes(tmp_path):
    root = make_anomaly_folder(tmp_path)
    data = AnomalyFolderDataModule(root, 5, class_masks="class_masks", num_workers=0)
    (root / "masks/street/2.png").write_bytes(b"no image")
    report = check_data(data, tmp_path / "out")
    (problem,) = report["problems"]
    assert problem["file"] == str(root / "masks/street/2.png")
    assert "anomalies in 3 images" in summary(report)
    assert report["splits"]["test"]["classes"]["class_0"]["images"] > 0


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
    masks = "../camvid/testannot"
    item = AnomalyFolder(root, CamVid.CLASS_NAMES, class_masks=masks, ids=CamVid.IDS)[40]
    assert (item["mask"][item["anomaly"] == 1] == 255).all()
    assert (item["mask"] != 255).float().mean() > 0.5


# --- classes left out --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = make_anomaly_folder(tmp_path)
    save(np.arange(5, dtype=np.uint8)[None].repeat(5, 0), root / "class_masks/street/0.png")
    save(np.zeros((5, 5, 3), np.uint8), root / "images/street/0.jpg")
    return root


def test_held_out_classes(folder):
    colors = [(c, c, c) for c in range(5)]
    dataset = Folder(folder, NAMES, masks="class_masks", palette=colors)
    assert "anomaly" not in dataset[0]
    with pytest.raises(
        GenSegError, match="holds 'dog', which is no class; known are a, b, c, d, e"
    ):
        dataset.hold_out(["a", "dog"])
    with pytest.raises(GenSegError, match="unknown_classes holds all classes"):
        dataset.hold_out(NAMES)
    assert dataset.class_names == NAMES
    dataset.hold_out(["d", "b"])
    assert dataset.class_names == ["a", "c", "e"]
    assert dataset.palette == [colors[0], colors[2], colors[4]]
    assert dataset.num_classes == 3
    item = dataset[0]
    assert item["mask"][0].tolist() == [0, 255, 1, 255, 2]
    assert item["anomaly"][0].tolist() == [0, 1, 0, 1, 0]
    assert (dataset.read_mask_labels(0) == item["mask"].numpy()).all()
    with pytest.raises(GenSegError, match="Folder has anomalies already"):
        dataset.hold_out(["a"])


def test_held_out_with_a_table_of_ids(folder):
    dataset = Folder(folder, ["x", "y"], masks="class_masks", ids={0: 1, 1: 0, 2: 255, 3: 0, 4: 1})
    dataset.hold_out(["x"])
    assert dataset[0]["mask"][0].tolist() == [0, 255, 255, 255, 0]
    assert dataset[0]["anomaly"][0].tolist() == [0, 1, 255, 1, 0]
    save(np.full((5, 5), 9, np.uint8), folder / "class_masks/street/0.png")
    with pytest.raises(GenSegError, match="holds the values 9, which are no classes"):
        dataset[0]


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
    turn = A.Affine(rotate=(-30, 30), fill_mask=255, p=1)
    moves = [
        A.OneOf([A.RandomScale((-0.5, 1), p=1), turn], p=1),
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


def test_all_splits_have_the_known_classes(tmp_path):
    root = make_voc(tmp_path, SIZE)
    arguments = {"batch_size": 2, "num_workers": 0, "crop_size": (40, 48)}
    data = VOCDataModule(root, unknown_classes=["background", "person"], **arguments)
    found = np.zeros(256, int)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert ((batch["mask"] < 19) | (batch["mask"] == 255)).all()
            assert ((batch["anomaly"] == 0) == (batch["mask"] != 255)).all()
            found += np.bincount(batch["anomaly"].flatten(), minlength=256)
    assert (found[[0, 1, 255]] > 0).all()
    whole = VOCDataModule(root, num_workers=0).class_index()
    known = [c for c in range(21) if c not in (0, 15)]
    assert (data.class_index() == whole[:, known]).all()


def test_own_classes_left_out(tmp_path):
    root = make_anomaly_folder(tmp_path)
    words = {"masks": "class_masks", "num_workers": 0}
    data = FolderDataModule(root, 5, unknown_classes=["class_0", "class_3"], **words)
    whole = FolderDataModule(root, 5, **words)
    assert data.class_names == ["class_1", "class_2", "class_4"]
    assert data.palette == [whole.palette[c] for c in (1, 2, 4)]
    for split in ("train", "val"):
        parts = zip(data.plain_loader(split), whole.plain_loader(split), strict=True)
        for part, full in parts:
            assert part["name"] == full["name"]
            assert (part["mask"] == torch.tensor([255, 0, 1, 255, 2])[full["mask"]]).all()
            assert (part["anomaly"] == torch.tensor([1, 0, 0, 1, 0])[full["mask"]]).all()


def test_missing_files_are_reported_of_the_known_classes(tmp_path):
    root = make_anomaly_folder(tmp_path)
    (root / "class_masks/street/1.png").unlink()
    words = {"masks": "class_masks", "num_workers": 0}
    data = FolderDataModule(root, 5, unknown_classes=["class_0"], **words)
    with pytest.raises(MissingFiles) as caught:
        data.setup("fit")
    assert caught.value.dataset.num_classes == 4
    report = check_data(data, tmp_path / "out")
    assert "class_0" not in report["splits"]["train"]["classes"]


def test_foreign_data_cannot_leave_classes_out():
    class Foreign(torch.utils.data.Dataset):
        pass

    class Own(CamVidDataModule):
        def make_dataset(self, split, transform):
            return Foreign()

    with pytest.raises(GenSegError, match="Foreign cannot leave out unknown_classes: derive it"):
        Own("nowhere", unknown_classes=["car"]).setup("fit")
