"""Sparse labels: a few points, scribbles or blocks an image, drawn from dense masks; from files: `sparse_files`."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.datasets.base import (
    IGNORE,
    MissingFiles,
    check_sizes,
)
from lightning_genseg.transforms import Transform, apply_all, compose

__all__ = [
    "Blocks",
    "Marks",
    "Points",
    "Raster",
    "Scribbles",
    "Shape",
    "SparseDataset",
    "SparseLabels",
]

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
        size: diameter of a point and width of a line in pixels of the training image, after all transforms.

    Raises:
        ValueError: a wrong argument.
    """

    needs_masks = True  # reads the masks of the data set
    has_marks = True  # points and lines, not areas
    from_files = False  # and not drawn from masks

    def __init__(self, size: int = 3) -> None:
        if size < 1:
            raise ValueError(f"the size of sparse labels is {size} but must be at least 1 pixel.")
        self.size = size

    @abstractmethod
    def read(self, dataset: Any, index: int, shape: Shape) -> Marks | Raster:
        """Labels of one image of (height, width) pixels.

        Args:
            dataset: what `SparseDataset` wraps.
            index: of the image.
            shape: of the image.
        """

    def prepare(self, dataset: Any, root: Path | None = None) -> str | None:
        """Open the files, which lie in the working folder or below `root`; a sentence if some images have none."""
        return None

    def labelled_classes(self, dataset: Any) -> set[int] | None:
        """Classes labelled anywhere in a data set; None: not known without reading all of it."""
        return None

    def label_files(self, name: str) -> list[Path]:
        """Files, besides its mask, that the labels of an image come from."""
        return []

    def arguments(self) -> list[Any]:
        """What tells these labels from others, but not in which folder they lie."""
        return [type(self).__qualname__, *((k, _short(v)) for k, v in sorted(vars(self).items()) if k[0] != "_")]  # fmt: skip


class SparseDataset(Dataset[dict[str, Any]]):
    """A data set of which only a few pixels are labelled.

    A sample has, beside `image` and `name`, `mask` int64 HxW, the class where there is a label and 255 everywhere else;
    `unlabelled` bool HxW, true in the image where there is none, false on labels, on what an annotator has marked as
    void, and in padding; `image_classes` bool C, the classes labelled anywhere in the whole image. Void of dense masks,
    from which labels are drawn, is unlabelled: an annotator would not have marked it. Points and scribbles go through
    the transforms as coordinates and are drawn afterwards, so that none is lost to a resize; areas move as masks do.
    Crops that look at the mask (`RandomCropLimitedClass`) see the sparse labels only.

    Args:
        dataset: a data set with `read_pixels`, `read_mask_labels` and `sample_name`, such as `SegmentationDataset`.
        sparse: which of its pixels are labelled.
        transform: albumentations transforms.
        root: where files of labels are looked for that are not in the working folder.

    Raises:
        ValueError: the data set has no such methods, a transform cannot move points, files of labels are wrong.
        FileNotFoundError: files of labels do not exist.
        MissingFiles: images without labels.
    """

    def __init__(
        self,
        dataset: Any,
        sparse: SparseLabels,
        transform: Sequence[Transform] | None = None,
        root: Path | str | None = None,
    ) -> None:
        for method in ("read_pixels", "read_mask_labels", "sample_name"):
            if not hasattr(dataset, method):
                raise ValueError(
                    f"{type(dataset).__name__} has no {method}(index), which sparse labels need: derive it from "
                    "SegmentationDataset, or add that method."
                )
        if sparse.from_files and not hasattr(dataset, "samples"):
            raise ValueError(
                f"{type(sparse).__name__} finds labels by the names of image files, which {type(dataset).__name__} has not: "
                "take Points, Scribbles or Blocks."
            )
        self.dataset = dataset
        self.sparse = sparse
        self.num_classes: int = dataset.num_classes
        self.transform = compose(transform, points=sparse.has_marks)
        self._marks: dict[int, Marks] = {}  # small, and dense masks are large
        complaint = sparse.prepare(dataset, None if root is None else Path(root))
        if complaint:
            raise MissingFiles(complaint, self)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read, transform and label one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        name, image = self.dataset.sample_name(position), self.dataset.read_pixels(position)
        found, raster = self._read(position, image.shape[:2])
        marks = found if isinstance(found, Marks) else None
        # With marks it only tells image from padding.
        blank = np.ones_like(raster.unlabelled) if marks is not None else raster.unlabelled
        result = apply_all(
            self.transform,
            image,
            {"mask": raster.labels, "unlabelled": blank.astype(np.uint8)},
            seed,
            name,
            np.column_stack([marks.vertices, marks.strokes]) if marks is not None else None,
        )
        mask, unlabelled = result["mask"], result["unlabelled"] == 1
        if marks is not None:
            points = result["points"].numpy()  # transforms may leave some out
            moved = Marks(points[:, :2], points[:, 2].astype(np.intp), marks.classes)
            drawn = draw_marks(moved, (mask.shape[0], mask.shape[1]), self.sparse.size)
            mask = torch.from_numpy(drawn.astype(np.int64)).masked_fill(~unlabelled, IGNORE)
            unlabelled &= mask == IGNORE
        classes = torch.zeros(self.num_classes, dtype=torch.bool)
        # Of all marks, also of one that is drawn over here: in a larger image it may be seen.
        held = _classes(raster.labels) if marks is None else marks.classes.astype(np.int64)
        classes[torch.from_numpy(held)] = True
        return {
            "image": result["image"],
            "mask": mask,
            "unlabelled": unlabelled,
            "image_classes": classes,
            "name": name,
        }

    @property
    def samples(self) -> Any:
        """Where the files lie, if the data set consists of files."""
        return self.dataset.samples

    def sample_name(self, index: int) -> str:
        """Name of a sample, unique in its data set."""
        name: str = self.dataset.sample_name(index)
        return name

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as HxWx3, without transforms."""
        pixels: NDArray[np.uint8] = self.dataset.read_pixels(index)
        return pixels

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Sparse labels as HxW classes, 255 elsewhere, without transforms."""
        return self.read_raster(index).labels

    def read_raster(self, index: int) -> Raster:
        """Sparse labels as areas, without transforms."""
        return self._read(index, self.read_pixels(index).shape[:2])[1]

    def read_marks(self, index: int) -> Marks | None:
        """Points and scribbles of an image; None where the labels are areas."""
        found = self._marks.get(index) or self._read(index, self.read_pixels(index).shape[:2])[0]
        return found if isinstance(found, Marks) else None

    def _read(self, index: int, shape: Sequence[int]) -> tuple[Marks | Raster, Raster]:
        size = (shape[0], shape[1])
        found = self._marks.get(index) or self.sparse.read(self.dataset, index, size)
        if isinstance(found, Raster):
            return found, found
        self._marks[index] = found
        labels = draw_marks(found, size, self.sparse.size)
        return found, Raster(labels, labels == IGNORE)


