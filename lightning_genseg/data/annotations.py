"""Masks out of the files of annotation tools: COCO's JSON and labelme's."""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_genseg.errors import GenSegError, listed

_FINE = 5  # polygons are drawn this much larger, as in pycocotools
Mask = NDArray[np.uint8]
Part = NDArray[np.bool_]
Painter = Callable[[Sequence[int], int], Mask]
"""Paints HxW: of a number for each class, and that of pixels which nothing covers."""


class Annotated(NamedTuple):
    """Images with the shapes that somebody has drawn in them.

    Args:
        classes: names.
        masks: for each image (path without suffix) what paints its mask.
        images: for each image the name of its file.
        left_out: kinds of shapes without an area, and how many of them there are.
        bare: names of the images that have no shape with an area.
    """

    classes: list[str]
    masks: dict[str, Painter]
    images: dict[str, str]
    left_out: dict[str, int]
    bare: list[str]


def paint_polygon(mask: Mask, points: NDArray[np.float64], value: int) -> None:
    """Paint a polygon, N x 2 of x and y, into a mask."""
    height, width = mask.shape
    left, top = np.floor(points.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 1, (width, height))
    if right <= left or bottom <= top:
        return
    # OpenCV also fills what the outline touches: on the fine grid a tenth of a pixel.
    fine = np.zeros((_FINE * (bottom - top), _FINE * (right - left)), np.uint8)
    corners = np.round((points - (left, top)) * _FINE - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [corners], 1)
    inside = fine[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE] == 1
    mask[top:bottom, left:right][inside] = value


