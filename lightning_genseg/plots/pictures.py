"""Pictures of images, masks and maps."""

import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file

Color = tuple[int, int, int]
Palette = Sequence[Color]
Picture = NDArray[np.uint8]
Label = TypeVar("Label", bound=np.integer[Any])

ANOMALY_PALETTE: Palette = ((54, 58, 72), (0, 229, 255))  # known, anomalous

_TEXT = (40, 40, 40)


def colorize(
    mask: NDArray[np.integer[Any]],
    palette: Palette,
    ignore_index: int = 255,
    void: Color | None = None,
) -> Picture:
    """Draw a mask in the colours of its classes.

    Args:
        mask: H x W class indices.
        palette: one (red, green, blue) per class, 0 to 255.
        ignore_index: label that is no class.
        void: colour of ignored pixels; default: see `void_color`.

    Returns:
        H x W x 3.

    Raises:
        GenSegError: a label has no colour.
    """
    ignored = mask == ignore_index
    classes = np.where(ignored, 0, mask)
    if classes.size and not 0 <= classes.min() <= classes.max() < len(palette):
        raise GenSegError(
            f"the mask holds labels from {classes.min()} to {classes.max()} but the palette has "
            f"{len(palette)} colours: give one colour per class."
        )
    colors: Picture = np.asarray(palette, dtype=np.uint8)[classes]
    colors[ignored] = void_color(palette) if void is None else void
    return colors


def indexed(mask: NDArray[np.uint8], palette: Palette, ignore_index: int = 255) -> Image.Image:
    """A palette image: Pillow reads the numbers of `mask` from it, and people see its colours."""
    colors = [*palette, *[(0, 0, 0)] * 256][:256]
    colors[ignore_index] = void_color(palette)
    image = Image.fromarray(mask)
    used = colors[: int(mask.max(initial=0)) + 1]
    image.putpalette(bytes(value for color in used for value in color))
    return image


def class_table(names: Sequence[str], palette: Palette, ignore_index: int = 255) -> bytes:
    """Content of a ``classes.json``: number, name and colour of classes and of ignored pixels."""
    rows = [*enumerate(zip(names, palette, strict=False))]
    rows.append((ignore_index, ("ignored", void_color(palette))))
    lines = [
        json.dumps({"index": c, "name": name, "color": list(color)}, ensure_ascii=False)
        for c, (name, color) in rows
    ]
    return ("[\n  " + ",\n  ".join(lines) + "\n]\n").encode()


def overlay(
    image: Picture,
    mask: NDArray[np.integer[Any]],
    palette: Palette,
    alpha: float = 0.5,
    ignore_index: int = 255,
) -> Picture:
    """Lay the colours of a mask over its image; ignored pixels show the image alone.

    Args:
        image: H x W x 3.
        mask: H x W class indices.
        palette: one (red, green, blue) per class, 0 to 255.
        alpha: 0 shows only the image, 1 only the colours.
        ignore_index: label that is no class.

    Returns:
        H x W x 3.

    Raises:
        GenSegError: the sizes differ, or a label has no colour.
    """
    _check_sizes(image, mask)
    picture = np.empty_like(image)
    for rows in _strips(len(image)):
        weight = np.where(mask[rows] == ignore_index, 0.0, alpha).astype(np.float32)[..., None]
        colors = colorize(mask[rows], palette, ignore_index)
        picture[rows] = np.rint(image[rows] * (1 - weight) + colors * weight)
    return picture


def void_color(palette: Palette) -> Color:
    """Colour of pixels without a class: the first of black, white and grey that no class has."""
    taken = set(map(tuple, palette))
    free = (color for color in ((0, 0, 0), (255, 255, 255), (128, 128, 128)) if color not in taken)
    return next(free, (224, 224, 192))  # VOC's own


def class_legend(
    names: Sequence[str],
    palette: Palette,
    labels: Collection[int],
    ignore_index: int = 255,
    void: Color | None = None,
) -> list[tuple[str, Color]]:
    """Names and colours of those classes that occur among `labels`, and of ignored pixels."""
    void = void_color(palette) if void is None else void
    entries = [(name, palette[c]) for c, name in enumerate(names) if c in labels]
    return [*entries, ("ignored", void)] if ignore_index in labels else entries


