import json
import math
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn

from lightning_genseg import AGMM, SegmentationModule
from lightning_genseg.callbacks import (
    ChannelsLast,
    LabelSpreading,
    PredictionWriter,
    Report,
    read_manifest,
)
from lightning_genseg.data import Points, SyntheticScenes, SyntheticScenesDataModule
from lightning_genseg.ops.views import InferenceOptions
from lightning_genseg.plots.pictures import ANOMALY_PALETTE, colorize
from lightning_genseg.uncertainty.conformal import Threshold
from tests.report_run import run as report_run


class PixelSegmenter(SegmentationModule):
    """One linear map of the colour of a pixel; how little any class likes it is its anomaly."""

    def __init__(self, num_classes=6, anomaly=True, class_names=None):
        score = "energy" if anomaly else None
        super().__init__(num_classes, class_names=class_names, anomaly_score=score)
        self.features = nn.Conv2d(3, num_classes, 1)

    def outputs(self, image):
        scores = self.features(self.normalize(image))
        return {"logits": scores, "features": scores}

    def compute_loss(self, batch):
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["mask"], ignore_index=255)
        return {"loss": loss}


def calibrated(value):
    """Module with a threshold; `value` is about the median of its scores, so that both sides occur."""
    torch.manual_seed(0)
    module = PixelSegmenter()
    module.anomaly.thresholds["energy"] = Threshold(value, 0.1, "image", 0.2, 9)
    return module


def trainer(folder, *callbacks, **options):
    options = {"logger": False, "max_epochs": 1} | options
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **options,
    )


def scenes(**options):
    options = {"train_length": 4, "val_length": 5, "test_length": 7, "num_workers": 0} | options
    size = (32, 48)
    return SyntheticScenesDataModule(
        size, crop_size=size, batch_size=2, eval_batch_size=2, **options
    )


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    dataset = SyntheticScenes(6, (36, 48), 3)
    for index in range(6):
        path = folder / ("." if index < 4 else "more") / f"photo.{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = dataset[index]["image"].mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(path)
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def predict(writer, photos, folder, module=None, **options):
    data = scenes(predict_root=photos, **options)
    trainer(folder, writer).predict(module or PixelSegmenter(), data, return_predictions=False)


# --- Report ---------------------------------------------------------------------------------


def test_report_of_a_test_run(tmp_path):
    data = scenes()
    module = PixelSegmenter(class_names=data.class_names)
    run = trainer(tmp_path, Report(num_pictures=3), logger=CSVLogger(tmp_path, version="a"))
    (logged,) = run.test(module, data, verbose=False)
    folder = tmp_path / "lightning_logs" / "a"
    report = json.loads((folder / "metrics.json").read_text())
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
    report = json.loads((tmp_path / "val_metrics.json").read_text())
    assert report["step"] == 2
    assert report["images"] == 5  # not those of the sanity check
    assert report["mIoU"] == run.callback_metrics["val_mIoU"].item()
    assert not (tmp_path / "metrics.json").exists()
    assert pixels(tmp_path / "val_pictures.png").shape[1] == 3 * 320 + 4 * 4
    run.validate(module, scenes(), verbose=False)
    assert json.loads((tmp_path / "val_metrics.json").read_text())["mIoU"] == report["mIoU"]


def test_report_shows_what_the_module_predicted(tmp_path):
    """A module that predicts the labels themselves must give two equal columns."""

    class Oracle(PixelSegmenter):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            return {"mask": batch["mask"]}

    trainer(tmp_path, Report(num_pictures=2)).test(Oracle(), scenes(), verbose=False)
    picture = pixels(tmp_path / "pictures.png")[27 : 27 + 2 * 213 + 4]
    left, middle, right = (picture[:, 4 + 324 * i : 324 + 324 * i] for i in range(3))
    np.testing.assert_array_equal(middle, right)
    assert (left != middle).any()


def test_report_writes_null_for_absent_classes(tmp_path):
    module = PixelSegmenter(num_classes=7)  # the data know six classes
    with torch.no_grad():
        module.features.bias[6] = -1000
    trainer(tmp_path, Report(0)).test(module, scenes(), verbose=False)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text  # JSON has no such number
    assert json.loads(text)["IoU"]["6"] is None
    assert not (tmp_path / "pictures.png").exists()


