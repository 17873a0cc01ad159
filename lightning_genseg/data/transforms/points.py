"""Transforms that move points exactly."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import albumentations as A
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion
from numpy.typing import NDArray

from lightning_genseg.data.transforms.crops import Transform
from lightning_genseg.errors import GenSegError

# They multiply x by the zoom, as if points were counted from the corner of the image and not the
# middle of its first pixel.
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


def exact_movers(transforms: Sequence[Transform]) -> list[Transform]:
    """The transforms, with scalers that move points exactly; ValueError about one that cannot."""
    movers = []
    for transform in transforms:
        if isinstance(transform, A.BaseCompose):
            transform = copy.copy(transform)
            transform.transforms = exact_movers(transform.transforms)
        elif is_moving(transform):
            kind = type(transform)
            cannot = kind.apply_to_keypoints is A.DualTransform.apply_to_keypoints
            if cannot or isinstance(transform, BaseDistortion):  # these are pixels off
                raise GenSegError(
                    f"{kind.__name__} moves pixels but not points and "
                    f"scribbles{'' if cannot else ' exactly'}: leave it out of train_transform "
                    "where the labels are sparse."
                )
            if kind.apply_to_keypoints in _SCALERS:
                transform = copy.deepcopy(transform)  # the user's own stays as it is
                move = partial(_about_corners, transform.apply_to_keypoints)
                transform._key2func["keypoints"] = move
        movers.append(transform)
    return movers


def is_moving(transform: Transform) -> bool:
    """Whether a transform moves pixels, not only changes their values."""
    if isinstance(transform, A.BaseCompose):
        return any(map(is_moving, transform.transforms))
    return isinstance(transform, A.DualTransform)
