"""The check of a batch."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_genseg.data.dataset import (
    Batch,
)
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError


def check_batch(batch: Batch, num_classes: int | None = None) -> None:
    """Check that a batch is what the modules expect, and warn if all its pixels are ignored.

    Args:
        batch: see `SegmentationDataModule`; without `mask` only the images are checked, `anomaly`
            may be absent.
        num_classes: C; None: labels are not compared with it.

    Raises:
        ValueError: wrong type, shape or range, naming the file.
    """
    names = batch.get("name", [])
    image = batch["image"]
    if (
        not isinstance(image, Tensor)
        or image.dtype != torch.float32
        or image.ndim != 4
        or image.shape[1] != 3
    ):
        raise GenSegError(
            f"the images of the batch with {_name(names, 0)} are {_kind(image)} but must be "
            "float32 Bx3xHxW: return an image as float32 3xHxW in [0, 1] from the data set."
        )
    low, high = image.amin((1, 2, 3)), image.amax((1, 2, 3))
    for index in range(len(image)):
        if not (low[index] >= 0 and high[index] <= 1):  # also catches NaN
            raise GenSegError(
                f"image {_name(names, index)} holds values from {low[index]:.4g} to "
                f"{high[index]:.4g} but must lie in [0, 1]: divide by 255, and leave out "
                "Normalize, which the module does itself."
            )
    if "mask" not in batch:
        return
    mask = batch["mask"]
    if (
        not isinstance(mask, Tensor)
        or mask.dtype != torch.int64
        or mask.shape != image.shape[:1] + image.shape[2:]
    ):
        raise GenSegError(
            f"the masks of the batch with {_name(names, 0)} are {_kind(mask)} but must be int64 of "
            f"shape {_shape(image.shape[:1] + image.shape[2:])}, like the images: return a mask as "
            "int64 HxW from the data set."
        )
    if num_classes is not None:
        wrong = ((mask < 0) | (mask >= num_classes)) & (mask != IGNORE)
        for index in torch.nonzero(wrong.flatten(1).any(1)).flatten().tolist():
            values = sorted(set(mask[index][wrong[index]].tolist()))
            raise GenSegError(
                f"mask {_name(names, index)} holds the labels {', '.join(map(str, values[:8]))} "
                f"but there are {num_classes} classes: use 0 to {num_classes - 1} and 255 for "
                "ignore, or raise num_classes."
            )
    anomaly = batch.get("anomaly")
    if anomaly is not None:
        _check_anomaly(anomaly, mask, names)
    if "unlabelled" in batch:
        _check_unlabelled(batch["unlabelled"], mask, names)
        _check_image_classes(batch.get("image_classes"), mask, num_classes, names)
        return  # a few crops without a single point are to be expected
    if bool((mask == IGNORE).all()) and (anomaly is None or bool((anomaly == IGNORE).all())):
        rank_zero_warn(
            f"every pixel of the first batch ({', '.join(names)}) is ignored (255), nothing is "
            "learned from it: check the masks, the ids table and the size of the crop."
        )


def _check_anomaly(anomaly: object, mask: Tensor, names: Sequence[str]) -> None:
    if (
        not isinstance(anomaly, Tensor)
        or anomaly.dtype != torch.int64
        or anomaly.shape != mask.shape
    ):
        raise GenSegError(
            f"the anomaly masks of the batch with {_name(names, 0)} are {_kind(anomaly)} but must "
            f"be int64 of shape {_shape(mask.shape)}, like the masks: return anomaly as int64 HxW "
            "from the data set."
        )
    odd = (anomaly != 0) & (anomaly != 1) & (anomaly != IGNORE)
    both = (anomaly == 1) & (mask != IGNORE)
    for index in torch.nonzero((odd | both).flatten(1).any(1)).flatten().tolist():
        if odd[index].any():
            values = sorted(set(anomaly[index][odd[index]].tolist()))
            raise GenSegError(
                f"anomaly mask {_name(names, index)} holds {', '.join(map(str, values[:8]))}: use "
                "1 for anomalous, 0 for known and 255 for not evaluated."
            )
        raise GenSegError(
            f"mask {_name(names, index)} names a class where the anomaly mask says 1: make it 255 "
            "(ignore) there, or the unknown is learned."
        )


def _check_unlabelled(unlabelled: object, mask: Tensor, names: Sequence[str]) -> None:
    if (
        not isinstance(unlabelled, Tensor)
        or unlabelled.dtype != torch.bool
        or unlabelled.shape != mask.shape
    ):
        raise GenSegError(
            f"unlabelled of the batch with {_name(names, 0)} is {_kind(unlabelled)} but must be "
            f"bool of shape {_shape(mask.shape)}, like the masks: return it as bool HxW from the "
            "data set."
        )
    both = unlabelled & (mask != IGNORE)
    for index in torch.nonzero(both.flatten(1).any(1)).flatten().tolist():
        raise GenSegError(
            f"mask {_name(names, index)} names a class at {int(both[index].sum())} pixels where "
            "unlabelled is true: make the mask 255 there, or unlabelled false."
        )


def _check_image_classes(
    classes: object, mask: Tensor, num_classes: int | None, names: Sequence[str]
) -> None:
    width = num_classes if num_classes is not None else "C"
    if (
        not isinstance(classes, Tensor)
        or classes.dtype != torch.bool
        or classes.ndim != 2
        or len(classes) != len(mask)
        or (num_classes is not None and classes.shape[1] != num_classes)
    ):
        raise GenSegError(
            f"image_classes of the batch with {_name(names, 0)} is {_kind(classes)} but must be "
            f"bool of shape {len(mask)}x{width}: return it as bool {width} from the data set, the "
            "classes labelled in the image."
        )
    for index in range(len(mask)):
        held = mask[index][mask[index] != IGNORE].unique()
        absent = held[~classes[index][held]].tolist()
        if absent:
            raise GenSegError(
                f"mask {_name(names, index)} holds class {absent[0]}, which image_classes says is "
                "not in the image: make it true there."
            )


def _name(names: Sequence[str], index: int) -> str:
    return f"'{names[index]}'" if index < len(names) else f"number {index} of the batch"


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {_shape(value.shape)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
