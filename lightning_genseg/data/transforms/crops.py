"""Crops and zooms that albumentations does not have."""

from typing import Annotated, Any, TypeAlias

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.crops.transforms import BaseCrop, CropSizeError
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets
from numpy.typing import NDArray
from pydantic import Field

from lightning_genseg.ops.letterbox import letterbox_size

Transform: TypeAlias = A.BasicTransform | A.BaseCompose
"""One albumentations transform; in YAML a `class_path` (the short name is enough) and its `init_args`."""

_Byte = Annotated[int, Field(ge=0, le=255)]


class RandomCropLimitedClass(BaseCrop):  # type: ignore[misc]
    """Random crop in which no class covers more than a given share of the labelled pixels.

    Draws up to `tries` positions and keeps the first that qualifies, otherwise the last:
    `cat_max_ratio` of mmsegmentation's RandomCrop. A crop that holds one class only never
    qualifies.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        max_class_share: largest allowed share of one class among the pixels that are not ignored,
            in (0, 1].
        ignore_index: mask value that is not counted.
        tries: number of positions drawn at most.
        p: probability of cropping.
    """

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Ranges of the arguments, checked by albumentations."""

        height: int = Field(ge=1)
        width: int = Field(ge=1)
        max_class_share: float = Field(gt=0, le=1)
        ignore_index: int
        tries: int = Field(ge=1)

    def __init__(
        self,
        height: int,
        width: int,
        max_class_share: float = 0.75,
        ignore_index: int = 255,
        tries: int = 10,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.max_class_share = max_class_share
        self.ignore_index = ignore_index
        self.tries = tries

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Choose the crop from the mask; without a mask the first position is taken."""
        rows, columns = params["shape"][0] - self.height, params["shape"][1] - self.width
        if rows < 0 or columns < 0:
            raise CropSizeError(
                f"crop {self.height}x{self.width} exceeds {params['shape'][0]}x{params['shape'][1]}"
            )
        mask = data.get("mask")
        top = left = 0
        for _ in range(self.tries):
            top, left = self.py_random.randint(0, rows), self.py_random.randint(0, columns)
            if mask is None or self._is_mixed(
                mask[top : top + self.height, left : left + self.width]
            ):
                break
        return {"crop_coords": (left, top, left + self.width, top + self.height)}

    def _is_mixed(self, mask: NDArray[np.integer[Any]]) -> bool:
        return is_mixed(mask, self.max_class_share, self.ignore_index)