def enlarge(mask: NDArray[Label], ignore_index: int = 255) -> NDArray[Label]:
    """Grow labelled spots so that single pixels can be seen in a picture.

    Args:
        mask: H x W class indices.
        ignore_index: where there is no label.

    Returns:
        H x W: pixels without label within a fiftieth of the shorter side, at least one pixel, of a
        label take it; the nearest one where there are several.
    """
    empty = mask == ignore_index
    if empty.all():
        return mask.copy()
    distance, nearest = cv2.distanceTransformWithLabels(
        empty.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    value_of = np.full(int(nearest.max()) + 1, ignore_index, mask.dtype)
    value_of[nearest[~empty]] = mask[~empty]
    return np.where(distance <= max(1.0, min(mask.shape) / 50), value_of[nearest], mask)


def outline(
    picture: Picture, mask: NDArray[np.bool_], color: Color = ANOMALY_PALETTE[1]
) -> Picture:
    """Draw a line in `color` along the inner edge of a region, and a black one around it.

    Args:
        picture: H x W x 3.
        mask: H x W, the region; its parts at the edge of the picture stay open.
        color: (red, green, blue), 0 to 255.

    Returns:
        H x W x 3; the lines are one pixel wide, or one for each 300 pixels of the shorter side.

    Raises:
        GenSegError: the sizes differ.
    """
    _check_sizes(picture, mask)
    width = max(1, round(min(mask.shape) / 300))
    region = mask.astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    result = picture.copy()
    result[(cv2.dilate(region, disc) > 0) & ~mask] = 0
    result[mask & (cv2.erode(region, disc) == 0)] = color
    return result


def _strips(height: int, rows: int = 256) -> Iterator[slice]:
    """Rows of a picture, some at a time: intermediate results of a large one fill the memory."""
    for first in range(0, height, rows):
        yield slice(first, min(first + rows, height))


def _check_sizes(image: Picture, mask: NDArray[Any]) -> None:
    if image.shape[:2] != mask.shape:
        raise GenSegError(
            f"the image is {image.shape[:2]} but the mask {mask.shape} (height, width): "
            "resize one of them first."
        )


def score_range(*scores: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """First and 99th percentile of the finite scores, which a few outliers cannot stretch."""
    finite = [score[np.isfinite(score)] for score in scores]
    values = finite[0] if len(finite) == 1 else np.concatenate(finite)
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, [1, 99], overwrite_input=True)
    return float(low), float(high)


def heat_map(
    score: NDArray[np.floating[Any]], low: float | None = None, high: float | None = None
) -> Picture:
    """Draw scores from dark (`low`) to bright (`high`).

    Args:
        score: H x W; what is not finite is drawn grey.
        low: score of the darkest colour; default: see `score_range`.
        high: score of the brightest colour; likewise.

    Returns:
        H x W x 3.
    """
    if low is None or high is None:
        default = score_range(score.astype(np.float32))
        low = default[0] if low is None else low
        high = default[1] if high is None else high
    span = high - low if high > low else 1.0
    colors: Picture = np.empty((*score.shape, 3), np.uint8)
    for rows in _strips(len(score)):
        part = score[rows].astype(np.float32)
        finite = np.isfinite(part)
        unit = np.clip((np.where(finite, part, low) - low) / span, 0, 1)
        colors[rows] = matplotlib.colormaps["inferno"](unit, bytes=True)[..., :3]
        colors[rows][~finite] = 128
    return colors


def with_legend(picture: Picture, legend: Sequence[tuple[str, Color]]) -> Image.Image:
    """A picture and, to its right, names and their colours, in as many columns as they need."""
    font, line = _font(picture)
    rows = max(1, (picture.shape[0] - line // 2) // line)
    columns = [legend[start : start + rows] for start in range(0, len(legend), rows)]
    widths = [2 * line + _broadest([name for name, _ in column], font) for column in columns]
    canvas, left = _widen(picture, sum(widths))
    draw = ImageDraw.Draw(canvas)
    for column, width in zip(columns, widths, strict=True):
        for row, (name, color) in enumerate(column):
            top = line // 4 + row * line
            box = (left + line // 3, top + line // 5, left + line, top + line - line // 5)
            draw.rectangle(box, tuple(color), _TEXT)
            draw.text((left + 1.3 * line, top + line // 2), name, _TEXT, font, anchor="lm")
        left += width
    return canvas


def with_scale(
    picture: Picture, low: float, high: float, threshold: float | None = None
) -> Image.Image:
    """A heat map and, to its right, the colours of scores from `low` to `high` with numbers."""
    font, line = _font(picture)
    marks = {high: f"{high:.3g}", low: f"{low:.3g}"}
    if threshold is not None and low < threshold < high:
        marks[threshold] = f"{threshold:.3g} threshold"
    canvas, left = _widen(picture, 2 * line + _broadest(list(marks.values()), font))
    draw = ImageDraw.Draw(canvas)
    top, bottom = line // 2, canvas.height - line // 2 - 1
    height = max(2, bottom - top)
    bar = heat_map(np.linspace(high, low, height)[:, None].repeat(line // 2, 1), low, high)
    canvas.paste(Image.fromarray(bar), (left + line // 3, top))
    for value, text in marks.items():
        y = top + round((high - value) / ((high - low) or 1) * height)
        draw.line((left + line // 3, y, left + line, y), _TEXT)
        draw.text((left + 1.2 * line, y), text, _TEXT, font, anchor="lm")
    return canvas


def _font(picture: Picture) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """Letters that suit the size of a picture, and the height of their line."""
    size = int(np.clip(min(picture.shape[:2]) / 24, 10, 48))
    return ImageFont.load_default(size), round(1.7 * size)


def _broadest(texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(max(map(font.getlength, texts), default=0))


def _widen(picture: Picture, width: int) -> tuple[Image.Image, int]:
    """The picture on white, with room at its right, and where that begins."""
    image = Image.fromarray(picture)
    line = _font(picture)[1]
    canvas = Image.new("RGB", (image.width + width, max(image.height, 2 * line)), "white")
    canvas.paste(image, (0, 0))
    return canvas, image.width


def grid(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str] | None = None,
    legend: Sequence[tuple[str, Color]] | None = None,
    cell_width: int = 320,
    gap: int = 4,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange pictures in rows and columns on white.

    Args:
        rows: pictures, H x W x 3, of any size; a row is as high as its first picture asks for.
        titles: one for each column.
        legend: names and their colours, drawn below.
        cell_width: width of every column in pixels.
        gap: between pictures, in pixels.
        captions: one for each row, drawn above it.

    Returns:
        A PIL image, which a notebook shows and `save` writes.

    Raises:
        GenSegError: there is no picture.
    """
    if not rows or not rows[0]:
        raise GenSegError("there is no picture to arrange: give at least one row with one picture.")
    columns = max(map(len, rows))
    heights = [max(1, round(cell_width * row[0].shape[0] / row[0].shape[1])) for row in rows]
    size = max(10, cell_width // 20)
    font = ImageFont.load_default(size)
    line = round(size * 1.7)
    width = columns * cell_width + (columns + 1) * gap
    top = line if titles else gap
    entries = _wrap(legend or [], font, line, width - 2 * gap)
    bottom = (entries[-1][1] + line + gap) if entries else 0
    above = line if captions else 0  # each row
    height = top + sum(heights) + (gap + above) * len(rows) + bottom
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles or []):
        center = gap + column * (cell_width + gap) + cell_width // 2
        draw.text((center, top // 2), title, _TEXT, font, anchor="mm")
    y = top
    for index, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if captions:
            draw.text((gap, y + line // 2), captions[index], _TEXT, font, anchor="lm")
            y += line
        for column, picture in enumerate(row):
            cell = Image.fromarray(picture)
            # Enlarged pixels stay sharp squares, so that a mask is seen as it is.
            enlarged = cell.width < cell_width
            method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX
            cell = cell.resize((cell_width, height), method)
            canvas.paste(cell, (gap + column * (cell_width + gap), y))
        y += height + gap
    for left, down, name, color in entries:
        middle = y + down + line // 2
        half = size // 2
        box = (gap + left, middle - half, gap + left + 2 * half, middle + half)
        draw.rectangle(box, tuple(color), _TEXT)
        draw.text((box[2] + half, middle), name, _TEXT, font, anchor="lm")
    return canvas


class Sheet:
    """Rows of pictures with captions and one legend, written to a file.

    Args:
        names: of the labels.
        palette: a colour for each; `void` is what ignored pixels get.
    """

    def __init__(self, names: Sequence[str], palette: Palette) -> None:
        self.names, self.palette, self.void = names, palette, void_color(palette)
        self.rows: list[Sequence[Picture]] = []
        self.captions: list[str] = []
        self.shown: set[int] = set()

    def add(self, caption: str, row: Sequence[Picture], *masks: NDArray[np.integer[Any]]) -> None:
        """Add a row; the legend explains the labels of its `masks`."""
        self.rows.append(row)
        self.captions.append(caption)
        for mask in masks:
            self.shown.update(np.unique(mask).tolist())

    def write(self, path: Path, titles: Sequence[str]) -> None:
        """Write the picture; where there is no row, no earlier one stays."""
        if not self.rows:
            path.unlink(missing_ok=True)
        else:
            legend = class_legend(self.names, self.palette, self.shown, void=self.void)
            picture = grid(self.rows, titles, legend, captions=self.captions)
            replace_file(path, encode(picture, "png"))


def _wrap(
    legend: Sequence[tuple[str, Color]],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line: int,
    width: int,
) -> list[tuple[int, int, str, Color]]:
    """Left and upper edge of each legend entry, in lines no wider than the pictures."""
    entries = []
    left = down = 0
    for name, color in legend:
        needed = 2 * line + round(font.getlength(name))
        if left and left + needed > width:
            left, down = 0, down + line
        entries.append((left, down, name, color))
        left += needed
    return entries


def encode(image: Image.Image, format: str) -> bytes:
    """Return the content of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 90} if format == "jpeg" else {}))
    return buffer.getvalue()
