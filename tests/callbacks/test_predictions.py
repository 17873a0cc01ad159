import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg.callbacks import PredictionWriter, read_manifest
from lightning_genseg.data import SyntheticScenes
from lightning_genseg.errors import GenSegError, UnwritableError
from lightning_genseg.plots.pictures import ANOMALY_PALETTE, colorize, heat_map
from tests.callbacks.runs import PixelSegmenter, calibrated, pixels, scenes, trainer


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


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def predict(tmp_path, photos, out):
    """Predict the photos into `out`; the lines of the list."""

    def run(module=None, root=photos, folder=out, callbacks=(), ckpt_path=None, **options):
        data = scenes(predict_root=root)
        trainer(tmp_path, PredictionWriter(folder, **options), *callbacks).predict(
            module or PixelSegmenter(), data, return_predictions=False, ckpt_path=ckpt_path
        )
        return read_manifest((folder or tmp_path / "predictions") / "predictions.jsonl")

    return run


def shorten(out, count):
    """Leave some of the lines and what they list, as an interruption does."""
    manifest = out / "predictions.jsonl"
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:count]))
    names = {line["name"] for line in read_manifest(manifest)}
    for path in [*out.rglob("*.jpg"), *out.rglob("*.png")]:
        if path.relative_to(out).with_suffix("").as_posix().partition("/")[2] not in names:
            path.unlink()


def written(folder, pattern="*"):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file()}


def test_predictions_are_complete(predict, out):
    module = PixelSegmenter()
    lines = predict(module, anomaly_scores=True)
    names = [line["name"] for line in lines]
    assert sorted(names) == ["more/photo.4", "more/photo.5", *(f"photo.{i}" for i in range(4))]
    for line in lines:
        expected = module.predict_image(pixels(line["image"]))
        mask = pixels(out / line["mask"])
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected["mask"])
        scores = np.load(out / line["anomaly_scores"])
        np.testing.assert_allclose(scores, expected["anomaly"], atol=1e-5)
        # The picture, and to its right what the colours mean.
        for key in ("anomaly", "overlay"):
            height, width, _ = pixels(out / line[key]).shape
            assert height == 36
            assert width > 2 * 48
        low, high = line["anomaly_range"]
        heat = pixels(out / line["anomaly"])[:, :48]
        np.testing.assert_array_equal(heat, heat_map(scores, low, high))
        with Image.open(out / line["mask"]) as file:
            assert file.mode == "P"
            colors = np.array(file.convert("RGB"))
        np.testing.assert_array_equal(colors, colorize(mask, SyntheticScenes.PALETTE))
        assert sum(line["classes"].values()) == pytest.approx(1, abs=1e-5)
        present = {SyntheticScenes.CLASS_NAMES[c] for c in np.unique(expected["mask"])}
        assert set(line["classes"]) == present
        assert line["seconds"] > 0
    keys = ("mask", "overlay", "anomaly", "anomaly_scores")
    listed = {line[key] for line in lines for key in keys}
    assert written(out) == listed | {"predictions.jsonl", "classes.json"}
    assert len({tuple(line["anomaly_range"]) for line in lines}) == 1
    *classes, ignored = json.loads((out / "classes.json").read_text())
    assert [(row["name"], tuple(row["color"])) for row in classes] == list(
        zip(SyntheticScenes.CLASS_NAMES, SyntheticScenes.PALETTE, strict=True)
    )
    assert ignored == {"index": 255, "name": "ignored", "color": [0, 0, 0]}


def test_predictions_without_extras_go_to_the_runs_folder(predict, tmp_path):
    line, *_ = predict(PixelSegmenter(anomaly=False), folder=None, overlays=False)
    out = tmp_path / "predictions"
    assert {path.name for path in out.iterdir()} == {"masks", "predictions.jsonl", "classes.json"}
    assert line["overlay"] is line["anomaly"] is None


def test_predictions_of_a_calibrated_module(predict, out, tmp_path):
    module = calibrated(-2.1)
    plain = {line["name"]: line for line in predict(folder=tmp_path / "plain")}
    shares = []
    for line in predict(module):
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
    assert len(written(out, "*.png")) == 6 * 3


def test_the_overlay_outlines_anomalies(predict, tmp_path):
    for name, value in (("some", -2.1), ("none", 1e9)):
        predict(calibrated(value), folder=tmp_path / name, alpha=0.0)
    for file in written(tmp_path / "none", "*.jpg"):
        some, none = (
            pixels(tmp_path / name / file)[:, :48].astype(int) for name in ("some", "none")
        )
        assert (np.abs(some - none).max(-1) > 60).mean() > 0.02


def test_more_classes_than_a_mask_holds(predict):
    with pytest.raises(ValueError, match="has 300 classes, and masks of 8 bits hold 256"):
        predict(PixelSegmenter(300, ignore_index=-1))