def decode_rle(counts: Sequence[int] | str, height: int, width: int) -> Part:
    """Decode COCO's run lengths, plain or compressed: runs of 0 and 1 by turns, down the columns.

    Raises:
        ValueError: they do not add up to the image.
    """
    runs = _uncompress(counts) if isinstance(counts, str) else list(counts)
    flat: Part = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _uncompress(text: str) -> list[int]:
    """Six bits a character, lowest first; the third run and those after it are differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def read_coco(path: Path) -> Annotated:
    """Read a file of instances in COCO's format: polygons and run lengths, groups as well.

    Larger objects are painted first, so that smaller ones stay visible. Classes are in the order of
    their ids.

    Raises:
        GenSegError: it is no such file, has a category that it does not list, or two images of one
            name.
    """
    content = _load(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise GenSegError(
            f"'{path}' is no COCO file, which has images, annotations and categories: give that "
            "of the instances."
        )
    categories = sorted(content["categories"], key=lambda category: category["id"])
    index = {category["id"]: c for c, category in enumerate(categories)}
    shapes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] not in index:
            raise GenSegError(
                f"'{path}' has an annotation of category_id {annotation['category_id']}, which is "
                f"none of its categories ({listed(index)}): export it again."
            )
        if annotation.get("segmentation"):
            shapes[annotation["image_id"]].append(annotation)
    left_out = sum(not annotation.get("segmentation") for annotation in content["annotations"])

    def painter(image: Mapping[str, Any]) -> Painter:
        def paint(numbers: Sequence[int], rest: int) -> Mask:
            parts = [
                (
                    _coco_part(shape["segmentation"], image, path),
                    numbers[index[shape["category_id"]]],
                )
                for shape in shapes[image["id"]]
            ]
            return _paint(parts, int(image["height"]), int(image["width"]), rest)

        return paint

    names: dict[str, Any] = {}
    for image in content["images"]:
        twin = names.setdefault(_stem(image["file_name"]), image)
        if twin is not image:
            raise GenSegError(
                f"'{path}' has '{twin['file_name']}' and '{image['file_name']}', whose masks would "
                "share a name: rename or remove one of them."
            )
    return Annotated(
        [str(category["name"]) for category in categories],
        {name: painter(image) for name, image in names.items()},
        {name: str(image["file_name"]) for name, image in names.items()},
        {"boxes without outline": left_out} if left_out else {},
        [name for name, image in names.items() if image["id"] not in shapes],
    )


def read_labelme(folder: Path, classes: Sequence[str] = ()) -> Annotated:
    """Read labelme's files, one JSON for each image: polygons, rectangles, circles and masks.

    The shape that was drawn last lies on top; points and lines have no area and are left out.

    Args:
        folder: of the files, searched recursively.
        classes: names in the order of their numbers; default: all labels, sorted.

    Raises:
        GenSegError: a file is not labelme's, or has a label that is not in `classes`.
    """
    files: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    left_out: dict[str, int] = defaultdict(int)
    images = {}
    bare = []
    for path in sorted(folder.rglob("*.json")):
        content = _load(path)
        if not isinstance(content, dict) or "shapes" not in content:
            raise GenSegError(
                f"'{path}' is no file of labelme, which has shapes: give the folder that holds "
                "only these."
            )
        name = path.relative_to(folder).with_suffix("").as_posix()
        files[name], images[name] = path, str(content.get("imagePath") or f"{name}.jpg")
        for shape in content["shapes"]:
            labels.setdefault(shape["label"], path)
            if _kind(shape) not in _AREAS:
                left_out[_kind(shape)] += 1
        if all(_kind(shape) not in _AREAS for shape in content["shapes"]):
            bare.append(name)
    names = list(classes) or sorted(labels)
    unlisted = [label for label in labels if label not in names]
    if unlisted:
        raise GenSegError(
            f"'{labels[unlisted[0]]}' has the label '{unlisted[0]}', which is none of the classes "
            f"({', '.join(names)}): add it to them."
        )

    def painter(path: Path) -> Painter:
        def paint(numbers: Sequence[int], rest: int) -> Mask:
            content = _load(path)
            height, width = int(content["imageHeight"]), int(content["imageWidth"])
            mask = np.full((height, width), rest, np.uint8)
            for shape in content["shapes"]:
                if _kind(shape) in _AREAS:
                    part = _AREAS[_kind(shape)](shape, height, width)
                    mask[part] = numbers[names.index(shape["label"])]
            return mask

        return paint

    masks = {name: painter(path) for name, path in files.items()}
    return Annotated(names, masks, images, dict(left_out), bare)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or encoding
        raise GenSegError(f"'{path}' is not JSON ({error}): export it again.") from error


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _coco_part(segmentation: Any, image: Mapping[str, Any], path: Path) -> Part:
    height, width = int(image["height"]), int(image["width"])
    if isinstance(segmentation, list):
        return _polygons(segmentation, height, width)
    try:
        return decode_rle(segmentation["counts"], height, width)
    except ValueError as error:
        raise GenSegError(
            f"'{path}' has run lengths of '{image['file_name']}' that are not of {width} x "
            f"{height} pixels: export it again."
        ) from error


def _paint(parts: Iterable[tuple[Part, int]], height: int, width: int, rest: int) -> Mask:
    mask = np.full((height, width), rest, np.uint8)
    for part, value in sorted(parts, key=lambda pair: -int(pair[0].sum())):
        mask[part] = value
    return mask


def _polygons(polygons: Iterable[Any], height: int, width: int) -> Part:
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        paint_polygon(mask, np.asarray(polygon, np.float64).reshape(-1, 2), 1)
    part: Part = mask == 1
    return part


def _kind(shape: Mapping[str, Any]) -> str:
    return str(shape.get("shape_type") or "polygon")


def _rectangle(shape: Mapping[str, Any], height: int, width: int) -> Part:
    (left, top), (right, bottom) = np.sort(np.asarray(shape["points"], float), axis=0)
    corners = (left, top), (right, top), (right, bottom), (left, bottom)
    return _polygons([corners], height, width)


def _circle(shape: Mapping[str, Any], height: int, width: int) -> Part:
    (x, y), edge = np.asarray(shape["points"], float)
    rows, columns = np.ogrid[:height, :width]
    radius = np.hypot(edge[0] - x, edge[1] - y)
    inside: Part = np.hypot(columns + 0.5 - x, rows + 0.5 - y) <= radius
    return inside


def _bitmap(shape: Mapping[str, Any], height: int, width: int) -> Part:
    """A drawn mask: a PNG whose upper left corner is the first point."""
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as file:
        drawn = np.array(file) > 0
    left, top = np.round(np.asarray(shape["points"], float)[0]).astype(int)
    part = np.zeros((height, width), bool)
    window = part[top : top + drawn.shape[0], left : left + drawn.shape[1]]
    window |= drawn[: window.shape[0], : window.shape[1]]
    return part


_AREAS: dict[str, Callable[[Mapping[str, Any], int, int], Part]] = {
    "polygon": lambda shape, height, width: _polygons([shape["points"]], height, width),
    "rectangle": _rectangle,
    "circle": _circle,
    "mask": _bitmap,
}
