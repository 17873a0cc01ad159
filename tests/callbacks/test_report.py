import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from PIL import Image
from torch import nn

from lightning_genseg.callbacks import ChannelsLast, CompareScores, LastCheckpoint, Report
from lightning_genseg.callbacks.pictures import classes_of
from lightning_genseg.callbacks.report import draw_samples
from lightning_genseg.plots.pictures import ANOMALY_PALETTE, colorize
from tests.callbacks import runs
from tests.callbacks.runs import PixelSegmenter, calibrated, column, pixels, scenes, trainer


def read(path):
    return json.loads(path.read_text())


def test_report_of_a_test_run(tmp_path):
    data = scenes()
    module = PixelSegmenter(class_names=data.class_names)
    run = trainer(tmp_path, Report(num_pictures=3), logger=CSVLogger(tmp_path, version="a"))
    (logged,) = run.test(module, data, verbose=False)
    folder = tmp_path / "lightning_logs" / "a"
    report = read(folder / "metrics.json")
    assert report["mIoU"] == logged["test_mIoU"]
    assert report["pixel_accuracy"] == logged["test_pixel_accuracy"]
    assert list(report["IoU"]) == data.class_names
    for name, value in report["IoU"].items():
        number = logged[f"test_IoU_{name}"]
        assert value == (None if math.isnan(number) else number)
    assert report["images"] == 7
    assert report["data"] == "SyntheticScenesDataModule"
    assert report["model"] == "PixelSegmenter"
    assert report["versions"]["torch"] == torch.__version__
    picture = pixels(folder / "pictures.png")
    assert picture.shape[1] == 4 * 320 + 5 * 4  # image, labels, prediction, anomaly
    assert 3 * 213 < picture.shape[0] < 3 * 213 + 100  # three rows and the legend
    assert not list(folder.glob(".*"))


def test_report_while_training(tmp_path):
    run = trainer(tmp_path, Report(), num_sanity_val_steps=2)
    module = PixelSegmenter(anomaly=False)
    run.fit(module, scenes())
    report = read(tmp_path / "val_metrics.json")
    assert report["step"] == 2
    assert report["images"] == 5  # not those of the sanity check
    assert report["mIoU"] == run.callback_metrics["val_mIoU"].item()
    assert not (tmp_path / "metrics.json").exists()
    assert pixels(tmp_path / "val_pictures.png").shape[1] == 3 * 320 + 4 * 4
    run.validate(module, scenes(), verbose=False)
    assert read(tmp_path / "val_metrics.json")["mIoU"] == report["mIoU"]


def test_report_shows_what_the_module_predicted(tmp_path):
    """A module that predicts the labels themselves must give two equal columns."""

    class Oracle(PixelSegmenter):
        @property
        def picture_maps(self):
            return {"doubt": "doubt", "absent": "never seen"}

        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            return {"mask": batch["mask"], "doubt": torch.zeros(batch["mask"].shape)}

    trainer(tmp_path, Report(num_pictures=2)).test(Oracle(), scenes(), verbose=False)
    picture = pixels(tmp_path / "pictures.png")[27 : 27 + 2 * 213 + 4]
    image, labels, doubt, prediction = (picture[:, 4 + 324 * i : 324 + 324 * i] for i in range(4))
    assert picture.shape[1] == 4 * 320 + 5 * 4
    np.testing.assert_array_equal(labels, prediction)
    assert (image != labels).any()
    assert (doubt[:213] == doubt[0, 0]).all()  # the darkest colour


def test_report_writes_null_for_absent_classes(tmp_path):
    module = PixelSegmenter(num_classes=7)  # the data know six classes
    with torch.no_grad():
        module.features.bias[6] = -1000
    trainer(tmp_path, Report(0)).test(module, scenes(), verbose=False)
    assert "NaN" not in (tmp_path / "metrics.json").read_text()  # JSON has no such number
    assert read(tmp_path / "metrics.json")["IoU"]["6"] is None
    assert not (tmp_path / "pictures.png").exists()


