"""Labelled images read one by one, and data sets that see them with other labels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.data.dataset import SegmentationDataset, check_sizes
from lightning_genseg.data.transforms.crops import Transform
from lightning_genseg.data.transforms.pipeline import apply, compose


class LabelledImages(Protocol):
    """A data set whose images and masks can be read one by one; those of this package can."""

    @property
    def num_classes(self) -> int:
        """C."""

    def __len__(self) -> int:
        """N."""

    def sample_name(self, index: int) -> str:
        """Name of an image."""

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """HxWx3."""

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """HxW classes and 255."""


def read_labelled(
    images: LabelledImages, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read an image HxWx3 and its labels HxW; ValueError if their sizes differ."""
    image, labels = images.read_pixels(index), images.read_mask_labels(index)
    if isinstance(images, SegmentationDataset):
        check_sizes(image.shape, labels.shape, images.samples[index])
    return image, labels


class RelabelledImages(Dataset[dict[str, Any]], ABC):
    """Images of other data sets with other labels; a subclass writes `__len__` and `locate`.

    Args:
        class_names: that the new labels count.
        transform: albumentations transforms.
    """

    def __init__(self, class_names: Sequence[str], transform: Sequence[Transform]) -> None:
        self.class_names = list(class_names)
        self.transform = compose(transform)

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def locate(self, index: int) -> tuple[LabelledImages, int, NDArray[np.uint8]]:
        """Where an image comes from: its data set, its position there, and 256 new labels in place of the old."""

    @property
    def num_classes(self) -> int:
        """Number of the classes of the new labels."""
        return len(self.class_names)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read and transform one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        images, i, table = self.locate(position)
        image, labels = read_labelled(images, i)
        name = self.sample_name(position)
        tensor, mask = apply(self.transform, image, table[labels], seed, name)
        return {"image": tensor, "mask": mask, "name": name}

    def sample_name(self, index: int) -> str:
        """Name of an image."""
        images, i, _ = self.locate(index)
        return images.sample_name(i)

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as HxWx3, without transforms."""
        images, i, _ = self.locate(index)
        return images.read_pixels(i)

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Read the new labels of an image as HxW, without transforms."""
        images, i, table = self.locate(index)
        labels: NDArray[np.uint8] = table[images.read_mask_labels(i)]
        return labels
