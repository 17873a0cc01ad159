"""COCO 2014 as classes: layout, lists, polygons painted as masks."""

import json

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from lightning_genseg.data import COCO
from lightning_genseg.data.images import read_mask
from lightning_genseg.data.sets.coco import convert_instances, paint_instances
from lightning_genseg.errors import MissingFileError
from tests.miniatures import instance, make_coco

SIZE = (48, 64)


def test_layout_and_lists(tmp_path):
    root = make_coco(tmp_path, SIZE, images=1)
    dataset = COCO(root, "val")
    assert dataset.class_names[80] == "toothbrush"
    assert set(np.unique(dataset.read_mask_labels(0)).tolist()) == {0, *range(1, 81, 4)}
    names = [sample.name for sample in dataset.samples]
    assert names == sorted(names)
    lines = [f"val2014/{name}.jpg annotations/val2014/{name}.png" for name in names[::-1][:3]]
    (root / "val.txt").write_text("\n".join(lines))  # BAM's format
    assert [s.name for s in COCO(root, "val", root / "val.txt").samples] == names[::-1][:3]


def test_polygons_against_matplotlib():
    """Random stars: a pixel is inside if its centre is, but for a tenth at the outline."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        points = (40, 30) + rng.uniform(8, 38, (14, 1)) * np.stack(
            [np.cos(angles), np.sin(angles)], 1
        )
        annotation = instance(1, 18, (0, 0, 1, 1)) | {"segmentation": [points.ravel().tolist()]}
        mask = paint_instances([annotation], 60, 80)
        y, x = np.mgrid[:60, :80] + 0.5
        inside = Outline(points).contains_points(np.stack([x.ravel(), y.ravel()], 1))
        wrong = (mask > 0) != inside.reshape(60, 80)
        length = np.linalg.norm(points - np.roll(points, 1, 0), axis=1).sum()
        assert wrong.sum() < 0.25 * length
        assert set(np.unique(mask).tolist()) == {0, 17}  # dog: number 18 without the gap at 12


def test_small_objects_stay_visible_and_groups_are_left_out():
    large, small = instance(1, 1, (0, 0, 20, 20)), instance(1, 90, (5, 5, 8, 9))
    group = instance(1, 3, (0, 0, 30, 30), iscrowd=1)
    mask = paint_instances([small, large, group], 30, 30)
    expected = np.zeros((30, 30), np.uint8)
    expected[:20, :20] = 1
    expected[5:9, 5:8] = 80
    assert np.array_equal(mask, expected)
    several = large | {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 12, 10, 12, 12, 10, 12]]}
    assert (paint_instances([several], 30, 30) > 0).sum() == 16 + 4
    beyond = large | {"segmentation": [[-5, -5, 40, -5, 40, 40, -5, 40], [50, 50, 60, 50, 60, 60]]}
    assert (paint_instances([beyond], 30, 30) == 1).all()


def test_conversion(tmp_path):
    root = make_coco(tmp_path, SIZE, images=1, instances=True)
    path = root / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 999, "file_name": "empty.jpg", "height": 9, "width": 9})
    path.write_text(json.dumps(content))
    with pytest.raises(MissingFileError, match=r"convert \(--data\.convert true\)"):
        COCO(root, "val")
    assert convert_instances(root, "val") == 4  # an image without annotations has no mask
    dataset = COCO(root, "val")
    for index, sample in enumerate(dataset.samples):
        expected = read_mask(root / "expected" / "val2014" / sample.mask.name)
        assert np.array_equal(dataset.read_mask_labels(index), expected)
    path.with_name("instances_train2014.json").unlink()
    with pytest.raises(MissingFileError, match=r"instances_train2014\.json' does not exist"):
        convert_instances(root, "train")