def test_resume_knows_of_anomaly_masks(predict, photos, out):
    line = predict(calibrated(-2.1))[2]
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / line["anomaly_mask"]).unlink()
    predict(calibrated(-2.1), resume=True)
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {out / line[key] for key in ("mask", "anomaly", "anomaly_mask")}
    predict(calibrated(-2.1), root=photos / "more", overwrite=True)
    assert written(out / "anomaly_masks") == {"photo.4.png", "photo.5.png"}


def test_resume_refuses_another_threshold(predict, out):
    predict(calibrated(-2.1))
    shorten(out, 3)
    sentence = r"anomaly score \w+ and threshold -2\.1, and this model has \w+ and {}: use these"
    for value, module in (("-2.5", calibrated(-2.5)), ("None", PixelSegmenter())):
        with pytest.raises(ValueError, match=sentence.format(value)):
            predict(module, resume=True)


def test_resume_refuses_another_checkpoint(predict, out, tmp_path):
    module = PixelSegmenter()
    run = trainer(tmp_path)
    run.strategy.connect(module)
    for name in ("a", "b"):
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    predict(module, ckpt_path=tmp_path / "a.ckpt")
    shorten(out, 1)
    sentence = r"predictions of the checkpoint .*a\.ckpt, not of .*b\.ckpt"
    with pytest.raises(ValueError, match=sentence):
        predict(module, ckpt_path=tmp_path / "b.ckpt", resume=True)


def test_resume_refuses_other_images_of_the_same_name(predict, photos, tmp_path):
    predict()
    photos.rename(tmp_path / "elsewhere")
    sentence = r"holds a prediction named \S+ of .*photos.*another output_dir"
    with pytest.raises(ValueError, match=sentence):
        predict(root=tmp_path / "elsewhere", resume=True)


def test_earlier_predictions_are_not_lost_silently(predict, out):
    lines = predict()
    with pytest.raises(ValueError, match=r"out already holds .*predictions\.resume true"):
        predict()
    assert read_manifest(out / "predictions.jsonl") == lines


def test_overwrite_starts_anew(predict, photos, out):
    predict()
    (out / "notes.txt").write_text("mine")
    lines = predict(root=photos / "more", overwrite=True)
    assert [line["name"] for line in lines] == ["photo.4", "photo.5"]
    assert written(out / "masks") == {"photo.4.png", "photo.5.png"}
    assert (out / "notes.txt").exists()


def test_hand_made_files_are_never_written_over(predict, photos, tmp_path):
    """Also where the output folder is that of the images, and behind links that lead nowhere."""
    mine = tmp_path / "masks" / "more" / "photo.4.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"hours of work")
    link = tmp_path / "overlays" / "photo.2.jpg"
    link.parent.mkdir()
    link.symlink_to("nowhere")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(GenSegError, match=r"more/photo\.4\.png' and 1 more would be written"):
            predict(folder=tmp_path, **options)
    assert mine.read_bytes() == b"hours of work"
    assert written(tmp_path, "*.png") == {f"photos/{n}" for n in written(photos)} | {
        "masks/more/photo.4.png"
    }
    mine.unlink()
    with pytest.raises(GenSegError, match=r"overlays/photo\.2\.jpg' would be written over"):
        predict(folder=tmp_path)
    assert link.is_symlink()
    assert len(predict(folder=tmp_path, overlays=False)) == 6
    mine.write_bytes(b"hours of work")  # listed by now: another run may write it
    predict(folder=tmp_path, overlays=False, overwrite=True)
    assert pixels(mine).shape == (36, 48)


@pytest.mark.parametrize(
    "line",
    [
        {"name": "a", "mask": "../victim.txt"},
        {"name": "../victim", "mask": "masks/../victim.png"},
        {"name": "a", "mask": "/etc/hostname"},
        {"name": "..\\\\victim", "mask": "masks/..\\\\victim.png"},
        {"name": "notes", "mask": "notes.txt"},
        {"mask": "masks/a.png"},
        ["masks/a.png"],
    ],
)
@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_foreign_lists_delete_nothing(line, option, predict, out, tmp_path):
    out.mkdir()
    for path in (tmp_path / "victim.txt", tmp_path / "victim.png", out / "notes.txt"):
        path.write_text("mine")
    manifest = out / "predictions.jsonl"
    manifest.write_text(json.dumps(line) + "\n")
    with pytest.raises(GenSegError, match=r"not written by genseg predict|leads out of the output"):
        predict(**{option: True})
    assert manifest.exists()
    for path in (tmp_path / "victim.txt", tmp_path / "victim.png", out / "notes.txt"):
        assert path.read_text() == "mine"


