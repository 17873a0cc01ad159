"""ADE20K's ids."""

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import ADE20K
from tests.miniatures import make_ade20k


def test_every_id(tmp_path):
    root = make_ade20k(tmp_path, (24, 32))
    sample = ADE20K(root).samples[0]
    Image.fromarray(np.arange(152, dtype=np.uint8).clip(0, 150).reshape(8, 19)).save(sample.mask)
    labels = ADE20K(root).read_mask_labels(0).flatten()
    assert labels[0] == 255
    assert labels[1:151].tolist() == list(range(150))
    # Anchors from objectInfo150.txt, which counts from 1.
    for number, name in {
        1: "wall",
        13: "person",
        49: "skyscraper",
        90: "television",
        150: "flag",
    }.items():
        assert ADE20K.CLASS_NAMES[labels[number]] == name
    assert ADE20K.PALETTE[labels[13]] == (150, 5, 61)


def test_shifted_ids(tmp_path):
    root = make_ade20k(tmp_path, (24, 32))
    for path in root.glob("annotations/training/*.png"):
        Image.fromarray(np.array(Image.open(path)) - np.uint8(1)).save(path)  # 0 becomes 255
    with pytest.raises(
        ValueError, match=r"holds the values 255, but official masks are 0 to 150.*shifted"
    ):
        ADE20K(root)