class RandomScaledCrop(A.DualTransform):  # type: ignore[misc]
    """Random zoom and a random crop of it: `RandomScale`, `PadIfNeeded` and `RandomCropLimitedClass` in one.

    Only what the crop shows is interpolated (bilinear; masks: nearest), and, where `short_side` is
    given, only once: mmsegmentation's RandomResize with the scale (2048, 512) is `short_side=512,
    long_side=2048`.

    Args:
        height: crop height in pixels; a smaller image stands in the middle of `fill`.
        width: crop width in pixels.
        scale: range of the zoom.
        short_side: pixels of the shorter side at a zoom of 1; None: as in the file.
        long_side: most pixels of the longer side at a zoom of 1.
        max_class_share: see `RandomCropLimitedClass`, as the next.
        tries: number of positions drawn at most.
        fill: image value around a smaller image, or red, green, blue.
        ignore_index: mask value around it, and one that is not counted.
        p: probability of doing it.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.KEYPOINTS)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Ranges of the arguments, checked by albumentations."""

        height: int = Field(ge=1)
        width: int = Field(ge=1)
        scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
        short_side: int | None = Field(ge=1)
        long_side: int | None = Field(ge=1)
        max_class_share: float = Field(gt=0, le=1)
        tries: int = Field(ge=1)
        fill: _Byte | tuple[_Byte, _Byte, _Byte]
        ignore_index: int

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        long_side: int | None = None,
        max_class_share: float = 0.75,
        tries: int = 10,
        fill: int | tuple[int, int, int] = 0,
        ignore_index: int = 255,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.scale = scale
        self.short_side = short_side
        self.long_side = long_side
        self.max_class_share = max_class_share
        self.tries = tries
        self.fill = fill
        self.ignore_index = ignore_index

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the zoom, then a position by the mask; `window` is top, left, height, width in the zoomed image."""
        rows, columns = params["shape"][:2]
        zoom = self.py_random.uniform(*self.scale)
        limits = [
            wanted / side
            for wanted, side in (
                (self.short_side, min(rows, columns)),
                (self.long_side, max(rows, columns)),
            )
            if wanted is not None
        ]
        zoom *= min(limits, default=1.0)
        size = max(1, int(rows * zoom)), max(1, int(columns * zoom))
        height, width = min(self.height, size[0]), min(self.width, size[1])
        mask = data.get("mask")
        window = (0, 0, height, width)
        for _ in range(self.tries):
            top = self.py_random.randint(0, size[0] - height)
            left = self.py_random.randint(0, size[1] - width)
            window = (top, left, height, width)
            if mask is None or is_mixed(
                _zoom_mask(mask, size, window), self.max_class_share, self.ignore_index
            ):
                break
        return {"size": size, "window": window}

    def apply(
        self,
        img: NDArray[Any],
        size: tuple[int, int],
        window: tuple[int, int, int, int],
        **params: Any,
    ) -> NDArray[Any]:
        """Cut the image."""
        return pad_around(_zoom_image(img, size, window), self.height, self.width, self.fill)

    def apply_to_mask(
        self,
        mask: NDArray[Any],
        size: tuple[int, int],
        window: tuple[int, int, int, int],
        **params: Any,
    ) -> NDArray[Any]:
        """Cut the mask."""
        part = _zoom_mask(mask, size, window)
        return pad_around(part, self.height, self.width, self.ignore_index)

    def apply_to_keypoints(
        self,
        keypoints: NDArray[Any],
        size: tuple[int, int],
        window: tuple[int, int, int, int],
        **params: Any,
    ) -> NDArray[Any]:
        """Move points (x, y and what follows) as the pixels under them move."""
        rows, columns = params["shape"][:2]
        top, left, height, width = window
        moved = keypoints.astype(np.float64)
        moved[:, 0] = (moved[:, 0] + 0.5) * (size[1] / columns) - 0.5
        moved[:, 1] = (moved[:, 1] + 0.5) * (size[0] / rows) - 0.5
        moved[:, 0] += (self.width - width) // 2 - left
        moved[:, 1] += (self.height - height) // 2 - top
        return moved


class RandomObjectCrop(A.DualTransform):  # type: ignore[misc]
    """Random crop that keeps most of the object, the pixels of 1 in a mask of 1, 0 and 255: BAM's `Crop`.

    Draws up to `tries` positions and keeps the first that holds `min_share` of the object,
    otherwise the last. A smaller image stands in the middle of `fill`.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        min_share: of the object's pixels, in [0, 1]; 0: any position.
        tries: number of positions drawn at most.
        fill: image value around a smaller image, or red, green, blue.
        ignore_index: mask value around it.
        p: probability of cropping.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Ranges of the arguments, checked by albumentations."""

        height: int = Field(ge=1)
        width: int = Field(ge=1)
        min_share: float = Field(ge=0, le=1)
        tries: int = Field(ge=1)
        fill: _Byte | tuple[_Byte, _Byte, _Byte]
        ignore_index: int

    def __init__(
        self,
        height: int,
        width: int,
        min_share: float = 0.85,
        tries: int = 32,
        fill: int | tuple[int, int, int] = 0,
        ignore_index: int = 255,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.min_share = min_share
        self.tries = tries
        self.fill = fill
        self.ignore_index = ignore_index

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Choose the crop from the mask, `window` as slices; without a mask the first position is taken."""
        rows, columns = params["shape"][:2]
        height, width = min(self.height, rows), min(self.width, columns)
        mask = data.get("mask")
        needed = 0.0 if mask is None else self.min_share * np.count_nonzero(mask == 1)
        window = slice(0), slice(0)
        for _ in range(self.tries):
            top = self.py_random.randint(0, rows - height)
            left = self.py_random.randint(0, columns - width)
            window = slice(top, top + height), slice(left, left + width)
            if mask is None or np.count_nonzero(mask[window] == 1) >= needed:
                break
        return {"window": window}

    def apply(self, img: NDArray[Any], window: tuple[slice, slice], **params: Any) -> NDArray[Any]:
        """Cut the image."""
        return pad_around(img[window], self.height, self.width, self.fill)

    def apply_to_mask(
        self, mask: NDArray[Any], window: tuple[slice, slice], **params: Any
    ) -> NDArray[Any]:
        """Cut the mask."""
        return pad_around(mask[window], self.height, self.width, self.ignore_index)