def test_overwrite_removes_only_what_is_inside(predict, photos, out, tmp_path):
    """Neither lists of another name, nor what lies behind a link, nor a folder of scratch files."""
    predict()
    (out / "predictions_2020.jsonl").write_text('{"name": "a"}')
    (out / ".partial").mkdir()
    (out / ".partial" / "notes.txt").touch()
    (out / "masks").rename(tmp_path / "elsewhere")
    (out / "masks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GenSegError, match="would be written over"):
        predict(overwrite=True)
    predict(root=photos / "more", overwrite=True)
    assert (out / "predictions_2020.jsonl").exists()
    assert (out / ".partial" / "notes.txt").exists()
    assert (tmp_path / "elsewhere" / "photo.0.png").exists()
    assert written(out / "overlays") == {"photo.4.jpg", "photo.5.jpg"}


def test_overwrite_deletes_nothing_before_new_files_are_there(predict, photos, out):
    class Fails(PixelSegmenter):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("power cut")
            return super().predict_step(batch, batch_idx)

    predict()
    before = written(out)
    with pytest.raises(RuntimeError, match="power cut"):
        predict(Fails(), overwrite=True)
    assert written(out) - before == {".partial/image-rank0"}
    lines = predict(overlays=False, resume=True)  # goes on with the overwriting
    assert len(lines) == 6
    assert sum(line["overlay"] is not None for line in lines) == 2
    assert len(written(out, "*.jpg")) == 2
    (photos / "photo.0.png").write_bytes(b"broken")
    with pytest.raises(GenSegError, match=r"photo\.0\.png' cannot be read"):
        predict(overwrite=True, on_error="stop")
    assert len(written(out / "masks")) == 6


@pytest.mark.filterwarnings("ignore:Total length of")
def test_output_inside_the_input(predict, photos):
    """The second run neither predicts the first one's pictures nor trips over them."""
    inside = photos / "out"
    predict(folder=inside)
    for option in ("overwrite", "resume"):
        lines = predict(folder=inside, **{option: True})
        assert sorted(line["name"] for line in lines)[:2] == ["more/photo.4", "more/photo.5"]
        assert len(lines) == 6


def test_what_a_killed_run_had_not_listed_is_its_own(predict, out):
    predict()
    overlays = {path: path.read_bytes() for path in (out / "overlays").rglob("*.jpg")}
    shorten(out, 2)
    path, content = next((path, c) for path, c in overlays.items() if not path.exists())
    path.write_bytes(content)
    with pytest.raises(GenSegError, match=f"{path.name}' would be written over"):
        predict(resume=True)
    (out / ".partial").mkdir()
    (out / ".partial" / "image-rank0").write_text(
        path.relative_to(out / "overlays").with_suffix("").as_posix()
    )  # as the killed run leaves it
    assert len(predict(resume=True)) == 6


def test_a_full_disk_is_told(predict, out, full_disk):
    """The limit is the kernel's: files of at most 1 kB."""
    full_disk(1000)
    with pytest.raises(UnwritableError, match=r"photo\.\d\.jpg' cannot be written \(File"):
        predict()
    assert not list(out.rglob("*.jpg"))


def test_resume_predicts_only_what_is_missing(predict, out):
    predict()
    manifest = out / "predictions.jsonl"
    kept, broken, torn, *_ = manifest.read_bytes().splitlines(keepends=True)
    shorten(out, 3)
    manifest.write_bytes(kept + broken + torn[:40])
    (out / ".partial").mkdir()
    (out / ".partial" / "image-rank0").write_text(json.loads(torn)["name"])
    (out / json.loads(broken)["overlay"]).unlink()  # listed, but no longer complete
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    predicted = []

    class Listener(pl.Callback):
        def on_predict_batch_end(self, trainer, module, outputs, batch, *_):
            predicted.extend(batch["name"])

    lines = predict(callbacks=[Listener()], resume=True)
    kept = json.loads(kept)
    assert len(predicted) == 5
    assert kept["name"] not in predicted
    assert len(lines) == len({line["name"] for line in lines}) == 6
    for key in ("mask", "overlay", "anomaly"):
        assert (out / kept[key]).stat().st_mtime_ns == times[out / kept[key]]
        assert all((out / line[key]).is_file() for line in lines)


@pytest.mark.filterwarnings("ignore:Total length of")
def test_resume_with_nothing_left(predict):
    lines = predict()
    assert predict(resume=True) == lines


@pytest.mark.filterwarnings("ignore:Total length of")
def test_the_range_of_heat_maps(predict, out, tmp_path):
    """Given, else the checkpoint's, a quarter wider, else the first image's; resuming keeps it."""

    def ranges(lines):
        return {tuple(line["anomaly_range"]) for line in lines}

    module = calibrated(-2.1)
    assert ranges(predict(module, anomaly_range=(-3.0, 4.0))) == {(-3.0, 4.0)}
    shorten(out, 2)
    assert ranges(predict(module, resume=True)) == {(-3.0, 4.0)}
    module.anomaly.ranges[module.anomaly_score] = (-3.0, -1.0)
    lines = predict(module, folder=tmp_path / "other")
    assert ranges(lines) == {(-3.0, -0.5)}


def test_after_a_failure_at_the_first_image_the_same_command_does(predict, out):
    class Fails(PixelSegmenter):
        def predict_step(self, batch, batch_idx):
            raise RuntimeError("out of memory")

    for _ in range(2):  # and not: classes.json is of others
        with pytest.raises(RuntimeError, match="out of memory"):
            predict(Fails())
    assert len(predict()) == 6
    assert not (out / ".partial").exists()


def test_a_failure_midway_leaves_only_complete_files(predict, out):
    class Fails(PixelSegmenter):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("power cut")
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="power cut"):
        predict(Fails())
    assert len(read_manifest(out / "predictions.jsonl")) == 4
    assert len(predict(resume=True)) == 6


