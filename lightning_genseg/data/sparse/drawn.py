"""Points, scribbles and blocks, drawn from dense masks."""

import hashlib
import math
from abc import abstractmethod
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.sparse.labels import (
    Marks,
    Raster,
    Shape,
    SparseLabels,
    dense_labels,
    present_classes,
)


class DrawnLabels(SparseLabels):
    """Labels drawn from dense masks; those of an image depend on `seed` and its name only.

    Args:
        size: diameter of a point and width of a line in pixels of the training image, after all
            transforms.
        seed: other seeds give other labels; apart from the seed of the training.
    """

    def __init__(self, size: int = 3, seed: int = 0, **kwargs: Any) -> None:
        check_arguments(DrawnLabels.__init__, locals(), seed="[0, inf)")
        super().__init__(size, **kwargs)
        self.seed = seed

    def read(self, dataset: Any, index: int, shape: Shape) -> Marks | Raster:
        """Draw the labels of an image."""
        digest = hashlib.sha256(dataset.sample_name(index).encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big")])
        return self.draw(dense_labels(dataset, index, shape), rng)

    @abstractmethod
    def draw(self, labels: NDArray[np.uint8], rng: np.random.Generator) -> Marks | Raster:
        """Draw from the labels H x W of an image (255 = void)."""


class Points(DrawnLabels):
    """Points drawn at random from dense masks: a class uniformly, then a pixel of it uniformly.

    Differs from clicks of people, who aim at the middle of objects and click each of them.

    Args:
        count: number of points.
        per: `class`: that many for each class in the image (all pixels of a smaller one); `image`:
            that many in all, spread over its classes by chance.
        size: diameter in pixels of the training image, after all transforms; above 1 points also
            label pixels of a neighbour where they lie at a border.
    """

    def __init__(
        self, count: int = 1, per: Literal["class", "image"] = "class", size: int = 1, **kwargs: Any
    ) -> None:
        check_arguments(Points.__init__, locals(), count="[1, inf)")
        super().__init__(size, **kwargs)
        self.count = count
        self.per = per

    def draw(self, labels: NDArray[np.uint8], rng: np.random.Generator) -> Marks:
        """Draw the points of an image."""
        present = present_classes(labels)
        wanted = np.full(present.size, self.count)
        if self.per == "image" and present.size:
            drawn = rng.integers(present.size, size=self.count)
            wanted = np.bincount(drawn, minlength=present.size)
        flat = labels.ravel()
        chosen = []
        for value, number in zip(present, wanted, strict=True):
            positions = np.flatnonzero(flat == value) if number else np.empty(0, np.intp)
            chosen.append(rng.choice(positions, min(number, positions.size), replace=False))
        y, x = np.divmod(np.concatenate([*chosen, np.empty(0, np.intp)]), labels.shape[1])
        classes = np.repeat(present, [len(one) for one in chosen]).astype(np.uint8)
        return Marks(np.stack([x, y], 1).astype(np.float64), np.arange(len(x)), classes)


class Scribbles(DrawnLabels):
    """Scribbles drawn at random in the regions of dense masks, about as far as a region reaches.

    Every connected region of `min_area` or more gets one, and the largest of each class. A scribble
    is a random walk that prefers to go straight on and keeps half its width away from other labels
    where the region is wide enough; people draw along the middle of objects.

    Args:
        size: width in pixels of the training image, after all transforms.
        min_area: share of the image that a region must cover to get a scribble of its own.
    """

    def __init__(self, size: int = 3, min_area: float = 0.002, **kwargs: Any) -> None:
        check_arguments(Scribbles.__init__, locals(), min_area="[0, 1]")
        super().__init__(size, **kwargs)
        self.min_area = min_area

    def draw(self, labels: NDArray[np.uint8], rng: np.random.Generator) -> Marks:
        """Draw the scribbles of an image."""
        strokes = []
        for value in present_classes(labels).tolist():
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


class Blocks(DrawnLabels):
    """Whole blocks of dense masks: a share of the cells of a grid, drawn at random for each image.

    The published block labels of Cityscapes and ADE20K (Tree Energy Loss, CVPR 2022) hold 10, 20 or
    50 % of the blocks.

    Args:
        share: of the blocks that are labelled, at least one.
        grid: blocks along each side.
    """

    has_marks = False

    def __init__(self, share: float = 0.1, grid: int = 10, **kwargs: Any) -> None:
        check_arguments(Blocks.__init__, locals(), share="(0, 1]", grid="[1, inf)")
        super().__init__(size=3, **kwargs)
        self.share = share
        self.grid = grid

    def draw(self, labels: NDArray[np.uint8], rng: np.random.Generator) -> Raster:
        """Choose the blocks of an image."""
        cells = self.grid**2
        chosen = np.zeros(cells, np.bool_)
        chosen[rng.choice(cells, max(1, round(self.share * cells)), replace=False)] = True
        rows, columns = (np.arange(side) * self.grid // side for side in labels.shape)
        labels = np.where(chosen[rows[:, None] * self.grid + columns], labels, np.uint8(IGNORE))
        return Raster(labels, labels == IGNORE)


def _scribble(
    rng: np.random.Generator, region: NDArray[np.bool_], size: int
) -> NDArray[np.float64]:
    """Vertices (x, y) of a walk both ways from a point in a region, about as long as it is wide."""
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
                angle = direction + turn
                target = place + step * np.array([math.cos(angle), math.sin(angle)])
                if _sees(free, place, target):
                    break
            else:
                break
            place, direction = target, angle
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
