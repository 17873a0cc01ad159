"""Augmentation of an image and its mask: the only file that knows albumentations."""

import os
import random
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# albumentations asks a server for its newest version whenever it is imported; training must not need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
from albumentations.augmentations.crops.transforms import BaseCrop, CropSizeError
from albumentations.core.transforms_interface import BaseTransformInitSchema
from pydantic import Field

__all__ = [
    "RandomCropLimitedClass",
    "Transform",
    "apply",
    "compose",
    "default_eval_transform",
    "default_train_transform",
]

Transform: TypeAlias = A.BasicTransform | A.BaseCompose
"""One albumentations transform; in YAML a `class_path` (the short name is enough) and its `init_args`."""


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
        counts = np.bincount(mask[mask != self.ignore_index])
        return bool((counts > 0).sum() > 1 and counts.max() <= self.max_class_share * counts.sum())


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
        A.RandomScale(scale_limit=(scale[0] - 1, scale[1] - 1), p=1.0),
        A.PadIfNeeded(
            min_height=height,
            min_width=width,
            border_mode=cv2.BORDER_CONSTANT,
            fill=0,
            fill_mask=255,
        ),
        RandomCropLimitedClass(height=height, width=width, max_class_share=max_class_share),
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


def default_eval_transform(resize: tuple[int, int] | None = None) -> list[Transform]:
    """Return no transforms at all: images are scored at their own size, unless `resize` (height, width) is given."""
    return [] if resize is None else [A.Resize(height=resize[0], width=resize[1])]


def compose(transforms: Sequence[Transform] | None) -> A.Compose:
    """Chain transforms; warns about one that would pad masks with class 0 instead of 255 (ignore)."""
    for transform in transforms or ():
        if _pads_with_a_class(transform):
            warnings.warn(
                f"{type(transform).__name__} pads masks with {transform.fill_mask}, which is a class: "
                "give it fill_mask=255 if the border is to be ignored.",
                stacklevel=3,
            )
    return A.Compose(list(transforms or ()))


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
    """Transform one sample; the result depends on the arguments only, not on what was drawn before.

    Args:
        transform: what `compose` returned.
        image: HxWx3 uint8.
        mask: HxW class numbers and 255, or None.
        seed: of this sample's random numbers, not negative.
        name: of the sample, for error messages.

    Returns:
        3xHxW float32 in [0, 1] and HxW int64 (or None).

    Raises:
        ValueError: the pipeline crops more than the image has, or returns no numpy image.
    """
    # One generator for the whole chain: `set_random_seed` would give every transform the same stream, so that
    # the flip and the jitter of a sample were correlated, and costs several times as much.
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    targets = {"image": image} if mask is None else {"image": image, "mask": mask}
    try:
        result = transform(**targets)
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
    chw = np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32)
    if array.dtype == np.uint8:
        chw /= 255
    tensor = torch.from_numpy(chw)
    return tensor, None if mask is None else torch.from_numpy(result["mask"].astype(np.int64))


def single_thread(worker_id: int) -> None:
    """Keep OpenCV from starting threads in a DataLoader's worker, where they only compete (a `worker_init_fn`)."""
    cv2.setNumThreads(0)
