"""Colours of classes in a maskige: constructed, published, random or from a file (GSS)."""

import json
import random
from collections.abc import Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.sets.cityscapes import Cityscapes
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import read_json
from lightning_genseg.methods.gss.maskige import Color

ColorTable = Literal[
    "arithmetic",
    "misaligned",
    "jittered",
    "lattice",
    "repulsion",
    "random",
    "cityscapes",
    "ade20k",
    "mseg",
]
Colors: TypeAlias = ColorTable | Path | list[Color]

_JITTER = 15  # T of the supplement's Eq. 20


def is_lasting(kind: Colors) -> bool:
    """Whether it gives the same colours later: no file, nor `repulsion`, a matter of rounding."""
    return kind in get_args(ColorTable) and kind != "repulsion"


def class_colors(kind: Colors, num_classes: int, seed: int = 0) -> list[Color]:
    """Colours of K classes and, last, of unlabelled pixels.

    GSS, Chen et al., CVPR 2023, supplement B. The first steps of its Table 9 are chosen per data
    set; here they fill 0..255 for any K.

    - `arithmetic`: equal steps from 0 in red, green and blue, blue fastest (Eqs. 16-18).
    - `misaligned`: the same, starting at 0, 1, 2 (Eq. 19).
    - `jittered`: the same, and up to 15 more at random in each channel (Eq. 20).
    - `lattice`: the full range of all channels, without the points nearest to grey that are too
      many; the greyest of the others is for unlabelled pixels. Its smallest distance is larger than
      that of the steps above.
    - `repulsion`: points of the cube that push each other away, from a random start.
    - `random`: uniform (GSS-FF-R; the paper does not say how).
    - `cityscapes` (19 classes), `ade20k` (150), `mseg` (194): the tables of the published code.

    Args:
        kind: one of these names, a .json file with a list of K + 1 colours, as `LearnedColors`
            leaves it, or the list.
        num_classes: K.
        seed: of `jittered`, `repulsion` and `random`.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: the table is for another number of classes, or the file holds no colours.

    Example:
        >>> class_colors("arithmetic", 4)  # of 2 x 2 x 2 the last, and black
        [(238, 0, 0), (238, 0, 238), (238, 238, 0), (238, 238, 238), (0, 0, 0)]
    """
    check_arguments(class_colors, locals(), num_classes="[2, inf)", seed="[0, inf)")
    if not isinstance(kind, str | Path):
        return _check(kind, num_classes, "colors")
    if kind not in get_args(ColorTable):
        return _check(_read(Path(kind)), num_classes, f"colors '{kind}'")
    if kind == "random":
        draw = random.Random(seed).randrange
        drawn: dict[Color, None] = {}
        while len(drawn) < num_classes + 1:
            drawn[(draw(256), draw(256), draw(256))] = None
        return list(drawn)
    if kind == "lattice":
        red, green, blue = (_spread(n) for n in _levels(num_classes + 1))
        return _without_grey(list(product(red, green, blue)), num_classes)
    if kind == "repulsion":
        return _without_grey(_repel(num_classes + 1, seed), num_classes)
    if kind in ("arithmetic", "misaligned", "jittered"):
        return _steps(str(kind), num_classes, random.Random(seed))
    return _check(_published(str(kind)), num_classes, f"colors {kind}")


def _steps(kind: str, num_classes: int, generator: random.Random) -> list[Color]:
    """Colours of Table 9's first steps, and that of unlabelled pixels."""
    starts = (0, 0, 0) if kind == "arithmetic" else (0, 1, 2)
    red, green, blue = (
        # So that neither the start nor the jitter leaves 0..255.
        [start + i * ((255 - 2 - _JITTER) // (n - 1)) for i in range(n)]
        for start, n in zip(starts, _levels(num_classes), strict=True)
    )
    table = list(product(red, green, blue))
    unlabelled = (0, 0, 0)
    if len(table) == num_classes:  # black is taken: the middle of the first cell
        r, g, b = ((one + two + _JITTER) // 2 for one, two, *_ in (red, green, blue))
        unlabelled = (r, g, b)
    table = table[-num_classes:]  # the first ones are too many, as in the table of MSeg
    if kind == "jittered":
        jitter = generator.randint
        table = [
            (r + jitter(0, _JITTER), g + jitter(0, _JITTER), b + jitter(0, _JITTER))
            for r, g, b in table
        ]
    return [*table, unlabelled]


def _published(kind: str) -> list[Sequence[int]]:
    if kind == "cityscapes":
        return [*Cityscapes.PALETTE, (0, 0, 0)]
    file = resources.files("lightning_genseg.methods.gss") / "published_colors.json"
    table: list[Sequence[int]] = json.loads(file.read_text())[kind]
    return table


def _read(path: Path) -> object:
    if not path.is_file():
        raise MissingFileError(
            f"colors '{path}' is no file: give a .json file of colours, or one of "
            f"{', '.join(get_args(ColorTable))}."
        )
    content: object = read_json(path, "colors")
    return content


def _check(table: object, num_classes: int, name: str) -> list[Color]:
    if (
        not isinstance(table, list | tuple)
        or not all(isinstance(color, list | tuple) and len(color) == 3 for color in table)
        or not all(isinstance(v, int) and 0 <= v <= 255 for color in table for v in color)
    ):
        raise GenSegError(
            f"{name} must be a list of [red, green, blue], integers from 0 to 255: one for each "
            "class and, last, that of unlabelled pixels."
        )
    if len(table) != num_classes + 1:
        raise GenSegError(
            f"{name} is for {len(table) - 1} classes (and unlabelled pixels) but there are "
            f"{num_classes}: give one more colour than classes, or the name of a table for any "
            "number, such as lattice."
        )
    return [(red, green, blue) for red, green, blue in table]


def _levels(count: int) -> tuple[int, int, int]:
    """Numbers of red, green and blue values, nearly equal, that make at least `count` colours."""
    red = green = blue = 2
    while red * green * blue < count:
        if green == red:
            green += 1
        elif blue == red:
            blue += 1
        else:
            red += 1
    return red, green, blue


def _spread(levels: int) -> list[int]:
    return [round(255 * i / (levels - 1)) for i in range(levels)]


def _without_grey(points: list[Color], num_classes: int) -> list[Color]:
    """The K + 1 points furthest from grey in their order; the greyest of them last."""

    def greyness(index: int) -> tuple[float, int]:
        return sum((value - 127.5) ** 2 for value in points[index]), index

    *classes, unlabelled = sorted(range(len(points)), key=greyness, reverse=True)[: num_classes + 1]
    return [points[index] for index in (*sorted(classes), unlabelled)]


def _repel(count: int, seed: int, steps: int = 600) -> list[Color]:
    """Points in the cube far from each other: descent on the sum of 1 / distance^p, p growing."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    other = ~torch.eye(count, dtype=torch.bool)
    spacing = count ** (-1 / 3)
    for step in range(steps):
        progress = step / steps
        difference = points[:, None] - points
        distance = difference.norm(dim=2).clamp_min(1e-6)
        nearest = distance.masked_fill(~other, torch.inf).min()
        # Weights of 1 for the nearest pair: nothing overflows.
        weight = (nearest / distance).pow(3 + 40 * progress) * other
        force = (difference / distance[..., None] * weight[..., None]).sum(1)
        length = force.norm(dim=1, keepdim=True).clamp_min(1e-12)
        move = force / length * length.clamp_max(1) * (0.2 * spacing * (1 - progress))
        points = (points + move).clamp(0, 1)
    return [(r, g, b) for r, g, b in (points * 255).round().long().tolist()]
