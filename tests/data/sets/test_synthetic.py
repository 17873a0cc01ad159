"""Toy scenes: reproducible, complete, not solvable by colour alone."""

import numpy as np
import pytest
import torch

from lightning_genseg.data import SyntheticScenes, SyntheticScenesDataModule
from lightning_genseg.data.transforms.pipeline import default_train_transform
from lightning_genseg.errors import GenSegError


def test_sample():
    dataset = SyntheticScenes(4, (64, 80))
    item = dataset[3]
    assert item.keys() == {"image", "mask", "name"}
    assert item["image"].shape == (3, 64, 80)
    assert item["image"].dtype == torch.float32
    assert item["mask"].dtype == torch.int64
    assert len({dataset[index]["name"] for index in range(4)}) == len(dataset) == 4
    with pytest.raises(IndexError):
        dataset[4]


def test_scene_depends_on_seed_and_index_only():
    first = SyntheticScenes(10, (48, 64), seed=1)
    again = SyntheticScenes(500, (48, 64), seed=1)
    again[7]
    for index in (0, 3):
        assert torch.equal(first[index]["image"], again[index]["image"])
        assert torch.equal(first[index]["mask"], again[index]["mask"])
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert not torch.equal(first[0]["image"], SyntheticScenes(10, (48, 64), seed=2)[0]["image"])


def test_every_class_occurs_and_nothing_else():
    dataset = SyntheticScenes(40)
    pixels = sum(
        item["mask"].flatten().bincount(minlength=256)
        for item in map(dataset.__getitem__, range(40))
    )
    assert pixels[6:255].sum() == 0
    share = pixels / pixels.sum()
    assert (share[:6] > 0.01).all()
    assert 0.03 < share[255] < 0.15
    assert dataset.num_classes == len(dataset.palette) == len(dataset.class_names) == 6


def test_held_out_objects():
    known, strange = SyntheticScenes(20, seed=3), SyntheticScenes(20, seed=3, held_out=True)
    assert "anomaly" not in known[0]
    pixels = 0
    for index in range(20):
        item = strange[index]
        anomaly = item["anomaly"]
        assert anomaly.dtype == torch.int64
        assert set(anomaly.unique().tolist()) <= {0, 1, 255}
        assert (item["mask"][anomaly == 1] == 255).all()
        assert torch.equal(anomaly == 0, item["mask"] != 255)
        assert item["mask"][anomaly == 0].max() < 6
        pixels += (anomaly == 1).sum()
    assert 0.005 < pixels / (20 * 128 * 160) < 0.15


def test_labels_without_transforms():
    scenes = SyntheticScenes(3, (48, 64), held_out=True)
    labels, anomaly = scenes.read_labels(1)
    assert (scenes[1]["mask"].numpy() == labels).all()
    assert (scenes[1]["anomaly"].numpy() == anomaly).all()
    assert (anomaly == 1).any()
    assert SyntheticScenes(3, (48, 64)).read_labels(1)[1] is None


def test_only_the_test_split_holds_strange_objects():
    size = (48, 64)
    lengths = {"train_length": 4, "val_length": 4, "test_length": 4, "num_workers": 0}
    data = SyntheticScenesDataModule(size, held_out=True, eval_batch_size=4, **lengths)
    (batch,) = data.plain_loader("test")
    assert (batch["anomaly"] == 1).flatten(1).any(1).sum() >= 2  # others may hide one
    assert (batch["mask"][batch["anomaly"] == 1] == 255).all()
    for split in ("train", "val"):
        assert all("anomaly" not in batch for batch in data.plain_loader(split))


def test_augmentation_moves_mask_and_anomaly_together():
    dataset = SyntheticScenes(6, held_out=True, transform=default_train_transform((64, 64)))
    for index in range(6):
        item = dataset[index, 11]
        assert item["image"].shape == (3, 64, 64)
        assert torch.equal(item["anomaly"] == 0, item["mask"] != 255)
    assert torch.equal(dataset[0, 11]["image"], dataset[0, 11]["image"])


def colour_votes(dataset, indices):
    """Number of pixels for each colour (4 bits a channel) and class."""
    votes = np.zeros((4096, 6))
    for index in indices:
        item = dataset[index]
        code = (item["image"] * 15.99).long()
        code = (code[0] * 256 + code[1] * 16 + code[2]).numpy()
        mask = item["mask"].numpy()
        np.add.at(votes, (code[mask != 255], mask[mask != 255]), 1)
    return votes


def test_colour_alone_does_not_suffice():
    """The best classifier of single colours is far from solving it, but better than chance."""
    dataset = SyntheticScenes(120, seed=5)
    best = colour_votes(dataset, range(80)).argmax(1)
    votes = colour_votes(dataset, range(80, 120))
    predicted = np.zeros((6, 6))
    for label in range(6):
        np.add.at(predicted[label], best, votes[:, label])
    iou = predicted.diagonal() / (predicted.sum(0) + predicted.sum(1) - predicted.diagonal())
    assert 0.2 < iou.mean() < 0.6


@pytest.mark.parametrize("size", [(32, 32), (32, 200), (150, 33)], ids=str)
@pytest.mark.parametrize("held_out", [False, True])
def test_other_sizes(size, held_out):
    dataset = SyntheticScenes(15, size, seed=9, held_out=held_out)
    for index in range(15):
        assert dataset[index]["mask"].shape == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"size": (31, 64)}, "size is 31"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        SyntheticScenes(**arguments)
