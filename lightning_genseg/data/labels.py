"""Labels: tables from the values of a file to classes, and their colours."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lightning_genseg.errors import GenSegError

IGNORE = 255
Color = tuple[int, int, int]


def known_classes(class_names: Sequence[str], unknown: Sequence[str]) -> list[int]:
    """Positions of the classes that are not in `unknown`; ValueError if a name is no class or none remains."""
    wrong = [name for name in unknown if name not in class_names]
    if wrong:
        end = " ..." if len(class_names) > 40 else "."
        raise GenSegError(
            f"unknown_classes holds '{wrong[0]}', which is no class: choose among "
            f"{', '.join(class_names[:40])}{end}"
        )
    known = [index for index, name in enumerate(class_names) if name not in unknown]
    if not known:
        raise GenSegError("unknown_classes holds all classes: leave some to be known.")
    return known


_UNKNOWN = 256  # in a label table: no class has this raw value
_ANOMALY = "an anomaly mask holds 1 (anomalous), 0 (known) and 255 (not evaluated): correct it, or list its values in anomaly_ids"


def anomaly_table(
    ids: Mapping[int, int],
    name: str = "anomaly_ids",
    values: str = "1 (anomalous), 0 (known) or 255",
) -> NDArray[np.uint16]:
    """Lookup table raw value -> 1, 0, 255 or 'unknown' (256); 255 stays 255 unless it is listed.

    `name` and `values` are for the message: what the table is called and may lead to.

    Raises:
        ValueError: keys that no mask can hold, or values other than 1, 0 and 255.
    """
    if not ids or not all(0 <= key <= 2**24 for key in ids) or set(ids.values()) - {0, 1, IGNORE}:
        raise GenSegError(
            f"{name} is {dict(ids)} but must lead from values of the masks to {values}."
        )
    table = np.full(max(256, max(ids) + 1), _UNKNOWN, np.uint16)
    table[IGNORE] = IGNORE
    table[list(ids)] = list(ids.values())
    return table


def label_table(ids: Mapping[int, int] | None, num_classes: int) -> NDArray[np.uint16]:
    """Lookup table raw value -> class, 255 or 'unknown' (256), with at least 256 entries.

    Raises:
        ValueError: the table is empty, has keys that no mask can hold, or leads to something that
            is not a class.
    """
    if not 0 < num_classes <= IGNORE:
        raise GenSegError(
            f"num_classes is {num_classes} but must be 1 to 255, because 255 means ignore."
        )
    pairs = {value: value for value in range(num_classes)} if ids is None else dict(ids)
    if not pairs:
        raise GenSegError(
            "ids is empty: list every value that occurs in the masks, or leave ids out."
        )
    if min(pairs) < 0 or max(pairs) > 2**24:
        raise GenSegError(
            f"ids has the keys {min(pairs)} to {max(pairs)} but masks hold values from 0 to "
            f"{2**24}."
        )
    wrong = sorted(
        value for value in pairs.values() if not (0 <= value < num_classes or value == IGNORE)
    )
    if wrong:
        raise GenSegError(
            f"ids leads to {wrong[:5]} but there are {num_classes} classes: use 0 to "
            f"{num_classes - 1}, or 255 for ignore."
        )
    if pairs.get(IGNORE, IGNORE) != IGNORE:
        raise GenSegError(
            f"ids maps 255 to {pairs[IGNORE]} but 255 always means ignore: renumber that class in "
            "the masks."
        )
    table = np.full(max(256, max(pairs) + 1), _UNKNOWN, np.uint16)
    table[list(pairs)] = list(pairs.values())
    table[IGNORE] = IGNORE
    return table


def map_labels(
    raw: NDArray[np.integer[Any]],
    table: NDArray[np.uint16],
    path: Path,
    expected: str | None = None,
) -> NDArray[np.uint8]:
    """Turn raw mask values into classes; ValueError naming the file and the values that are not in the table.

    `expected` ends the message in place of a list of the classes.
    """
    if raw.dtype == np.uint8:  # nearly all masks: ten times as fast as below
        values = cv2.calcHist([raw], [0], None, [256], [0, 256]).ravel() > 0
        if not (table[:256][values] == _UNKNOWN).any():
            quick = cv2.LUT(raw, table[:256].astype(np.uint8))
            return np.asarray(quick, np.uint8)
    inside = raw if raw.dtype == np.uint8 else np.clip(raw, 0, len(table) - 1)
    classes = table[inside]
    unknown = classes == _UNKNOWN
    if inside is not raw:
        unknown |= inside != raw
    if unknown.any():
        values = np.unique(raw[unknown]).tolist()
        shown = ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")
        if expected is not None:
            raise GenSegError(f"mask '{path}' holds the values {shown}, but {expected}.")
        known = np.flatnonzero(table < IGNORE).tolist()
        listed = (
            f"{known[0]} to {known[-1]}"
            if known and known == list(range(known[0], known[-1] + 1))
            else str(known)
        )
        raise GenSegError(
            f"mask '{path}' holds the values {shown}, which are no classes (known: {listed}, and "
            "255 for ignore): correct num_classes, or list these values in ids (raw value: class, "
            "or 255)."
        )
    labels: NDArray[np.uint8] = classes.astype(np.uint8)
    return labels


def check_palette(palette: Sequence[Color] | None, num_classes: int) -> list[Color]:
    """Return the palette, by default PASCAL VOC's; ValueError if it has not one colour 0..255 per class."""
    if palette is None:
        return voc_palette(num_classes)
    if len(palette) != num_classes:
        raise GenSegError(
            f"the palette has {len(palette)} colours but there are {num_classes} classes: give one "
            "per class."
        )
    colors = [tuple(color) for color in palette]
    if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in colors):
        raise GenSegError("the palette must hold (red, green, blue) with values from 0 to 255.")
    return [(color[0], color[1], color[2]) for color in colors]


def voc_palette(num_classes: int) -> list[Color]:
    """Colours of PASCAL VOC for any number of classes: the bits of the class number spread over red, green, blue."""
    palette = []
    for index in range(num_classes):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append((color[0], color[1], color[2]))
    return palette
