"""Copies of public data sets: their folders, files without a partner, ids of another convention."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.data.dataset import MissingFiles, SegmentationDataset
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError, MissingFileError, listed
from lightning_genseg.files import read_text


def check_root(root: Path, needs: Sequence[str], name: str, downloads: bool = False) -> None:
    """Check that `root` directly holds the folders `needs`.

    Raises:
        MissingFileError: it does not; the sentence names a folder one or two levels up or down
            that does.
    """
    hint = ", or set download to true" if downloads else ""
    if not root.is_dir():
        raise MissingFileError(
            f"root '{root}' does not exist: give the folder of {name} that holds "
            f"{_and(needs)}{hint}."
        )
    missing = [folder for folder in needs if not (root / folder).is_dir()]
    if not missing:
        return
    inside = _folders(root)
    nearby = [
        *root.resolve().parents[:2],
        *inside,
        *(sub for one in inside for sub in _folders(one)),
    ]
    better = next((place for place in nearby if all((place / one).is_dir() for one in needs)), None)
    remedy = f"use '{better}' as root" if better else f"give the folder that holds them{hint}"
    raise MissingFileError(
        f"root '{root}' of {name} must hold {_and(needs)} but has no {_and(missing)} (found: "
        f"{_found(root)}): {remedy}."
    )


def check_split(split: str, name: str, *folders: Path) -> None:
    """Check that a split has its folders; a MissingFileError names what is there instead."""
    for folder in folders:
        if not folder.is_dir():
            raise MissingFileError(
                f"the {split} split of {name} is missing: '{folder}' does not exist (found beside "
                f"it: {_found(folder.parent)}), unpack it there."
            )


def list_files(folder: Path, suffix: str, levels: int = 0, remedy: str = "") -> dict[str, Path]:
    """Files in a folder (or `levels` below) whose names end in `suffix`, sorted, by the rest.

    Raises:
        GenSegError: there are none, and a remedy is given.
    """
    # os.listdir, because Path.glob takes seconds for COCO's 118 000 images.
    files = {}
    for place in [folder] if levels == 0 else sorted(folder.glob("*/" * levels)):
        for name in sorted(os.listdir(place)):  # noqa: PTH208
            if name.endswith(suffix) and name[0] != ".":  # macOS leaves ._x.jpg beside x.jpg
                files[name.removesuffix(suffix)] = place / name
    if remedy and not files:
        pattern = "*/" * levels + f"*{suffix}"
        raise GenSegError(f"no file '{pattern}' in '{folder}': {remedy}.")
    return files


def read_list(path: Path, name: str) -> list[str]:
    """Read the image names of a split: one per line, as a stem or as the paths "image mask".

    Raises:
        MissingFileError: no such list.
        GenSegError: it is empty.
    """
    if not path.is_file():
        raise MissingFileError(
            f"the list '{path}' of {name} does not exist (found beside it: {_found(path.parent)}): "
            "put it there."
        )
    lines = read_text(path, "the list").splitlines()
    names = [_stem(line.split()[0]) for line in lines if line.strip()]
    if not names:
        raise GenSegError(f"the list '{path}' of {name} is empty: write one image name per line.")
    return names


def check_files(dataset: SegmentationDataset) -> None:
    """Check that every image and mask exists, at the end of the constructor of `dataset`.

    Raises:
        MissingFiles: with the number of those that do not, and three of them.
    """
    known: dict[str, set[str]] = {}  # one listing per folder is faster than 100 000 questions

    def missing(path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in known:
            there = Path(folder).is_dir()
            known[folder] = set(os.listdir(folder)) if there else set()  # noqa: PTH208
        return name not in known[folder]

    for what, paths in (
        ("images are missing", [sample.image for sample in dataset.samples]),
        ("images have no mask", [sample.mask for sample in dataset.samples]),
    ):
        lost = [f"'{path}'" for path in paths if missing(path)]
        if lost:
            raise MissingFiles(
                f"{len(lost)} {what} (expected: {listed(lost, 3)}): add the files or leave the "
                "images out.",
                dataset,
            )


def check_ids(dataset: SegmentationDataset, wrong: Collection[int], expected: str) -> None:
    """Look for values of another convention in eight masks, at the end of the constructor.

    Args:
        dataset: its masks.
        wrong: values that do not occur in the expected convention.
        expected: what was expected and the remedy, as the end of the message.

    Raises:
        GenSegError: they do occur, naming a file.
    """
    for position, values in some_values(len(dataset), dataset.read_mask_values):
        odd = sorted(values.intersection(wrong))
        if odd:
            raise GenSegError(
                f"mask '{dataset.samples[position].mask}' holds the values {listed(odd)}, but "
                f"{expected}."
            )


def some_values(
    count: int, read: Callable[[int], NDArray[np.integer[Any]]]
) -> Iterator[tuple[int, set[int]]]:
    """Positions of up to eight of `count` masks, and the values that occur in them."""
    for position in np.linspace(0, count - 1, min(8, count)).astype(int).tolist():
        try:
            yield position, set(np.unique(read(position)).tolist())
        except GenSegError:
            continue  # reported when the file is read, or by `genseg check` with all the others


def absent_classes(dataset: Any, names: Sequence[str]) -> str:
    """Sentence on classes that no training mask holds; where they may be its 255, what to do."""
    values: set[int] = set()
    if isinstance(dataset, SegmentationDataset):
        values = set().union(
            *(found for _, found in some_values(len(dataset), dataset.read_mask_values))
        )
    remedy = (
        "label them, leave them out, or set absent_classes to warn (--data.absent_classes warn)"
    )
    if 255 in values and len(names) == 1 and dataset.table[255] == IGNORE:
        table = dataset.label_values() | {255: dataset.class_names.index(names[0])}
        ids = ", ".join(f"{value}: {table[value]}" for value in sorted(values & table.keys()))
        remedy = (
            f"they hold {listed(sorted(values))}, and 255 is ignored; if it is that class, set "
            f"--data.ids '{{{ids}}}', otherwise {remedy}"
        )
    return f"no training mask holds a pixel of {listed(names)}: {remedy}."


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in (".jpg", ".png") else path.name


def _folders(folder: Path) -> list[Path]:
    # At most fifty: a data folder may hold thousands.
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")[:50]


def _found(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return listed(names) or "nothing"


def _and(names: Iterable[str]) -> str:
    *most, last = (f"'{name}'" for name in names)
    return f"{', '.join(most)} and {last}" if most else last
