"""Which images take part, how episodes are drawn, what a sample holds, manifests."""

import json

import numpy as np
import pytest
import torch

from lightning_genseg.data import BaseClasses, EvalEpisodes, Folder, SyntheticScenes, TrainEpisodes
from lightning_genseg.data.episodes.dataset import Episode, Pool, draw_episodes
from lightning_genseg.data.episodes.manifest import read_episodes, write_episodes
from lightning_genseg.data.transforms import Letterbox
from lightning_genseg.data.transforms.pipeline import episode_train_transform
from tests.miniatures import save

# Pixels of the classes 0 (background), 1, 2, 3 in seven images.
COUNTS = np.array(
    [
        [50, 20, 0, 0],
        [50, 9, 20, 0],
        [50, 0, 20, 1],
        [50, 20, 20, 0],
        [50, 20, 3, 0],
        [70, 0, 0, 0],
        [50, 0, 30, 0],
    ]
)


def test_rules_of_the_lists():
    """At least min_area pixels; no pixel, however few, of an excluded class."""
    pool = Pool(COUNTS, [1, 2], shots=1, min_area=10, excluded=[3])
    assert pool.queries.tolist() == [0, 1, 3, 4, 6]
    assert {c: images.tolist() for c, images in pool.images_of.items()} == {
        1: [0, 3, 4],
        2: [1, 3, 6],
    }
    kept = Pool(COUNTS, [1, 2], shots=1, min_area=10)  # PFENet: nothing is excluded
    assert kept.queries.tolist() == [0, 1, 2, 3, 4, 6]
    assert kept.images_of[2].tolist() == [1, 2, 3, 6]
    assert Pool(COUNTS, [1, 2], shots=1, min_area=9).queries_of[1].tolist() == [0, 1, 3, 4]


def test_classes_with_too_few_images_are_left_out():
    pool = Pool(COUNTS, [1, 2, 3], shots=3, min_area=10)
    assert pool.classes == [2]  # four images: three supports beside any query
    assert pool.too_few == [1, 3]
    assert pool.queries.tolist() == [1, 2, 3, 6]
    # Supports of other images: a query does not use one up, but there must be one.
    apart = Pool(COUNTS, [1, 3], shots=3, min_area=10, support_counts=COUNTS)
    assert apart.classes == [1]
    assert Pool(COUNTS[5:], [1], 1, 10, support_counts=COUNTS).too_few == [1]


def test_drawing():
    pool = Pool(COUNTS, [1, 2], shots=2, min_area=10)
    rng = np.random.default_rng(0)
    drawn = [pool.draw(rng, 4) for _ in range(200)]
    assert all(4 not in e.supports and len(set(e.supports)) == 2 for e in drawn)
    # Class 2 has three pixels in image 4, too few for a support but enough to be asked for.
    share = np.mean([e.category == 2 for e in drawn])
    assert 0.35 < share < 0.65
    for episode in drawn:
        assert set(episode.supports) <= set(pool.images_of[episode.category].tolist())


def test_modes():
    pool = Pool(COUNTS, [1, 2], shots=1, min_area=10)
    bam = draw_episodes(pool, 14, seed=5)
    assert [e.query for e in bam] == [0, 1, 2, 3, 4, 6] * 2 + [0, 1]  # in order, and again
    assert bam == draw_episodes(pool, 14, seed=5)
    assert bam != draw_episodes(pool, 14, seed=6)
    uniform = draw_episodes(pool, 12, 5, "uniform")
    first, second = ([e.query for e in uniform[part]] for part in (slice(6), slice(6, 12)))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 6]
    assert first != sorted(first)
    balanced = draw_episodes(pool, 15, 5, "balanced")
    assert [e.category for e in balanced] == [1, 2] * 7 + [1]
    assert {e.query for e in balanced[::2]} == {0, 3, 4}
    with pytest.raises(ValueError, match="no image can be a query: lower min_area"):
        draw_episodes(Pool(COUNTS, [1, 2], 1, min_area=100), 1, 0)


@pytest.fixture(scope="module")
def scenes():
    images = SyntheticScenes(12, (48, 64))
    counts = np.array(
        [np.bincount(images.read_mask_labels(i).ravel(), minlength=6)[:6] for i in range(12)]
    )
    return images, counts


