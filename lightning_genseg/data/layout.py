"""What the public data sets share: the official folders, files that miss their partner, ids of another convention."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.data.dataset import (
    MissingFiles,
    SegmentationDataset,
    read_mask,
    readable_suffixes,
)
from lightning_genseg.errors import GenSegError, MissingFileError


def check_root(root: Path, needs: Sequence[str], name: str, downloads: bool = False) -> None:
    """Check that `root` directly holds the folders `needs`.

    Raises:
        FileNotFoundError: it does not; the sentence names a folder one or two levels up or down
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


def check_split(folder: Path, split: str, name: str) -> None:
    """Check that a split has its folder; FileNotFoundError naming what is there instead."""
    if not folder.is_dir():
        raise MissingFileError(
            f"the {split} split of {name} is missing: '{folder}' does not exist (found beside it: "
            f"{_found(folder.parent)}), unpack it there."
        )


def list_files(folder: Path, suffix: str, levels: int = 0) -> dict[str, Path]:
    """Files in a folder (or `levels` below) whose names end in `suffix`, by the rest of their names, sorted."""
    # os.listdir, because Path.glob takes seconds for COCO's 118 000 images.
    files = {}
    for place in [folder] if levels == 0 else sorted(folder.glob("*/" * levels)):
        for name in sorted(os.listdir(place)):  # noqa: PTH208
            if name.endswith(suffix) and name[0] != ".":  # macOS leaves ._x.jpg beside x.jpg
                files[name.removesuffix(suffix)] = place / name
    return files


def read_list(path: Path, name: str) -> list[str]:
    """Read the image names of a split: one per line, as a stem or as the paths "image mask".

    Raises:
        FileNotFoundError: no such list.
        ValueError: it is empty.
    """
    if not path.is_file():
        raise MissingFileError(
            f"the list '{path}' of {name} does not exist (found beside it: {_found(path.parent)}): "
            "put it there."
        )
    lines = path.read_text(encoding="utf-8-sig").splitlines()
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
            known[folder] = set(os.listdir(folder)) if Path(folder).is_dir() else set()  # noqa: PTH208
        return name not in known[folder]

    for what, lost in (
        ("images are missing", [s.image for s in dataset.samples if missing(s.image)]),
        ("images have no mask", [s.mask for s in dataset.samples if missing(s.mask)]),
    ):
        if lost:
            shown = ", ".join(f"'{path}'" for path in lost[:3]) + (" ..." if len(lost) > 3 else "")
            raise MissingFiles(
                f"{len(lost)} {what} (expected: {shown}): add the files or leave the images out.",
                dataset,
            )


def check_ids(
    dataset: SegmentationDataset,
    wrong: Collection[int],
    expected: str,
    read: Callable[[Path], NDArray[np.integer[Any]]] = read_mask,
) -> None:
    """Look into eight masks, at the end of the constructor, for values of another convention than the expected one.

    Args:
        dataset: its masks.
        wrong: raw values that do not occur in the expected convention.
        expected: what was expected and what to do, as the end of the message.
        read: reads a mask file.

    Raises:
        ValueError: they do occur, naming a file.
    """
    positions = np.linspace(0, len(dataset) - 1, min(8, len(dataset))).astype(int)
    for path in (dataset.samples[position].mask for position in positions.tolist()):
        try:
            values = np.unique(read(path)).tolist()
        except (ValueError, FileNotFoundError):
            continue  # reported when the file is read, or by `genseg check` with all the others
        odd = [value for value in values if value in wrong]
        if odd:
            shown = ", ".join(map(str, odd[:5])) + (" ..." if len(odd) > 5 else "")
            raise GenSegError(f"mask '{path}' holds the values {shown}, but {expected}.")


def _stem(name: str) -> str:
    path = Path(name)
    return path.stem if path.suffix.lower() in (".jpg", ".png") else path.name


def _folders(folder: Path) -> list[Path]:
    # At most fifty: a data folder may hold thousands.
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")[:50]


def _found(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "") or "nothing"


def _and(names: Iterable[str]) -> str:
    *most, last = (f"'{name}'" for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def without_suffix(name: str) -> str:
    """Cut the suffix of an image off; in `frame.0001` the part after the dot belongs to the name."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in readable_suffixes() else path).as_posix()
