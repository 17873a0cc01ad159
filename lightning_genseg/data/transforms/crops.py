"""Crops and zooms that albumentations does not have."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.crops.transforms import CropSizeError
from albumentations.core.type_definitions import Targets
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.ops.letterbox import letterbox_size

Transform: TypeAlias = A.BasicTransform | A.BaseCompose
"""An albumentations transform; in YAML a `class_path` (a short name will do) and `init_args`."""

Window: TypeAlias = tuple[slice, slice]
"""Rows and columns."""

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = dict[str, Any]


class PaddedPart(A.DualTransform):  # type: ignore[misc]
    """A part of the image, padded to `height` x `width`: the one place that pads masks with 255.

    Args:
        height: of the result in pixels.
        width: of the result in pixels.
        fill: image value around a smaller part, or red, green, blue.
        ignore_index: mask value around it.
        p: probability of doing it.
    """

    _targets: tuple[Targets, ...] = (Targets.IMAGE, Targets.MASK)
    centred = True

    def __init__(
        self,
        height: int,
        width: int,
        fill: int | tuple[int, int, int] = 0,
        ignore_index: int = 255,
        p: float = 1.0,
    ) -> None:
        check_arguments(
            PaddedPart.__init__, locals(), height="[1, inf)", width="[1, inf)", fill="[0, 255]"
        )
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.fill = fill
        self.ignore_index = ignore_index

    @abstractmethod
    def part(self, array: Array, nearest: bool, **params: Any) -> Array:
        """The part of an image or (`nearest`) a mask, not larger than the result."""

    def apply(self, img: Array, **params: Any) -> Array:
        """Cut and pad the image."""
        return self._pad(self.part(img, nearest=False, **params), self.fill)

    def apply_to_mask(self, mask: Array, **params: Any) -> Array:
        """Cut and pad the mask."""
        return self._pad(self.part(mask, nearest=True, **params), self.ignore_index)

    def _pad(self, part: Array, value: int | tuple[int, int, int]) -> Array:
        height, width = part.shape[:2]
        if (height, width) == (self.height, self.width):
            return np.ascontiguousarray(part)
        padded = np.full((self.height, self.width, *part.shape[2:]), value, part.dtype)
        top, left = self.margins(height, width)
        padded[top : top + height, left : left + width] = part
        return padded

    def margins(self, height: int, width: int) -> tuple[int, int]:
        """Rows above and columns left of a part of this size."""
        return ((self.height - height) // 2, (self.width - width) // 2) if self.centred else (0, 0)


class RandomScaledCrop(PaddedPart):
    """Random zoom and crop: `RandomScale`, `PadIfNeeded` and `RandomCropLimitedClass` in one.

    Draws up to `tries` positions and keeps the first in which no class covers too much, otherwise
    the last. Only what the crop shows is interpolated (bilinear; masks: nearest), and, where
    `short_side` is given, only once: mmsegmentation's RandomResize with the scale (2048, 512) is
    `short_side=512, long_side=2048`. A smaller image stands in the middle of `fill`.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        scale: range of the zoom.
        short_side: pixels of the shorter side at a zoom of 1; None: as in the file.
        long_side: most pixels of the longer side at a zoom of 1.
        max_class_share: largest share of one class among the pixels that are not ignored, in
            (0, 1]; a crop with one class only never qualifies.
        tries: number of positions drawn at most.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.KEYPOINTS)

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        long_side: int | None = None,
        max_class_share: float = 0.75,
        tries: int = 10,
        **kwargs: Any,
    ) -> None:
        ranges = dict.fromkeys(("short_side", "long_side", "tries"), "[1, inf)")
        ranges |= {"scale": "(0, inf)", "max_class_share": "(0, 1]"}
        check_arguments(RandomScaledCrop.__init__, locals(), **ranges)
        super().__init__(height, width, **kwargs)
        self.scale = scale
        self.short_side = short_side
        self.long_side = long_side
        self.max_class_share = max_class_share
        self.tries = tries

    def get_params_dependent_on_data(self, params: Params, data: Params) -> Params:
        """Draw the `size` of the zoomed image, then the `window` in it by the mask."""
        size = self.draw_size(*params["shape"][:2])
        mask = data.get("mask")

        def qualifies(window: Window) -> bool:
            return mask is None or self._is_mixed(_zoom_mask(mask, size, window))

        crop = min(self.height, size[0]), min(self.width, size[1])
        return {"size": size, "window": draw_window(self, size, crop, qualifies)}

    def draw_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Draw the size of the zoomed image."""
        zoom = self.py_random.uniform(*self.scale)
        sides = (self.short_side, min(rows, columns)), (self.long_side, max(rows, columns))
        zoom *= min((wanted / side for wanted, side in sides if wanted is not None), default=1.0)
        return max(1, int(rows * zoom)), max(1, int(columns * zoom))

    def _is_mixed(self, mask: NDArray[np.integer[Any]]) -> bool:
        return is_mixed(mask, self.max_class_share, self.ignore_index)

    def part(self, array: Array, nearest: bool, **params: Any) -> Array:
        """What the window shows."""
        return (_zoom_mask if nearest else _zoom_image)(array, params["size"], params["window"])

    def apply_to_keypoints(self, keypoints: Array, **params: Any) -> Array:
        """Move points (x, y and what follows) as the pixels under them move."""
        moved = keypoints.astype(np.float64)
        shown = [axis.stop - axis.start for axis in params["window"]]
        margins = self.margins(*shown)
        for column, axis in ((0, 1), (1, 0)):  # x and y
            if params["size"][axis] != params["shape"][axis]:
                ratio = params["size"][axis] / params["shape"][axis]
                moved[:, column] = (moved[:, column] + 0.5) * ratio - 0.5
            moved[:, column] += margins[axis] - params["window"][axis].start
        return moved


class RandomCropLimitedClass(RandomScaledCrop):
    """`RandomScaledCrop` without zoom: a crop in which no class covers more than a given share.

    `cat_max_ratio` of mmsegmentation's RandomCrop. A smaller image is an error.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        max_class_share: largest share of one class among the pixels that are not ignored, in
            (0, 1]; a crop with one class only never qualifies.
    """

    def __init__(
        self, height: int, width: int, max_class_share: float = 0.75, **kwargs: Any
    ) -> None:
        super().__init__(
            height,
            width,
            scale=(1.0, 1.0),
            short_side=None,
            long_side=None,
            max_class_share=max_class_share,
            fill=0,
            **kwargs,
        )

    def draw_size(self, rows: int, columns: int) -> tuple[int, int]:
        """The image's own size."""
        if rows < self.height or columns < self.width:
            raise CropSizeError(f"crop {self.height}x{self.width} exceeds {rows}x{columns}")
        return rows, columns