def test_training_sample(scenes):
    images, counts = scenes
    pool = Pool(counts, [0, 2, 3], shots=2, min_area=30)
    transform = episode_train_transform(72, (0.9, 1.1))
    given = {"base_index": {0: 1, 2: 2, 3: 3}, "class_names": images.class_names}
    dataset = TrainEpisodes(images, pool, transform=transform, **given)
    assert len(dataset) == 12
    sample = dataset[3, 17]
    assert sample["image"].shape == (3, 72, 72)
    assert sample["support_image"].shape == (2, 3, 72, 72)
    assert sample["support_mask"].dtype == sample["mask"].dtype == torch.int64
    assert sample["support_valid"].dtype == sample["valid"].dtype == torch.bool
    assert set(sample["mask"].unique().tolist()) <= {0, 1, 255}
    assert sample["name"] == "scene_0_00003"
    assert sample["class_name"] == images.class_names[sample["class_index"]]
    assert sample["base_index"] == {0: 1, 2: 2, 3: 3}[int(sample["class_index"])]
    assert sample["candidates"].tolist() == [0, 2, 3]
    # Padding is ignored, but what is ignored is not always padding: scenes have void borders.
    masks, valids = ([sample[key], *sample[f"support_{key}"]] for key in ("mask", "valid"))
    for mask, valid in zip(masks, valids, strict=True):
        assert (mask[~valid] == 255).all()
        assert not valid[0].any()  # 72 rows hold an image of at most 53
        assert valid.float().mean() > 0.4
    again = dataset[3, 17]
    assert torch.equal(sample["support_image"], again["support_image"])
    assert {dataset[3, seed]["support_name"] for seed in range(8)} != {sample["support_name"]}


def test_object_survives_the_crop(scenes):
    """The crop is drawn again until it holds 85 % of the object, unless that is impossible."""
    images, counts = scenes
    pool = Pool(counts, [2, 3], shots=1, min_area=30)
    given = {"base_index": {}, "class_names": images.class_names}
    dataset = TrainEpisodes(images, pool, transform=episode_train_transform(56), **given)
    empty = sum(not (dataset[i % len(dataset), i]["support_mask"] == 1).any() for i in range(16))
    assert empty <= 1


def test_evaluation_sample(scenes):
    images, _ = scenes
    episode = Episode(5, 4, (2, 7, 9))
    given = {"base_index": {2: 1}, "candidates": [4, 5], "class_names": images.class_names}
    dataset = EvalEpisodes(images, images, [episode], 40, **given)
    sample = dataset[0]
    assert sample["base_index"] == 0
    assert sample["support_name"] == "scene_0_00002, scene_0_00007, scene_0_00009"
    labels = images.read_mask_labels(5)
    assert torch.equal(sample["full_mask"] == 1, torch.from_numpy(labels == 4))
    assert torch.equal(sample["full_mask"] == 255, torch.from_numpy(labels == 255))
    # 48 x 64 in 40: 24 x 40 (30 is cut to a multiple of 8), top left.
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[:24] = True
    assert torch.equal(sample["valid"], expected)
    assert (sample["mask"][24:] == 255).all()
    assert (sample["image"][:, 24:] == 0).all()
    assert sample["candidates"].tolist() == [4, 5]


def test_base_classes(scenes):
    images, _ = scenes
    dataset = BaseClasses(images, [2, 5], images.class_names, [])
    assert dataset.class_names == ["background", "building", "person"]
    labels, sample = images.read_mask_labels(1), dataset[1]
    expected = np.select([labels == 255, labels == 2, labels == 5], [255, 1, 2], 0)
    assert np.array_equal(sample["mask"].numpy(), expected)
    assert torch.equal(sample["image"], images[1]["image"])


def test_sizes_that_differ_are_named(tmp_path):
    save(np.zeros((20, 24, 3), np.uint8), tmp_path / "images" / "a.png")
    save(np.zeros((20, 23), np.uint8), tmp_path / "masks" / "a.png")
    images = Folder(tmp_path, ["x", "y"])
    given = {"base_index": {}, "candidates": [0], "class_names": ["x", "y"]}
    dataset = EvalEpisodes(images, images, [Episode(0, 0, (0,))], 16, **given)
    with pytest.raises(ValueError, match=r"mask '.*a\.png' is 20x23 but image"):
        dataset[0]
    with pytest.raises(ValueError, match=r"mask '.*a\.png' is 20x23 but image"):
        BaseClasses(images, [1], ["x", "y"], [Letterbox(16)])[0]


def test_manifest(scenes, tmp_path):
    images, counts = scenes
    drawn = draw_episodes(Pool(counts, [2, 3], 2, 30), 5, 0)
    path = tmp_path / "new" / "episodes.json"
    settings = {"seed": 0, "classes": ["building", "tree"]}
    names = images.class_names
    write_episodes(path, drawn, images, images, names, settings)
    assert read_episodes(path, images, images, names, settings) == drawn
    row = json.loads(path.read_text())["episodes"][0]
    assert row["query"] == "scene_0_00000"
    assert row["class"] in ("building", "tree")
    with pytest.raises(ValueError, match=r"'.*episodes\.json' was drawn with seed 0, not 1"):
        read_episodes(path, images, images, names, {**settings, "seed": 1})
    other = SyntheticScenes(12, (48, 64), seed=1)
    with pytest.raises(ValueError, match=r"holds 'scene_0_\d+', which the data do not have"):
        read_episodes(path, other, other, names, settings)
    path.write_text(path.read_text().replace("scene_0_00000", "scene_0_00001"))
    with pytest.raises(ValueError, match=r"was changed after it was written \(checksum\)"):
        read_episodes(path, images, images, names, settings)
    for text in ("[]", "{", '{"episodes": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest '.*' is no (list of episodes|JSON)"):
            read_episodes(path, images, images, names, settings)
