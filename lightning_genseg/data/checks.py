"""The check of a batch: what modules expect, and the sentence for everything else."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_genseg.data.dataset import Batch
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError, listed

_RANGE = (
    "image {name} holds values from {low:.4g} to {high:.4g} but must lie in [0, 1]: divide by 255, "
    "and leave out Normalize, which the module does itself."
)
_NO_CLASS = (
    "mask {name} holds the labels {values} but there are {count} classes: use 0 to {last} and 255 "
    "for ignore, or raise num_classes."
)
_ODD_ANOMALY = (
    "anomaly mask {name} holds {values}: use 1 for anomalous, 0 for known and 255 for not "
    "evaluated."
)
_NAMED_ANOMALY = (
    "mask {name} names a class where the anomaly mask says 1: make it 255 (ignore) there, or the "
    "unknown is learned."
)
_NAMED_BLANK = (
    "mask {name} names a class at {pixels} pixels where unlabelled is true: make the mask 255 "
    "there, or unlabelled false."
)
_ABSENT_CLASS = (
    "mask {name} holds class {values}, which image_classes says is not in the image: make it true "
    "there."
)


def check_batch(batch: Batch, num_classes: int | None = None) -> None:
    """Check that a batch is what the modules expect; warn if all its pixels are ignored.

    Args:
        batch: see `SegmentationDataModule`; only `image` is required.
        num_classes: C; None: labels are not compared with it.

    Raises:
        GenSegError: wrong type, shape or values, naming the file.
    """
    names = batch.get("name", [])
    image = batch["image"]
    if "mask" not in batch and image.dtype == torch.uint8:
        return  # to predict, as `ImageFolder` reads them
    _check_type("image", image, torch.float32, ("B", 3, "H", "W"), "float32 3xHxW in [0, 1]", names)
    _refuse(~((image >= 0) & (image <= 1)), image, _RANGE, names)  # NaN is neither
    if "mask" not in batch:
        return
    size = (len(image), *image.shape[2:])
    classes = "C" if num_classes is None else num_classes
    for key, dtype, shape, form in (
        ("mask", torch.int64, size, "int64 HxW"),
        ("anomaly", torch.int64, size, "int64 HxW"),
        ("unlabelled", torch.bool, size, "bool HxW"),
        ("image_classes", torch.bool, (len(image), classes), f"bool {classes}"),
    ):
        needed = key == "mask" or (key == "image_classes" and "unlabelled" in batch)
        if needed or batch.get(key) is not None:
            _check_type(key, batch.get(key), dtype, shape, form, names)
    mask, anomaly, unlabelled = batch["mask"], batch.get("anomaly"), batch.get("unlabelled")
    named = mask != IGNORE
    if num_classes is not None:
        outside = ((mask < 0) | (mask >= num_classes)) & named
        _refuse(outside, mask, _NO_CLASS, names, count=num_classes, last=num_classes - 1)
    if anomaly is not None:
        odd = (anomaly != 0) & (anomaly != 1) & (anomaly != IGNORE)
        _refuse(odd, anomaly, _ODD_ANOMALY, names)
        _refuse((anomaly == 1) & named, mask, _NAMED_ANOMALY, names)
    if unlabelled is not None:
        _refuse(unlabelled & named, mask, _NAMED_BLANK, names)
        image_of = torch.arange(len(mask), device=mask.device)[:, None, None]
        held = batch["image_classes"][image_of, mask.where(named, 0)]
        _refuse(named & ~held, mask, _ABSENT_CLASS, names)
        return  # a few crops without a single point are to be expected
    if not named.any() and (anomaly is None or bool((anomaly == IGNORE).all())):
        rank_zero_warn(
            f"every pixel of the first batch ({', '.join(names)}) is ignored (255), nothing is "
            "learned from it: check the masks, the ids table and the size of the crop."
        )


def _check_type(
    key: str,
    value: object,
    dtype: torch.dtype,
    shape: Sequence[int | str],
    form: str,
    names: Sequence[str],
) -> None:
    """Compare type and shape, in which a letter stands for any number; `form` is one sample's."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        pairs = zip(value.shape, shape, strict=False)
        same = value.ndim == len(shape) and all(isinstance(n, str) or m == n for m, n in pairs)
        if same and value.dtype == dtype:
            return
        kind = _kind(value.dtype, value.shape)
    raise GenSegError(
        f"{key} of the batch with {_name(names, 0)} is {kind} but must be {_kind(dtype, shape)}: "
        f"return {key} as {form} from the data set."
    )


def _refuse(
    wrong: Tensor, values: Tensor, sentence: str, names: Sequence[str], **words: object
) -> None:
    """Raise a sentence about the first image of a batch in which anything is wrong."""
    for index in wrong.flatten(1).any(1).nonzero().flatten().tolist():
        found = values[index][wrong[index]]
        words |= {"low": values[index].min().item(), "high": values[index].max().item()}
        words |= {"values": listed(found.unique()[:9].tolist(), 8), "pixels": len(found)}
        raise GenSegError(sentence.format(name=_name(names, index), **words))


def _name(names: Sequence[str], index: int) -> str:
    return f"'{names[index]}'" if index < len(names) else f"number {index} of the batch"


def _kind(dtype: torch.dtype, shape: Sequence[int | str]) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {'x'.join(map(str, shape))}"