class RandomObjectCrop(PaddedPart):
    """Random crop that keeps most of the object, the pixels of 1 in a mask of 1, 0 and 255.

    Draws up to `tries` positions and keeps the first that holds `min_share` of the object,
    otherwise the last. A smaller image stands in the middle of `fill`.

    Source: `Crop` in the code of Lang et al.: Learning what not to segment (BAM), CVPR 2022.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        min_share: of the object's pixels, in [0, 1]; 0: any position.
        tries: number of positions drawn at most.
    """

    def __init__(
        self, height: int, width: int, min_share: float = 0.85, tries: int = 32, **kwargs: Any
    ) -> None:
        check_arguments(RandomObjectCrop.__init__, locals(), min_share="[0, 1]", tries="[1, inf)")
        super().__init__(height, width, **kwargs)
        self.min_share = min_share
        self.tries = tries

    def get_params_dependent_on_data(self, params: Params, data: Params) -> Params:
        """Choose the `window` from the mask."""
        rows, columns = params["shape"][:2]
        mask = data.get("mask")
        needed = 0.0 if mask is None else self.min_share * np.count_nonzero(mask == 1)

        def qualifies(window: Window) -> bool:
            return mask is None or bool(np.count_nonzero(mask[window] == 1) >= needed)

        crop = min(self.height, rows), min(self.width, columns)
        return {"window": draw_window(self, (rows, columns), crop, qualifies)}

    def part(self, array: Array, nearest: bool, **params: Any) -> Array:
        """What the window shows."""
        shown: Array = array[params["window"]]
        return shown