def test_report_of_a_calibrated_module_on_unknown_objects(tmp_path):
    module, data = calibrated(-2.1), scenes(held_out=True)
    run = trainer(tmp_path, Report(num_pictures=2))
    (logged,) = run.test(module, data, verbose=False)
    report = json.loads((tmp_path / "metrics.json").read_text())
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
    left = {"labels": 3 * 324 + 4, "mask": 5 * 324 + 4}
    first = scores[0] > -2.1
    for key, values in (("labels", labels[0]), ("mask", first.long())):
        column = picture[27 : 27 + 213, left[key] : left[key] + 320]
        expected = colorize(values.numpy(), ANOMALY_PALETTE)
        rows = ((np.arange(32) + 0.5) * 213 / 32).astype(int)
        columns = ((np.arange(48) + 0.5) * 320 / 48).astype(int)
        np.testing.assert_array_equal(column[rows][:, columns], expected)


def test_report_without_unknown_objects_or_score(tmp_path):
    trainer(tmp_path / "a", Report(1)).test(PixelSegmenter(), scenes(), verbose=False)
    assert not (tmp_path / "a" / "anomaly_histogram.png").exists()
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["anomaly"] == {
        "score": "energy",
        "threshold": None,
    }
    data = scenes(held_out=True)
    trainer(tmp_path / "b", Report(1)).test(PixelSegmenter(anomaly=False), data, verbose=False)
    assert not (tmp_path / "b" / "anomaly_histogram.png").exists()
    assert "anomaly" not in json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert (tmp_path / "b" / "reliability.png").exists()
    # image, labels, prediction, and the anomaly labels, which need no score
    assert pixels(tmp_path / "b" / "pictures.png").shape[1] == 4 * 320 + 5 * 4


