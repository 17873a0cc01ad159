"""The public data sets with their miniatures, for tests that all of them must pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lightning_genseg import data
from tests import miniatures


class Case(NamedTuple):
    """A data set, where its miniature comes from, and what is in it."""

    dataset: Any
    datamodule: Any
    make: Callable[..., Path]
    classes: int
    counts: dict[str, int]  # images by the names that the data set has for its splits
    found_by: str = "image"  # what makes a sample: an image, a mask, either, or a list
    wrong: tuple[int, str] = (0, "")  # a value that is in no mask, and what is said about it
    rooted: bool = True  # whether a wrong root is recognised by the folders in it


def case(name: str, make: str, classes: int, *more: Any, **words: Any) -> Any:
    module = getattr(data, f"{name.replace('LostAndFound', '')}DataModule")
    kind, maker = getattr(data, name), getattr(miniatures, make)
    return pytest.param(Case(kind, module, maker, classes, *more, **words), id=name)


# fmt: off
DENSE = [
    case("ADE20K", "make_ade20k", 150, {"train": 4, "val": 4}),
    case("CamVid", "make_camvid", 11, {"train": 4, "val": 4, "test": 4}, rooted=False),
    case("Cityscapes", "make_cityscapes", 19, {"train": 4, "val": 4}),
    case("COCO", "make_coco", 81, {"train": 24, "val": 24}, "mask"),
    case("COCOStuff10k", "make_coco_stuff_10k", 171, {"train": 4, "test": 4}, "list"),
    case("COCOStuff164k", "make_coco_stuff_164k", 171, {"train": 4, "val": 4}),
    case("VOC", "make_voc", 21, {"trainaug": 8, "train": 4, "val": 4}, "list"),
]
STREETS = case(
    "StreetHazards", "make_street_hazards", 12, {"train": 4, "val": 2, "test": 4}, "either",
    (21, "the masks of StreetHazards hold 1 to 14"), rooted=False,
)
UNTRAINED = [
    case("FishyscapesLostAndFound", "make_fishyscapes", 19, {"test": 4}, "mask",
         (2, "the labels of Fishyscapes are 0, 1 and 255")),
    case("RoadAnomaly", "make_road_anomaly", 19, {"test": 4}, "image",
         (255, "the labels of Road Anomaly are 0, 1 and 2")),
    case("RoadAnomaly21", "make_road_anomaly21", 19, {"test": 3}, "mask",
         (254, "the labels of RoadAnomaly21 are 0, 1 and 255")),
]
# fmt: on
ALL = [*DENSE, STREETS, *UNTRAINED]
