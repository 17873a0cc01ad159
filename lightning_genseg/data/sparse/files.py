"""Sparse labels read from files: points, scribbles, masks with an unlabelled value."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.dataset import Sample, check_sizes
from lightning_genseg.data.images import read_mask, without_suffix
from lightning_genseg.data.labels import IGNORE, UNLISTED, label_table, map_labels
from lightning_genseg.data.sparse.labels import Marks, Raster, Shape, SparseLabels
from lightning_genseg.errors import GenSegError, MissingFileError, listed
from lightning_genseg.files import read_json

Stroke = tuple[int, NDArray[np.float64]]
"""Class, and vertices (x, y)."""


class MarkFiles(SparseLabels):
    """Points or scribbles of files, each of which may be wrong on its own."""

    needs_masks = False
    from_files = True

    @abstractmethod
    def raw_marks(self, dataset: Any, index: int, shape: Shape) -> tuple[str, list[Any]]:
        """What messages call the place, and what it says of each point or scribble."""

    @abstractmethod
    def stroke(self, raw: Any, dataset: Any, shape: Shape, where: str) -> Stroke:
        """A point or scribble; GenSegError if it is wrong."""

    def read(self, dataset: Any, index: int, shape: Shape) -> Marks:
        """Points or scribbles of an image, without those that are wrong if `leave_out` is set."""
        strokes, problems = self._sorted(dataset, index, shape)
        if problems and not self.leave_out:
            raise problems[0]
        return Marks.of_strokes(strokes)

    def mark_problems(self, dataset: Any, index: int, shape: Shape) -> list[GenSegError]:
        """What is wrong with each point or scribble of an image."""
        return self._sorted(dataset, index, shape)[1]

    def _sorted(
        self, dataset: Any, index: int, shape: Shape
    ) -> tuple[list[Stroke], list[GenSegError]]:
        where, raw = self.raw_marks(dataset, index, shape)
        strokes, problems = [], []
        for one in raw:
            try:
                strokes.append(self.stroke(one, dataset, shape, where))
            except GenSegError as error:
                problems.append(error)
        return strokes, problems


class PointFiles(MarkFiles):
    """Points in JSON files: `{"image": [{"x": 10, "y": 20, "cls": 3}, ...], ...}`.

    x counts to the right, y down, both from 0. An image is named as its sample or its file; an
    image without points has an empty list. `cls` is a value of the masks or the name of a class.

    Public files come with GatedCRFLoss (github.com/LEONOB2014/GatedCRFLoss, folder datasets):
    What's the Point (Bearman et al., ECCV 2016) for VOC, `voc_whats_the_point.json` (cls 1 to 20)
    and, for the background, `voc_whats_the_point_bg_from_scribbles.json`; simulated clicks for
    Cityscapes, `cityscapes_synthetic_clicks.json` (cls: labelIds).

    Args:
        files: one file, or several that are joined, as those of the objects and of the background.
        ids: cls -> class (or 255: not used); default: as in the masks of the data set.
        size: diameter in pixels of the training image, after all transforms; 3 in Tree Energy Loss.
    """

    def __init__(
        self,
        files: list[Path] | Path,
        ids: dict[int, int] | None = None,
        size: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(size, **kwargs)
        self.files = list(files) if isinstance(files, list) else [files]
        if not self.files:
            raise GenSegError("files is empty: give at least one JSON file of points.")
        self.ids = ids
        self._found: list[Path] = []
        self._points: dict[str, list[dict[str, Any]]] = {}

    def prepare(self, dataset: Any, root: Path | None = None) -> str | None:
        """Read the files; a sentence if some images are in none of them."""
        found = [_find(file, root) for file in self.files]
        if found != self._found:
            points: dict[str, list[dict[str, Any]]] = {}
            for file in found:
                for name, more in _read_points(file).items():
                    points.setdefault(without_suffix(name), []).extend(more)
            self._found, self._points = found, points
        if self.ids is not None:
            label_table(self.ids, len(dataset.file_class_names))
        lost = [f"'{s.name}'" for s in dataset.samples if self._key(s) is None]
        if lost:
            return (
                f"{len(lost)} of {len(dataset)} images are not in {self._names()} "
                f"({listed(lost, 3)}): add their points, an empty list for an image without, or "
                "take them out of the data."
            )
        if self.labelled_classes(dataset) == set():
            raise GenSegError(
                f"{self._names()} holds no point of a class for any of the {len(dataset)} images, "
                "nothing can be learned from it: add points, or correct ids."
            )
        return None

    def labelled_classes(self, dataset: Any) -> set[int] | None:
        """Classes with a point in some image; None if a point is of no class, as `read` reports."""
        keys = filter(None, map(self._key, dataset.samples))
        points = (point for key in keys for point in self._points[key])
        try:
            values = {point["cls"] for point in points}
            classes = {_class(value, dataset, self.ids, self._names()) for value in values}
        except (TypeError, KeyError, GenSegError):
            return None
        return classes - {IGNORE}

    def raw_marks(self, dataset: Any, index: int, shape: Shape) -> tuple[str, list[Any]]:
        """Points of an image."""
        sample = dataset.samples[index]
        key = self._key(sample)
        if key is None:
            raise GenSegError(f"image '{sample.image}' is not in {self._names()}: add its points.")
        return f"{self._names()}, image '{key}'", self._points[key]

    def stroke(self, raw: Any, dataset: Any, shape: Shape, where: str) -> Stroke:
        """A point."""
        place, value = _parse_point(raw, where)
        return _class(value, dataset, self.ids, where), _inside(place, shape, where)

    def label_files(self, name: str) -> list[Path]:
        """All files, for any image."""
        return self._found

    def _key(self, sample: Sample) -> str | None:
        # The stem of the file serves flat folders only: in others two images may share it.
        keys = [sample.name] if "/" in sample.name else [sample.name, sample.image.stem]
        return next((key for key in keys if key in self._points), None)

    def _names(self) -> str:
        return " and ".join(f"'{file}'" for file in self._found)


class ScribbleFiles(MarkFiles):
    """Scribbles in XML files, one for each image, as ScribbleSup publishes them for VOC.

    Layout: `folder/<image>.xml` with `<annotation><size><width>, <height></size>
    <polygon><tag>class</tag><point><X>, <Y></point>...</polygon>...`. Unpack `voc_scribbles.zip` of
    GatedCRFLoss (github.com/LEONOB2014/GatedCRFLoss, folder datasets), 12 031 files, or the
    original `pascal_2012`.

    Source: Lin et al.: ScribbleSup, CVPR 2016.

    Args:
        folder: of the XML files.
        names: tag -> name of a class, besides the classes themselves and ScribbleSup's plane, bike,
            table, plant and monitor for VOC's aeroplane, bicycle, diningtable, pottedplant and
            tvmonitor.
        size: width of the lines in pixels of the training image, after all transforms; 3 in Tree
            Energy Loss.
    """

    NAMES: ClassVar[dict[str, str]] = {
        "plane": "aeroplane",
        "bike": "bicycle",
        "table": "diningtable",
        "plant": "pottedplant",
        "monitor": "tvmonitor",
    }

    def __init__(
        self, folder: Path, names: dict[str, str] | None = None, size: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(size, **kwargs)
        self.folder = folder
        self.names = dict(names or {})
        self._found = Path(folder)

    def prepare(self, dataset: Any, root: Path | None = None) -> str | None:
        """Find the files; a sentence if some images have none."""
        self._found = _find(self.folder, root)
        complaint = _without_file(self, dataset, "scribbles")
        # The first file with a line answers it.
        if complaint is None and not any(self._has_line(s.name) for s in dataset.samples):
            raise GenSegError(
                f"none of the {len(dataset)} files in '{self._found}' holds a line, nothing can be "
                "learned from them: add polygons with points."
            )
        return complaint

    def raw_marks(self, dataset: Any, index: int, shape: Shape) -> tuple[str, list[Any]]:
        """Scribbles of an image, but for those without a point."""
        path = self.label_files(dataset.sample_name(index))[0]
        where = f"scribbles '{path}'"
        size, strokes = _read_scribbles(path)
        if size != shape:
            raise GenSegError(
                f"{where} are for an image of {size[0]}x{size[1]} but it is {shape[0]}x{shape[1]} "
                "(height x width): restore the image of that size."
            )
        return where, [(tag, points) for tag, points in strokes if points]

    def stroke(self, raw: Any, dataset: Any, shape: Shape, where: str) -> Stroke:
        """A scribble."""
        tag, points = raw
        try:
            vertices = np.array(points, np.float64)
        except ValueError as error:
            raise GenSegError(f"{where}: a line of {tag} has no number ({error}).") from error
        return self._class(tag, dataset, where), _inside(vertices, shape, where)

    def label_files(self, name: str) -> list[Path]:
        """The XML file of an image."""
        return [self._found / f"{name}.xml"]

    def _has_line(self, name: str) -> bool:
        try:
            return any(points for _, points in _read_scribbles(self.label_files(name)[0])[1])
        except GenSegError:
            return True  # reported when it is read

    def _class(self, tag: str, dataset: Any, where: str) -> int:
        known = tag in self.names or tag in dataset.file_class_names
        name = self.names.get(tag, tag) if known else self.NAMES.get(tag, tag)
        return _class(name, dataset, None, where)


class SparseMasks(SparseLabels):
    """Masks in which most pixels hold a value for `no label`, such as your own brush strokes.

    No label and 255 (ignored: void, outside the image) are two things: what is not labelled takes
    part in learning, what is ignored does not. Where files use 255 for both, as the rasters of Tree
    Energy Loss do, say `unlabelled: 255`. The files of AGMM use the number of classes, 21 for VOC.

    Args:
        unlabelled: value of the pixels without label.
        folder: of the files; default: the masks of the data set are such files.
        suffix: what follows the name of an image in that of its file.
        ids: value in the files -> class (or 255: ignored); default: as in the masks of the data
            set.
        max_labelled: largest share of labelled pixels, above which a file is refused as dense.
    """

    has_marks = False
    from_files = True

    def __init__(
        self,
        unlabelled: int,
        folder: Path | None = None,
        suffix: str = ".png",
        ids: dict[int, int] | None = None,
        max_labelled: float = 0.2,
    ) -> None:
        check_arguments(
            SparseMasks.__init__, locals(), unlabelled="[0, inf)", max_labelled="(0, 1]"
        )
        super().__init__()
        if ids is not None and ids.get(unlabelled, IGNORE) != IGNORE:
            raise GenSegError(
                f"ids maps {unlabelled} to class {ids[unlabelled]} but unlabelled says that it is "
                "no label: correct one of them."
            )
        self.needs_masks = folder is None
        self.unlabelled, self.max_labelled = unlabelled, max_labelled
        self.folder, self.suffix, self.ids = folder, suffix, ids
        self._found: Path | None = None

    def prepare(self, dataset: Any, root: Path | None = None) -> str | None:
        """Find the files; a sentence if some images have none."""
        ids = dataset.label_values() if self.ids is None else self.ids
        if ids.get(self.unlabelled, IGNORE) != IGNORE:
            raise GenSegError(
                f"unlabelled is {self.unlabelled}, which is class "
                f"'{dataset.class_names[ids[self.unlabelled]]}': give the value that pixels "
                "without label hold, or ids for files with other numbers than the masks."
            )
        if self.folder is None:
            return None
        self._found = _find(self.folder, root)
        return _without_file(self, dataset, "sparse masks")

    def read(self, dataset: Any, index: int, shape: Shape) -> Raster:
        """Sparse labels of an image."""
        sample = dataset.samples[index]
        path = next(iter(self.label_files(sample.name)), sample.mask)
        raw = read_mask(path) if self._found else dataset.read_mask_values(index)
        check_sizes(shape, raw.shape, sample._replace(mask=path))
        blank = raw == self.unlabelled
        table = dataset.table
        if self.ids is not None:
            table = label_table(self.ids, len(dataset.file_class_names))
        table = np.pad(
            table, (0, max(0, self.unlabelled + 1 - len(table))), constant_values=UNLISTED
        )
        table[self.unlabelled] = IGNORE
        labels = map_labels(raw, table, path)
        if self.ids is not None:
            labels = dataset.class_of[labels].astype(np.uint8)
        labelled, ignored = float((labels != IGNORE).mean()), float((raw == IGNORE).mean())
        if not blank.any():
            also = f", but {ignored:.0%} of 255, which means ignored" if ignored else ""
            raise GenSegError(
                f"mask '{path}' holds no pixel of the value {self.unlabelled} (unlabelled){also}: "
                "set unlabelled to the value that its pixels without label hold."
            )
        if labelled > self.max_labelled:
            raise GenSegError(
                f"mask '{path}' labels {labelled:.0%} of its pixels, more than max_labelled "
                f"({self.max_labelled:.0%}): set unlabelled to the value that pixels without label "
                "hold, or raise max_labelled if so many are labelled."
            )
        return Raster(labels, blank)

    def label_files(self, name: str) -> list[Path]:
        """The file of an image, unless it is its mask."""
        return [] if self._found is None else [self._found / f"{name}{self.suffix}"]


def _class(value: Any, dataset: Any, ids: Mapping[int, int] | None, where: str) -> int:
    """Class (or 255) of a value or name in a file of labels; GenSegError if there is none."""
    if isinstance(value, str):
        if value in dataset.file_class_names:
            return int(dataset.class_of[dataset.file_class_names.index(value)])
        known = ", ".join(dataset.file_class_names[:30])
        raise GenSegError(
            f"{where}: there is no class '{value}' (known: {known}), correct or translate the name."
        )
    if ids is not None and value in ids:
        return int(dataset.class_of[ids[value]])
    values = dataset.label_values()
    if ids is None and value in values:
        return int(values[value])
    raise GenSegError(
        f"{where}: cls {value} is no class, correct it or list it in ids (cls: class, or 255)."
    )


def _inside(points: NDArray[np.float64], shape: Shape, where: str) -> NDArray[np.float64]:
    """Points (x, y), up to a pixel outside moved to the border; GenSegError if further."""
    last = np.array([shape[1], shape[0]]) - 1
    far = ~((points >= -1) & (points <= last + 1)).all(1)  # also NaN
    if far.any():
        x, y = points[far][0].tolist()
        raise GenSegError(
            f"{where}: the point x={x:g}, y={y:g} lies outside the image of {shape[0]}x{shape[1]} "
            "(height x width): use pixels of the image as it is, x to the right, y down."
        )
    return np.clip(points, 0, last)


def _read_points(path: Path) -> dict[str, list[dict[str, Any]]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise GenSegError(f"'{path}' holds '{twice}' twice: put what it says into one.")
        return content

    content = read_json(path, "the file of points", object_pairs_hook=unique)
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise GenSegError(
            f"'{path}' must hold a list of points for each image name, "
            '{"image": [{"x": 10, "y": 20, "cls": 3}]}: correct it.'
        )
    return content


def _parse_point(point: Any, where: str) -> tuple[NDArray[np.float64], int | str]:
    """Place (x, y) as 1 x 2, and what it says about the class."""
    try:
        place, value = np.array([[point["x"], point["y"]]], np.float64), point["cls"]
    except (TypeError, KeyError, ValueError, OverflowError):
        place, value = np.empty(0), None
    if place.shape != (1, 2) or isinstance(value, bool) or not isinstance(value, int | str):
        raise GenSegError(f'{where}: {point} is no point, write {{"x": 10, "y": 20, "cls": 3}}.')
    return place, value


def _read_scribbles(path: Path) -> tuple[Shape, list[tuple[str, list[tuple[str, str]]]]]:
    """Height and width, and for each line its tag and vertices (x, y) as they stand there."""
    try:
        tree = ElementTree.parse(path).getroot()
        size = (int(tree.findtext("size/height", "0")), int(tree.findtext("size/width", "0")))
        strokes = []
        for polygon in tree.findall("polygon"):
            tag = polygon.findtext("tag", "").strip()
            points = [(p.findtext("X", ""), p.findtext("Y", "")) for p in polygon.findall("point")]
            strokes.append((tag, points))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise GenSegError(
            f"scribbles '{path}' cannot be read ({error}): restore the file as published, or take "
            "its image out of the data set."
        ) from error
    return size, strokes


def _without_file(sparse: SparseLabels, dataset: Any, what: str) -> str | None:
    paths = [path for sample in dataset.samples for path in sparse.label_files(sample.name)]
    lost = [f"'{path}'" for path in paths if not path.is_file()]
    if not lost:
        return None
    return (
        f"{len(lost)} of {len(dataset)} images have no {what} (expected: {listed(lost, 3)}): add "
        "the files or take the images out."
    )


def _find(path: Path, root: Path | None) -> Path:
    """Path from the working folder or below `root`; MissingFileError if there is none."""
    places = [Path(path)] if root is None else [Path(path), root / path]
    for place in places:
        if place.exists():
            return place
    looked = listed(f"'{place}'" for place in places)
    raise MissingFileError(f"the sparse labels {looked} do not exist: check the path.")