def test_report_of_a_calibrated_module_on_unknown_objects(tmp_path):
    module, data = calibrated(-2.1), scenes(held_out=True)
    run = trainer(tmp_path, Report(num_pictures=2))
    (logged,) = run.test(module, data, verbose=False)
    report = read(tmp_path / "metrics.json")
    for name in ("ECE", "AUROC", "AP", "FPR95"):
        assert report[name] == logged[f"test_{name}"]
    assert report["anomaly"]["score"] == "energy"
    promise = {"value": -2.1, "false_positive_rate": 0.1, "level": "image", "risk": 0.2}
    assert report["anomaly"]["threshold"] == {**promise, "samples": 9}
    batches = list(data.test_dataloader())
    with torch.no_grad():
        scores = torch.cat([module.maps(batch["image"])["anomaly"][:, 0] for batch in batches])
    labels = torch.cat([batch["anomaly"] for batch in batches])
    for name, label in (("known_above", 0), ("anomalous_above", 1)):
        share = (scores[labels == label] > -2.1).float().mean().item()
        assert 0.05 < share < 0.95
        assert report["anomaly"][name] == pytest.approx(share, abs=2e-3)  # bins
    names = ["anomaly_histogram.png", "metrics.json", "pictures.png", "reliability.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert pixels(tmp_path / "reliability.png").shape == (600, 500, 3)
    assert pixels(tmp_path / "anomaly_histogram.png").shape == (440, 640, 3)

    picture = pixels(tmp_path / "pictures.png")
    assert picture.shape[1] == 6 * 320 + 7 * 4
    for index, values in ((3, labels[0]), (5, (scores[0] > -2.1).long())):
        expected = colorize(values.numpy(), ANOMALY_PALETTE)
        np.testing.assert_array_equal(column(picture, index)[0], expected)


def test_report_without_unknown_objects_or_score(tmp_path):
    trainer(tmp_path / "a", Report(1)).test(PixelSegmenter(), scenes(), verbose=False)
    assert not (tmp_path / "a" / "anomaly_histogram.png").exists()
    anomaly = read(tmp_path / "a" / "metrics.json")["anomaly"]
    assert anomaly == {"score": "energy", "threshold": None}
    data = scenes(held_out=True)
    trainer(tmp_path / "b", Report(1)).test(PixelSegmenter(anomaly=False), data, verbose=False)
    assert not (tmp_path / "b" / "anomaly_histogram.png").exists()
    assert "anomaly" not in read(tmp_path / "b" / "metrics.json")
    assert (tmp_path / "b" / "reliability.png").exists()
    # image, labels, prediction, and the anomaly labels, which need no score
    assert pixels(tmp_path / "b" / "pictures.png").shape[1] == 4 * 320 + 5 * 4


def test_pictures_of_anomalies_alone_have_no_column_of_labels():
    """Sets such as RoadAnomaly know no classes: every pixel of their masks is ignored."""
    maps = {"prediction": 0, "label": 255, "anomaly_label": 1}
    sample = {key: np.full((8, 8), value, np.uint8) for key, value in maps.items()}
    sample["image"] = np.zeros((8, 8, 3), np.uint8)
    wide = {**sample, "label": np.zeros((8, 8), np.uint8)}
    palette = [(1, 2, 3), (4, 5, 6)]
    for samples, columns in (([sample], 3), ([wide], 4), ([sample, wide], 4)):
        assert draw_samples(samples, ["a", "b"], palette).width == columns * 320 + (columns + 1) * 4


def test_report_of_infinite_scores_has_no_histogram(tmp_path):
    module = calibrated(math.inf)
    module.anomaly.forward = lambda name, outputs: outputs["logits"][:, :1] * 0 + math.inf
    trainer(tmp_path, Report(0)).test(module, scenes(held_out=True), verbose=False)
    assert not (tmp_path / "anomaly_histogram.png").exists()
    assert "Infinity" not in (tmp_path / "metrics.json").read_text()
    assert read(tmp_path / "metrics.json")["anomaly"]["threshold"]["value"] is None


def test_report_of_another_test_counts_anew(tmp_path):
    module, data = calibrated(-2.1), scenes(held_out=True)
    files = ("metrics.json", "reliability.png", "anomaly_histogram.png")
    reports = []
    for _ in range(2):
        trainer(tmp_path, Report(0)).test(module, data, verbose=False)
        reports.append([(tmp_path / name).read_bytes() for name in files])
    assert reports[0] == reports[1]
    known = sum((batch["mask"] != 255).sum().item() for batch in data.test_dataloader())
    assert module.evaluation.calibration.counts.sum() == known  # still there, for a notebook


def tensorboard(folder):
    """The logger, and a function from the name of a picture to the picture as it was logged."""
    logger = TensorBoardLogger(folder, version="a")

    def find(name):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        read = events.EventAccumulator(logger.log_dir).Reload()
        return io.BytesIO(read.Images(name)[-1].encoded_image_string)

    return logger, find


def wandb(folder):
    pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=folder, offline=True)
    return logger, lambda name: next(folder.glob(f"wandb/offline-run-*/files/media/**/{name}_*"))


