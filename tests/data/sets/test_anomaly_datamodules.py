"""Datamodules with anomalies: testing only, classes left out, `genseg check` and `genseg test`."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from lightning_genseg import SegmentationModule, SoftmaxSegmenter
from lightning_genseg.cli.check import check_data, summary
from lightning_genseg.cli.main import main
from lightning_genseg.data import (
    ADE20KDataModule,
    AnomalyFolderDataModule,
    CamVidDataModule,
    CityscapesDataModule,
    COCOStuff10kDataModule,
    COCOStuff164kDataModule,
    FishyscapesDataModule,
    FolderDataModule,
    RoadAnomaly21DataModule,
    RoadAnomalyDataModule,
    StreetHazardsDataModule,
    VOCDataModule,
)
from lightning_genseg.data.dataset import MissingFiles
from tests.contract import TINY
from tests.miniatures import (
    make_anomaly_folder,
    make_fishyscapes,
    make_road_anomaly,
    make_road_anomaly21,
    make_street_hazards,
    make_voc,
    save,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
SIZE = (48, 64)
NAMES = ["a", "b", "c", "d", "e"]
TEST_ONLY = [
    pytest.param(FishyscapesDataModule, make_fishyscapes, 4, id="fishyscapes"),
    pytest.param(RoadAnomalyDataModule, make_road_anomaly, 4, id="road_anomaly"),
    pytest.param(RoadAnomaly21DataModule, make_road_anomaly21, 3, id="road_anomaly21"),
]


def trainer(folder):
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


# --- testing only ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "make", "count"), TEST_ONLY)
def test_only_a_test_split(tmp_path, kind, make, count):
    assert kind("nowhere").class_names == CityscapesDataModule("nowhere").class_names
    data = kind(make(tmp_path, SIZE), num_workers=0)
    data.setup()  # what there is
    assert len(data.test_dataset) == count
    assert data.train_dataset is data.val_dataset is None
    assert len(list(data.plain_loader("test"))) == count
    sentence = rf"^{kind.__name__} has no (train|val) split, only test: train and validate on data"
    for ask in (
        lambda: data.setup("fit"),
        lambda: data.setup("validate"),
        data.train_dataloader,
        data.val_dataloader,
        lambda: data.plain_loader("train"),
        data.class_index,
    ):
        with pytest.raises(ValueError, match=sentence):
            ask()


def test_fit_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["genseg"])
    root = make_fishyscapes(tmp_path, SIZE)
    arguments = ["--data", "FishyscapesDataModule", f"--data.root={root}"]
    model = ["--model", "SoftmaxSegmenter", "--model.encoder=tu-test_resnet"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_epochs=1"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *arguments, *model, "--model.decoder=segformer", *quiet])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "FishyscapesDataModule has no train split, only test: train and validate on" in last


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


def test_predicting_the_images_of_the_organisers(tmp_path):
    root = make_road_anomaly21(tmp_path, SIZE)
    data = RoadAnomaly21DataModule(root, num_workers=0, predict_root=root / "images")
    assert len(list(data.predict_dataloader())) == 5


# --- own folders -------------------------------------------------------------------------------


def test_own_folder(tmp_path):
    root = make_anomaly_folder(tmp_path)
    (root / "some.txt").write_text("street/1.jpg\nstreet/3\n")
    data = AnomalyFolderDataModule(
        root, class_names=NAMES, class_masks="class_masks", test_list="some.txt", num_workers=0
    )
    batches = list(data.test_dataloader())
    assert [batch["name"] for batch in batches] == [["street/1"], ["street/3"]]
    assert all((batch["mask"] < 5).any() for batch in batches)
    assert AnomalyFolderDataModule(root, 7).class_names == [f"class_{c}" for c in range(7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the number of classes is not known"),
        ({"num_classes": 4, "class_names": NAMES}, "num_classes is 4 but class_names has 5"),
        ({"num_classes": 5, "anomaly_ids": {0: 7}}, "anomaly_ids is {0: 7} but must lead"),
        ({"num_classes": 5, "ids": {0: 0}}, "ids is about class masks, of which there are none"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnomalyFolderDataModule("nowhere", **arguments)


def test_counts_follow_the_anomaly_masks(tmp_path):
    root = make_anomaly_folder(tmp_path)
    arguments = {"class_names": NAMES, "class_masks": "class_masks", "num_workers": 0}
    data = AnomalyFolderDataModule(root, cache_dir=tmp_path / "cache", **arguments)
    first = data.class_index("test")
    path = root / "masks" / "street" / "0.png"
    mask = np.array(Image.open(path))
    save(np.ones_like(mask), path)
    second = data.class_index("test")
    assert second[0].sum() == 0 < first[0].sum()
    assert (second[1:] == first[1:]).all()


# --- StreetHazards -----------------------------------------------------------------------------


def test_street_hazards_trains_and_tests(tmp_path):
    torch.manual_seed(0)
    root = make_street_hazards(tmp_path, SIZE)
    data = StreetHazardsDataModule(root, batch_size=2, num_workers=0, crop_size=(32, 32))
    assert data.num_classes == len(data.palette) == 12
    assert StreetHazardsDataModule(root, unlabelled_class=True).class_names[:2] == [
        "unlabelled",
        "building",
    ]
    batch = next(iter(data.train_dataloader()))
    assert batch["anomaly"].shape == batch["mask"].shape == (2, 32, 32)
    model = SoftmaxSegmenter(**{**TINY, "num_classes": 12}, anomaly_score="energy")
    run = trainer(tmp_path)
    run.fit(model, datamodule=data)
    (scores,) = run.test(model, datamodule=data, verbose=False)
    assert 0 <= scores["test_AUROC"] <= 1
    assert 0 <= scores["test_mIoU"] <= 1


# --- classes left out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (CamVidDataModule, "pedestrian"),
        (CityscapesDataModule, "train"),
        (ADE20KDataModule, "person"),
        (COCOStuff10kDataModule, "zebra"),
        (COCOStuff164kDataModule, "zebra"),
        (VOCDataModule, "sheep"),
    ],
)
def test_attributes_are_those_of_the_known(kind, name):
    whole, part = kind("nowhere"), kind("nowhere", unknown_classes=[name])
    assert part.num_classes == whole.num_classes - 1
    left_out = whole.class_names.index(name)
    assert part.class_names == [n for n in whole.class_names if n != name]
    assert part.palette == [color for c, color in enumerate(whole.palette) if c != left_out]
    with pytest.raises(
        ValueError, match="unknown_classes holds 'unicorn', which is no class: choo"
    ):
        kind("nowhere", unknown_classes=["unicorn"])


def test_all_splits_have_the_known_classes(tmp_path):
    root = make_voc(tmp_path, SIZE)
    arguments = {"batch_size": 2, "num_workers": 0, "crop_size": (40, 48)}
    data = VOCDataModule(root, unknown_classes=["background", "person"], **arguments)
    found = np.zeros(256, int)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            assert ((batch["mask"] < 19) | (batch["mask"] == 255)).all()
            assert (batch["mask"][batch["anomaly"] != 0] == 255).all()
            assert (batch["mask"][batch["anomaly"] == 0] != 255).all()
            found += np.bincount(batch["anomaly"].flatten(), minlength=256)
    assert (found[[0, 1, 255]] > 0).all()
    whole = VOCDataModule(root, num_workers=0, cache_dir=tmp_path / "cache").class_index()
    data.cache_dir = tmp_path / "cache"
    known = [c for c in range(21) if c not in (0, 15)]
    assert (data.class_index() == whole[:, known]).all()


def test_own_classes_left_out(tmp_path):
    root = make_anomaly_folder(tmp_path)
    data = FolderDataModule(
        root, 5, masks="class_masks", unknown_classes=["class_0", "class_3"], num_workers=0
    )
    assert data.class_names == ["class_1", "class_2", "class_4"]
    assert data.palette == [FolderDataModule(root, 5).palette[c] for c in (1, 2, 4)]
    loaders = [data.plain_loader(split) for split in ("train", "val")]
    whole = FolderDataModule(root, 5, masks="class_masks", num_workers=0)
    for loader, plain in zip(
        loaders, (whole.plain_loader(s) for s in ("train", "val")), strict=True
    ):
        for part, full in zip(loader, plain, strict=True):
            assert part["name"] == full["name"]
            table = torch.tensor([255, 0, 1, 255, 2])
            assert (part["mask"] == table[full["mask"]]).all()
            assert (part["anomaly"] == torch.tensor([1, 0, 0, 1, 0])[full["mask"]]).all()


def test_missing_files_are_reported_of_the_known_classes(tmp_path):
    root = make_anomaly_folder(tmp_path)
    (root / "class_masks/street/1.png").unlink()
    data = FolderDataModule(
        root, 5, masks="class_masks", unknown_classes=["class_0"], num_workers=0
    )
    with pytest.raises(MissingFiles) as caught:
        data.setup("fit")
    assert caught.value.dataset.num_classes == 4
    report = check_data(data, tmp_path / "out")
    assert "class_0" not in report["splits"]["train"]["classes"]


class Foreign(torch.utils.data.Dataset):
    def __len__(self):
        return 1


def test_foreign_data_cannot_leave_classes_out():
    class Own(CamVidDataModule):
        def make_dataset(self, split, transform):
            return Foreign()

    with pytest.raises(
        ValueError, match="Foreign cannot leave out unknown_classes: derive it from"
    ):
        Own("nowhere", unknown_classes=["car"]).setup("fit")


# --- genseg check ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "make", "count"), TEST_ONLY)
def test_check_without_classes(tmp_path, kind, make, count):
    data = kind(make(tmp_path, SIZE), num_workers=0, cache_dir=tmp_path / "cache")
    report = check_data(data, tmp_path / "out")
    assert report["problems"] == []
    assert list(report["splits"]) == ["test"]
    found = report["splits"]["test"]
    assert found["images"] == found["anomalies"]["images"] == count
    masks = torch.cat([batch["anomaly"].flatten() for batch in data.test_dataloader()])
    known, odd = (masks == 0).sum().item(), (masks == 1).sum().item()
    assert found["anomalies"]["share"] == pytest.approx(odd / (known + odd))
    assert found["anomalies"]["not_evaluated"] == pytest.approx((masks == 255).double().mean())
    text = summary(report)
    assert f"anomalies in {count} images" in text
    assert "no labels of classes in test, only of anomalies" in text
    assert "ignored" not in text
    assert "bicycle" not in text
    assert (tmp_path / "out" / "data_check.png").stat().st_size > 1000


def test_check_with_classes(tmp_path):
    root = make_anomaly_folder(tmp_path)
    data = AnomalyFolderDataModule(
        root, class_names=NAMES, class_masks="class_masks", num_workers=0, cache_dir=tmp_path / "c"
    )
    (root / "masks/street/2.png").write_bytes(b"no image")
    report = check_data(data, tmp_path / "out")
    (problem,) = report["problems"]
    assert problem["file"] == str(root / "masks/street/2.png")
    assert "anomalies in 3 images" in summary(report)
    assert report["splits"]["test"]["classes"]["a"]["images"] > 0


def test_check_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["genseg"])
    root = make_street_hazards(tmp_path, SIZE)
    arguments = [f"--data.root={root}", "--data.num_workers=0", "--data.cache_dir=cache"]
    main(["check", "--data", "StreetHazardsDataModule", *arguments])
    shown = capsys.readouterr().out
    assert "anomalies in 0 images" in shown  # training and validation
    assert "anomalies in 4 images" in shown
    assert "traffic sign" in shown
