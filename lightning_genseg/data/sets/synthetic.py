"""Toy street scenes drawn on the fly: public, seeded, no files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.labels import IGNORE, check_palette

_SKY, _GROUND, _BUILDING, _TREE, _VEHICLE, _PERSON = range(6)
_HELD_OUT = 254  # in the drawn mask; becomes 255 in `mask` and 1 in `anomaly`
_Rng = np.random.Generator
_Color = tuple[float, float, float]


class SyntheticScenes(Dataset[dict[str, Any]]):
    """Street and park scenes of six classes; sample i depends on (`seed`, i) only.

    Each class has several appearances: sky (clear, overcast, dusk) · ground (asphalt with
    markings, grass, paving) · building (brick, plaster, glass) · tree (round, conifer, autumn) ·
    vehicle (car, van, round bus) · person (standing, striding, with umbrella). Classes share
    colours (grass and leaves, brick and red cars, overcast sky and asphalt), so that shape, texture
    and place have to be learned. Objects occlude each other, are lit from one side, fade with
    distance and have a void (255) border.

    With `held_out=True` each scene also holds one or two balloons or striped tents, which never
    occur otherwise, and a sample has the key `anomaly`: int64 HxW, 1 on them, 0 elsewhere, 255 on
    void. `mask` is 255 on them.

    Args:
        length: number of scenes.
        size: (height, width) in pixels, at least 32 each.
        seed: not negative; other seeds give other scenes.
        held_out: add objects of an unknown kind.
        transform: albumentations transforms.

    Raises:
        GenSegError: a wrong argument.
    """

    CLASS_NAMES = ("sky", "ground", "building", "tree", "vehicle", "person")
    # fmt: off
    PALETTE = (
        (120, 170, 220), (128, 100, 128), (190, 90, 70), (70, 140, 60), (240, 180, 40),
        (220, 40, 120),
    )
    # fmt: on

    def __init__(
        self,
        length: int = 256,
        size: tuple[int, int] = (128, 160),
        seed: int = 0,
        held_out: bool = False,
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        # Objects are not recognisable in smaller scenes.
        check_arguments(
            SyntheticScenes.__init__, locals(), length="[1, inf)", size="[32, inf)", seed="[0, inf)"
        )
        self.class_names = list(self.CLASS_NAMES)
        self.palette = check_palette(self.PALETTE, len(self.class_names))
        self.length = length
        self.size = size
        self.seed = seed
        self.held_out = held_out
        self.transform = transforms.compose(transform)

    @property
    def num_classes(self) -> int:
        """Number of classes: 6."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of scenes."""
        return self.length

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Draw and transform one scene."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        if not 0 <= position < self.length:
            raise IndexError(f"scene {position} of {self.length}")
        image, mask = self._draw(position)
        name = self.sample_name(position)
        sample: dict[str, Any] = transforms.apply(self.transform, image, {"mask": mask}, seed, name)
        sample["name"] = name
        if self.held_out:
            labels = sample["mask"]
            held_out = labels == _HELD_OUT
            sample["anomaly"] = torch.where(labels == IGNORE, IGNORE, held_out.long())
            sample["mask"] = labels.masked_fill(held_out, IGNORE)
        return sample

    def sample_name(self, index: int) -> str:
        """Name of a scene, without drawing it."""
        return f"scene_{self.seed}_{index:05d}"

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Draw a scene as HxWx3, without transforms."""
        return self._draw(index)[0]

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Draw the labels of a scene as HxW classes (255 = ignore), without transforms."""
        return self.read_labels(index)[0]

    def read_labels(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Draw classes (255 = ignore) and, with `held_out`, anomalies (1, 0, 255), both HxW."""
        mask = self._draw(index)[1]
        unknown = mask == _HELD_OUT
        anomaly = np.where(mask == IGNORE, np.uint8(IGNORE), unknown.astype(np.uint8))
        mask[unknown] = IGNORE
        return mask, anomaly if self.held_out else None

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return _draw(np.random.default_rng([self.seed, index]), self.size, self.held_out)


class _Scene:
    """A canvas: image 3xHxW float in [0, 1], mask HxW; shapes are in pixels, x right, y down."""

    def __init__(self, rng: _Rng, size: tuple[int, int]) -> None:
        self.rng = rng
        self.height, self.width = size
        self.y = np.arange(self.height, dtype=np.float32)[:, None]
        self.x = np.arange(self.width, dtype=np.float32)[None]
        self.image = np.zeros((3, *size), np.float32)
        self.mask = np.full(size, _SKY, np.uint8)
        self.light = float(rng.choice([-1.0, 1.0]))  # the sun is left or right
        self.grain = rng.standard_normal(size, dtype=np.float32)
        cell = max(4, self.height // 12)
        self.blotches = _smooth(rng, size, cell, cell)

    def window(self, left: float, top: float, right: float, bottom: float) -> _Scene:
        """The part of the canvas within these limits: drawing there draws here, only faster."""
        rows = slice(max(0, int(top)), max(0, int(bottom) + 1))
        columns = slice(max(0, int(left)), max(0, int(right) + 1))
        part = copy.copy(self)
        part.y, part.x = self.y[rows], self.x[:, columns]
        part.image, part.mask = self.image[:, rows, columns], self.mask[rows, columns]
        part.grain, part.blotches = self.grain[rows, columns], self.blotches[rows, columns]
        return part

    def paint(
        self,
        shape: NDArray[np.bool_],
        color: _Color,
        texture: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Colour a region; `texture` (HxW, or broadcast to it) is added to its brightness."""
        for channel in range(3):  # three planes: several times faster than writing pixels of three
            value = color[channel] if texture is None else np.float32(color[channel]) + texture
            np.copyto(self.image[channel], value, where=shape, casting="same_kind")

    def stamp(self, shape: NDArray[np.bool_], label: int) -> None:
        """Label an object that was painted, with a border of one pixel of void."""
        # The border is inside and outside the object, as annotators leave it.
        border = np.zeros_like(shape)
        vertical = shape[1:] != shape[:-1]
        horizontal = shape[:, 1:] != shape[:, :-1]
        border[1:] |= vertical
        border[:-1] |= vertical
        border[:, 1:] |= horizontal
        border[:, :-1] |= horizontal
        self.mask[shape] = label
        self.mask[border] = IGNORE

    def box(self, left: float, top: float, right: float, bottom: float) -> NDArray[np.bool_]:
        region: NDArray[np.bool_] = (
            (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
        )
        return region

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> NDArray[np.bool_]:
        region: NDArray[np.bool_] = ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 <= 1
        return region

    def line(
        self, x0: float, y0: float, x1: float, y1: float, thickness: float
    ) -> NDArray[np.bool_]:
        """Straight stroke from one point to another."""
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(
            ((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy + 1e-6), 0, 1
        )
        distance = (self.x - x0 - along * dx) ** 2 + (self.y - y0 - along * dy) ** 2
        region: NDArray[np.bool_] = distance <= (thickness / 2) ** 2
        return region

    def shade(self, x: float, radius: float) -> NDArray[np.floating[Any]]:
        """Brightness of a rounded body at x, lit from the side of the sun; 1xW."""
        shade: NDArray[np.floating[Any]] = 0.12 * self.light * np.clip((self.x - x) / radius, -1, 1)
        return shade


_Painter = Callable[[_Scene, float, float, float], None]  # scene, x, foot, size


def _draw(
    rng: _Rng, shape: tuple[int, int], held_out: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw a scene from back to front; HxWx3 uint8 and HxW uint8."""
    scene = _Scene(rng, shape)
    height, width = shape
    horizon = height * rng.uniform(0.38, 0.55)
    _sky(scene, horizon)
    haze = scene.image[:, int(horizon) - 1].mean(1)[:, None]
    _ground(scene, horizon)
    _buildings(scene, horizon)
    # Everything that stands on the ground, far to near: `depth` 0 is the horizon, 1 the lower edge.
    counts: list[tuple[_Painter, int, int]] = [(_tree, 1, 4), (_vehicle, 1, 3), (_person, 1, 4)]
    things: list[tuple[float, _Painter]] = []
    for kind, low, high in counts:
        things += [(rng.uniform(0.05, 0.8), kind) for _ in range(rng.integers(low, high + 1))]
    if held_out:
        things += [(rng.uniform(0.15, 0.7), _stranger) for _ in range(rng.integers(1, 3))]
    for depth, kind in sorted(things, key=lambda thing: thing[0]):
        x, foot = rng.uniform(0.02, 0.98) * width, horizon + (height - horizon) * depth
        size = height * (0.12 + 0.55 * depth)
        part = scene.window(x - 0.8 * size, foot - 2.2 * size, x + 0.8 * size, foot + 0.2 * size)
        before = part.image.copy()
        kind(part, x, foot, size)
        if depth < 0.35:  # distant things fade into the haze
            changed = (before != part.image).any(0)
            part.image[:, changed] += (0.35 - depth) * (haze - part.image[:, changed])
    return _expose(scene), scene.mask


def _sky(scene: _Scene, horizon: float) -> None:
    rng = scene.rng
    top, low = (
        ((0.25, 0.48, 0.85), (0.72, 0.84, 0.95)),  # clear
        ((0.58, 0.60, 0.63), (0.76, 0.77, 0.78)),  # overcast: the greys of asphalt and plaster
        ((0.30, 0.28, 0.52), (0.97, 0.66, 0.42)),  # dusk
    )[rng.integers(3)]
    share = np.clip(scene.y / horizon, 0, 1)
    upper, lower = (np.asarray(color, np.float32)[:, None, None] for color in (top, low))
    scene.image[:] = upper * (1 - share) + lower * share
    bands = _smooth(rng, scene.mask.shape, max(4, scene.height // 14), max(4, scene.width // 5))
    clouds = np.clip(0.7 * bands + 0.45 * scene.blotches - rng.uniform(0.0, 1.0), 0, 1) * 0.55
    scene.image += clouds * (np.float32(0.95) - scene.image)


def _ground(scene: _Scene, horizon: float) -> None:
    rng, width = scene.rng, scene.width
    below = np.broadcast_to(scene.y >= horizon, scene.mask.shape)
    nearness = np.clip((scene.y - horizon) / (scene.height - horizon), 0, 1)
    grass, paving = _jitter(rng, (0.30, 0.46, 0.18)), _jitter(rng, (0.62, 0.57, 0.50))
    center, far, near = width * rng.uniform(0.3, 0.7), width * 0.04, width * rng.uniform(0.3, 0.6)
    bend = width * rng.uniform(-0.2, 0.2) * nearness
    offset = (scene.x - center - bend) / (far + near * nearness)
    if rng.random() < 0.5:
        scene.paint(below, grass, 0.05 * scene.grain + 0.05 * scene.blotches)
    else:  # slabs get smaller with distance
        joints = (np.sin(60 / (nearness + 0.25)) > 0.93) | (np.abs((offset * 3) % 1 - 0.5) > 0.46)
        scene.paint(below, paving, 0.02 * scene.grain - 0.12 * joints)
    road = below & (np.abs(offset) < 1)
    scene.paint(road, _jitter(rng, (0.36, 0.36, 0.38)), 0.035 * scene.grain)
    dashes = road & (np.abs(offset) < 0.05) & (np.sin(26 / (nearness + 0.3)) > 0)
    edges = road & (np.abs(np.abs(offset) - 0.9) < 0.03)
    scene.paint(dashes | edges, (0.86, 0.85, 0.78))
    scene.mask[below] = _GROUND
    row = int(np.ceil(horizon))
    scene.mask[row - 1 : row + 1] = IGNORE


def _buildings(scene: _Scene, horizon: float) -> None:
    rng, width = scene.rng, scene.width
    left = -width * rng.uniform(0, 0.2)
    while left < width:
        broad = width * rng.uniform(0.14, 0.34)
        if rng.random() < 0.72:
            top = horizon * rng.uniform(0.12, 0.75)
            bottom = horizon + scene.height * rng.uniform(0.0, 0.05)
            part = scene.window(left - 2, top - 0.3 * broad - 2, left + broad + 2, bottom + 2)
            _building(part, left, top, left + broad, bottom)
        left += broad * rng.uniform(0.95, 1.3)


def _building(scene: _Scene, left: float, top: float, right: float, bottom: float) -> None:
    rng = scene.rng
    shape = scene.box(left, top, right, bottom)
    kind = rng.integers(3)
    step = max(5.0, scene.height * rng.uniform(0.05, 0.075))
    column, row = (scene.x - left) / step % 1, (scene.y - top) / step % 1
    window = (column > 0.3) & (column < 0.72) & (row > 0.3) & (row < 0.8) & shape
    if kind == 0:  # brick: the red of cars, with courses
        courses = (scene.y - top) % 3 < 1
        scene.paint(shape, _jitter(rng, (0.60, 0.27, 0.20)), 0.04 * scene.grain - 0.09 * courses)
        scene.paint(window, (0.16, 0.18, 0.22))
    elif kind == 1:  # plaster
        wall = ((0.86, 0.80, 0.66), (0.72, 0.72, 0.73), (0.66, 0.74, 0.68))[rng.integers(3)]
        scene.paint(shape, _jitter(rng, wall), 0.04 * scene.blotches)
        scene.paint(window, (0.30, 0.36, 0.42))
    else:  # glass: the colours of the sky, in a grid
        scene.paint(shape, _jitter(rng, (0.42, 0.56, 0.70)), 0.10 * scene.blotches)
        scene.paint(shape & ((column < 0.14) | (row < 0.14)), (0.24, 0.29, 0.36))
    if rng.random() < 0.5 and kind < 2:  # gable
        middle, half, rise = (left + right) / 2, (right - left) / 2, (right - left) * 0.28
        roof = np.abs(scene.x - middle) < half * (scene.y - top + rise) / rise
        roof = roof & (scene.y < top) & (scene.y >= top - rise)
        tiles = _jitter(rng, (0.40, 0.24, 0.20) if kind else (0.30, 0.29, 0.32))
        scene.paint(roof, tiles, 0.04 * scene.grain)
        shape = shape | roof
    scene.image[:, shape] += 0.07 * scene.light * rng.choice([-1, 1])
    scene.stamp(shape, _BUILDING)


def _tree(scene: _Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    size *= rng.uniform(1.0, 1.5)
    trunk = scene.line(x, foot, x, foot - size * 0.5, max(1.6, size * 0.07))
    kind = rng.integers(3)
    if kind == 1:  # conifer: three cones
        crown = np.zeros_like(trunk)
        for low, high, half in ((0.15, 0.55, 0.30), (0.38, 0.78, 0.23), (0.6, 1.0, 0.16)):
            share = (foot - scene.y - size * low) / (size * (high - low))
            inside = np.abs(scene.x - x) <= half * size * (1 - share)
            crown |= (share >= 0) & (share <= 1) & inside
        color: _Color = (0.11, 0.30, 0.20)
    else:
        crown = scene.ellipse(x, foot - size * 0.68, size * 0.26, size * 0.3)
        for _ in range(4):
            middle, height = x + size * rng.uniform(-0.24, 0.24), size * rng.uniform(0.5, 0.85)
            crown |= scene.ellipse(middle, foot - height, size * 0.17, size * 0.15)
        color = (0.24, 0.43, 0.15) if kind == 0 else (0.70, 0.36, 0.13)  # green, or autumn
    scene.paint(trunk, (0.33, 0.23, 0.15), 0.03 * scene.grain + scene.shade(x, size * 0.05))
    leaves = 0.07 * scene.grain + 0.05 * scene.blotches + scene.shade(x, size * 0.3)
    scene.paint(crown, _jitter(rng, color), leaves)
    scene.stamp(trunk | crown, _TREE)


def _vehicle(scene: _Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    size *= 0.62
    color: _Color
    kind = rng.integers(3)
    gloss = 0.10 * np.clip((foot - scene.y) / size, 0, 1)
    if kind == 0:  # car: box and cabin, red, blue or dark
        color = ((0.66, 0.16, 0.14), (0.15, 0.27, 0.56), (0.17, 0.18, 0.19))[rng.integers(3)]
        half, tall = size * 0.95, size * 0.42
        beside, slope = np.abs(scene.x - x), (foot - tall - scene.y) * 0.35
        cabin = beside < half * 0.62 - slope
        cabin = cabin & (scene.y > foot - size * 0.78) & (scene.y <= foot - tall)
        shape = scene.box(x - half, foot - tall, x + half, foot - size * 0.1) | cabin
        glass = (beside < half * 0.5 - slope) & cabin & (scene.y > foot - size * 0.7)
        glass &= beside > size * 0.04
    elif kind == 1:  # van: tall and white
        color, half = (0.87, 0.87, 0.85), size * 0.9
        shape = scene.box(x - half, foot - size * 1.05, x + half, foot - size * 0.1)
        pane, wide = x + rng.choice([-1, 1]) * half * 0.7, half * 0.22
        glass = scene.box(pane - wide, foot - size * 0.9, pane + wide, foot - size * 0.58)
    else:  # small round bus: green or blue
        color, half = ((0.22, 0.50, 0.36), (0.30, 0.52, 0.72))[rng.integers(2)], size * 0.85
        shape = scene.ellipse(x, foot - size * 0.42, half, size * 0.52)
        shape &= scene.y < foot - size * 0.06
        glass = shape & (np.abs(scene.y - (foot - size * 0.6)) < size * 0.13)
        glass &= ((scene.x - x) / size * 3) % 1 > 0.15
    shadow = scene.ellipse(x, foot, half * 1.05, size * 0.09) & (scene.mask == _GROUND)
    scene.paint(shadow, (0.13, 0.13, 0.14))
    scene.paint(shape, _jitter(rng, color), gloss + scene.shade(x, half))
    reflexes = 0.1 * ((scene.x + scene.y) % (size * 0.5) < size * 0.1)
    scene.paint(glass & shape, (0.20, 0.25, 0.30), reflexes)
    wheels = scene.ellipse(x - half * 0.58, foot - size * 0.12, size * 0.16, size * 0.16)
    wheels |= scene.ellipse(x + half * 0.58, foot - size * 0.12, size * 0.16, size * 0.16)
    scene.paint(wheels, (0.09, 0.09, 0.10))
    lamp = scene.ellipse(x - half * 0.88, foot - size * 0.32, size * 0.06, size * 0.06) & shape
    scene.paint(lamp, (0.98, 0.92, 0.60))
    scene.stamp(shape | wheels, _VEHICLE)


def _person(scene: _Scene, x: float, foot: float, size: float) -> None:
    rng = scene.rng
    size *= 0.72
    thick = max(1.5, size * 0.11)
    kind = rng.integers(3)
    stride = size * (0.16 if kind == 1 else 0.05)
    hip, neck = foot - size * 0.45, foot - size * 0.8
    legs = scene.line(x, hip, x - stride, foot, thick) | scene.line(x, hip, x + stride, foot, thick)
    torso = scene.line(x, hip, x, neck, size * 0.2)
    neck_low, reach = neck + size * 0.06, size * 0.1
    arms = scene.line(x, neck_low, x - stride - reach, hip, thick * 0.7)
    arms |= scene.line(x, neck_low, x + stride + reach, hip - size * 0.06, thick * 0.7)
    head = scene.ellipse(x, foot - size * 0.9, size * 0.085, size * 0.1)
    shirts = ((0.72, 0.18, 0.16), (0.88, 0.88, 0.86), (0.20, 0.32, 0.60), (0.85, 0.70, 0.20))
    shirt = shirts[rng.integers(4)]
    scene.paint(legs, ((0.16, 0.18, 0.28), (0.35, 0.30, 0.25))[rng.integers(2)])
    scene.paint(torso | arms, _jitter(rng, shirt), scene.shade(x, size * 0.12))
    skin = ((0.86, 0.66, 0.54), (0.48, 0.32, 0.22))[rng.integers(2)]
    scene.paint(head, skin, scene.shade(x, size * 0.1))
    shape = legs | torso | arms | head
    if kind == 2:  # umbrella on a thin pole
        top = foot - size * 1.3
        pole = scene.line(x + size * 0.14, hip, x + size * 0.1, top, max(1.2, size * 0.03))
        dome = scene.ellipse(x + size * 0.08, top + size * 0.16, size * 0.34, size * 0.22)
        dome &= scene.y < top + size * 0.16
        scene.paint(pole, (0.15, 0.15, 0.15))
        cloth = _jitter(rng, ((0.16, 0.17, 0.20), (0.50, 0.16, 0.36))[rng.integers(2)])
        scene.paint(dome, cloth, scene.shade(x, size * 0.3))
        shape = shape | pole | dome
    scene.stamp(shape, _PERSON)


def _stranger(scene: _Scene, x: float, foot: float, size: float) -> None:
    """A held-out object: a balloon or a striped tent."""
    rng = scene.rng
    if rng.random() < 0.5:
        y, radius = max(foot - size * rng.uniform(0.9, 1.6), size * 0.25), size * 0.25
        shape = scene.ellipse(x, y, radius, radius * 1.2)
        stripes = np.sin((scene.x - x) / radius * 7) > 0
        scene.paint(shape, _jitter(rng, (0.90, 0.30, 0.62)), scene.shade(x, radius))
        scene.paint(shape & stripes, (0.98, 0.86, 0.30), scene.shade(x, radius))
        string = scene.line(x, y + radius, x, y + radius * 2.4, 1.2)
        scene.paint(string, (0.2, 0.2, 0.2))
        shape = shape | string
    else:
        half, tall = size * 0.55, size * 0.7
        share = (foot - scene.y) / tall
        shape = (share >= 0) & (share <= 1) & (np.abs(scene.x - x) <= half * (1 - share) + 0.5)
        stripes = np.sin(np.arctan2(scene.x - x, tall - (foot - scene.y) + 1e-3) * 14) > 0
        scene.paint(shape, _jitter(rng, (0.16, 0.62, 0.66)), 0.02 * scene.grain)
        scene.paint(shape & stripes, (0.96, 0.95, 0.92))
    scene.stamp(shape, _HELD_OUT)


def _expose(scene: _Scene) -> NDArray[np.uint8]:
    """Light falling off to one side, exposure, white balance, sensor noise."""
    rng = scene.rng
    falloff = 1 + np.float32(0.24 * scene.light) * (scene.x / scene.width - np.float32(0.5))
    balance = rng.uniform(0.85, 1.12) * rng.uniform(0.95, 1.05, 3)
    image = scene.image * (falloff * balance[:, None, None].astype(np.float32))
    image += 0.012 * rng.standard_normal(image.shape, dtype=np.float32)
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _jitter(rng: _Rng, color: Sequence[float]) -> _Color:
    red, green, blue = np.clip(
        np.asarray(color) * rng.uniform(0.88, 1.12) + rng.uniform(-0.03, 0.03, 3), 0, 1
    )
    return float(red), float(green), float(blue)


def _smooth(rng: _Rng, size: tuple[int, ...], tall: int, wide: int) -> NDArray[np.float32]:
    """Smooth noise HxW of about unit variance: random values on a coarse grid, interpolated."""
    height, width = size
    grid = rng.standard_normal((height // tall + 2, width // wide + 2), dtype=np.float32)
    y, x = np.arange(height, dtype=np.float32) / tall, np.arange(width, dtype=np.float32) / wide
    row, column = y.astype(int), x.astype(int)
    fy, fx = (y - row)[:, None], x - column
    fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
    upper = grid[row][:, column] * (1 - fx) + grid[row][:, column + 1] * fx
    lower = grid[row + 1][:, column] * (1 - fx) + grid[row + 1][:, column + 1] * fx
    noise: NDArray[np.float32] = (1.3 * (upper * (1 - fy) + lower * fy)).astype(np.float32)
    return noise


class SyntheticScenesDataModule(SegmentationDataModule):
    """`SyntheticScenes`: scenes of six classes, drawn on the fly, different ones in each split.

    Args:
        size: (height, width) of the scenes in pixels.
        train_length: number of training scenes.
        val_length: number of validation scenes.
        test_length: number of test scenes.
        held_out: put objects of an unknown kind into the test scenes (`anomaly` in the batch).
        scene_seed: other seeds give other scenes; apart from `seed`, so that runs are scored on the
            same ones.
        eval_batch_size: images of a batch of validation, test and prediction.
        crop_size: (height, width) of training images in pixels.
    """

    def __init__(
        self,
        size: tuple[int, int] = (128, 160),
        train_length: int = 512,
        val_length: int = 64,
        test_length: int = 64,
        held_out: bool = False,
        scene_seed: int = 0,
        eval_batch_size: int = 8,
        crop_size: tuple[int, int] = (128, 160),
        **kwargs: Any,
    ) -> None:
        check_arguments(
            SyntheticScenesDataModule.__init__,
            locals(),
            size="[32, inf)",
            train_length="[1, inf)",
            val_length="[1, inf)",
            test_length="[1, inf)",
            scene_seed="[0, inf)",
        )
        super().__init__(
            class_names=SyntheticScenes.CLASS_NAMES,
            palette=SyntheticScenes.PALETTE,
            unknown_classes=None,
            eval_batch_size=eval_batch_size,
            crop_size=crop_size,
            **kwargs,
        )
        self.size = size
        self.lengths: dict[Split, int] = {
            "train": train_length,
            "val": val_length,
            "test": test_length,
        }
        self.held_out = held_out
        self.scene_seed = scene_seed

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> SyntheticScenes:
        """Build the scenes of a split."""
        seed = 3 * self.scene_seed + ("train", "val", "test").index(split)
        held_out = self.held_out and split == "test"
        return SyntheticScenes(self.lengths[split], self.size, seed, held_out, transform)
