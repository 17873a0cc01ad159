"""ADE20K's ids; a download that nobody asked for."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg import SoftmaxSegmenter
from lightning_genseg.data import ADE20K, ADE20KDataModule
from lightning_genseg.errors import GenSegError
from tests.contract import TINY, trainer
from tests.miniatures import make_ade20k


def test_every_id(tmp_path):
    root = make_ade20k(tmp_path, (24, 32))
    sample = ADE20K(root).samples[0]
    Image.fromarray(np.arange(152, dtype=np.uint8).clip(0, 150).reshape(8, 19)).save(sample.mask)
    labels = ADE20K(root).read_mask_labels(0).flatten()
    assert labels[0] == 255
    assert labels[1:151].tolist() == list(range(150))
    # Anchors from objectInfo150.txt, which counts from 1.
    anchors = {1: "wall", 13: "person", 49: "skyscraper", 90: "television", 150: "flag"}
    assert {number: ADE20K.CLASS_NAMES[labels[number]] for number in anchors} == anchors
    assert ADE20K.PALETTE[labels[13]] == (150, 5, 61)


def test_shifted_ids(tmp_path):
    root = make_ade20k(tmp_path, (24, 32))
    for path in root.glob("annotations/training/*.png"):
        Image.fromarray(np.array(Image.open(path)) - np.uint8(1)).save(path)  # 0 becomes 255
    with pytest.raises(GenSegError, match=r"holds the values 255, but official masks .*shifted"):
        ADE20K(root)


def test_prediction_downloads_nothing(tmp_path, monkeypatch):
    """A configuration with download: true must not fetch gigabytes to label one photograph."""
    root = make_ade20k(tmp_path, (48, 64))
    asked = []
    monkeypatch.setattr(ADE20K, "download", lambda root: asked.append(root))
    data = ADE20KDataModule(
        tmp_path / "new", download=True, num_workers=0, predict_root=root / "images" / "validation"
    )
    module = SoftmaxSegmenter(**{**TINY, "num_classes": 150})
    assert len(trainer(tmp_path).predict(module, datamodule=data)) == 4
    assert asked == []
    data.trainer = None
    data.prepare_data()
    assert asked == [tmp_path / "new"]


def test_a_few_of_many_absent_classes_are_named(tmp_path):
    data = ADE20KDataModule(
        make_ade20k(tmp_path, (48, 64)), batch_size=2, num_workers=0, class_balanced=True
    )
    held = data.class_index().any(0)
    absent = [name for name, found in zip(data.class_names, held, strict=True) if not found]
    assert len(absent) > 100
    with pytest.warns(UserWarning, match="classes occur in no training image") as record:
        data.train_dataloader()
    (warning,) = record
    assert str(warning.message).startswith(f"{len(absent)} classes")
    assert f"({', '.join(absent[:5])} ...)" in str(warning.message)