class Points(SparseLabels):
    """Points drawn at random from dense masks: a class uniformly, then a pixel of it uniformly.

    Differs from clicks of people, who aim at the middle of objects and click each of them. The points of an image depend
    on `seed` and its name only, not on epoch, worker or order.

    Args:
        count: number of points.
        per: `class`: that many for each class in the image (all pixels of a smaller one); `image`: that many in all,
            spread over its classes by chance.
        size: diameter in pixels of the training image, after all transforms; above 1 points also label pixels of a
            neighbour where they lie at a border.
        seed: other seeds give other points; apart from the seed of the training.
    """

    def __init__(
        self, count: int = 1, per: Literal["class", "image"] = "class", size: int = 1, seed: int = 0
    ) -> None:
        super().__init__(size)
        if count < 1:
            raise ValueError(f"count is {count} but must be at least 1 point.")
        self.count = count
        self.per = per
        self.seed = _seed(seed)

    def read(self, dataset: Any, index: int, shape: Shape) -> Marks:
        """Draw the points of an image."""
        labels = dense_labels(dataset, index, shape)
        rng = _generator(self.seed, dataset.sample_name(index))
        present = _classes(labels)
        if self.per == "class" or not present.size:
            wanted = np.full(present.size, self.count)
        else:
            wanted = np.bincount(rng.integers(present.size, size=self.count), minlength=present.size)  # fmt: skip
        flat = labels.ravel()
        chosen = []
        for value, number in zip(present, wanted, strict=True):
            positions = np.flatnonzero(flat == value) if number else np.empty(0, np.intp)
            chosen.append(rng.choice(positions, min(number, positions.size), replace=False))
        y, x = np.divmod(np.concatenate([*chosen, np.empty(0, np.intp)]), shape[1])
        classes = np.repeat(present, [len(one) for one in chosen]).astype(np.uint8)
        return Marks(np.stack([x, y], 1).astype(np.float64), np.arange(len(x)), classes)


