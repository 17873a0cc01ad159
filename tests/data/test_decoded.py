"""Decoded images that are kept: the same samples, also once files have changed."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_genseg.data import FolderDataModule, SyntheticScenesDataModule
from lightning_genseg.data import dataset as reading
from lightning_genseg.errors import GenSegError
from tests.data.loading import SKEWED, write_skewed


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    names = []
    for function in ("read_image", "read_mask"):
        original = getattr(reading, function)

        def counted(path, *rest, original=original):
            names.append(f"{path.parent.name}/{path.name}")
            return original(path, *rest)

        monkeypatch.setattr(reading, function, counted)
    return names


def make(root, folder, **words):
    words = {"class_names": SKEWED, "num_workers": 0, "absent_classes": "warn", **words}
    data = FolderDataModule(root=root, cache="memmap", cache_dir=folder, **words)
    return data.split_dataset("train", ())


def same(one, two):
    return all(torch.equal(one[i][k], two[i][k]) for i in range(2) for k in ("image", "mask"))


@pytest.mark.filterwarnings("ignore:.* classes occur in no")
def test_the_second_epoch_decodes_what_has_changed(tmp_path, decoded):
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_skewed(root)
    kept = make(root, cache)
    plain = make(root, cache)
    plain.decoded = None
    samples = [kept[0], kept[1]]
    decoded.clear()
    assert same(kept, plain)
    assert len(decoded) == 8, "two images and masks, twice, of the one without cache"
    # What a transform writes into an array stays its own.
    kept.read_pixels(0)[:] = 7
    kept.read_mask_labels(0)[:] = 7
    assert all(torch.equal(samples[i]["image"], kept[i]["image"]) for i in range(2))

    sample = kept.samples[0]
    pixels = np.array(Image.open(sample.image).convert("RGB"))
    Image.fromarray(255 - pixels).save(sample.image)
    os.utime(sample.image, ns=(1, 1))
    decoded.clear()
    assert torch.equal(kept[0]["image"], plain[0]["image"])
    assert not torch.equal(kept[0]["image"], samples[0]["image"])
    assert decoded.count(f"images/{sample.image.name}") == 2  # by both
    files = sorted(cache.rglob("*.npy"))
    assert len(files) == 4, "the array of the old file is gone"

    # One that was cut off is made anew.
    files[0].write_bytes(files[0].read_bytes()[:-20])
    assert same(make(root, cache), plain)
    sample.image.unlink()
    with pytest.raises(GenSegError, match="does not exist"):
        kept[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    write_skewed(tmp_path / "data")
    (tmp_path / "cache").write_text("a file")
    kept = make(tmp_path / "data", tmp_path / "cache")
    with pytest.warns(UserWarning, match="decoded images cannot be kept"):
        first = kept[0]
    assert torch.equal(kept[0]["image"], first["image"])


def test_scenes_that_are_drawn_have_no_files():
    data = SyntheticScenesDataModule((48, 64), cache="memmap")
    with pytest.raises(GenSegError, match="reads no files"):
        data.setup("fit")
