"""Every sample of a data set read once: what it consists of, and what is wrong with it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.data import transforms
from lightning_genseg.data.class_index import count_labels
from lightning_genseg.data.dataset import Sample, check_sizes
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.data.sparse.labels import Raster
from lightning_genseg.errors import GenSegError


class Problem(NamedTuple):
    """What is wrong with a sample."""

    name: str
    file: str | None
    text: str


class Found(NamedTuple):
    """What one sample consists of; None where it could not be read."""

    name: str
    size: tuple[int, int] | None
    counts: NDArray[np.int64] | None
    pixels: int
    anomaly: NDArray[np.int64] | None  # pixels that are known, anomalous, not evaluated
    unlabelled: int | None  # pixels, where labels are sparse
    marks: int | None  # points or scribbles
    problems: list[Problem]


class _Samples(Dataset[Found]):
    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset = dataset
        self.split = split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Found:
        sample: Sample | None = None
        if hasattr(self.dataset, "samples"):
            sample = self.dataset.samples[index]
        name = sample.name if sample else f"{self.split} {index}"
        problems: list[Problem] = []

        def complain(error: Exception, *files: Path | None) -> None:
            known = isinstance(error, GenSegError)
            named = [file for file in files if file is not None and f"'{file}'" in str(error)]
            file = next(iter([*named, *files]))
            text = str(error) if known else f"'{file}': {type(error).__name__}: {error}"
            problems.append(Problem(name, str(file) if file else None, text))

        image = labels = anomaly = unlabelled = marks = None
        try:
            image = self.dataset.read_pixels(index)
        except Exception as error:  # the other files are still to be read
            complain(error, sample.image if sample else None)
        try:
            labels, anomaly, raster = read_labels(self.dataset, index)
            if raster is not None:
                unlabelled = int(raster.unlabelled.sum())
                found = self.dataset.read_marks(index)
                marks = None if found is None else len(found.classes)
        except Exception as error:
            marks_of = getattr(self.dataset, "mark_problems", None)
            found_bad: list[GenSegError] = []
            with suppress(GenSegError):  # no single one, which `error` tells
                found_bad = marks_of(index) if marks_of and image is not None else []
            for bad in found_bad:  # all of them
                complain(bad, sample.image if sample else None)
            if not found_bad:
                complain(error, *((sample.mask, sample.anomaly) if sample else (None,)))
        if image is not None and labels is not None and sample is not None:
            try:
                check_sizes(image.shape, labels.shape, sample)
            except GenSegError as error:
                problems.append(Problem(name, str(sample.mask), str(error)))
        return Found(
            name,
            None if image is None else (image.shape[0], image.shape[1]),
            None if labels is None else count_labels(labels, self.dataset.num_classes),
            0 if labels is None else labels.size,
            None if anomaly is None else np.bincount(anomaly.flat, minlength=256)[[0, 1, IGNORE]],
            unlabelled,
            marks,
            problems,
        )


def read_labels(
    dataset: Any, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, Raster | None]:
    """Labels of a sample, its anomalies and its sparse labels, without transforms."""
    if isinstance(dataset, SparseDataset):
        raster = dataset.read_raster(index)
        return raster.labels, None, raster
    if hasattr(dataset, "read_labels"):
        return *dataset.read_labels(index), None
    return dataset.read_mask_labels(index), None, None


def examine(dataset: Any, split: str, num_workers: int) -> list[Found]:
    """Read every sample of a data set that is read one by one, also after one that is broken.

    Raises:
        GenSegError: it has not the methods for that.
    """
    if not hasattr(dataset, "read_pixels"):
        raise GenSegError(
            f"{type(dataset).__name__} has no read_pixels(index) and read_mask_labels(index), by "
            "which data are checked: derive it from SegmentationDataset, or add these methods."
        )
    loader: DataLoader[Found] = DataLoader(
        _Samples(dataset, split),
        batch_size=4,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=transforms.single_thread,
    )
    found: list[Found] = []
    with tqdm(total=len(dataset), desc=f"reading {split}", unit="image", disable=None) as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    return found
