"""A data set with sparse labels in place of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.data import transforms
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.relabelled import check_readable
from lightning_genseg.data.sparse.labels import (
    Marks,
    Raster,
    SparseLabels,
    draw_marks,
    present_classes,
)
from lightning_genseg.errors import GenSegError


class SparseDataset(Dataset[dict[str, Any]]):
    """A data set of which only a few pixels are labelled.

    A sample has, beside `image` and `name`:

    - `mask` int64 HxW, the class where there is a label and 255 everywhere else;
    - `unlabelled` bool HxW, true in the image where there is none, false on labels, on what an
      annotator has marked as void, and in padding;
    - `image_classes` bool C, the classes labelled anywhere in the whole image.

    Void of dense masks, from which labels are drawn, is unlabelled: an annotator would not have
    marked it. Points and scribbles go through the transforms as coordinates and are drawn
    afterwards, so that none is lost to a resize, unless `sparse.zoom` is set; areas move as masks
    do. Crops that look at the mask (`RandomCropLimitedClass`) see the sparse labels only.

    Args:
        dataset: a data set with `read_pixels`, `read_mask_labels` and `sample_name`, such as
            `SegmentationDataset`.
        sparse: which of its pixels are labelled.
        transform: albumentations transforms.
        root: where files of labels are looked for that are not in the working folder.

    Raises:
        GenSegError: the data set has no such methods, a transform cannot move points, files of
            labels are wrong.
        MissingFileError: files of labels do not exist.
        MissingFiles: images without labels.
    """

    def __init__(
        self,
        dataset: Any,
        sparse: SparseLabels,
        transform: Sequence[transforms.Transform] | None = None,
        root: Path | str | None = None,
    ) -> None:
        check_readable(dataset, "sparse labels are placed")
        if sparse.from_files and not hasattr(dataset, "samples"):
            raise GenSegError(
                f"{type(sparse).__name__} finds labels by the names of image files, which "
                f"{type(dataset).__name__} has not: take Points, Scribbles or Blocks."
            )
        self.dataset = dataset
        self.sparse = copy(sparse)  # which may serve other data, with other files
        self.num_classes: int = dataset.num_classes
        self.transform = transforms.compose(transform, points=sparse.has_marks and not sparse.zoom)
        self._marks: dict[int, Marks] = {}  # small, and dense masks are large
        complaint = self.sparse.prepare(dataset, None if root is None else Path(root))
        if complaint:
            raise MissingFiles(complaint, self)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read, transform and label one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        name, image = self.dataset.sample_name(position), self.dataset.read_pixels(position)
        marks, raster = self._read(position, image.shape)
        if self.sparse.zoom:
            marks = None
        # With marks it only tells image from padding.
        blank = np.ones_like(raster.unlabelled) if marks is not None else raster.unlabelled
        result = transforms.apply(
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
        held = present_classes(raster.labels) if marks is None else marks.classes.astype(np.int64)
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
        return self._read(index, self.read_pixels(index).shape)[1]

    def read_marks(self, index: int) -> Marks | None:
        """Points and scribbles of an image; None where the labels are areas."""
        return self._marks.get(index) or self._read(index, self.read_pixels(index).shape)[0]

    def mark_problems(self, index: int, shape: Sequence[int] | None = None) -> list[GenSegError]:
        """What is wrong with each point or scribble of an image, of this shape."""
        height, width = (self.read_pixels(index).shape if shape is None else shape)[:2]
        return self.sparse.mark_problems(self.dataset, index, (height, width))

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out all other samples."""
        self.dataset.keep(positions)
        self._marks.clear()

    def _read(self, index: int, shape: Sequence[int]) -> tuple[Marks | None, Raster]:
        size = (shape[0], shape[1])
        found = self._marks.get(index) or self.sparse.read(self.dataset, index, size)
        if isinstance(found, Raster):
            return None, found
        self._marks[index] = found
        labels = draw_marks(found, size, self.sparse.size)
        return found, Raster(labels, labels == IGNORE)