class Scribbles(SparseLabels):
    """Scribbles drawn at random inside the regions of dense masks, about as far as the region reaches.

    Every connected region of `min_area` or more gets one, and the largest of each class. A scribble is a random walk that
    prefers to go straight on and keeps half its width away from other labels where the region is wide enough; people draw
    along the middle of objects. Depends on `seed` and the name of the image only.

    Args:
        size: width in pixels of the training image, after all transforms.
        min_area: share of the image that a region must cover to get a scribble of its own.
        seed: other seeds give other scribbles; apart from the seed of the training.
    """

    def __init__(self, size: int = 3, min_area: float = 0.002, seed: int = 0) -> None:
        super().__init__(size)
        if not 0 <= min_area <= 1:
            raise ValueError(f"min_area is {min_area} but must be a share of the image, 0 to 1.")
        self.min_area = min_area
        self.seed = _seed(seed)

    def read(self, dataset: Any, index: int, shape: Shape) -> Marks:
        """Draw the scribbles of an image."""
        labels = dense_labels(dataset, index, shape)
        rng = _generator(self.seed, dataset.sample_name(index))
        strokes = []
        for value in _classes(labels).tolist():
            count, parts, boxes, _ = cv2.connectedComponentsWithStats(
                (labels == value).view(np.uint8)
            )
            areas = boxes[1:count, cv2.CC_STAT_AREA]
            least = min(self.min_area * labels.size, areas.max())
            for part in np.flatnonzero(areas >= least) + 1:
                left, top, width, height = boxes[part, :4]
                region = parts[top : top + height, left : left + width] == part
                walk = _scribble(rng, region, self.size)
                strokes.append((value, walk + np.array([left, top])))
        return Marks.of_strokes(strokes)


class Blocks(SparseLabels):
    """Whole blocks of dense masks: a share of the cells of a grid, drawn at random for each image.

    The published block labels of Cityscapes and ADE20K (Tree Energy Loss, CVPR 2022) hold 10, 20 or 50 % of the blocks.
    Depends on `seed` and the name of the image only.

    Args:
        share: of the blocks that are labelled, at least one.
        grid: blocks along each side.
        seed: other seeds give other blocks; apart from the seed of the training.
    """

    has_marks = False

    def __init__(self, share: float = 0.1, grid: int = 10, seed: int = 0) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise ValueError(f"share is {share} but must be above 0 and at most 1.")
        if grid < 1:
            raise ValueError(f"grid is {grid} but must be at least 1 block along each side.")
        self.share = share
        self.grid = grid
        self.seed = _seed(seed)

    def read(self, dataset: Any, index: int, shape: Shape) -> Raster:
        """Choose the blocks of an image."""
        labels = dense_labels(dataset, index, shape)
        rng = _generator(self.seed, dataset.sample_name(index))
        cells = self.grid**2
        chosen = np.zeros(cells, np.bool_)
        chosen[rng.choice(cells, max(1, round(self.share * cells)), replace=False)] = True
        rows, columns = (np.arange(side) * self.grid // side for side in shape)
        labels = np.where(chosen[rows[:, None] * self.grid + columns], labels, np.uint8(IGNORE))
        return Raster(labels, labels == IGNORE)


def draw_marks(marks: Marks, shape: Shape, size: int) -> NDArray[np.uint8]:
    """Draw points as discs and scribbles as lines, `size` pixels wide, later over earlier; 255 elsewhere."""
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
    """Classes of a dense mask, HxW; ValueError if it is not of the size of its image."""
    labels: NDArray[np.uint8] = dataset.read_mask_labels(index)
    if labels.shape != shape:
        check_sizes(shape, labels.shape, dataset.samples[index])
    return labels


def _scribble(
    rng: np.random.Generator, region: NDArray[np.bool_], size: int
) -> NDArray[np.float64]:
    """Vertices (x, y) of a walk in a region, both ways from a point in it, about as long as the region is wide."""
    inner = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    # Half a width away from others, or as far as there is room.
    free = inner >= min((size + 1) / 2, float(inner.max()))
    y, x = divmod(int(rng.choice(np.flatnonzero(free))), region.shape[1])
    step = max(2.0, 0.15 * math.sqrt(region.sum()))
    first = rng.uniform(0, 2 * math.pi)
    halves = []
    for direction in (first, first + math.pi):
        place, walk = np.array([x, y], np.float64), []
        for _ in range(6):
            # From straight on to ever sharper turns, until one stays inside.
            for turn in rng.normal(0, 1, 12) * np.linspace(0.2, 1.5, 12):
                target = place + step * np.array(
                    [math.cos(direction + turn), math.sin(direction + turn)]
                )
                if _sees(free, place, target):
                    break
            else:
                break
            place, direction = target, direction + turn
            walk.append(target)
        halves.append(walk)
    return np.array([*halves[0][::-1], np.array([x, y], np.float64), *halves[1]])


def _sees(free: NDArray[np.bool_], start: NDArray[np.float64], end: NDArray[np.float64]) -> bool:
    """Whether the line between two points (x, y) stays in the free part."""
    count = int(np.abs(end - start).max()) + 2
    x, y = np.floor(np.linspace(start, end, count) + 0.5).astype(int).T
    height, width = free.shape
    if min(x.min(), y.min()) < 0 or x.max() >= width or y.max() >= height:
        return False
    return bool(free[y, x].all())


def _classes(labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Classes that occur, ascending."""
    return np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:IGNORE])


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def _seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"the seed of sparse labels is {seed} but must not be negative.")
    return seed


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value.parts[-3:] if isinstance(value, Path) else value