def test_a_name_cannot_leave_the_folder(predict, out, tmp_path):
    class Renames(PixelSegmenter):
        def on_predict_batch_start(self, batch, batch_idx, dataloader_idx=0):
            batch["name"] = ["../escape"] * len(batch["name"])

    with pytest.raises(ValueError, match=r"'\.\./escape' leads out of the output folder"):
        predict(Renames(), folder=out / "deep")
    assert not list(tmp_path.rglob("escape*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resume": True, "overwrite": True}, "resume and overwrite exclude each other"),
        ({"resume": True}, "resume needs output_dir"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PredictionWriter(**arguments)


def test_resume_needs_a_datamodule(tmp_path, out):
    loader = torch.utils.data.DataLoader(dataset=[{"image": torch.rand(3, 8, 8), "name": "a"}])
    run = trainer(tmp_path, PredictionWriter(out))
    run.predict(PixelSegmenter(), loader, return_predictions=False)
    assert read_manifest(out / "predictions.jsonl")[0]["image"] is None
    with pytest.raises(ValueError, match="resume needs a datamodule"):
        trainer(tmp_path, PredictionWriter(out, resume=True)).predict(PixelSegmenter(), loader)


class Images(pl.LightningDataModule):
    """A datamodule that is not ours, which may call its images as ours do."""

    def __init__(self, sample):
        super().__init__()
        self.predict_dataset = [sample]

    def predict_dataloader(self):
        return torch.utils.data.DataLoader(self.predict_dataset)


def test_images_of_another_datamodule(tmp_path, out):
    run = trainer(tmp_path, PredictionWriter(out))
    data = Images({"image": torch.rand(3, 8, 8), "name": "a"})
    run.predict(PixelSegmenter(), data, return_predictions=False)
    assert [line["name"] for line in read_manifest(out / "predictions.jsonl")] == ["a"]


def test_what_it_needs_of_others(tmp_path, out):
    class Other(pl.LightningModule):
        num_classes = 2

        def predict_step(self, batch, batch_idx):
            return torch.zeros(1, 8, 8)

    image = torch.rand(3, 8, 8)
    for sample, message in [
        ((image, image), "a dictionary with image and name from the data set"),
        ({"image": image}, "a dictionary with image and name from the data set"),
        ({"image": image, "name": "a"}, "a dictionary with mask from predict_step"),
    ]:
        run = trainer(tmp_path, PredictionWriter(out))
        with pytest.raises(GenSegError, match=f"PredictionWriter needs {message}: let it give"):
            run.predict(Other(), Images(sample), return_predictions=False)


def test_read_manifest_names_a_broken_line(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"name": "a"}\n{"name": \n{"name": "c"}\n{"na')
    with pytest.raises(ValueError, match=r"line 2 of .*predictions\.jsonl is not JSON"):
        read_manifest(path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_follows_the_window_and_not_the_picture(predict, tmp_path, out):
    def used(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

    (tmp_path / "large").mkdir()
    ramp = np.linspace(0, 255, 8000).astype(np.uint8)
    picture = np.stack([np.tile(ramp, (6000, 1)), np.tile(ramp[:6000, None], (1, 8000))], 2)
    picture = np.concatenate([picture, picture[..., :1]], 2)
    Image.fromarray(picture).save(tmp_path / "large" / "photo.png", compress_level=1)
    del picture
    module = PixelSegmenter(inference={"window": (512, 512), "stride": (384, 384)})
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = used("VmRSS")
    (line,) = predict(module, root=tmp_path / "large")
    assert used("VmHWM") - before < 1.5e9
    part = pixels(tmp_path / "large" / "photo.png")[:600, :700]
    plain = PixelSegmenter()
    plain.load_state_dict(module.state_dict())
    expected = plain.predict_image(part)["mask"]
    np.testing.assert_array_equal(pixels(out / line["mask"])[:600, :700], expected)