def mlflow(folder):
    """Without a folder of the run: the metrics are in a database."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    places = {"tracking_uri": f"sqlite:///{folder}/a.db", "artifact_location": f"{folder}/art"}
    logger = MLFlowLogger(**places)
    return logger, lambda name: next(folder.glob(f"art/*/artifacts/images/{name}+*.png"))


@pytest.mark.filterwarnings("ignore:::(sqlalchemy|mlflow|wandb|lightning.pytorch.loggers)")
@pytest.mark.parametrize("kind", [tensorboard, wandb, mlflow])
def test_pictures_arrive_in_loggers(kind, tmp_path):
    logger, find = kind(tmp_path)
    options = {"logger": [CSVLogger(tmp_path, version="files"), logger]}
    run, module = trainer(tmp_path, Report(num_pictures=2), **options), calibrated(-2.1)
    run.fit(module, scenes())
    run.test(module, scenes(held_out=True), verbose=False)
    logger.finalize("success")
    names = {"val_pictures", "test_pictures", "test_reliability", "test_anomaly_histogram"}
    for name in names:
        file = name if name == "val_pictures" else name.removeprefix("test_")
        with Image.open(find(name)) as logged:
            expected = pixels(tmp_path / "lightning_logs" / "files" / f"{file}.png")
            np.testing.assert_array_equal(np.array(logged), expected)


def test_pictures_arrive_where_there_is_no_folder(tmp_path):
    """In a tracking server, such as MLflow's database; a trial draws nothing."""

    class Kept(Logger):
        name = version = "kept"
        pictures: ClassVar[list[str]] = []

        def log_image(self, key, images, step):
            self.pictures.append(key)

        log_metrics = log_hyperparams = lambda self, *_, **__: None

    module = calibrated(-2.1)
    trainer(tmp_path, Report(1), logger=Kept(), fast_dev_run=True).test(
        module, scenes(), verbose=False
    )
    assert not Kept.pictures
    trainer(tmp_path, Report(1), logger=Kept()).test(module, scenes(), verbose=False)
    assert Kept.pictures == ["test_pictures", "test_reliability"]
    assert not list(tmp_path.iterdir())