def test_report_of_infinite_scores_has_no_histogram(tmp_path):
    module = calibrated(math.inf)
    module.anomaly.forward = lambda name, outputs: outputs["logits"][:, :1] * 0 + math.inf
    trainer(tmp_path, Report(0)).test(module, scenes(held_out=True), verbose=False)
    assert not (tmp_path / "anomaly_histogram.png").exists()
    text = (tmp_path / "metrics.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text)["anomaly"]["threshold"]["value"] is None


def test_report_of_another_test_counts_anew(tmp_path):
    module, data = calibrated(-2.1), scenes(held_out=True)
    files = ("metrics.json", "reliability.png", "anomaly_histogram.png")
    reports = []
    for _ in range(2):
        trainer(tmp_path, Report(0)).test(module, data, verbose=False)
        reports.append([(tmp_path / name).read_bytes() for name in files])
    assert reports[0] == reports[1]
    known = sum((batch["mask"] != 255).sum().item() for batch in data.test_dataloader())
    assert module.test_calibration.counts.sum() == known  # still there, for a notebook


@pytest.mark.ddp
@pytest.mark.slow
def test_report_of_two_processes_is_that_of_one(tmp_path):
    command = [sys.executable, "-m", "tests.report_run", str(tmp_path / "two"), "2"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report_run(tmp_path / "one", 1)
    two, one = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in ("two", "one"))
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


# --- LabelSpreading -------------------------------------------------------------------------


def column(picture, index):
    """Middle of each cell of a column of 320 pixels, two rows below a line of titles, as 32 x 48 images."""
    x = 4 + 324 * index + ((np.arange(48) + 0.5) * 320 / 48).astype(int)
    y = ((np.arange(32) + 0.5) * 213 / 32).astype(int)
    return [picture[27 + row * 217 + y][:, x] for row in range(2)]


def test_label_spreading_of_agmm(tmp_path):
    data = scenes(sparse=Points(2))
    features = nn.Conv2d(3, 8, 3, padding=1)
    module = AGMM(6, features=features, class_names=data.class_names)
    spreading = LabelSpreading(num_images=2)
    trainer(tmp_path, spreading, val_check_interval=1).fit(module, data)
    folder = tmp_path / "label_spreading"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000001.png", "step_000002.png"]
    first, last = (pixels(path) for path in sorted(folder.iterdir()))
    assert first.shape == last.shape
    assert last.shape[1] == 4 * 320 + 5 * 4
    dataset = data.split_dataset("train", ())
    for i, index in enumerate((0, 3)):
        sample = dataset[index]
        image = sample["image"].mul(255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(column(first, 0)[i], image)
        labels, mask = column(first, 1)[i], sample["mask"].numpy()
        drawn = (labels == colorize(mask, data.palette)).all(2)
        assert drawn[mask != 255].all()
        batch = data.train_dataloader().collate_fn([sample])
        strength, likeliest = (x[0].numpy() for x in module.gaussian_map(batch).max(1))
        expected = colorize(likeliest, data.palette) * strength[..., None]
        np.testing.assert_array_equal(column(last, 2)[i], np.rint(expected).astype(np.uint8))
    assert (first != last).any()  # the map and the prediction
    assert all((a == b).all() for a, b in zip(column(first, 1), column(last, 1), strict=True))


def test_label_spreading_at_the_size_of_inference(tmp_path):
    """A photograph of 12 megapixels would fill the memory, and the map at its size is not that of training."""
    module = AGMM(
        6, features=nn.Conv2d(3, 8, 3, padding=1), inference=InferenceOptions(short_side=16)
    )
    spreading = LabelSpreading(1)
    trainer(tmp_path, spreading).fit(module, scenes(sparse=Points(2)))
    (batch,) = spreading._batches
    assert batch["image"].shape[-2:] == (16, 24)
    assert batch["mask"].shape[-2:] == (16, 24)


def test_label_spreading_of_another_method_has_no_gaussians(tmp_path):
    spreading = LabelSpreading(num_images=9)  # there are four images
    module = PixelSegmenter(anomaly=False)
    trainer(tmp_path, spreading).fit(module, scenes(sparse=Points()))
    picture = pixels(tmp_path / "label_spreading" / "step_000002.png")
    assert picture.shape[1] == 3 * 320 + 4 * 4
    assert 4 * 213 < picture.shape[0] < 4 * 213 + 100


def test_black_is_a_colour_of_label_spreading(tmp_path):
    """VOC's background: seen on white, in the labels and where the Gaussian map has faded."""
    palette = [(0, 0, 0), (128, 0, 0)]
    mask = torch.full((1, 32, 48), 255)
    mask[0, 8, 8], mask[0, 24, 40] = 0, 1
    image = torch.zeros(1, 3, 32, 48)
    image[..., 24:] = 0.5
    batch = {"image": image, "mask": mask, "unlabelled": mask == 255}
    module = AGMM(2, features=nn.Conv2d(3, 8, 3, padding=1))
    for colors, void in ((palette, 255), ([(0, 0, 255), *palette[1:]], 0)):
        _, labels, spread, _ = LabelSpreading._row(module, batch, colors)
        assert tuple(labels[8, 8]) == colors[0]
        assert tuple(labels[24, 40]) == colors[1]
        assert tuple(labels[30, 2]) == (void // 2,) * 3
        strength, likeliest = (x[0].numpy() for x in module.gaussian_map(batch).max(1))
        expected = colorize(likeliest, colors) * strength[..., None] + void * (1 - strength)[..., None]  # fmt: skip
        np.testing.assert_allclose(spread, expected, atol=0.51)


def test_label_spreading_needs_a_module_of_ours(tmp_path):
    class Foreign(pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)

    data = scenes(sparse=Points())
    with pytest.raises(ValueError, match="SegmentationModule predicts and Foreign is none"):
        trainer(tmp_path, LabelSpreading()).fit(Foreign(), data)


def test_label_spreading_needs_sparse_labels(tmp_path):
    with pytest.raises(ValueError, match=r"the data have none: set data\.sparse"):
        trainer(tmp_path, LabelSpreading()).fit(PixelSegmenter(anomaly=False), scenes())
    with pytest.raises(ValueError, match="num_images is 0 but must be 1 or more"):
        LabelSpreading(num_images=0)


# --- PredictionWriter -----------------------------------------------------------------------


def test_predictions_are_complete(tmp_path, photos):
    out = tmp_path / "out"
    module = PixelSegmenter()
    predict(PredictionWriter(out, anomaly_scores=True), photos, tmp_path, module)
    lines = read_manifest(out / "predictions.jsonl")
    names = [line["name"] for line in lines]
    assert sorted(names) == ["more/photo.4", "more/photo.5", *(f"photo.{i}" for i in range(4))]
    for line in lines:
        expected = module.predict_image(pixels(line["image"]))
        mask = pixels(out / line["mask"])
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected["mask"])
        np.testing.assert_allclose(
            np.load(out / line["anomaly_scores"]), expected["anomaly"], atol=1e-5
        )
        for key in ("anomaly", "overlay"):
            assert pixels(out / line[key]).shape == (36, 48, 3)
        assert line["anomaly_range"][0] < line["anomaly_range"][1]
        assert sum(line["classes"].values()) == pytest.approx(1, abs=1e-5)
        present = {SyntheticScenes.CLASS_NAMES[c] for c in np.unique(expected["mask"])}
        assert set(line["classes"]) == present
        assert line["seconds"] > 0
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    listed = {
        line[key] for line in lines for key in ("mask", "overlay", "anomaly", "anomaly_scores")
    }
    assert files == listed | {"predictions.jsonl"}


def test_predictions_without_extras_go_to_the_runs_folder(tmp_path, photos):
    predict(PredictionWriter(overlays=False), photos, tmp_path, PixelSegmenter(anomaly=False))
    out = tmp_path / "predictions"
    assert {path.name for path in out.iterdir()} == {"masks", "predictions.jsonl"}
    (line, *_) = read_manifest(out / "predictions.jsonl")
    assert line["overlay"] is None
    assert line["anomaly"] is None


def test_predictions_of_a_calibrated_module(tmp_path, photos):
    out, module = tmp_path / "out", calibrated(-2.1)
    predict(PredictionWriter(out), photos, tmp_path, module)
    predict(PredictionWriter(tmp_path / "plain"), photos, tmp_path, PixelSegmenter())
    plain = {line["name"]: line for line in read_manifest(tmp_path / "plain" / "predictions.jsonl")}
    shares = []
    for line in read_manifest(out / "predictions.jsonl"):
        assert line["anomaly_mask"] == f"anomaly_masks/{line['name']}.png"
        expected = module.predict_image(pixels(line["image"]))["anomaly"] > -2.1
        with Image.open(out / line["anomaly_mask"]) as file:
            assert file.mode == "P"
            np.testing.assert_array_equal(np.array(file), expected)
            colors = np.array(file.convert("RGB"))
        np.testing.assert_array_equal(colors, colorize(expected.astype(int), ANOMALY_PALETTE))
        assert line["anomalous"] == pytest.approx(expected.mean(), abs=1e-6)
        assert line["anomaly_threshold"] == -2.1
        shares.append(line["anomalous"])
        other = plain[line["name"]]
        assert other["anomaly_mask"] is other["anomaly_threshold"] is None
        assert "anomalous" not in other
    assert 0 < min(shares) < max(shares) < 1
    files = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert len(files) == 6 * 3


def test_the_overlay_outlines_anomalies(tmp_path, photos):
    for name, value in (("some", -2.1), ("none", 1e9)):
        writer = PredictionWriter(tmp_path / name, alpha=0)
        predict(writer, photos, tmp_path, calibrated(value))
    for file in (tmp_path / "none" / "overlays").rglob("*.jpg"):
        other = pixels(tmp_path / "some" / file.relative_to(tmp_path / "none"))
        assert (np.abs(pixels(file).astype(int) - other).max(-1) > 60).mean() > 0.02


def test_resume_knows_of_anomaly_masks(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path, calibrated(-2.1))
    lines = read_manifest(out / "predictions.jsonl")
    lost = out / lines[2]["anomaly_mask"]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    lost.unlink()
    predict(PredictionWriter(out, resume=True), photos, tmp_path, calibrated(-2.1))
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {out / lines[2][key] for key in ("mask", "anomaly", "anomaly_mask")}
    predict(PredictionWriter(out, overwrite=True), photos / "more", tmp_path, calibrated(-2.1))
    masks = {path.name for path in (out / "anomaly_masks").rglob("*.png")}
    assert masks == {"photo.4.png", "photo.5.png"}


def test_resume_refuses_another_threshold(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path, calibrated(-2.1))
    sentence = r"anomaly score \w+ and threshold -2\.1, and this model has \w+ and {}: use these"
    manifest = out / "predictions.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:3]))
    for value, module in (("-2.5", calibrated(-2.5)), ("None", PixelSegmenter())):
        with pytest.raises(ValueError, match=sentence.format(value)):
            predict(PredictionWriter(out, resume=True), photos, tmp_path, module)


def test_earlier_predictions_are_not_lost_silently(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path)
    before = (out / "predictions.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"out already holds .*predictions\.resume true"):
        predict(PredictionWriter(out), photos, tmp_path)
    assert (out / "predictions.jsonl").read_bytes() == before


def test_overwrite_starts_anew(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path)
    (out / "notes.txt").write_text("mine")
    predict(PredictionWriter(out, overwrite=True), photos / "more", tmp_path)
    assert [line["name"] for line in read_manifest(out / "predictions.jsonl")] == [
        "photo.4",
        "photo.5",
    ]
    masks = [path.name for path in (out / "masks").rglob("*.png")]
    assert sorted(masks) == ["photo.4.png", "photo.5.png"]
    assert (out / "notes.txt").exists()


def test_resume_predicts_only_what_is_missing(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path)
    manifest = out / "predictions.jsonl"
    kept, *rest = manifest.read_bytes().splitlines(keepends=True)
    broken, torn = rest[0], rest[1]
    manifest.write_bytes(kept + broken + torn[:40])
    (out / json.loads(broken)["overlay"]).unlink()  # listed, but no longer complete
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    predicted = []

    class Listener(pl.Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, *_):
            predicted.extend(batch["name"])

    data = scenes(predict_root=photos)
    trainer(tmp_path, PredictionWriter(out, resume=True), Listener()).predict(
        PixelSegmenter(), data, return_predictions=False
    )
    kept_name = json.loads(kept)["name"]
    assert len(predicted) == 5
    assert kept_name not in predicted
    lines = read_manifest(manifest)
    assert len(lines) == 6
    assert len({line["name"] for line in lines}) == 6
    for key in ("mask", "overlay", "anomaly"):
        path = out / json.loads(kept)[key]
        assert path.stat().st_mtime_ns == times[path]
        assert all((out / line[key]).is_file() for line in lines)


@pytest.mark.filterwarnings("ignore:Total length of")
def test_resume_with_nothing_left(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path)
    before = (out / "predictions.jsonl").read_bytes()
    predict(PredictionWriter(out, resume=True), photos, tmp_path)
    assert (out / "predictions.jsonl").read_bytes() == before


def test_resume_refuses_other_images_of_the_same_name(tmp_path, photos):
    out = tmp_path / "out"
    predict(PredictionWriter(out), photos, tmp_path)
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"holds a prediction named \S+ of .*photos.*another output_dir"
    ):
        predict(PredictionWriter(out, resume=True), tmp_path / "elsewhere", tmp_path)


def test_resume_refuses_another_checkpoint(tmp_path, photos):
    out = tmp_path / "out"
    module, data = PixelSegmenter(), scenes(predict_root=photos)
    run = trainer(tmp_path, PredictionWriter(out))
    run.strategy.connect(module)
    for name in ("a", "b"):
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    run.predict(module, data, return_predictions=False, ckpt_path=tmp_path / "a.ckpt")
    (out / "predictions.jsonl").write_bytes(
        (out / "predictions.jsonl").read_bytes().partition(b"\n")[0] + b"\n"
    )
    run = trainer(tmp_path, PredictionWriter(out, resume=True))
    with pytest.raises(
        ValueError, match=r"predictions of the checkpoint .*a\.ckpt, not of .*b\.ckpt"
    ):
        run.predict(module, data, return_predictions=False, ckpt_path=tmp_path / "b.ckpt")


def test_a_failure_midway_leaves_only_complete_files(tmp_path, photos):
    out = tmp_path / "out"

    class Fails(PixelSegmenter):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("power cut")
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="power cut"):
        predict(PredictionWriter(out), photos, tmp_path, Fails())
    lines = read_manifest(out / "predictions.jsonl")
    assert len(lines) == 4
    predict(PredictionWriter(out, resume=True), photos, tmp_path)
    assert len(read_manifest(out / "predictions.jsonl")) == 6


def test_a_name_cannot_leave_the_folder(tmp_path, photos):
    class Renames(PixelSegmenter):
        def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
            batch["name"] = ["../escape"] * len(batch["name"])

    with pytest.raises(ValueError, match=r"'\.\./escape' leads out of the output folder"):
        predict(PredictionWriter(tmp_path / "a" / "out"), photos, tmp_path, Renames())
    assert not list(tmp_path.rglob("escape*"))


def test_writer_arguments():
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        PredictionWriter(Path("x"), resume=True, overwrite=True)
    with pytest.raises(ValueError, match="resume needs output_dir"):
        PredictionWriter(resume=True)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        PredictionWriter(alpha=1.5)


def test_resume_needs_a_datamodule(tmp_path):
    out = tmp_path / "out"
    loader = torch.utils.data.DataLoader(dataset=[{"image": torch.rand(3, 8, 8), "name": "a"}])
    run = trainer(tmp_path, PredictionWriter(out))
    run.predict(PixelSegmenter(), loader, return_predictions=False)
    assert read_manifest(out / "predictions.jsonl")[0]["image"] is None
    with pytest.raises(ValueError, match="resume needs a datamodule"):
        trainer(tmp_path, PredictionWriter(out, resume=True)).predict(PixelSegmenter(), loader)


def test_read_manifest_names_a_broken_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"name": "a"}\n{"name": \n{"name": "c"}\n{"na')
    with pytest.raises(ValueError, match=r"line 2 of .*predictions\.jsonl is not JSON"):
        read_manifest(path)


# --- ChannelsLast ---------------------------------------------------------------------------


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
