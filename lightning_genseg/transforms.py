"""Augmentation of an image and its mask: the only file that knows albumentations."""

import copy
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# albumentations asks a server for its newest version whenever it is imported; training must not need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
from albumentations.augmentations.crops.transforms import BaseCrop, CropSizeError
from albumentations.augmentations.geometric.distortion import BaseDistortion
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets
from pydantic import Field

from lightning_genseg.inference import letterbox_size

__all__ = [
    "Letterbox",
    "RandomCropLimitedClass",
    "RandomObjectCrop",
    "RandomScaledCrop",
    "Transform",
    "apply",
    "apply_all",
    "compose",
    "default_eval_transform",
    "default_train_transform",
    "episode_train_transform",
    "shorter_side",
]

Transform: TypeAlias = A.BasicTransform | A.BaseCompose
"""One albumentations transform; in YAML a `class_path` (the short name is enough) and its `init_args`."""

_Byte = Annotated[int, Field(ge=0, le=255)]


class RandomCropLimitedClass(BaseCrop):  # type: ignore[misc]
    """Random crop in which no class covers more than a given share of the labelled pixels.

    Draws up to `tries` positions and keeps the first that qualifies, otherwise the last: `cat_max_ratio` of
    mmsegmentation's RandomCrop. A crop that holds one class only never qualifies.

    Args:
        height: crop height in pixels.
        width: crop width in pixels.
        max_class_share: largest allowed share of one class among the pixels that are not ignored, in (0, 1].
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

    Only what the crop shows is interpolated (bilinear; masks: nearest), and, where `short_side` is given, only once:
    mmsegmentation's RandomResize with the scale (2048, 512) is `short_side=512, long_side=2048`.

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

    Draws up to `tries` positions and keeps the first that holds `min_share` of the object, otherwise the last. A
    smaller image stands in the middle of `fill`.

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


def default_train_transform(
    crop_size: tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 0.75,
    color_jitter: float = 0.3,
) -> list[Transform]:
    """Random scale, crop, horizontal flip and colour jitter: the usual recipe for scenes.

    Args:
        crop_size: (height, width) of the result in pixels; smaller images are padded, with 255 in the mask.
        scale: range of the random zoom.
        max_class_share: see `RandomCropLimitedClass`.
        color_jitter: largest relative change of brightness, contrast and saturation (hue: a fifth of it); 0 is off.
    """
    height, width = crop_size
    transforms: list[Transform] = [
        RandomScaledCrop(height, width, scale=scale, max_class_share=max_class_share),
        A.HorizontalFlip(p=0.5),
    ]
    if color_jitter > 0:
        limits = (max(0.0, 1 - color_jitter), 1 + color_jitter)
        hue = min(0.5, color_jitter / 5)
        transforms.append(
            A.ColorJitter(
                brightness=limits, contrast=limits, saturation=limits, hue=(-hue, hue), p=0.8
            )
        )
    return transforms


def episode_train_transform(
    size: int, scale: tuple[float, float] = (0.9, 1.1), min_share: float = 0.85
) -> list[Transform]:
    """Zoom, rotation by up to 10 degrees, blur, flip and a crop that keeps the object: the recipe of PFENet and BAM.

    Args:
        size: side of the square crop in pixels; around a smaller image stands ImageNet's mean colour, with 255 in the mask.
        scale: range of the random zoom.
        min_share: see `RandomObjectCrop`.
    """
    mean = (124, 116, 104)
    return [
        A.RandomScale((scale[0] - 1, scale[1] - 1), p=1.0),
        A.Rotate((-10, 10), fill=mean, fill_mask=255, p=0.5),
        A.GaussianBlur((5, 5), (1.1, 1.1), p=0.5),  # OpenCV's own width for 5 x 5 pixels
        A.HorizontalFlip(p=0.5),
        RandomObjectCrop(size, size, min_share, fill=mean),
    ]


def default_eval_transform(resize: tuple[int, int] | None = None) -> list[Transform]:
    """Return no transforms at all: images are scored at their own size, unless `resize` (height, width) is given."""
    return [] if resize is None else [A.Resize(height=resize[0], width=resize[1])]


def shorter_side(pixels: int) -> list[Transform]:
    """Resize images to a shorter side of so many pixels."""
    return [A.SmallestMaxSize(pixels)]


def compose(transforms: Sequence[Transform] | None, points: bool = False) -> A.Compose:
    """Chain transforms, of points as well if asked to.

    Warns about one that would pad masks with class 0 instead of 255 (ignore); ValueError about one that cannot move
    points.
    """
    for transform in transforms or ():
        if _pads_with_a_class(transform):
            warnings.warn(
                f"{type(transform).__name__} pads masks with {transform.fill_mask}, which is a class: "
                "give it fill_mask=255 if the border is to be ignored.",
                stacklevel=3,
            )
    movers = _movers(transforms or ()) if points else list(transforms or ())
    moving = points and any(_moves(transform) for transform in movers)
    return A.Compose(
        movers,
        additional_targets={"anomaly": "mask", "unlabelled": "mask", "valid": "mask"},
        # Those outside stay, because a line that crosses the border needs both of its ends.
        keypoint_params=A.KeypointParams("xy", remove_invisible=False, check_each_transform=False)
        if moving
        else None,
    )


# They multiply x by the zoom, as if points were counted from the corner of the image and not the middle of its first pixel.
_SCALERS = {
    kind.apply_to_keypoints
    for kind in (
        A.Resize,
        A.RandomScale,
        A.LongestMaxSize,
        A.SmallestMaxSize,
        A.RandomSizedCrop,
        A.RandomResizedCrop,
        A.RandomSizedBBoxSafeCrop,
        A.CropAndPad,
    )
}


def _about_corners(
    move: Callable[..., NDArray[Any]], points: NDArray[Any], **params: Any
) -> NDArray[Any]:
    half = np.zeros(points.shape[1])
    half[:2] = 0.5  # of x and y
    return move(points + half, **params) - half


def _movers(transforms: Sequence[Transform]) -> list[Transform]:
    """The transforms, with scalers that move points exactly; ValueError about one that cannot."""
    movers = []
    for transform in transforms:
        if isinstance(transform, A.BaseCompose):
            transform = copy.copy(transform)
            transform.transforms = _movers(transform.transforms)
        elif _moves(transform):
            kind = type(transform)
            cannot = kind.apply_to_keypoints is A.DualTransform.apply_to_keypoints
            if cannot or isinstance(transform, BaseDistortion):  # these are pixels off
                raise ValueError(
                    f"{kind.__name__} moves pixels but not points and scribbles{'' if cannot else ' exactly'}: leave it out "
                    "of train_transform where the labels are sparse."
                )
            if kind.apply_to_keypoints in _SCALERS:
                transform = copy.deepcopy(transform)  # the user's own stays as it is
                move = partial(_about_corners, transform.apply_to_keypoints)
                transform._key2func["keypoints"] = move
        movers.append(transform)
    return movers


def _moves(transform: Transform) -> bool:
    if isinstance(transform, A.BaseCompose):
        return any(map(_moves, transform.transforms))
    return isinstance(transform, A.DualTransform)


def _pads_with_a_class(transform: Transform) -> bool:
    return (
        getattr(transform, "fill_mask", None) not in (None, 255)
        and getattr(transform, "border_mode", cv2.BORDER_CONSTANT) == cv2.BORDER_CONSTANT
        and getattr(transform, "pad_if_needed", True)
    )


def apply(
    transform: A.Compose,
    image: NDArray[np.uint8],
    mask: NDArray[np.integer[Any]] | None,
    seed: int,
    name: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Do as `apply_all` to an image and, unless it is None, its mask."""
    result = apply_all(transform, image, {} if mask is None else {"mask": mask}, seed, name)
    return result["image"], result.get("mask")


