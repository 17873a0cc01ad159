"""What sparse labels are."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.dataset import Sample, check_sizes
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError

Shape = tuple[int, int]


class Marks(NamedTuple):
    """Points and scribbles as an annotator sets them; a stroke of one vertex is a point."""

    vertices: NDArray[np.float64]  # V x 2, x and y in pixels, 0 = middle of the first pixel
    strokes: NDArray[np.intp]  # V, ascending: which stroke a vertex belongs to
    classes: NDArray[np.uint8]  # S, of the strokes

    @classmethod
    def of_strokes(cls, strokes: Iterable[tuple[int, NDArray[np.float64]]]) -> "Marks":
        """Put strokes (class, vertices) together; those of class 255 are left out."""
        kept = [(value, vertices) for value, vertices in strokes if value != IGNORE]
        return cls(
            np.concatenate([np.empty((0, 2)), *(vertices for _, vertices in kept)]),
            np.repeat(np.arange(len(kept)), [len(vertices) for _, vertices in kept]),
            np.array([value for value, _ in kept], np.uint8),
        )


class Raster(NamedTuple):
    """Labels that are areas, both H x W."""

    labels: NDArray[np.uint8]  # classes, 255 elsewhere
    unlabelled: NDArray[np.bool_]  # where an annotator has left the image blank


class SparseLabels(ABC):
    """Which pixels of an image are labelled; `data.sparse` of every datamodule that trains.

    Args:
        size: diameter of a point and width of a line in pixels of the training image, after all
            transforms.
        zoom: draw them on the image as it is instead, so that they are zoomed with it and may
            vanish when it shrinks, as in AGMM's code and Tree Energy Loss.
    """

    needs_masks = True  # reads the masks of the data set
    has_marks = True  # points and lines, not areas
    from_files = False  # and not drawn from masks
    leave_out = False  # points and scribbles that are wrong, in place of an error

    def __init__(self, size: int = 3, zoom: bool = False) -> None:
        check_arguments(SparseLabels.__init__, locals(), size="[1, inf)")
        self.size = size
        self.zoom = zoom

    @abstractmethod
    def read(self, dataset: Any, index: int, shape: Shape) -> Marks | Raster:
        """Labels of one image, of this height and width, of what `SparseDataset` wraps."""

    def prepare(self, dataset: Any, root: Path | None = None) -> str | None:
        """Open the files, in the working folder or below `root`; what is wrong if some are lost."""
        return None

    def labelled_classes(self, dataset: Any) -> set[int] | None:
        """Classes labelled anywhere in a data set; None: not known without reading all of it."""
        return None

    def label_files(self, name: str) -> list[Path]:
        """Files, besides its mask, that the labels of an image come from."""
        return []

    def mark_problems(self, dataset: Any, index: int, shape: Shape) -> list[GenSegError]:
        """What is wrong with each point or scribble of an image, where they come from files."""
        return []

    def arguments(self) -> list[Any]:
        """What tells these labels from others, but not in which folder they lie."""
        own = sorted(item for item in vars(self).items() if item[0][0] != "_")
        return [type(self).__qualname__, *((key, _short(value)) for key, value in own)]


def draw_marks(marks: Marks, shape: Shape, size: int) -> NDArray[np.uint8]:
    """Draw points as discs and scribbles as lines, `size` wide, later over earlier, on 255."""
    canvas = np.full(shape, IGNORE, np.uint8)
    if not len(marks.vertices):
        return canvas
    # OpenCV counts in 32 bits; a line that far outside looks the same when it is cut short.
    pixels = np.floor(np.clip(marks.vertices, -(2**20), 2**20) + 0.5).astype(np.int32)
    starts = np.flatnonzero(np.diff(marks.strokes, prepend=-1))
    side = np.arange(size) - (size - 1) // 2
    x, y = np.meshgrid(side, side)
    middle = (1 - size % 2) / 2  # of an even number of pixels
    disc = np.stack([x, y], 2)[np.hypot(x - middle, y - middle) <= size / 2]
    classes = marks.classes[marks.strokes[starts]].tolist()
    for value, stroke in zip(classes, np.split(pixels, starts[1:]), strict=True):
        if len(stroke) > 1:
            cv2.polylines(canvas, [stroke], False, value, size)
            continue
        x, y = (stroke + disc).T
        inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])
        canvas[y[inside], x[inside]] = value
    return canvas


def dense_labels(dataset: Any, index: int, shape: Shape) -> NDArray[np.uint8]:
    """Classes of a dense mask, HxW; GenSegError if it is not of the size of its image."""
    labels: NDArray[np.uint8] = dataset.read_mask_labels(index)
    if labels.shape != shape:
        name = Path(dataset.sample_name(index))  # all that there is of data without files
        samples = getattr(dataset, "samples", {index: Sample(str(name), name, name)})
        check_sizes(shape, labels.shape, samples[index])
    return labels


def present_classes(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Classes that occur, ascending."""
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORE])


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value.parts[-3:] if isinstance(value, Path) else value
