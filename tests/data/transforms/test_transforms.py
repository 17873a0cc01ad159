"""Augmentations: determinism, padding, the limited crop, YAML, error messages."""

import pickle
import random
import subprocess
import sys

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_genseg.data import SyntheticScenesDataModule
from lightning_genseg.data.transforms import (
    Letterbox,
    PhotometricDistortion,
    RandomCropLimitedClass,
    RandomObjectCrop,
    RandomScaledCrop,
)
from lightning_genseg.data.transforms.crops import Transform, is_mixed
from lightning_genseg.data.transforms.pipeline import (
    apply,
    compose,
    default_train_transform,
    episode_train_transform,
)
from lightning_genseg.ops.letterbox import letterbox_size


def scene(height=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :] = 1
    mask[:, width // 2 :] += 2
    return image, mask


def apply_both(transform, image, mask, seed, name=""):
    """Image and mask, which may be None."""
    result = apply(transform, image, {} if mask is None else {"mask": mask}, seed, name)
    return result["image"], result.get("mask")


def test_no_transform_only_converts():
    image, mask = scene()
    tensor, labels = apply_both(compose([]), image, mask, 0)
    assert tensor.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert tensor.is_contiguous()
    assert torch.equal((tensor * 255).round().byte(), torch.from_numpy(image).permute(2, 0, 1))
    assert torch.equal(labels, torch.from_numpy(mask).long())


@pytest.mark.parametrize("size", [(20, 30), (60, 80), (200, 100)], ids=str)
def test_default_train_transform(size):
    pipeline = compose(default_train_transform((64, 48)))
    labels_seen = set()
    for seed in range(20):
        tensor, labels = apply_both(pipeline, *scene(*size), seed)
        assert tensor.shape == (3, 64, 48)
        assert labels.shape == (64, 48)
        assert tensor.min() >= 0
        assert tensor.max() <= 1
        labels_seen |= set(labels.unique().tolist())
    # Nothing but the classes and the padding: a mask is never interpolated or padded with a class.
    assert labels_seen <= {0, 1, 2, 3, 255}
    assert (255 in labels_seen) == (size != (200, 100))


def test_padding_is_ignored_and_black():
    pipeline = compose(default_train_transform((64, 64), scale=(1, 1), color_jitter=0))
    image, mask = np.full((16, 16, 3), 200, np.uint8), np.ones((16, 16), np.uint8)
    tensor, labels = apply_both(pipeline, image, mask, 3)
    assert torch.equal(labels == 255, tensor[0] == 0)
    assert (labels == 1).sum() == 16 * 16


class Scripted(random.Random):
    """Zooms and positions from streams of their own, so that two pipelines draw the same ones."""

    def __init__(self, seed):
        super().__init__(seed)
        self.zooms, self.positions = random.Random(seed + 1), random.Random(seed + 2)

    def uniform(self, a, b):
        return self.zooms.uniform(a, b)

    def randint(self, a, b):
        return self.positions.randint(a, b)


def street(height, width):
    """A smooth image, whose pixels are all different, and a mask with stripes of rare classes."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    image = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 7 * y))], -1).astype(np.uint8)
    mask = ((x * 12).astype(int) % 4 * (y > 0.4)).astype(np.uint8)
    mask[: height // 10] = 255
    return image, mask


@pytest.mark.parametrize("size", [(60, 80), (30, 200), (200, 31), (40, 48)], ids=str)
@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.25, 0.5), (2.5, 4.0)], ids=str)
def test_scaled_crop_is_scale_pad_and_crop(size, scale):
    """The same zoom and position give the same crop as the three transforms one after the other."""
    height, width = 40, 48
    image, mask = street(*size)
    zoom = A.RandomScale(scale_limit=(scale[0] - 1, scale[1] - 1), p=1.0)
    pad = A.PadIfNeeded(height, width, border_mode=0, fill=0, fill_mask=255)
    chain = A.Compose([zoom, pad, RandomCropLimitedClass(height, width)])
    single = A.Compose([RandomScaledCrop(height, width, scale)])
    tops = set()
    for seed in range(60):
        results = []
        for pipeline in (chain, single):
            pipeline.set_random_state(np.random.default_rng(seed), Scripted(seed))
            results.append(pipeline(image=image, mask=mask))
        first, second = results
        assert np.array_equal(first["mask"], second["mask"])
        # OpenCV 5 rounds alike in both; before, warpAffine knew positions to 1/32 pixel only.
        difference = np.abs(first["image"].astype(int) - second["image"])
        assert difference.max() <= 12
        assert difference.mean() < 0.6
        tops.add(second["image"].tobytes())
    assert len(tops) > 1 or scale == (0.25, 0.5) or size == (40, 48)


def test_zoom_and_position_are_uniform():
    height, width = 64, 64
    crop = RandomScaledCrop(height, width)
    crop.set_random_state(np.random.default_rng(0), random.Random(0))
    zooms, places = [], []
    for _ in range(4000):
        drawn = crop.get_params_dependent_on_data({"shape": (200, 300, 3)}, {})
        zooms.append(drawn["size"][1] / 300)
        places.append(drawn["window"][0].start / (drawn["size"][0] - height))
    for values, low, high in ((zooms, 0.5, 2.0), (places, 0.0, 1.0)):
        share = (np.sort(values) - low) / (high - low)
        furthest = np.abs(share - np.linspace(0, 1, len(share))).max()
        assert furthest < 1.95 / np.sqrt(len(share)) + 0.01


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((400, 800), 100, None, (100, 200)),
        ((800, 400), 100, None, (200, 100)),
        ((100, 1000), 512, 2048, (204, 2048)),  # the long side is the limit
        ((1000, 100), None, 500, (500, 50)),
        ((50, 50), 100, None, (100, 100)),  # small images grow
    ],
)
def test_scaled_crop_from_a_common_size(size, short, long, expected):
    crop = RandomScaledCrop(8, 8, (1.0, 1.0), short, long)
    crop.set_random_state(np.random.default_rng(0), random.Random(0))
    drawn = crop.get_params_dependent_on_data({"shape": (*size, 3)}, {})
    assert drawn["size"] == expected


def test_scaled_crop_fills_with_a_colour():
    image, mask = street(20, 20)
    pipeline = compose([RandomScaledCrop(30, 30, (1.0, 1.0), fill=(124, 116, 104))])
    tensor, labels = apply_both(pipeline, image, mask, 0)
    assert (tensor[:, 0, 0] * 255).round().tolist() == [124, 116, 104]
    assert (labels[:5] == 255).all()
    assert torch.equal(labels[5:25, 5:25], torch.from_numpy(mask).long())


def test_scaled_crop_of_wide_masks_and_without_mask():
    image, mask = street(50, 70)
    pipeline = compose([RandomScaledCrop(32, 32)])
    for seed in range(5):
        first = apply_both(pipeline, image, mask, seed)
        wide = apply_both(pipeline, image, mask.astype(np.int32), seed)
        assert torch.equal(first[0], wide[0])
        assert torch.equal(first[1], wide[1])
    assert apply_both(pipeline, image, None, 0)[0].shape == (3, 32, 32)


def test_same_seed_same_sample_whatever_came_before():
    image, mask = scene()
    pipeline = compose(default_train_transform((32, 32)))
    first, other, again = (apply_both(pipeline, image, mask, seed) for seed in (7, 8, 7))
    fresh = apply_both(pickle.loads(pickle.dumps(pipeline)), image, mask, 7)
    assert all(torch.equal(first[i], same[i]) for same in (again, fresh) for i in (0, 1))
    assert not torch.equal(first[0], other[0])


def test_transforms_of_one_sample_draw_independently():
    """With one seed for each transform these two flips would always agree."""
    pipeline = compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 255
    corners = {int(apply_both(pipeline, image, None, seed)[0][0].argmax()) for seed in range(40)}
    assert corners == {0, 1, 2, 3}


def test_nested_transforms_are_seeded():
    pipeline = compose([A.OneOf([A.HorizontalFlip(p=1), A.VerticalFlip(p=1)], p=1)])
    image, _ = scene()
    results = [apply_both(pipeline, image, None, 5)[0] for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_limited_crop_avoids_one_class():
    """Class 1 is a stripe of 20 in 200 columns: free crops mostly miss it, limited ones do not."""
    mask = np.zeros((40, 200), np.uint8)
    mask[:, 90:110] = 1
    image = np.zeros((40, 200, 3), np.uint8)

    def hits(crop):
        pipeline = compose([crop])
        largest = []
        for seed in range(60):
            _, labels = apply_both(pipeline, image, mask, seed)
            largest.append(labels.flatten().bincount().max().item() / labels.numel())
        return np.mean(np.array(largest) <= 0.75)

    assert hits(RandomCropLimitedClass(40, 40, 0.75, tries=50)) > 0.95
    assert hits(A.RandomCrop(40, 40)) < 0.5


def test_limited_crop_does_not_count_ignored_pixels():
    mask = np.full((10, 10), 255, np.uint8)
    mask[0, :4] = [0, 0, 0, 1]
    for kind in (np.uint8, np.int32):
        assert is_mixed(mask.astype(kind), 0.75, 255)
        for uniform in (0, 255):
            assert not is_mixed(np.full((10, 10), uniform, kind), 0.75, 255)
    mask[0, 4] = 0
    assert not is_mixed(mask, 0.75, 255)


def test_limited_crop_without_mask_and_with_ignored_mask():
    pipeline = compose([RandomCropLimitedClass(8, 8)])
    image, _ = scene()
    assert apply_both(pipeline, image, None, 0)[0].shape == (3, 8, 8)
    _, labels = apply_both(pipeline, image, np.full(image.shape[:2], 255, np.uint8), 0)
    assert (labels == 255).all()


@pytest.mark.parametrize("crop", [A.RandomCrop(100, 100), RandomCropLimitedClass(100, 100)])
def test_crop_larger_than_image(crop):
    with pytest.raises(ValueError, match=r"larger than image 'street/7' \(60x80 .*PadIfNeeded"):
        apply_both(compose([crop]), *scene(), 0, "street/7")


def test_tensor_transform_is_refused():
    with pytest.raises(ValueError, match="remove ToTensorV2"):
        apply_both(compose([A.ToTensorV2()]), *scene(), 0, "a")


UNCOVERING = [
    A.PadIfNeeded(64, 64, border_mode=0, p=1),
    A.Rotate((30, 60), mask_interpolation=cv2.INTER_LINEAR, p=1),
    A.SafeRotate((30, 60), p=1),
    A.Affine(rotate=(30, 60), fill_mask=0, p=1),
    A.CropAndPad(px=5, fill_mask=2, p=1),
    A.RandomCrop(64, 64, pad_if_needed=True, p=1),
]


@pytest.mark.parametrize("transform", UNCOVERING, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    "nest",
    [
        lambda one: [one],
        lambda one: one,
        lambda one: [A.OneOf([one], p=1)],
        lambda one: A.OneOf([A.HorizontalFlip(p=0), one], p=1),
        lambda one: [A.Compose([A.Sequential([A.SomeOf([one], n=1, p=1)], p=1)])],
    ],
    ids=["list", "alone", "OneOf", "OneOf alone", "Compose"],
)
def test_uncovered_pixels_are_ignored_however_the_transform_is_nested(transform, nest):
    mask = np.ones((40, 40), np.uint8)
    own, seen = transform.fill_mask, set()
    for seed in range(4):
        masks = {"mask": mask, "anomaly": mask, "unlabelled": mask}
        image = np.zeros((40, 40, 3), np.uint8)
        result = apply(compose(nest(transform)), image, masks, seed)
        assert all(torch.equal(result[key], result["mask"]) for key in masks)
        seen |= set(result["mask"].unique().tolist())
    assert seen == {1, 255}
    assert transform.fill_mask == own  # the user's own is left alone


def test_one_of_alone_is_one_of_them():
    data = SyntheticScenesDataModule(train_transform=A.OneOf([A.VerticalFlip(p=1), A.NoOp(p=1)]))
    assert len(data.train_transform) == 1


YAML = """
transforms:
- class_path: RandomScale
  init_args: {scale_limit: [-0.5, 1.0]}
- class_path: PadIfNeeded
  init_args: {min_height: 32, min_width: 32, border_mode: 0, fill: 0, fill_mask: 255}
- class_path: RandomCropLimitedClass
  init_args: {height: 32, width: 32, max_class_share: 0.5, tries: 7}
- class_path: RandomScaledCrop
  init_args: {height: 32, width: 32, tries: 3, fill: [1, 2, 3], ignore_index: 254, p: 0.5}
- class_path: OneOf
  init_args:
    transforms:
    - class_path: HorizontalFlip
    - class_path: ColorJitter
      init_args: {brightness: [0.8, 1.2], contrast: 0.1, saturation: 0.1, hue: 0.1}
"""


def parser():
    result = ArgumentParser(exit_on_error=False)
    result.add_argument("--transforms", type=list[Transform] | None, default=None)
    return result


def test_yaml_with_short_names():
    config = parser().parse_string(YAML)
    transforms = parser().instantiate(config).transforms
    kinds = [A.RandomScale, A.PadIfNeeded, RandomCropLimitedClass, RandomScaledCrop, A.OneOf]
    assert list(map(type, transforms)) == kinds
    given = transforms[3]
    assert (transforms[2].max_class_share, transforms[2].tries) == (0.5, 7)
    assert (given.fill, given.ignore_index, given.p) == ((1, 2, 3), 254, 0.5)
    again = parser().instantiate(parser().parse_string(parser().dump(config))).transforms
    assert repr(again) == repr(transforms)
    assert apply_both(compose(transforms), *scene(), 0)[0].shape == (3, 32, 32)
    assert parser().parse_string("transforms: null").transforms is None


def test_photometric_distortion_is_four_transforms():
    """To the last bit and with the same draws, so that recipes keep their results."""
    one, off = (1.0, 1.0), (0.0, 0.0)
    four = [
        A.RandomBrightnessContrast(brightness_limit=(-0.125, 0.125), contrast_limit=off, p=0.5),
        A.RandomBrightnessContrast(brightness_limit=off, contrast_limit=(-0.5, 0.5), p=0.5),
        A.ColorJitter(brightness=one, contrast=one, saturation=(0.5, 1.5), hue=off, p=0.5),
        A.ColorJitter(brightness=one, contrast=one, saturation=one, hue=(-0.1, 0.1), p=0.5),
    ]
    config = parser().parse_string("transforms: [{class_path: PhotometricDistortion}]")
    single = parser().instantiate(config).transforms
    assert isinstance(single[0], PhotometricDistortion)
    pipelines = [compose([A.HorizontalFlip(), *t, A.RandomCrop(30, 30)]) for t in (four, single)]
    image, mask = scene()
    unlike = set()
    for seed in range(50):
        (first, labels), (second, same) = (apply_both(p, image, mask, seed) for p in pipelines)
        assert torch.equal(first, second)
        assert torch.equal(labels, same)
        unlike.add(first.sum().item())
    assert len(unlike) == 50
    points = compose(single, points=True)
    assert apply(points, image, {}, 0, points=np.ones((1, 2)))["points"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "entry", ["{class_path: RandomCropp}", "{class_path: RandomCrop, init_args: {heightt: 3}}"]
)
def test_yaml_typo(entry):
    with pytest.raises(Exception, match=r"RandomCropp|heightt"):
        parser().parse_string(f"transforms: [{entry}]")


def test_masks_move_together():
    image, mask = scene(60, 80)
    anomaly = np.where(mask == 255, 255, mask % 2).astype(np.uint8)
    pipeline = compose(default_train_transform((64, 64)))
    for seed in range(10):
        both = apply(pipeline, image, {"mask": mask, "anomaly": anomaly}, seed, "x")
        labels = both["mask"]
        assert (both["anomaly"] == torch.where(labels == 255, 255, labels % 2)).all()
        assert both["anomaly"].dtype == torch.int64
        alone, same = apply_both(pipeline, image, mask, seed)
        assert (both["image"] == alone).all()
        assert (labels == same).all()
    assert set(apply(pipeline, image, {}, 0)) == {"image"}


def test_points_keep_their_order_and_columns():
    points = np.array([[0.0, 0, 7], [79, 59, 8], [40, 30, 9]])
    image, _ = scene()
    pipeline = compose([A.HorizontalFlip(p=1), A.Crop(10, 10, 50, 50)], points=True)
    moved = apply(pipeline, image, {}, 0, points=points)["points"]
    assert moved.dtype == torch.float64
    assert moved.tolist() == [[69, -10, 7], [-10, 49, 8], [29, 20, 9]]  # two have left the image


@pytest.mark.parametrize("transforms", [[], [A.ColorJitter()], [A.HorizontalFlip(p=1)]], ids=len)
def test_no_points(transforms):
    moved = apply(compose(transforms, points=True), scene()[0], {}, 0, points=np.empty((0, 3)))
    assert moved["points"].shape == (0, 3)


@pytest.mark.parametrize(
    "transform",
    [
        A.HorizontalFlip(p=1),
        A.VerticalFlip(p=1),
        A.Transpose(p=1),
        A.RandomRotate90(p=1),
        A.RandomCrop(50, 70),
        A.PadIfNeeded(101, 122, fill=0, fill_mask=255),
        A.Resize(180, 240),
        A.Resize(30, 40),
        A.RandomScale((1.0, 1.0), p=1),  # its zoom is that before the size is rounded
        A.LongestMaxSize(200),
        A.SmallestMaxSize(150),
        A.RandomSizedCrop((50, 55), (150, 200)),
        A.RandomResizedCrop((150, 200), scale=(0.7, 1.0)),
        A.CropAndPad(px=-6, p=1, fill_mask=255),
        A.Rotate((30, 30), p=1, fill_mask=255),
        A.Affine(scale=1.8, shear=5, translate_percent=0.1, p=1, fill_mask=255),
        RandomScaledCrop(100, 120, scale=(0.7, 2.0)),
        A.OneOf([A.Sequential([A.HorizontalFlip(p=1), A.Resize(180, 240)])], p=1),
        A.Sequential([A.RandomScale((1.0, 1.0), p=1), A.PadIfNeeded(200, 200, fill_mask=255)], p=1),
        A.Sequential([A.Rotate((30, 30), p=1, fill_mask=255), A.RandomCrop(50, 70)], p=1),
        A.Sequential(default_train_transform((100, 120), (1.0, 2.0), color_jitter=0), p=1),
    ],
    ids=lambda t: type(t).__name__,
)
def test_points_move_exactly(transform):
    """Against a picture of a bright blob around the point: its centre of gravity."""
    y, x = np.indices((60, 80))
    blob = 255 * np.exp(-((x - 35) ** 2 + (y - 25) ** 2) / 18)
    image = np.repeat(blob.round().astype(np.uint8)[..., None], 3, 2)
    pipeline = pickle.loads(pickle.dumps(compose([transform], points=True)))  # as workers get it
    seen = 0
    for seed in range(20):
        result = apply(pipeline, image, {}, seed, points=np.array([[35.0, 25.0]]))
        weight = result["image"][0].numpy().astype(np.float64)
        weight[weight < 0.05 * weight.max()] = 0
        if weight[[0, -1]].any() or weight[:, [0, -1]].any():
            continue  # cut off: its centre of gravity is another
        y, x = np.indices(weight.shape)
        centre = [(x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()]
        np.testing.assert_allclose(result["points"][0], centre, atol=0.07)
        seen += 1
    assert seen >= 2
    assert type(transform).__module__.startswith(("albumentations", "lightning_genseg"))
    assert not type(transform).__name__.startswith("_")  # the user's own is left alone


@pytest.mark.parametrize("kind", [A.GridDistortion, A.ThinPlateSpline])
def test_distortions_move_points_only_roughly(kind):
    with pytest.raises(ValueError, match=r"moves pixels but not points and scribbles exactly"):
        compose([kind(fill_mask=255)], points=True)
    compose([kind(fill_mask=255)])


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((375, 500), 473, (352, 472)),  # BAM's example
        ((500, 375), 473, (472, 352)),
        ((480, 640), 641, (480, 640)),
        ((60, 160), 160, (56, 160)),
        ((3, 900), 64, (8, 64)),  # not thinner than the stride
    ],
)
def test_letterbox_size(shape, size, expected):
    assert letterbox_size(*shape, size) == expected


def test_letterbox():
    image, mask = scene(60, 80)
    box = compose([Letterbox(41)])
    result = apply(box, image, {"mask": mask, "valid": np.ones_like(mask)}, 0)
    assert result["image"].shape == (3, 41, 41)
    valid = result["valid"] == 1
    assert valid[:24, :40].all()
    assert valid.sum() == 24 * 40
    assert (result["mask"][~valid] == 255).all()
    assert set(result["mask"][valid].tolist()) == {0, 1, 2, 3}
    assert (result["image"][:, ~valid] == 0).all()
    # The quarters stay where they are: 2 to the right, 1 below.
    assert result["mask"][2, 38] == 2
    assert result["mask"][22, 2] == 1


def test_object_crop_keeps_the_object():
    """4 x 4 pixels in 200 x 200: a random crop of 120 often misses them, this one hardly ever."""
    image = np.zeros((200, 200, 3), np.uint8)
    mask = np.zeros((200, 200), np.uint8)
    mask[10:14, 10:14] = 1

    def kept(share):
        crop = compose([RandomObjectCrop(120, 120, share, tries=150)])
        return [int((apply_both(crop, image, mask, seed)[1] == 1).sum()) for seed in range(60)]

    assert sum(pixels >= 14 for pixels in kept(0.85)) > 45
    assert sum(pixels >= 14 for pixels in kept(0)) < 8


def test_object_crop_pads_around_smaller_images():
    image, mask = scene(20, 90)
    crop = compose([RandomObjectCrop(40, 60, fill=(124, 116, 104))])
    result = apply(crop, image, {"mask": mask, "valid": np.ones_like(mask)}, 3)
    assert result["image"].shape == (3, 40, 60)
    valid = result["valid"] == 1
    assert valid[10:30].all()
    assert valid.sum() == 20 * 60
    assert (result["mask"][~valid] == 255).all()
    expected = torch.tensor([124, 116, 104])[:, None].expand(3, 20 * 60)
    assert torch.equal((result["image"][:, ~valid] * 255).round().long(), expected)


def test_episode_train_transform():
    image, mask = scene(80, 100)
    image[:] = 200
    pipeline = compose(episode_train_transform(72))
    rotated = 0
    for seed in range(30):
        result = apply(pipeline, image, {"mask": mask, "valid": np.ones_like(mask)}, seed)
        assert result["image"].shape == (3, 72, 72)
        valid = result["valid"] == 1
        assert (result["mask"][~valid] == 255).all()
        assert set(result["mask"].unique().tolist()) <= {0, 1, 2, 3, 255}
        rotated += not valid.all()
    assert 3 < rotated < 27  # only rotation shows what is beyond the image


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (RandomCropLimitedClass, {"height": 0}),
        (RandomCropLimitedClass, {"max_class_share": 0.0}),
        (RandomCropLimitedClass, {"tries": 0}),
        (RandomScaledCrop, {"width": 0}),
        (RandomScaledCrop, {"scale": (0.0, 1.0)}),
        (RandomScaledCrop, {"short_side": 0}),
        (RandomScaledCrop, {"fill": 256}),
        (RandomScaledCrop, {"fill": (0, 0, -1)}),
        (RandomScaledCrop, {"tries": 0}),
        (RandomScaledCrop, {"max_class_share": float("nan")}),
        (RandomObjectCrop, {"height": 0}),
        (RandomObjectCrop, {"min_share": 1.5}),
        (RandomObjectCrop, {"tries": 2.5}),
        (RandomObjectCrop, {"p": 2.0}),
        (Letterbox, {"size": 7}),
        (default_train_transform, {"crop_size": (8, 8), "color_jitter": -0.1}),
        (episode_train_transform, {"size": 8, "scale": (0.0, 1.0)}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wrong_arguments(make, arguments):
    needed = {} if "size" in str(arguments) else {"height": 8, "width": 8}
    with pytest.raises(ValueError, match=rf"\b{list(arguments)[-1]}\b"):
        make(**{**needed, **arguments})


def test_a_crop_of_a_photograph_shows_its_shorter_side():
    """The columns of the image are numbered: the crop holds all of them, sixteen times smaller."""
    image = np.arange(256, dtype=np.uint8)[None, :, None].repeat(1000, 0).repeat(3, 2)
    arguments = {"scale": (1, 1), "color_jitter": 0, "short_side": 16}
    pipeline = compose(default_train_transform((16, 16), **arguments))
    crop = pipeline(image=image, mask=np.zeros((1000, 256), np.uint8))["image"][0, :, 0]
    np.testing.assert_allclose(sorted(crop), np.arange(16) * 16 + 7.5, atol=1)


def test_the_command_starts_without_albumentations():
    """It takes longer to import than all of this package, and most commands never use it."""
    code = "import sys, lightning_genseg.cli.main; assert 'albumentations' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