class Letterbox(A.DualTransform):  # type: ignore[misc]
    """Resize to `letterbox_size` and put it into the upper left corner of a square (image: bilinear; mask: nearest).

    Args:
        size: side of the square in pixels, at least 8.
        fill: image value of the rest, or red, green, blue.
        ignore_index: mask value of the rest.
        p: probability of doing it.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Ranges of the arguments, checked by albumentations."""

        size: int = Field(ge=8)
        fill: _Byte | tuple[_Byte, _Byte, _Byte]
        ignore_index: int

    def __init__(
        self,
        size: int,
        fill: int | tuple[int, int, int] = 0,
        ignore_index: int = 255,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.size = size
        self.fill = fill
        self.ignore_index = ignore_index

    def apply(self, img: NDArray[Any], **params: Any) -> NDArray[Any]:
        """Resize and pad the image."""
        return self._place(img, self.fill, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: NDArray[Any], **params: Any) -> NDArray[Any]:
        """Resize and pad the mask."""
        return self._place(mask, self.ignore_index, cv2.INTER_NEAREST)

    def _place(
        self, array: NDArray[Any], value: int | tuple[int, int, int], interpolation: int
    ) -> NDArray[Any]:
        height, width = letterbox_size(array.shape[0], array.shape[1], self.size)
        placed = np.full((self.size, self.size, *array.shape[2:]), value, array.dtype)
        placed[:height, :width] = cv2.resize(array, (width, height), interpolation=interpolation)
        return placed


def pad_around(
    array: NDArray[Any], height: int, width: int, value: int | tuple[int, int, int]
) -> NDArray[Any]:
    """Put an array that is not larger than height x width into the middle of `value`."""
    rows, columns = height - array.shape[0], width - array.shape[1]
    if not rows and not columns:
        return np.ascontiguousarray(array)
    padded = np.full((height, width, *array.shape[2:]), value, array.dtype)
    top, left = rows // 2, columns // 2
    padded[top : top + array.shape[0], left : left + array.shape[1]] = array
    return padded


def is_mixed(mask: NDArray[np.integer[Any]], max_class_share: float, ignore_index: int) -> bool:
    """Whether HxW labels hold two classes or more, none with more than the given share of the pixels not ignored."""
    if mask.dtype == np.uint8:  # ten times as fast
        counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()
        counts[ignore_index : ignore_index + 1] = 0
    else:
        counts = np.bincount(mask[mask != ignore_index])
    return bool((counts > 0).sum() > 1 and counts.max() <= max_class_share * counts.sum())


def _zoom_image(
    image: NDArray[Any], size: tuple[int, int], window: tuple[int, int, int, int]
) -> NDArray[Any]:
    """Return `cv2.resize(image, size)[window]`, by the quicker of two ways."""
    top, left, height, width = window
    if size == image.shape[:2]:
        return image[top : top + height, left : left + width]
    if size[0] * size[1] <= 4 * height * width:
        zoomed = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        return zoomed[top : top + height, left : left + width]
    # Centres of pixels: x in the zoomed image lies at (x + 0.5) / zoom - 0.5 in the image.
    axes = []
    for start, count, zoomed_side, side in (
        (left, width, size[1], image.shape[1]),
        (top, height, size[0], image.shape[0]),
    ):
        step = side / zoomed_side
        first = (start + 0.5) * step - 0.5
        low = max(0, int(np.floor(first)))
        high = min(side, int(np.ceil(first + (count - 1) * step)) + 2)
        axes.append((step, first - low, slice(low, high)))
    (step_x, x, columns), (step_y, y, rows) = axes
    part: NDArray[Any] = cv2.warpAffine(
        image[rows, columns],
        np.array([[step_x, 0, x], [0, step_y, y]]),
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return part


def _zoom_mask(
    mask: NDArray[Any], size: tuple[int, int], window: tuple[int, int, int, int]
) -> NDArray[Any]:
    """Return `cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)[window]`."""
    top, left, height, width = window
    rows, columns = (
        # The same rounding as OpenCV's, down to the last bit.
        np.minimum(
            (np.arange(start, start + count) * (1 / (zoomed / side))).astype(np.intp), side - 1
        )
        for start, count, zoomed, side in (
            (top, height, size[0], mask.shape[0]),
            (left, width, size[1], mask.shape[1]),
        )
    )
    part: NDArray[Any] = np.take(np.take(mask, rows, 0), columns, 1)
    return part
