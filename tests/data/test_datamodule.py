"""The datamodule alone and in a Trainer: stages, data sets, arguments."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from lightning_genseg.data import (
    CamVidDataModule,
    FolderDataModule,
    SegmentationDataModule,
    SyntheticScenesDataModule,
)
from lightning_genseg.data.transforms import RandomCropLimitedClass
from lightning_genseg.errors import GenSegError
from tests.contract import trainer
from tests.data.loading import SKEWED, Recorder, skewed, synthetic, write_skewed


def write_image(path, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("stage", "built"),
    [
        ("fit", "train val"),
        ("validate", "val"),
        ("test", "test"),
        (None, "train val test"),
        ("predict", "predict"),
    ],
)
def test_setup_builds_what_a_stage_needs(stage, built, tmp_path):
    write_image(tmp_path / "x.png")
    data = synthetic(predict_root=tmp_path if stage == "predict" else None)
    assert data.num_classes == len(data.class_names) == len(data.palette) == 6
    assert data.ignore_index == 255
    splits = ("train", "val", "test", "predict")
    assert all(getattr(data, f"{name}_dataset") is None for name in splits)
    data.setup(stage)
    there = [name for name in splits if getattr(data, f"{name}_dataset") is not None]
    assert there == built.split()


def test_loaders_without_trainer_and_setup(tmp_path):
    write_image(tmp_path / "x.png")
    data = synthetic(predict_root=tmp_path)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 4
    assert batches[0]["image"].shape == (3, 3, 24, 24)
    assert batches[0]["mask"].shape == (3, 24, 24)
    assert len({name for batch in batches for name in batch["name"]}) == 12
    assert [len(batch["name"]) for batch in data.val_dataloader()] == [3]
    assert next(iter(data.test_dataloader()))["image"].shape == (2, 3, 32, 40)
    assert next(iter(data.predict_dataloader()))["name"] == ["x"]
    shown = data.plain_loader("train")
    names = [name for batch in shown for name in batch["name"]]
    assert names == [f"scene_0_{index:05}" for index in range(13)]


def test_every_stage_runs_in_a_trainer(tmp_path):
    write_image(tmp_path / "in" / "a.png", (20, 30))
    write_image(tmp_path / "in" / "b.png", (30, 20))
    data = synthetic(eval_batch_size=1, num_workers=1, predict_root=tmp_path / "in")
    module, run = Recorder(), trainer(tmp_path)
    run.fit(module, data)
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    assert module.seen[-2:] == [["scene_2_00000"], ["scene_2_00001"]]
    assert run.predict(module, data) == [["a"], ["b"]]


def test_scenes_of_the_splits_differ():
    data = synthetic(train_length=3, train_transform=[], held_out=True)
    data.setup()
    sets = (data.train_dataset, data.val_dataset, data.test_dataset)
    images = [dataset[0]["image"] for dataset in sets]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert ["anomaly" in dataset[0] for dataset in sets] == [False, False, True]


def test_given_transforms_replace_the_default():
    crops = [[RandomCropLimitedClass(16, 8)], [RandomCropLimitedClass(8, 16)]]
    data = synthetic(train_transform=crops[0], eval_transform=crops[1])
    assert next(iter(data.train_dataloader()))["image"].shape[2:] == (16, 8)
    assert next(iter(data.val_dataloader()))["image"].shape[2:] == (8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1; it must be at least 0"),
        ({"crop_size": (0, 8)}, "crop_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"test_length": 0}, "test_length is 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        synthetic(**arguments)


def test_every_class_has_a_name_of_its_own(tmp_path):
    with pytest.raises(GenSegError, match="class_names holds 'a' twice"):
        FolderDataModule(tmp_path, class_names=["a", "b", "a"])


def test_loaders_that_cannot_be():
    with pytest.raises(GenSegError, match="2 images, fewer than one batch of 3 for each of 1 proc"):
        synthetic(train_length=2).train_dataloader()
    with pytest.raises(GenSegError, match="set predict_root"):
        synthetic().predict_dataloader()
    with pytest.raises(TypeError, match="make_dataset"):
        SegmentationDataModule(["a"])


def test_class_index_of_a_split(tmp_path):
    data = skewed(write_skewed(tmp_path))
    assert (data.class_index() > 0).sum(0).tolist() == [40, 8, 2]
    assert data.class_index("val").tolist() == [[47, 16, 0]]

    class Foreign(SyntheticScenesDataModule):
        def make_dataset(self, split, transform):
            class Plain(Dataset):
                pass

            return Plain()

    with pytest.raises(
        GenSegError, match=r"Plain has no read_mask_labels\(index\).*class_balanced"
    ):
        Foreign(class_balanced=True).train_dataloader()


def test_class_balanced_scenes_and_frames(shared_dir, tmp_path):
    """The bicyclist, in one frame of four, comes as often as the road, in all."""
    words = {"train_length": 12, "class_balanced": True, "num_workers": 0}
    scenes = SyntheticScenesDataModule((48, 64), **words)
    assert len(next(iter(scenes.train_dataloader()))["name"]) == 8
    root = shared_dir / "data" / "camvid"
    data = CamVidDataModule(root, class_balanced=True, cache_dir=tmp_path, num_workers=0)
    counts = data.class_index("train")
    assert counts.sum() > 0.9 * 367 * 360 * 480
    present = counts > 0
    shares = present[[index for index, _ in data.train_dataloader().sampler]].mean(0)
    assert shares[10] > present.mean(0)[10] + 0.05
    rarest = present.mean(0).argmin()
    assert shares[rarest] > present.mean(0)[rarest]


@pytest.mark.parametrize(
    "name", ["train_list", "val_list", "test_list", "root", "predict_root", "cache_dir"]
)
def test_paths_may_be_strings(tmp_path, name):
    write_skewed(tmp_path)
    words = {"root": tmp_path, "class_names": SKEWED, "num_workers": 0, "cache_dir": tmp_path}
    words |= {"absent_classes": "warn", "batch_size": 2, "predict_root": tmp_path / "images"}
    for split, names in (("train", "00\n01\n03\n05\n"), ("val", "02\n"), ("test", "04\n")):
        (tmp_path / f"{split}.txt").write_text(names)
        words[f"{split}_list"] = tmp_path / f"{split}.txt"
    values = {**words, name: str(words[name])}
    if name.endswith("_list"):
        values[name] = f"{name.removesuffix('_list')}.txt"  # below root
    data = FolderDataModule(**values)
    data.setup()
    lengths = [len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)]
    assert [*lengths, len(data.predict_dataset)] == [4, 1, 1, 40]