class Letterbox(PaddedPart):
    """Resize to `letterbox_size` and put it into the upper left corner of a square.

    Images are interpolated bilinearly, of masks the nearest pixel is taken.

    Args:
        size: side of the square in pixels, at least 8.
    """

    centred = False

    def __init__(self, size: int, **kwargs: Any) -> None:
        check_arguments(Letterbox.__init__, locals(), size="[8, inf)")
        super().__init__(size, size, **kwargs)
        self.size = size

    def part(self, array: Array, nearest: bool, **params: Any) -> Array:
        """The whole, resized."""
        height, width = letterbox_size(array.shape[0], array.shape[1], self.size)
        how = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
        resized: Array = cv2.resize(array, (width, height), interpolation=how)
        return resized


def draw_window(
    transform: Any,
    size: tuple[int, int],
    crop: tuple[int, int],
    qualifies: Callable[[Window], bool],
) -> Window:
    """Draw up to `transform.tries` positions of a crop; the first that qualifies, or the last."""
    window = slice(0), slice(0)
    for _ in range(transform.tries):
        top = transform.py_random.randint(0, size[0] - crop[0])
        left = transform.py_random.randint(0, size[1] - crop[1])
        window = slice(top, top + crop[0]), slice(left, left + crop[1])
        if qualifies(window):
            break
    return window


def is_mixed(mask: NDArray[np.integer[Any]], max_class_share: float, ignore_index: int) -> bool:
    """Whether labels hold two classes or more, none with more than a share of what is labelled."""
    if mask.dtype == np.uint8:  # ten times as fast
        counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
        counts[ignore_index : ignore_index + 1] = 0
    else:
        counts = np.bincount(mask[mask != ignore_index])
    return bool((counts > 0).sum() > 1 and counts.max() <= max_class_share * counts.sum())


def _zoom_image(image: Array, size: tuple[int, int], window: Window) -> Array:
    """Return `cv2.resize(image, size)[window]`, by the quicker of two ways."""
    part: Array
    if size == image.shape[:2]:
        part = image[window]
        return part
    height, width = (axis.stop - axis.start for axis in window)
    if size[0] * size[1] <= 4 * height * width:
        part = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)[window]
        return part
    # Centres of pixels: x in the zoomed image lies at (x + 0.5) / zoom - 0.5 in the image.
    axes = []
    for shown, zoomed_side, side in zip(window, size, image.shape, strict=False):
        step = side / zoomed_side
        first = (shown.start + 0.5) * step - 0.5
        low = max(0, int(np.floor(first)))
        high = min(side, int(np.ceil(first + (shown.stop - shown.start - 1) * step)) + 2)
        axes.append((step, first - low, slice(low, high)))
    (step_y, y, rows), (step_x, x, columns) = axes
    part = cv2.warpAffine(
        image[rows, columns],
        np.array([[step_x, 0, x], [0, step_y, y]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return part


def _zoom_mask(mask: Array, size: tuple[int, int], window: Window) -> Array:
    """Return `cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)[window]`."""
    part: Array
    if size == mask.shape[:2]:
        part = mask[window]
        return part
    rows, columns = (
        # The same rounding as OpenCV's, down to the last bit.
        np.minimum(
            (np.arange(shown.start, shown.stop) * (1 / (zoomed / side))).astype(np.intp), side - 1
        )
        for shown, zoomed, side in zip(window, size, mask.shape, strict=False)
    )
    part = np.take(np.take(mask, rows, 0), columns, 1)
    return part
