"""What every public data set must do, and what is said about a damaged copy: one sentence each."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

from lightning_genseg import SoftmaxSegmenter, data
from lightning_genseg.cli.check import check_data, summary
from lightning_genseg.data import Cityscapes, CityscapesDataModule
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.download import DownloadDataModule
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.contract import TINY, trainer
from tests.data.sets.cases import ALL, DENSE, STREETS, UNTRAINED, Case
from tests.miniatures import (
    make_cityscapes,
    make_fishyscapes,
    make_street_hazards,
    make_voc,
    save,
)

SIZE = (48, 64)


every = pytest.mark.parametrize("case", ALL)
untrained = pytest.mark.parametrize("case", UNTRAINED)
rooted = pytest.mark.parametrize("case", [param for param in ALL if param.values[0].rooted])


def opened(case: Case, root: Path) -> list[Any]:
    """Every split of a data set."""
    if list(case.counts) == ["test"]:
        return [case.dataset(root)]
    return [case.dataset(root, split) for split in case.counts]


def one_sentence(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# --- the data set ------------------------------------------------------------------------------


@every
def test_samples(tmp_path, case):
    splits = opened(case, case.make(tmp_path, SIZE))
    assert {name: len(s) for name, s in zip(case.counts, splits, strict=True)} == case.counts
    values = set()
    for split in splits:
        assert split.num_classes == len(set(split.class_names)) == len(split.palette)
        assert split.num_classes == case.classes
        assert len({item["name"] for item in split}) == len(split)
        for index, item in enumerate(split):
            assert item["image"].shape[1:] == item["mask"].shape
            assert min(item["mask"].shape) >= min(SIZE)  # at its own size
            assert np.array_equal(split.read_mask_labels(index), item["mask"])
            values |= set(item["mask"].unique().tolist())
            if "anomaly" in item:
                assert item["anomaly"].shape == item["mask"].shape
                assert set(item["anomaly"].unique().tolist()) <= {0, 1, 255}
                assert (item["mask"][item["anomaly"] == 1] == 255).all()
    known = values - {255}
    assert known <= set(range(case.classes))
    assert (len(known) > 4) == (list(case.counts) != ["test"])
    assert (255 in values) == (case.dataset is not data.COCO)


@every
def test_splits_share_no_image(tmp_path, case):
    splits = dict(zip(case.counts, opened(case, case.make(tmp_path, SIZE)), strict=True))
    if "trainaug" in splits:
        splits.pop("train")
    images = [sample.image for split in splits.values() for sample in split.samples]
    assert len(set(images)) == len(images)


@every
def test_choices_are_checked(tmp_path, case):
    if list(case.counts) != ["test"]:
        with pytest.raises(GenSegError, match=r"split is 'holiday'; it must be one of \w+, \w+"):
            case.dataset(tmp_path, "holiday")


@rooted
def test_wrong_root(tmp_path, case):
    root = case.make(tmp_path / "data", SIZE)
    below = next(path for path in sorted(root.iterdir()) if path.is_dir())
    for wrong in (root.parent, below):
        with pytest.raises(MissingFileError, match=f"must hold .*use '{root}' as root.$") as error:
            case.dataset(wrong)
        one_sentence(error)
    with pytest.raises(MissingFileError, match="nowhere' does not exist: give the folder of"):
        case.dataset(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    with pytest.raises(MissingFileError, match=r"found: holiday\.jpg.: give the folder") as error:
        case.dataset(tmp_path / "other")
    downloads = issubclass(case.datamodule, DownloadDataModule)
    assert ("set download to true" in one_sentence(error)) == downloads


def test_root_two_levels_too_high_or_half_a_copy(tmp_path, shared_dir):
    root = make_voc(tmp_path / "voc", SIZE)
    with pytest.raises(MissingFileError, match=f"found: VOCdevkit.: use '{root}' as root"):
        data.VOC(root.parents[1])
    root = make_cityscapes(tmp_path / "cityscapes", SIZE)
    shutil.rmtree(root / "gtFine")
    with pytest.raises(MissingFileError, match=r"has no 'gtFine' \(found: .*leftImg8bit\)"):
        Cityscapes(root)
    with pytest.raises(MissingFileError, match=r"no 'leftImg8bit' and 'gtFine' \(found: .*test"):
        Cityscapes(shared_dir / "data" / "camvid")


@every
@pytest.mark.parametrize("part", ["image", "mask"])
def test_half_of_a_sample(tmp_path, case, part):
    root = case.make(tmp_path, SIZE)
    gone = opened(case, root)[0].samples[1]
    getattr(gone, part).unlink()
    if case.found_by == part:  # there is nothing left of it
        assert gone not in opened(case, root)[0].samples
        return
    with pytest.raises(MissingFiles, match=r"^1 (images|masks) (are missing|have no)") as error:
        opened(case, root)
    assert gone.name in one_sentence(error)
    # What `genseg check` goes on with: everything, the missing file included.
    assert error.value.dataset.samples[1].name == gone.name
    assert error.value.dataset[0]["mask"].ndim == 2


@pytest.mark.parametrize(
    ("name", "folder", "split", "beside"),
    [
        ("Cityscapes", "leftImg8bit/val", "val", "test, train"),
        ("Cityscapes", "gtFine/val", "val", "test, train"),
        ("ADE20K", "images/validation", "val", "training"),
        ("ADE20K", "annotations/validation", "val", "training"),
        ("COCOStuff164k", "images/val2017", "val", "train2017"),
        ("COCOStuff164k", "annotations/val2017", "val", "train2017"),
        ("StreetHazards", "train/annotations/validation", "val", "training"),
        ("COCOStuff10k", "imageLists/test.txt", "test", "train.txt"),
        ("VOC", "ImageSets/Segmentation/val.txt", "val", "train.txt"),
    ],
)
def test_missing_split(tmp_path, name, folder, split, beside):
    (case,) = (param.values[0] for param in ALL if param.id == name)
    root = case.make(tmp_path, SIZE)
    path = root / folder
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    case.dataset(root, "train")
    with pytest.raises(MissingFileError, match=f"{folder}' .*found beside it: .*{beside}"):
        case.dataset(root, split)
    if path.suffix:
        path.write_text("\n\n")
        with pytest.raises(GenSegError, match=f"the list '.*{folder}' of .* is empty"):
            case.dataset(root, split)


@pytest.mark.parametrize(
    ("name", "folder", "pattern"),
    [
        ("Cityscapes", "leftImg8bit/train", "_leftImg8bit.png"),
        ("ADE20K", "images/training", ".jpg"),
        ("COCOStuff164k", "images/train2017", ".jpg"),
        ("FishyscapesLostAndFound", "fishyscapes_lostandfound", "_labels.png"),
        ("RoadAnomaly21", "labels_masks", "_labels_semantic.png"),
    ],
)
def test_split_without_files(tmp_path, name, folder, pattern):
    (case,) = (param.values[0] for param in ALL if param.id == name)
    root = case.make(tmp_path, SIZE)
    for path in list((root / folder).rglob("*.*")):
        path.unlink()
    with pytest.raises(GenSegError, match=rf"^no .*{pattern}.* in '{root / folder}': "):
        case.dataset(root)


@pytest.mark.parametrize("case", [STREETS, *UNTRAINED])
def test_values_of_something_else(tmp_path, case):
    value, message = case.wrong
    root = case.make(tmp_path, SIZE)
    save(np.full(SIZE, value, np.uint8), opened(case, root)[0].samples[0].mask)
    with pytest.raises(GenSegError, match=f"holds the values {value}, but {message}"):
        case.dataset(root)


# --- its datamodule ----------------------------------------------------------------------------


@every
def test_attributes_need_no_files(case):
    plain = case.datamodule("nowhere")
    assert plain.num_classes == len(plain.palette) == case.classes
    if case.dataset not in {param.values[0].dataset for param in DENSE}:
        with pytest.raises(TypeError, match="unknown_classes"):
            case.datamodule("nowhere", unknown_classes=["car"])
        return
    left_out = plain.class_names[5]
    part = case.datamodule("nowhere", unknown_classes=[left_out])
    assert part.class_names == [name for name in plain.class_names if name != left_out]
    assert part.palette == [color for c, color in enumerate(plain.palette) if c != 5]
    with pytest.raises(GenSegError, match="unknown_classes holds 'unicorn', which is no class"):
        case.datamodule("nowhere", unknown_classes=["unicorn"])


@pytest.mark.parametrize("case", [*DENSE, STREETS])
def test_loaders(tmp_path, case):
    root = case.make(tmp_path, SIZE)
    module = case.datamodule(root, batch_size=2, num_workers=0, crop_size=(32, 40))
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 40)
    assert batch["mask"].shape == (2, 32, 40)
    assert batch["mask"].dtype == torch.int64
    module.setup("test")
    held = [[s.name for s in d.samples] for d in (module.val_dataset, module.test_dataset)]
    counts = list(case.counts.values())
    assert (len(module.train_dataset), len(held[1])) == (counts[0], counts[-1])
    # Most official test labels are not public.
    assert (held[0] == held[1]) == (case.dataset not in (data.CamVid, data.StreetHazards))
    assert min(tuple(batch["mask"].shape[1:]) for batch in module.val_dataloader()) >= SIZE


@untrained
def test_data_without_training(tmp_path, case):
    assert case.datamodule("nowhere").class_names == CityscapesDataModule("nowhere").class_names
    module = case.datamodule(case.make(tmp_path, SIZE), num_workers=0)
    module.setup()  # what there is
    assert len(module.test_dataset) == len(list(module.plain_loader("test"))) == case.counts["test"]
    assert module.train_dataset is module.val_dataset is None
    for ask in (
        lambda: module.setup("fit"),
        lambda: module.setup("validate"),
        module.train_dataloader,
        module.val_dataloader,
        lambda: module.plain_loader("train"),
        module.class_index,
    ):
        with pytest.raises(GenSegError, match=r"DataModule has no \w+ split, only test: train and"):
            ask()


@pytest.mark.filterwarnings("ignore:.* classes occur in no training image")
@pytest.mark.parametrize("case", [*DENSE, STREETS])
def test_two_class_balanced_steps(tmp_path, case):
    words = {"batch_size": 2, "num_workers": 0, "crop_size": (32, 32), "cache_dir": tmp_path / "c"}
    module = case.datamodule(case.make(tmp_path, SIZE), class_balanced=True, **words)
    model = SoftmaxSegmenter(**{**TINY, "num_classes": case.classes}, anomaly_score="energy")
    run = trainer(tmp_path, max_steps=2, limit_val_batches=2, log_every_n_steps=1)
    run.fit(model, datamodule=module)
    assert run.global_step == 2
    assert torch.isfinite(run.callback_metrics["train_loss"])
    (scores,) = run.test(model, datamodule=module, verbose=False)
    assert 0 <= scores["test_mIoU"] <= 1
    assert ("test_AUROC" in scores) == (case.dataset is data.StreetHazards)


@every
def test_command_line(case, capsys):
    name = case.datamodule.__name__
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(data.SegmentationDataModule, "data")
    config = parser.parse_args([f"--data={name}", "--data.root=x"])
    assert config.data.class_path == f"lightning_genseg.data.{name}"
    assert config.data.init_args.root == Path("x")
    with pytest.raises(ArgumentError, match="Option 'eval_batchsize' is not accepted"):
        parser.parse_args([f"--data={name}", "--data.root=x", "--data.eval_batchsize=3"])
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help={name}"])
    shown = " ".join(capsys.readouterr().out.split())
    # The base's text, and nothing that is about training where there is none.
    assert "not needed for prediction" in shown
    assert "folder of images (searched recursively), or one image, for prediction" in shown
    trains = list(case.counts) != ["test"]
    for option in (
        "batch_size",
        "crop_size",
        "class_balanced",
        "sparse",
        "train_transform",
        "seed",
    ):
        assert (f"--data.{option} " in shown) == trains


def test_fit_without_training_data_says_so_in_one_line(tmp_path, genseg, capsys):
    root = make_fishyscapes(tmp_path, SIZE)
    model = "--model SoftmaxSegmenter --model.encoder tu-test_resnet --model.decoder segformer"
    quiet = "--trainer.accelerator cpu --trainer.logger false --trainer.max_epochs 1"
    with pytest.raises(SystemExit, match="2"):
        genseg(f"fit --data FishyscapesDataModule --data.root {root} {model} {quiet}")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "FishyscapesDataModule has no train split, only test: train and validate on" in last


# --- genseg check ------------------------------------------------------------------------------


@untrained
def test_check_without_classes(tmp_path, case):
    root = case.make(tmp_path, SIZE)
    module = case.datamodule(root, num_workers=0, cache_dir=tmp_path / "cache")
    report = check_data(module, tmp_path / "out")
    assert report["problems"] == []
    assert list(report["splits"]) == ["test"]
    found = report["splits"]["test"]
    assert found["images"] == found["anomalies"]["images"] == case.counts["test"]
    masks = torch.cat([batch["anomaly"].flatten() for batch in module.test_dataloader()])
    known, odd = (masks == 0).sum().item(), (masks == 1).sum().item()
    assert found["anomalies"]["share"] == pytest.approx(odd / (known + odd))
    assert found["anomalies"]["not_evaluated"] == pytest.approx((masks == 255).double().mean())
    text = summary(report)
    assert f"anomalies in {case.counts['test']} images" in text
    assert "no labels of classes in test, only of anomalies" in text
    assert "ignored" not in text
    assert "bicycle" not in text
    assert (tmp_path / "out" / "data_check.png").stat().st_size > 1000


def test_check_on_the_command_line(tmp_path, genseg, capsys):
    root = make_street_hazards(tmp_path, SIZE)
    words = f"--data.root {root} --data.num_workers 0 --data.cache_dir cache"
    genseg(f"check --data StreetHazardsDataModule {words}")
    shown = capsys.readouterr().out
    assert "anomalies in 0 images" in shown  # training and validation
    assert "anomalies in 4 images" in shown
    assert "traffic sign" in shown