def apply_all(
    transform: A.Compose,
    image: NDArray[np.uint8],
    masks: Mapping[str, NDArray[np.integer[Any]]],
    seed: int,
    name: str = "",
    points: NDArray[np.floating[Any]] | None = None,
) -> dict[str, Tensor]:
    """Transform one sample; the result depends on the arguments only, not on what was drawn before.

    Args:
        transform: what `compose` returned.
        image: HxWx3 uint8.
        masks: `mask` HxW class numbers and 255, `anomaly` HxW 1, 0 and 255, `unlabelled` HxW 1 and 0, `valid` HxW, which
            padding fills with 255; any of them. They move together.
        seed: of this sample's random numbers, not negative.
        name: of the sample, for error messages.
        points: P x 2 or more, x and y in pixels (0 = middle of the first) and what goes with them; P may be 0.

    Returns:
        `image` 3xHxW float32 in [0, 1], each of the masks HxW int64 (255 where the transforms have padded), and where
        there were `points` these as float64, in their order, also those that have left the image.

    Raises:
        ValueError: the pipeline crops more than the image has, or returns no numpy image.
    """
    # One generator for the whole chain: `set_random_seed` would give every transform the same stream, so that
    # the flip and the jitter of a sample were correlated, and costs several times as much.
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    # Without a transform that moves them albumentations would warn of points; without points it loses a column.
    keypoints = {}
    if points is not None and len(points) and "keypoints" in transform.processors:
        keypoints = {"keypoints": points.astype(np.float64)}
    try:
        result = transform(image=image, **masks, **keypoints)
    except CropSizeError as error:
        raise ValueError(
            f"a crop of the transforms is larger than image '{name}' ({image.shape[0]}x{image.shape[1]} as read; {error}): "
            "make the crop smaller or put PadIfNeeded(fill=0, fill_mask=255) of the crop's size before it."
        ) from error
    array = result["image"]
    if not isinstance(array, np.ndarray):
        raise ValueError(
            f"the transforms turned image '{name}' into {type(array).__name__}: "
            "remove ToTensorV2, tensors are made after the transforms."
        )
    # In numpy: torch would wake its threads for a millisecond's work, and they spin on the cores of the training.
    if array.dtype == np.uint8:
        chw = np.empty((array.shape[2], *array.shape[:2]), np.float32)
        for plane, target in zip(cv2.split(array), chw, strict=True):  # twice as fast as at once
            np.divide(plane, np.float32(255), out=target)
    else:
        chw = np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32)
    labels = {key: torch.from_numpy(result[key].astype(np.int64)) for key in masks}
    if points is not None:
        moved = np.asarray(result.get("keypoints", points))
        labels["points"] = torch.from_numpy(moved.astype(np.float64))
    return {"image": torch.from_numpy(chw), **labels}


def single_thread(worker_id: int) -> None:
    """Keep OpenCV from starting threads in a DataLoader's worker, where they only compete (a `worker_init_fn`)."""
    cv2.setNumThreads(0)
