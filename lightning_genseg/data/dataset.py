"""What every data set shares: samples of an image and its masks; folders of images to predict."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.data import transforms
from lightning_genseg.data.decoded import DecodedFiles
from lightning_genseg.data.images import (
    find_images,
    find_unsupported,
    read_image,
    read_mask,
    unique_names,
)
from lightning_genseg.data.labels import (
    IGNORE,
    UNLISTED,
    Color,
    anomaly_table,
    check_palette,
    known_classes,
    label_table,
    map_labels,
)
from lightning_genseg.errors import GenSegError

Batch = dict[str, Any]
_ANOMALIES = (
    "an anomaly mask holds 1 (anomalous), 0 (known) and 255 (not evaluated): correct it, or list "
    "its values in anomaly_ids"
)


class Sample(NamedTuple):
    """Where one sample lies.

    Args:
        name: unique in its data set.
        image: file of the image.
        mask: file of the mask.
        anomaly: file of the anomaly mask, where there is one of its own.
    """

    name: str
    image: Path
    mask: Path
    anomaly: Path | None = None


class MissingFiles(GenSegError):
    """Files that a data set consists of do not exist; raise it at the end of its constructor.

    Args:
        message: one sentence.
        dataset: complete, the missing files in its `samples` as well, so that `genseg check` can
            read all the others.
    """

    def __init__(self, message: str, dataset: Any) -> None:
        super().__init__(message)
        self.dataset = dataset


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with masks: `image` float32 3xHxW in [0, 1], `mask` int64 HxW (255 = ignore), `name`.

    An index is an int, or a pair (int, seed): the seed decides the augmentation, so that it does
    not depend on the worker that happens to read the sample.

    Masks of colours: a subclass sets the class variable `colors`; the values of its masks, for
    `ids`, are positions there. Another format: it overrides `decode_mask`.

    With `anomaly_ids`, or after `hold_out`, a sample also has `anomaly` int64 HxW: 1 anomalous, 0
    known, 255 not evaluated. `mask` is 255 where it is 1.

    Args:
        samples: where the files lie.
        class_names: one per class, at most 255.
        palette: one RGB colour per class; default: the colours of PASCAL VOC.
        ids: value in the mask files -> class (or 255); None: the files hold classes. 255 is
            ignored unless it is listed.
        transform: albumentations transforms.
        anomaly_ids: value in the anomaly files, or without these in the mask files -> 1, 0 or 255.

    Raises:
        GenSegError: no sample, wrong lengths or a wrong table; on reading: an unreadable file,
            sizes that differ, a label that is not in the table.
        MissingFileError: on reading: a file does not exist.
    """

    colors: Sequence[Color] | None = None
    decoded: DecodedFiles | None = None  # what has been decoded before, where that is kept

    def __init__(
        self,
        samples: Sequence[Sample],
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        ids: Mapping[int, int] | None = None,
        transform: Sequence[transforms.Transform] | None = None,
        anomaly_ids: Mapping[int, int] | None = None,
    ) -> None:
        if not samples:
            raise GenSegError("the data set has no samples: give it at least one image.")
        self.samples = list(samples)
        self.class_names = list(class_names)
        # Before `hold_out`: names, and what has become of the classes.
        self.file_class_names = list(class_names)
        self.class_of = np.arange(IGNORE + 1)
        self.palette = check_palette(palette, len(self.class_names))
        self.transform = transforms.compose(transform)
        self.table = label_table(ids, len(self.class_names))  # of the mask files
        self._anomaly_table = None if anomaly_ids is None else anomaly_table(anomaly_ids)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def sample_name(self, index: int) -> str:
        """Name of a sample, without reading it."""
        return self.samples[index].name

    def label_values(self) -> dict[int, int]:
        """Value in the mask files -> class or 255, all that may occur."""
        known = np.flatnonzero(self.table != UNLISTED)
        return dict(zip(known.tolist(), self.table[known].tolist(), strict=True))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read and transform one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        sample = self.samples[position]
        image, (labels, anomaly) = self.read_pixels(position), self.read_labels(position)
        check_sizes(image.shape, labels.shape, sample)
        masks = {"mask": labels} if anomaly is None else {"mask": labels, "anomaly": anomaly}
        return {
            **transforms.apply(self.transform, image, masks, seed, sample.name),
            "name": sample.name,
        }

    def keep(self, positions: Sequence[int]) -> None:
        """Leave out all other samples."""
        self.samples = [self.samples[position] for position in positions]

    def hold_out(self, unknown: Sequence[str]) -> None:
        """Make classes unknown: 255 in `mask`, 1 in `anomaly`; the others are numbered anew.

        Raises:
            GenSegError: a name is no class, none remains, or the data have anomalies already.
        """
        if self._anomaly_table is not None:
            raise GenSegError(
                f"{type(self).__name__} has anomalies already: leave unknown_classes out, or call "
                "hold_out once."
            )
        known = known_classes(self.class_names, unknown)
        classes, anomalies = np.full((2, UNLISTED + 1), IGNORE, np.uint16)
        classes[UNLISTED] = anomalies[UNLISTED] = UNLISTED
        anomalies[: self.num_classes] = 1
        anomalies[known], classes[known] = 0, range(len(known))
        self._anomaly_table, self.table = anomalies[self.table], classes[self.table]
        self.class_of = classes[self.class_of].astype(np.intp)
        self.class_names = [self.class_names[c] for c in known]
        self.palette = [self.palette[c] for c in known]

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as HxWx3, without transforms."""
        path = self.samples[index].image
        return self._decode(path, lambda: read_image(path), "image")

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Read the labels of an image as HxW classes (255 = ignore), without transforms."""
        return self.read_labels(index)[0]

    def read_labels(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Read classes (255 = ignore) and, where there are any, anomalies (1, 0, 255), both HxW."""
        sample, values = self.samples[index], self.read_mask_values(index)
        expected = None if (self.table < IGNORE).any() else _ANOMALIES  # without classes
        labels = map_labels(values, self.table, sample.mask, expected)
        if self._anomaly_table is None:
            return labels, None
        if sample.anomaly is None:
            return labels, map_labels(values, self._anomaly_table, sample.mask, expected)
        raw = read_mask(sample.anomaly)
        anomaly = map_labels(raw, self._anomaly_table, sample.anomaly, _ANOMALIES)
        if anomaly.shape != labels.shape:
            raise GenSegError(
                f"anomaly mask '{sample.anomaly}' is {anomaly.shape[0]}x{anomaly.shape[1]} but "
                f"mask '{sample.mask}' is {labels.shape[0]}x{labels.shape[1]} (height x width): "
                "give both the size of the image."
            )
        return np.where(anomaly == 1, np.uint8(IGNORE), labels), anomaly

    def read_mask_values(self, index: int) -> NDArray[np.integer[Any]]:
        """What the file of a mask holds, HxW: read, or kept from before (`cache` memmap)."""
        path = self.samples[index].mask
        read_with = ("mask", self.colors, *self.mask_decoder())
        return self._decode(path, lambda: self.decode_mask(path), read_with)

    def decode_mask(self, path: Path) -> NDArray[np.integer[Any]]:
        """Read the file of a mask, HxW; override it for other formats."""
        return read_mask(path, self.colors)

    def mask_decoder(self) -> list[str]:
        """Source of an overridden `decode_mask`: with another, what was kept of masks is stale."""
        if type(self).decode_mask is SegmentationDataset.decode_mask:
            return []
        try:
            return [inspect.getsource(type(self).decode_mask)]
        except OSError:  # typed into an interpreter
            return [type(self).decode_mask.__qualname__]

    def _decode(
        self, path: Path, decode: Callable[[], NDArray[Any]], options: object
    ) -> NDArray[Any]:
        return decode() if self.decoded is None else self.decoded.read(path, decode, options)


class ImageFolder(Dataset[dict[str, Any]]):
    """Images to predict, a folder of them or one file: `image`, `name`, `path` (str).

    `name` is the path relative to `root` without its suffix; where two files share it (a.jpg,
    a.png) the suffix stays: `a_jpg`, `a_png`. `PredictionWriter` sets `as_bytes`, by which `image`
    is uint8, and `skips_unreadable`: a sample then has an `error` in place of `image`.

    Args:
        root: folder, searched recursively, or an image file.
        transform: albumentations transforms.

    Raises:
        MissingFileError: `root` does not exist.
        GenSegError: no image in it; on reading: an unreadable file.
    """

    def __init__(
        self, root: Path | str, transform: Sequence[transforms.Transform] | None = None
    ) -> None:
        root = Path(root)
        paths = [root] if root.is_file() else find_images(root)
        base = root.parent if root.is_file() else root
        self.transform, self.root = transforms.compose(transform), base
        self.samples = list(zip(unique_names(paths, base), paths, strict=True))
        self.as_bytes = self.skips_unreadable = False
        self.unreadable: list[dict[str, str]] = []  # name, path and error, as loaders meet them
        self.unsupported = [] if root.is_file() else find_unsupported(root)

    def skip(self, names: set[str]) -> None:
        """Leave out the images of these names, for instance those already predicted."""
        self.samples = [sample for sample in self.samples if sample[0] not in names]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read and transform one image."""
        name, path = self.samples[index]
        sample = {"name": name, "path": str(path)}
        try:
            pixels = read_image(path)
            result = transforms.apply(
                self.transform, pixels, {}, index, name, as_bytes=self.as_bytes
            )
        except GenSegError as error:
            if not self.skips_unreadable:
                raise
            return {**sample, "error": str(error)}
        return {"image": result["image"], **sample}


def check_sizes(image: Sequence[int], mask: Sequence[int], sample: Sample) -> None:
    """Compare the shapes HxWx3 and HxW; a GenSegError names both files if they differ."""
    if image[0] != mask[0] or image[1] != mask[1]:
        raise GenSegError(
            f"mask '{sample.mask}' is {mask[0]}x{mask[1]} but image '{sample.image}' is "
            f"{image[0]}x{image[1]} (height x width, after EXIF rotation): give both the same size."
        )