@pytest.mark.ddp
@pytest.mark.slow
def test_report_of_two_processes_is_that_of_one(tmp_path):
    command = [sys.executable, "-m", "tests.callbacks.runs", str(tmp_path / "two"), "2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    runs.report(tmp_path / "one", 1)
    two, one = (read(tmp_path / name / "metrics.json") for name in ("two", "one"))
    assert two["images"] == one["images"] == 8
    for name in ("known_above", "anomalous_above"):
        assert 0 < one["anomaly"][name] < 1
        assert two["anomaly"][name] == pytest.approx(one["anomaly"][name], abs=1e-3)
    for name in ("ECE", "AUROC", "AP"):
        assert two[name] == pytest.approx(one[name], abs=1e-4)
    for name in ("reliability.png", "anomaly_histogram.png"):
        differing = pixels(tmp_path / "two" / name) != pixels(tmp_path / "one" / name)
        assert differing.mean() < 1e-3


def test_report_leaves_nothing_in_a_fast_dev_run(tmp_path):
    run = trainer(tmp_path, Report(), fast_dev_run=True)
    run.fit(PixelSegmenter(), scenes())
    run.test(PixelSegmenter(), scenes(), verbose=False)
    assert not list(tmp_path.iterdir())


def test_report_refuses_a_negative_number():
    with pytest.raises(ValueError, match="num_pictures is -1"):
        Report(-1)


def test_compare_scores_measures_what_single_tests_do(tmp_path):
    module, data = calibrated(-2.1), scenes(held_out=True)
    callbacks = (Report(0), CompareScores())
    trainer(tmp_path, *callbacks).test(module, data, verbose=False)
    scores, report = (read(tmp_path / f"{name}.json") for name in ("anomaly_scores", "metrics"))
    assert set(scores) == {"msp", "entropy", "max_logit", "energy"}
    assert scores["energy"] == {name: report[name] for name in ("AUROC", "AP", "FPR95")}
    with pytest.raises(ValueError, match="name unknown_classes, use data with anomaly masks"):
        trainer(tmp_path, CompareScores()).test(module, scenes(), verbose=False)


def test_what_callbacks_say_of_other_modules(tmp_path):
    class Other(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match="SegmentationModule, and Other is none: leave"):
        trainer(tmp_path, CompareScores()).test(Other(), scenes(), verbose=False)
    run = trainer(tmp_path)
    run.datamodule = None
    with pytest.raises(ValueError, match="give Other the attribute num_classes or class_names"):
        classes_of(run, Other())


@pytest.mark.parametrize(
    "sample",
    [
        (torch.rand(3, 8, 8), torch.zeros(8, 8)),
        {"pixel_values": torch.rand(3, 8, 8), "labels": torch.zeros(8, 8)},
        {"image": torch.rand(3, 8, 8)},
    ],
    ids=["pairs", "other names", "no mask"],
)
def test_report_of_batches_of_another_form(sample, tmp_path):
    class Other(pl.LightningModule):
        num_classes = 2

        def test_step(self, batch, batch_idx):
            self.log("test_mIoU", 0.5, batch_size=1)
            return {"mask": torch.zeros(1, 8, 8, dtype=torch.int64)}

    loader = torch.utils.data.DataLoader([sample])
    trainer(tmp_path, Report(1)).test(Other(), loader, verbose=False)
    report = read(tmp_path / "metrics.json")
    assert report["mIoU"] == 0.5
    assert report["images"] is None  # and not none
    assert not (tmp_path / "pictures.png").exists()


def test_another_label_to_ignore_is_drawn(tmp_path):
    module, data = PixelSegmenter(ignore_index=-1), scenes()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    batch["mask"] = torch.where(batch["mask"] == 255, -1, batch["mask"])
    batch["mask"][0, :4] = -1
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    trainer(tmp_path, Report(1)).test(module, loader, verbose=False)
    assert (tmp_path / "pictures.png").exists()


def test_channels_last_changes_layout_and_nothing_else(tmp_path):
    module = PixelSegmenter()
    module.features = nn.Conv2d(3, 6, 3, padding=1)
    module.register_buffer("covariance", torch.rand(2, 3, 4, 4))
    image = torch.rand(1, 3, 8, 8)
    before = module(image)
    trainer(tmp_path, ChannelsLast()).test(module, scenes(), verbose=False)
    assert module.features.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.features.weight.is_contiguous()
    assert module.covariance.is_contiguous()
    torch.testing.assert_close(module(image), before)


@pytest.mark.parametrize("every", [{}, {"val_check_interval": 3, "check_val_every_n_epoch": None}])
def test_last_checkpoint_is_there_after_each_validation_and_of_the_last_step(every, tmp_path):
    path, seen = tmp_path / "checkpoints" / "last.ckpt", []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if path.exists():
                kept = torch.load(path, weights_only=True)["global_step"]
                seen.append((trainer.global_step, kept))

    options = {"max_steps": 5, "max_epochs": -1, "enable_checkpointing": True, **every}
    trainer(tmp_path, LastCheckpoint(), Look(), **options).fit(PixelSegmenter(), scenes())
    assert seen == ([(3, 3), (4, 3)] if every else [(2, 2), (3, 2), (4, 4)])
    assert torch.load(path, weights_only=True)["global_step"] == 5
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
