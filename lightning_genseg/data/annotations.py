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

from lightning_genseg.data.images import find_files
from lightning_genseg.errors import GenSegError, listed
from lightning_genseg.files import leads_out, read_json

_FINE = 5  # polygons are drawn this much larger, as in pycocotools
_ID, _NUMBER = (int, str), (int, float)
_INSTANCES: dict[str, dict[str, Any]] = {
    "categories": {"id": _ID, "name": str},
    "images": {"id": _ID, "file_name": str, "height": _NUMBER, "width": _NUMBER},
    "annotations": {"image_id": _ID, "category_id": _ID},
}
_SHAPES = {"label": str, "points": list}
_MALFORMED = (ValueError, TypeError, LookupError, OSError)  # NumPy's, base64's, PIL's of a shape
Mask = NDArray[np.uint8]
Part = NDArray[np.bool_]
Painter = Callable[[Sequence[int], int], Mask]
"""Paints HxW: of a number for each class, and that of pixels which nothing covers."""


class Annotated(NamedTuple):
    """Images with the shapes that somebody has drawn in them.

    Args:
        classes: names.
        masks: for each image (path without suffix) what paints its mask.
        left_out: kinds of shapes without an area, and how many of them there are.
        bare: names of the images that have no shape with an area.
    """

    classes: list[str]
    masks: dict[str, Painter]
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


