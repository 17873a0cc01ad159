"""Labels: tables from the values of a file to classes, and their colours."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lightning_genseg.errors import GenSegError, MissingFileError, did_you_mean, listed
from lightning_genseg.files import read_text

IGNORE = 255
UNLISTED = 256  # in a table: no class has this value
_LARGEST = 2**24  # value of a mask that a table has room for
Color = tuple[int, int, int]
Table = NDArray[np.uint16]
"""Value in a file -> class, 255 or 256 (`UNLISTED`), with at least 256 entries."""


def known_classes(class_names: Sequence[str], unknown: Sequence[str]) -> list[int]:
    """Positions of the classes that are not in `unknown`.

    Raises:
        GenSegError: a name is no class, or no class remains.
    """
    wrong = [name for name in unknown if name not in class_names]
    if wrong:
        raise GenSegError(
            f"unknown_classes holds '{wrong[0]}', which is no class"
            f"{did_you_mean(wrong[0], class_names)}"
        )
    known = [index for index, name in enumerate(class_names) if name not in unknown]
    if not known:
        raise GenSegError("unknown_classes holds all classes: leave some to be known.")
    return known


def label_table(ids: Mapping[int, int] | None, num_classes: int) -> Table:
    """Table of class masks; without `ids` the files hold the classes themselves.

    255 is ignored unless `ids` lists it, as `{0: 0, 255: 1}` of black and white masks does.

    Raises:
        GenSegError: the table is empty, has keys that no mask can hold, or leads to no class.
    """
    if not 0 < num_classes <= IGNORE:
        raise GenSegError(
            f"num_classes is {num_classes} but must be 1 to 255, because 255 means ignore."
        )
    pairs = {value: value for value in range(num_classes)} if ids is None else dict(ids)
    low, high = min(pairs, default=0), max(pairs, default=0)
    outside = [c for c in pairs.values() if not (0 <= c < num_classes or c == IGNORE)]
    for wrong, problem in (
        (not pairs, "is empty: list every value that occurs in the masks, or leave ids out"),
        (
            low < 0 or high > _LARGEST,
            f"has the keys {low} to {high} but masks hold values from 0 to {_LARGEST}",
        ),
        (
            outside,
            f"leads to {sorted(outside)[:5]} but there are {num_classes} classes: use 0 to "
            f"{num_classes - 1}, or 255 for ignore",
        ),
    ):
        if wrong:
            raise GenSegError(f"ids {problem}.")
    return _table(pairs)


def anomaly_table(
    ids: Mapping[int, int],
    name: str = "anomaly_ids",
    values: str = "1 (anomalous), 0 (known) or 255",
) -> Table:
    """Table of anomaly masks, which leads to 1, 0 and 255.

    Args:
        ids: value in the files -> 1, 0 or 255; 255 stays 255 unless it is listed.
        name: of the table, for the message.
        values: that it may lead to, for the message.

    Raises:
        GenSegError: keys that no mask can hold, or values other than 1, 0 and 255.
    """
    if (
        not ids
        or not all(0 <= key <= _LARGEST for key in ids)
        or set(ids.values()) - {0, 1, IGNORE}
    ):
        raise GenSegError(
            f"{name} is {dict(ids)} but must lead from values of the masks to {values}."
        )
    return _table(ids)


def _table(pairs: Mapping[int, int]) -> Table:
    table = np.full(max(256, max(pairs) + 1), UNLISTED, np.uint16)
    table[IGNORE] = IGNORE
    table[list(pairs)] = list(pairs.values())
    return table


def map_labels(
    raw: NDArray[np.integer[Any]], table: Table, path: Path, expected: str | None = None
) -> NDArray[np.uint8]:
    """Turn the values of a mask into classes.

    Args:
        raw: HxW, of the file.
        table: see `label_table`.
        path: of the file, for the message.
        expected: end of the message in place of a list of the classes.

    Raises:
        GenSegError: naming the file and the values that are not in the table.
    """
    if raw.dtype == np.uint8:  # nearly all masks: ten times as fast as below
        values = cv2.calcHist([raw], [0], None, [256], [0, 256]).ravel() > 0
        if not (table[:256][values] == UNLISTED).any():
            return np.asarray(cv2.LUT(raw, table[:256].astype(np.uint8)), np.uint8)
    inside = np.clip(raw, 0, len(table) - 1)
    classes = table[inside]
    unlisted = (classes == UNLISTED) | (inside != raw)
    if unlisted.any():
        found = listed(np.unique(raw[unlisted]).tolist(), 8)
        if expected is None:
            known = np.flatnonzero(table < IGNORE).tolist()
            if raw.min() < 0:
                raise GenSegError(
                    f"mask '{path}' holds the values {found}, and labels are not negative: write "
                    "255 where a pixel does not count."
                )
            gapless = known and known == list(range(known[0], known[-1] + 1))
            raise GenSegError(
                f"mask '{path}' holds the values {found}, which are no classes (known: "
                f"{f'{known[0]} to {known[-1]}' if gapless else known}, and 255 for ignore): "
                "correct num_classes, or list these values in ids (raw value: class, or 255)."
            )
        raise GenSegError(f"mask '{path}' holds the values {found}, but {expected}.")
    labels: NDArray[np.uint8] = classes.astype(np.uint8)
    return labels


def check_palette(palette: Sequence[Color] | None, num_classes: int) -> list[Color]:
    """Return the palette, by default PASCAL VOC's.

    Raises:
        GenSegError: it has not one colour of three values from 0 to 255 for each class.
    """
    if palette is None:
        return voc_palette(num_classes)
    if len(palette) != num_classes:
        raise GenSegError(
            f"the palette has {len(palette)} colours but there are {num_classes} classes: give one "
            "per class."
        )
    if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in palette):
        raise GenSegError("the palette must hold (red, green, blue) with values from 0 to 255.")
    return [(red, green, blue) for red, green, blue in palette]


_RGB = r"(?P<red>\d+)[,;\t ]+(?P<green>\d+)[,;\t ]+(?P<blue>\d+)"
# A number before commas is that of the class; before a space only where nothing else separates.
_NUMBER = r"(?:\d+(?:\s*[,;\t]\s*|\s+(?=[^,;\t]*$)))?"
_COLOR_LAST = re.compile(rf"{_NUMBER}(?P<name>\S.*?)[,;\t ]+{_RGB}[,;\t ]*")
_COLOR_FIRST = re.compile(rf"(?:\d+[,;\t ]+)??{_RGB}[,;\t ]+(?P<name>[^\d\s].*)")


def read_colors(path: Path) -> dict[str, Color]:
    """Read a table of colours: on each line a name and red, green, blue, in either order.

    They stand apart by commas, semicolons, tabs or spaces, as in CamVid's ``label_colors.txt`` and
    in a ``class_dict.csv``; the number of the class may come first. Lines without three numbers,
    such as a heading, are passed over.

    Raises:
        MissingFileError: no such file.
        GenSegError: no colour in it, more than 255, or a name or colour that is there twice; it is
            not in UTF-8.
    """
    if not path.is_file():
        raise MissingFileError(f"table of colours '{path}' does not exist: check the path.")
    colors: dict[str, Color] = {}
    for line in read_text(path, "the table of colours").splitlines():
        match = _COLOR_LAST.fullmatch(line.strip()) or _COLOR_FIRST.fullmatch(line.strip())
        if match is None:
            continue
        name = match["name"].strip("\"' ")
        red, green, blue = int(match["red"]), int(match["green"]), int(match["blue"])
        if name in colors or (red, green, blue) in colors.values():
            raise GenSegError(
                f"the table of colours '{path}' holds {name} {red, green, blue} twice: remove the "
                "repetition."
            )
        colors[name] = red, green, blue
    if not 0 < len(colors) <= IGNORE:
        raise GenSegError(
            f"the table of colours '{path}' holds {len(colors)} colours: write 1 to 255 lines of a "
            "name and red, green, blue."
        )
    return colors


def color_table(
    colors: Sequence[Color] | Path, class_names: Sequence[str] | None
) -> tuple[list[Color], list[str] | None]:
    """Colours of masks, those of the classes first, and the names of the classes.

    Of a table with `class_names` those rows are the classes, without these all rows.

    Raises:
        GenSegError: the table has not all classes, or a value is no colour.
    """
    if not isinstance(colors, Path):
        return check_palette(colors, len(colors)), None if class_names is None else [*class_names]
    table = read_colors(colors)
    names = list(class_names or table)
    missing = [name for name in names if name not in table]
    if missing:
        raise GenSegError(
            f"the table of colours '{colors}' has no class {missing[0]}"
            f"{did_you_mean(missing[0], table)}"
        )
    ordered = [*names, *(name for name in table if name not in names)]
    return check_palette([table[name] for name in ordered], len(ordered)), names


def voc_palette(num_classes: int) -> list[Color]:
    """PASCAL VOC's colours: the bits of the class number spread over red, green and blue."""
    palette = []
    for index in range(num_classes):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append((color[0], color[1], color[2]))
    return palette
