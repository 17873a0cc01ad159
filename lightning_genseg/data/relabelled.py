"""Labelled images read one by one, and data sets that see them with other labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.data import transforms
from lightning_genseg.data.dataset import SegmentationDataset, check_sizes
from lightning_genseg.errors import GenSegError


class Labelled(Protocol):
    """A data set whose labels can be read one by one; those of this package can."""

    @property
    def num_classes(self) -> int:
        """C."""

    def __len__(self) -> int:
        """N."""

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """HxW classes and 255."""


class LabelledImages(Labelled, Protocol):
    """A data set whose images and labels can be read one by one; those of this package can."""

    def sample_name(self, index: int) -> str:
        """Name of an image."""

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """HxWx3."""


def check_readable(
    dataset: Any,
    purpose: str,
    methods: Sequence[str] = ("sample_name", "read_pixels", "read_mask_labels"),
) -> LabelledImages:
    """Return a data set whose images can be read one by one; GenSegError if they cannot."""
    for method in methods:
        if not hasattr(dataset, method):
            raise GenSegError(
                f"{type(dataset).__name__} has no {method}(index), by which {purpose}: derive it "
                "from SegmentationDataset, or add that method."
            )
    images: LabelledImages = dataset
    return images


def read_labelled(
    images: LabelledImages, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read an image HxWx3 and its labels HxW; GenSegError if their sizes differ."""
    image, labels = images.read_pixels(index), images.read_mask_labels(index)
    if isinstance(images, SegmentationDataset):
        check_sizes(image.shape, labels.shape, images.samples[index])
    return image, labels


class RelabelledImages(Dataset[dict[str, Any]]):
    """Images of other data sets with other labels; a sample is `image`, `mask` and `name`.

    Args:
        parts: data sets by name; names of images begin with it, unless it is empty.
        tables: for each, 256 labels in place of its own.
        class_names: that the new labels count.
        transform: albumentations transforms.
    """

    def __init__(
        self,
        parts: Mapping[str, LabelledImages],
        tables: Mapping[str, NDArray[np.uint8]],
        class_names: Sequence[str],
        transform: Sequence[transforms.Transform] = (),
    ) -> None:
        self.parts, self.tables = dict(parts), dict(tables)
        self.class_names = list(class_names)
        self.transform = transforms.compose(transform)
        self._places = [(key, i) for key, part in self.parts.items() for i in range(len(part))]

    def __len__(self) -> int:
        """Number of images of all parts."""
        return len(self._places)

    @property
    def num_classes(self) -> int:
        """Number of the classes of the new labels."""
        return len(self.class_names)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read and transform one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        key, i = self._places[position]
        image, labels = read_labelled(self.parts[key], i)
        name, masks = self.sample_name(position), {"mask": self.tables[key][labels]}
        return {**transforms.apply(self.transform, image, masks, seed, name), "name": name}

    def sample_name(self, index: int) -> str:
        """Name of an image, below that of its data set."""
        key, i = self._places[index]
        name = self.parts[key].sample_name(i)
        return f"{key}/{name}" if key else name

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as HxWx3, without transforms."""
        key, i = self._places[index]
        return self.parts[key].read_pixels(i)

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Read the new labels of an image as HxW, without transforms."""
        key, i = self._places[index]
        labels: NDArray[np.uint8] = self.tables[key][self.parts[key].read_mask_labels(i)]
        return labels
