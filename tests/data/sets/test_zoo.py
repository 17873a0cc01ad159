"""The datamodules of the public data sets on generated miniatures."""

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_genseg import SoftmaxSegmenter
from lightning_genseg.cli.main import main
from lightning_genseg.data import (
    ADE20K,
    ADE20KDataModule,
    CityscapesDataModule,
    COCOStuff10kDataModule,
    COCOStuff164kDataModule,
    VOCDataModule,
)
from tests.contract import TINY
from tests.miniatures import (
    make_ade20k,
    make_cityscapes,
    make_coco_stuff_10k,
    make_coco_stuff_164k,
    make_voc,
)

SIZE = (48, 64)
ZOO = [
    pytest.param(CityscapesDataModule, make_cityscapes, 19, (4, 4), id="cityscapes"),
    pytest.param(ADE20KDataModule, make_ade20k, 150, (4, 4), id="ade20k"),
    pytest.param(COCOStuff10kDataModule, make_coco_stuff_10k, 171, (4, 4), id="coco10k"),
    pytest.param(COCOStuff164kDataModule, make_coco_stuff_164k, 171, (4, 4), id="coco164k"),
    pytest.param(VOCDataModule, make_voc, 21, (8, 4), id="voc"),
]


@pytest.mark.parametrize(("kind", "make", "classes", "counts"), ZOO)
def test_loaders(tmp_path, kind, make, classes, counts):
    data = kind(make(tmp_path, SIZE), batch_size=2, num_workers=0, crop_size=(32, 40))
    assert data.num_classes == len(data.palette) == classes
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 40)
    assert batch["mask"].shape == (2, 32, 40)
    data.setup("test")
    assert (len(data.train_dataset), len(data.val_dataset)) == counts
    # The labels of the official test images are not public.
    assert [s.name for s in data.test_dataset.samples] == [s.name for s in data.val_dataset.samples]
    sizes = [tuple(batch["mask"].shape[1:]) for batch in data.val_dataloader()]
    assert min(sizes) >= SIZE  # every image at its own size


@pytest.mark.parametrize(("kind", "make", "classes", "counts"), ZOO)
def test_attributes_need_no_files(kind, make, classes, counts):
    assert kind("nowhere").num_classes == classes


@pytest.mark.filterwarnings("ignore:.* classes occur in no training image")
@pytest.mark.parametrize(("kind", "make", "classes", "counts"), ZOO)
def test_two_class_balanced_steps(tmp_path, kind, make, classes, counts):
    torch.manual_seed(0)
    data = kind(
        make(tmp_path, SIZE),
        batch_size=2,
        num_workers=0,
        crop_size=(32, 32),
        class_balanced=True,
        cache_dir=tmp_path / "cache",
    )
    module = SoftmaxSegmenter(**{**TINY, "num_classes": data.num_classes})
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    assert 0 <= scores["val_mIoU"] <= 1


def test_a_few_of_many_absent_classes_are_named(tmp_path):
    data = ADE20KDataModule(
        make_ade20k(tmp_path, SIZE),
        batch_size=2,
        num_workers=0,
        class_balanced=True,
        cache_dir=tmp_path / "cache",
    )
    absent = [
        n for n, held in zip(data.class_names, data.class_index().T, strict=True) if not held.any()
    ]
    assert len(absent) > 100
    with pytest.warns(UserWarning, match="classes occur in no training image") as record:
        data.train_dataloader()
    (warning,) = record
    assert str(warning.message) == (
        f"{len(absent)} classes occur in no training image and are never drawn: "
        f"{', '.join(absent[:5])} ..."
    )


def test_choices(tmp_path):
    root = make_voc(tmp_path / "voc", SIZE)
    data = VOCDataModule(root, "train", num_workers=0)
    data.setup("fit")
    assert len(data.train_dataset) == 4
    root = make_cityscapes(tmp_path / "cityscapes", SIZE, train_ids=True)
    data = CityscapesDataModule(root, "labelTrainIds", num_workers=0)
    data.setup("fit")
    assert data.train_dataset.samples[0].mask.name.endswith("_labelTrainIds.png")


def test_prediction_downloads_nothing(tmp_path, monkeypatch):
    """A configuration with download: true must not fetch gigabytes in order to label one photograph."""
    root = make_ade20k(tmp_path, SIZE)
    asked = []
    monkeypatch.setattr(ADE20K, "download", lambda root: asked.append(root))
    data = ADE20KDataModule(
        tmp_path / "new",
        download=True,
        num_workers=0,
        predict_root=root / "images" / "validation",
    )
    module = SoftmaxSegmenter(**{**TINY, "num_classes": 150})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    assert len(trainer.predict(module, datamodule=data)) == 4
    assert asked == []
    data.prepare_data()
    assert asked == [tmp_path / "new"]


@pytest.mark.parametrize(("kind", "make", "classes", "counts"), ZOO)
def test_by_name_on_the_command_line(tmp_path, capsys, monkeypatch, kind, make, classes, counts):
    monkeypatch.setattr("sys.argv", ["genseg"])
    root = make(tmp_path, SIZE)
    arguments = ["--data", kind.__name__, f"--data.root={root}", "--model", "SoftmaxSegmenter"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *arguments, "--print_config"])
    shown = capsys.readouterr().out
    assert f"class_path: lightning_genseg.datamodules.{kind.__name__}" in shown
    assert f"root: {root}" in shown
