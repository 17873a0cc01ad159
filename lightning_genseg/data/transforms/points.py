"""Transforms that move points exactly."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import albumentations as A
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion

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


class _AboutCorners(A.Sequential):  # type: ignore[misc]
    """One transform, whose points are counted from the corner of the image while it moves them."""

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> dict[str, Any]:
        """Transform one sample; as without this class no number is drawn for the chain of one."""
        (transform,) = self.transforms
        points = data.get("keypoints")
        if points is None:
            unmoved: dict[str, Any] = transform(force_apply=force_apply, **data)
            return unmoved
        half = np.zeros(points.shape[1])
        half[:2] = 0.5  # of x and y
        result: dict[str, Any] = transform(
            force_apply=force_apply, **{**data, "keypoints": points + half}
        )
        return {**result, "keypoints": result["keypoints"] - half}


def exact_movers(transforms: Sequence[Transform]) -> list[Transform]:
    """The transforms, with scalers that move points exactly; GenSegError about one that cannot."""
    movers = []
    for transform in transforms:
        if isinstance(transform, A.BaseCompose):
            transform = copy.copy(transform)  # the user's own stays as it is
            transform.transforms = exact_movers(transform.transforms)
        elif isinstance(transform, A.DualTransform):
            kind = type(transform)
            cannot = kind.apply_to_keypoints is A.DualTransform.apply_to_keypoints
            if cannot or isinstance(transform, BaseDistortion):  # these are pixels off
                raise GenSegError(
                    f"{kind.__name__} moves pixels but not points and "
                    f"scribbles{'' if cannot else ' exactly'}: leave it out of train_transform "
                    "where the labels are sparse."
                )
            if kind.apply_to_keypoints in _SCALERS:
                transform = _AboutCorners([transform], p=1.0)
        movers.append(transform)
    return movers


def leaves(transforms: Iterable[Transform]) -> Iterator[A.BasicTransform]:
    """All transforms, also those inside of OneOf, Sequential and the like."""
    for transform in transforms:
        if isinstance(transform, A.BaseCompose):
            yield from leaves(transform.transforms)
        else:
            yield transform
