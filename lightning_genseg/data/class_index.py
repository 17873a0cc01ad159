"""Pixels of each class in each image of a data set: counted once, kept in a cache."""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.data import transforms
from lightning_genseg.data.dataset import SegmentationDataset
from lightning_genseg.data.loaders import from_worker
from lightning_genseg.data.relabelled import Labelled
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.errors import GenSegError, reason
from lightning_genseg.files import replace_file

Counts = NDArray[np.int64]
_SAVE_EVERY = 30.0  # seconds of work that a killed process loses at most
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def class_index(
    dataset: Labelled,
    cache_dir: Path | None = None,
    num_workers: int = 0,
    until_all_seen: bool = False,
) -> Counts:
    """Count the pixels of each class in each image, without those of 255.

    Of sparse labels the pixels are counted that are drawn. For a `SegmentationDataset`, also with
    sparse labels, the counts are kept in one file of `cache_dir`. It is found again by the names of
    the samples and the table of labels, wherever the data lie. An image is counted again when its
    mask has another size or time of change. What an interrupted call has counted is kept as well.
    Two processes that count at once do not disturb each other. Scenes that are drawn on the fly are
    counted at every call.

    Args:
        dataset: of N images and C classes.
        cache_dir: folder to keep the counts in; default: `default_cache_dir()`.
        num_workers: processes that read masks.
        until_all_seen: stop as soon as every class has been seen in some image, of a random order.

    Returns:
        N x C.

    Raises:
        GenSegError: a mask is unreadable, or holds labels that are no classes.
        MissingFileError: a mask does not exist.
    """
    cache = Cache(dataset, cache_dir)
    counts, done = cache.load()
    todo = np.flatnonzero(~done)
    if until_all_seen:
        todo = np.random.default_rng(0).permutation(todo)

    def finished() -> bool:
        return bool(done.all() or (until_all_seen and counts.any(0).all()))

    if finished():
        return counts
    loader: DataLoader[Counts] = DataLoader(
        _Masks(dataset, todo),
        batch_size=16,
        num_workers=num_workers,
        collate_fn=np.stack,
        worker_init_fn=transforms.single_thread,
    )
    saved, position = time.monotonic(), 0
    # Nothing is drawn where nobody looks, as in the log file of a cluster.
    bar = tqdm(
        total=len(done),
        initial=len(done) - len(todo),
        desc="counting classes (once)",
        unit="mask",
        disable=None,
    )
    try:
        for rows in loader:
            batch = todo[position : position + len(rows)]
            counts[batch], done[batch] = rows, True
            position += len(rows)
            bar.update(len(rows))
            if time.monotonic() - saved > _SAVE_EVERY:
                cache.save(counts, done)
                saved = time.monotonic()
            if finished():
                break
    except GenSegError as error:
        raise from_worker(error) from None
    finally:
        bar.close()
        cache.save(counts, done)
    return counts


def count_labels(labels: NDArray[np.uint8], num_classes: int) -> Counts:
    """Pixels of each of C classes in HxW labels."""
    counts: Counts = np.bincount(labels.ravel(), minlength=256)[:num_classes].astype(np.int64)
    return counts


def default_cache_dir() -> Path:
    """`lightning_genseg` in $XDG_CACHE_HOME, by default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lightning_genseg"


class _Masks(Dataset[Counts]):
    def __init__(self, dataset: Labelled, positions: NDArray[np.intp]) -> None:
        self.dataset = dataset
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Counts:
        labels = self.dataset.read_mask_labels(int(self.positions[index]))
        return count_labels(labels, self.dataset.num_classes)


class Cache:
    """The file with the counts of one data set; without one for data that are no files.

    It holds `counts` N x C and `stamps` N x 2: size and time of change of each mask when it was
    counted, -1 before.
    """

    def __init__(self, dataset: Labelled, folder: Path | None) -> None:
        self.shape = (len(dataset), dataset.num_classes)
        self.path: Path | None = None
        self.stamps = np.full((len(dataset), 2), -2, np.int64)
        sparse = dataset.sparse if isinstance(dataset, SparseDataset) else None
        files = dataset.dataset if isinstance(dataset, SparseDataset) else dataset
        if isinstance(files, SegmentationDataset):
            arguments = [] if sparse is None else sparse.arguments()
            name = f"classes_{type(files).__name__}_{_digest(files, arguments)}.npz"
            self.path = (default_cache_dir() if folder is None else Path(folder)) / name
            self.stamps = _stamps([sample.mask for sample in files.samples])
            own = [sample.anomaly for sample in files.samples if sample.anomaly is not None]
            if own:  # one for each
                self.stamps += _stamps(own)
            if sparse is not None:
                for column in zip(
                    *(sparse.label_files(s.name) for s in files.samples), strict=True
                ):
                    self.stamps += _stamps(column)

    def load(self) -> tuple[Counts, NDArray[np.bool_]]:
        """Counts, and for which images they are known."""
        nothing = np.zeros(self.shape, np.int64), np.zeros(self.shape[0], np.bool_)
        if self.path is None or not self.path.is_file():
            return nothing
        try:
            # Opened here, because np.load leaves the file of a broken archive open.
            with self.path.open("rb") as content, np.load(content) as file:
                counts, stamps = file["counts"], file["stamps"]
            if (counts.shape, counts.dtype) != (self.shape, np.int64):
                raise ValueError(f"counts of shape {counts.shape}")
            done = (stamps == self.stamps).all(1)
        except _UNREADABLE as error:
            warnings.warn(
                f"the class index '{self.path}' cannot be read ({error}): it is built anew.",
                stacklevel=3,
            )
            return nothing
        return np.where(done[:, None], counts, 0), done

    def save(self, counts: Counts, done: NDArray[np.bool_]) -> None:
        """Keep what is known; warns once if that is not possible."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        np.savez_compressed(buffer, counts=counts, stamps=np.where(done[:, None], self.stamps, -1))
        try:
            replace_file(self.path, buffer.getvalue())
        except OSError as error:
            warnings.warn(
                f"the class index cannot be kept in '{self.path.parent}' ({reason(error)}) and is "
                "built again at every start: set cache_dir (--data.cache_dir) to a folder that you "
                "may write to.",
                stacklevel=3,
            )
            self.path = None


def _digest(dataset: SegmentationDataset, sparse: list[Any]) -> str:
    """Of names and tables, not of the root folder: clusters unpack data into new ones."""
    content: list[Any] = [type(dataset).__qualname__, dataset.num_classes, dataset.label_values()]
    content += sparse if dataset.colors is None else [*sparse, dataset.colors]
    content += dataset.mask_decoder()
    content += [(sample.name, sample.mask.parts[-3:]) for sample in dataset.samples]
    content += [s.anomaly.parts[-3:] for s in dataset.samples if s.anomaly is not None]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:20]


def _stamps(paths: Sequence[Path]) -> NDArray[np.int64]:
    stamps = np.full((len(paths), 2), -2, np.int64)
    for row, path in zip(stamps, paths, strict=True):
        try:
            status = path.stat()
        except OSError:  # reading it will say so
            continue
        row[:] = status.st_size, status.st_mtime_ns
    return stamps
