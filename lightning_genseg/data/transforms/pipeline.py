"""From a list of transforms to tensors."""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.augmentations.crops.transforms import CropSizeError
from numpy.typing import NDArray
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.transforms.crops import RandomObjectCrop, RandomScaledCrop, Transform
from lightning_genseg.data.transforms.points import exact_movers, leaves
from lightning_genseg.errors import GenSegError


def default_train_transform(
    crop_size: tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 0.75,
    color_jitter: float = 0.3,
    short_side: int | None = None,
) -> list[Transform]:
    """Random scale, crop, horizontal flip and colour jitter: the usual recipe for scenes.

    Args:
        crop_size: (height, width) of the result in pixels; smaller images are padded, with 255 in
            the mask.
        scale: range of the random zoom.
        max_class_share: largest share of one class in the labelled pixels of a crop, if possible.
        color_jitter: largest relative change of brightness, contrast and saturation (hue: a fifth
            of it); 0 is off.
        short_side: pixels of the shorter side before the zoom; None: as in the file.
    """
    check_arguments(default_train_transform, locals(), color_jitter="[0, inf)")
    transforms: list[Transform] = [
        RandomScaledCrop(
            *crop_size, scale=scale, short_side=short_side, max_class_share=max_class_share
        ),
        A.HorizontalFlip(p=0.5),
    ]
    if color_jitter > 0:
        limits, hue = (max(0.0, 1 - color_jitter), 1 + color_jitter), min(0.5, color_jitter / 5)
        transforms.append(A.ColorJitter(limits, limits, limits, (-hue, hue), p=0.8))
    return transforms


def episode_train_transform(
    size: int, scale: tuple[float, float] = (0.9, 1.1), min_share: float = 0.85
) -> list[Transform]:
    """Zoom, rotation by up to 10 degrees, blur, flip and a crop that keeps the object.

    Sources: PFENet (TPAMI 2020) and BAM (CVPR 2022).

    Args:
        size: side of the square crop in pixels; around a smaller image stands ImageNet's mean
            colour, with 255 in the mask.
        scale: range of the random zoom.
        min_share: of the object's pixels that a crop must hold, if possible.
    """
    check_arguments(episode_train_transform, locals(), scale="(0, inf)")
    mean = (124, 116, 104)
    return [
        A.RandomScale((scale[0] - 1, scale[1] - 1), p=1.0),
        A.Rotate((-10, 10), fill=mean, fill_mask=255, p=0.5),
        A.GaussianBlur((5, 5), (1.1, 1.1), p=0.5),  # OpenCV's own width for 5 x 5 pixels
        A.HorizontalFlip(p=0.5),
        RandomObjectCrop(size, size, min_share, fill=mean),
    ]


def shorter_side(pixels: int) -> list[Transform]:
    """Resize images to a shorter side of so many pixels."""
    return [A.SmallestMaxSize(pixels)]


def as_chain(transforms: Sequence[Transform] | Transform | None) -> list[Transform]:
    """A list of transforms; one of them alone, such as a `OneOf`, which is no list of its parts."""
    if isinstance(transforms, Transform):
        return [transforms]
    return list(transforms or ())


def compose(transforms: Sequence[Transform] | None, points: bool = False) -> A.Compose:
    """Chain transforms, of points as well if asked to.

    Pixels of masks that a transform uncovers are 255 (ignore), however it is nested and whatever
    its own `fill_mask` says: albumentations fills them with class 0. Class numbers are never
    interpolated, whatever `mask_interpolation` says.

    Raises:
        GenSegError: a transform cannot move points.
    """
    chain = copy.deepcopy(as_chain(transforms))  # the user's own stay as they are
    for transform in leaves(chain):
        if getattr(transform, "fill_mask", None) is not None:
            transform.fill_mask = IGNORE
        if hasattr(transform, "mask_interpolation"):
            transform.mask_interpolation = cv2.INTER_NEAREST
    moving = points and any(isinstance(leaf, A.DualTransform) for leaf in leaves(chain))
    return A.Compose(
        exact_movers(chain) if points else chain,
        additional_targets={"anomaly": "mask", "unlabelled": "mask", "valid": "mask"},
        # Those outside stay, because a line that crosses the border needs both of its ends.
        keypoint_params=A.KeypointParams("xy", remove_invisible=False, check_each_transform=False)
        if moving
        else None,
    )


def apply(
    transform: A.Compose,
    image: NDArray[np.uint8],
    masks: Mapping[str, NDArray[np.integer[Any]]],
    seed: int,
    name: str = "",
    points: NDArray[np.floating[Any]] | None = None,
    as_bytes: bool = False,
) -> dict[str, Tensor]:
    """Transform one sample; the result depends on the arguments only, not on what was drawn before.

    Args:
        transform: what `compose` returned.
        image: HxWx3 uint8.
        masks: `mask` HxW class numbers and 255, `anomaly` HxW 1, 0 and 255, `unlabelled` HxW 1 and
            0, `valid` HxW, which padding fills with 255; any of them. They move together.
        seed: of this sample's random numbers, not negative.
        name: of the sample, for error messages.
        points: P x 2 or more, x and y in pixels (0 = middle of the first) and what goes with them;
            P may be 0.
        as_bytes: leave an image of uint8 as it is.

    Returns:
        `image` 3xHxW float32 in [0, 1], each of the masks HxW int64 (255 where the transforms have
        padded), and where there were `points` these as float64, in their order, also those that
        have left the image.

    Raises:
        GenSegError: the pipeline crops more than the image has, or returns no numpy image.
    """
    # One generator for the whole chain: `set_random_seed` would give every transform the same
    # stream, so that the flip and the jitter of a sample were correlated, and costs several times
    # as much.
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    # Without a transform that moves them albumentations would warn of points; without points it
    # loses a column.
    keypoints = {}
    if points is not None and len(points) and "keypoints" in transform.processors:
        keypoints = {"keypoints": points.astype(np.float64)}
    try:
        with _seeded(seed):
            result = transform(image=image, **masks, **keypoints)
    except CropSizeError as error:
        raise GenSegError(
            f"a crop of the transforms is larger than image '{name}' "
            f"({image.shape[0]}x{image.shape[1]} as read; {error}): make the crop smaller or put "
            "PadIfNeeded of the crop's size before it."
        ) from error
    array = result["image"]
    if not isinstance(array, np.ndarray):
        raise GenSegError(
            f"the transforms turned image '{name}' into {type(array).__name__}: "
            "remove ToTensorV2, tensors are made after the transforms."
        )
    # In numpy: torch would wake its threads for a millisecond's work, and they spin on the cores of
    # the training.
    if array.dtype == np.uint8 and as_bytes:
        chw = np.ascontiguousarray(array.transpose(2, 0, 1))
    elif array.dtype == np.uint8:
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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which a transform of the user may draw, for a while."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - the global one
        torch.set_rng_state(before[2])


def single_thread(worker_id: int) -> None:
    """Keep OpenCV from starting threads in a DataLoader's worker, where they only compete."""
    cv2.setNumThreads(0)