def read_instances(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Content of a file of instances in COCO's format.

    Raises:
        GenSegError: it is no such file, or one of its entries lacks something.
    """
    content = read_json(path, "annotations")
    if not isinstance(content, dict) or not set(_INSTANCES) <= set(content):
        raise GenSegError(
            f"'{path}' is no COCO file, which has images, annotations and categories: give that "
            "of the instances."
        )
    for what, form in _INSTANCES.items():
        _check(path, what, content[what], form)
    return content


def _check(path: Path, what: str, entries: Any, form: Mapping[str, Any]) -> None:
    """Refuse a list whose entries have not the keys of `form`, with values of its types."""
    if not isinstance(entries, list):
        raise GenSegError(f"'{path}' has no list of {what}: export it again.")
    for entry in entries:
        for key, kinds in form.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kinds):
                raise GenSegError(
                    f"'{path}' has, among its {what}, one without a proper {key} "
                    f"({json.dumps(entry)[:80]}): correct it or export the file again."
                )


def _by_id(category: Mapping[str, Any]) -> tuple[bool, Any]:
    return isinstance(category["id"], str), category["id"]


def read_coco(path: Path) -> Annotated:
    """Read a file of instances in COCO's format: polygons and run lengths, groups as well.

    Larger objects are painted first, so that smaller ones stay visible. Classes are in the order of
    their ids; categories of one name are one class.

    Raises:
        GenSegError: it is no such file, has an annotation of a category or an image that it does
            not list, two images of one name, or one whose name leads out of a folder.
    """
    content = read_instances(path)
    categories = sorted(content["categories"], key=_by_id)
    names = list(dict.fromkeys(category["name"] for category in categories))
    index = {category["id"]: names.index(category["name"]) for category in categories}
    images = {image["id"] for image in content["images"]}
    shapes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] not in index:
            raise GenSegError(
                f"'{path}' has an annotation of category_id {annotation['category_id']}, which is "
                f"none of its categories ({listed(index)}): export it again."
            )
        if annotation["image_id"] not in images:
            raise GenSegError(
                f"'{path}' has an annotation of image_id {annotation['image_id']!r}, which is none "
                f"of its images ({listed(map(repr, images))}): export it again."
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

    image_of: dict[str, Any] = {}
    for image in content["images"]:
        if leads_out(image["file_name"]):
            raise GenSegError(
                f"'{path}' has the file_name '{image['file_name']}', which leads out of a folder: "
                "make it relative to the folder of the images."
            )
        twin = image_of.setdefault(_stem(image["file_name"]), image)
        if twin is not image:
            raise GenSegError(
                f"'{path}' has '{twin['file_name']}' and '{image['file_name']}', whose masks would "
                "share a name: rename or remove one of them."
            )
    return Annotated(
        names,
        {name: painter(image) for name, image in image_of.items()},
        {"boxes without outline": left_out} if left_out else {},
        [name for name, image in image_of.items() if image["id"] not in shapes],
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
    bare = []
    for path in _json_files(folder):
        content = read_json(path, "annotations")
        if not isinstance(content, dict) or "shapes" not in content:
            raise GenSegError(
                f"'{path}' is no file of labelme, which has shapes: give the folder that holds "
                "only these."
            )
        for key in ("imageHeight", "imageWidth"):
            if not isinstance(content.get(key), int):
                raise GenSegError(f"'{path}' has no {key}: save it again in labelme.")
        _check(path, "shapes", content["shapes"], _SHAPES)
        name = path.relative_to(folder).with_suffix("").as_posix()
        files[name] = path
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
            content = read_json(path, "annotations")
            height, width = int(content["imageHeight"]), int(content["imageWidth"])
            mask = np.full((height, width), rest, np.uint8)
            for shape in content["shapes"]:
                if _kind(shape) in _AREAS:
                    try:
                        part = _AREAS[_kind(shape)](shape, height, width)
                    except _MALFORMED as error:
                        raise GenSegError(
                            f"'{path}' has a {_kind(shape)} of '{shape['label']}' that cannot be "
                            f"drawn ({error}): correct it in labelme."
                        ) from error
                    mask[part] = numbers[names.index(shape["label"])]
            return mask

        return paint

    masks = {name: painter(path) for name, path in files.items()}
    return Annotated(names, masks, dict(left_out), bare)


def has_labelme(folder: Path) -> bool:
    """Whether there are JSON files in a folder, which are taken for labelme's."""
    return bool(_json_files(folder))


def _json_files(folder: Path) -> list[Path]:
    return [path for path in find_files(folder) if path.suffix == ".json"]


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _coco_part(segmentation: Any, image: Mapping[str, Any], path: Path) -> Part:
    height, width = int(image["height"]), int(image["width"])
    try:
        if isinstance(segmentation, list):
            return _polygons(segmentation, height, width)
        if list(segmentation.get("size", (height, width))) != [height, width]:
            raise ValueError(f"size is {segmentation['size']}")
        return decode_rle(segmentation["counts"], height, width)
    except _MALFORMED as error:
        kind = "an outline" if isinstance(segmentation, list) else "run lengths"
        raise GenSegError(
            f"'{path}' has {kind} of '{image['file_name']}' that cannot be drawn on {width} x "
            f"{height} pixels ({error}): export it again."
        ) from error


def _paint(parts: Iterable[tuple[Part, int]], height: int, width: int, rest: int) -> Mask:
    mask = np.full((height, width), rest, np.uint8)
    small = [(*_cropped(part), value) for part, value in parts]  # of hundreds, gigabytes otherwise
    for window, part, value in sorted(small, key=lambda one: -int(one[1].sum())):
        mask[window][part] = value
    return mask


def _cropped(part: Part) -> tuple[tuple[slice, slice], Part]:
    """Where it is true: rows and columns of an image, and what they hold."""
    spans = []
    for axis in (1, 0):
        inside = np.flatnonzero(part.any(axis))
        spans.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0))
    window = spans[0], spans[1]
    return window, part[window].copy()


def _polygons(polygons: Iterable[Any], height: int, width: int) -> Part:
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        if len(polygon) == 0:
            continue
        paint_polygon(mask, np.asarray(polygon, np.float64).reshape(-1, 2), 1)
    part: Part = mask == 1
    return part


def _kind(shape: Mapping[str, Any]) -> str:
    return str(shape.get("shape_type") or "polygon")


def _rectangle(shape: Mapping[str, Any], height: int, width: int) -> Part:
    points = np.asarray(shape["points"], float).reshape(-1, 2)  # two corners, or all four
    (left, top), (right, bottom) = points.min(0), points.max(0)
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
