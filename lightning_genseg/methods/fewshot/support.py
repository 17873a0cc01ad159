"""The annotated examples of an object, in the square in which the network sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.episodes.support import need_background
from lightning_genseg.errors import GenSegError
from lightning_genseg.ops.letterbox import letterbox, letterbox_size
from lightning_genseg.ops.resize import resize_aligned, resize_labels
from lightning_genseg.ops.views import unit_image

SUPPORT_KEYS = ("support_image", "support_mask", "support_valid")  # `Support` in a batch


class Support(NamedTuple):
    """K examples of one object, all in one square: K x 3 x S x S, K x S x S, K x S x S bool."""

    images: Tensor
    masks: Tensor
    valid: Tensor


def make_support(
    images: Sequence[Tensor | NDArray[Any]],
    masks: Sequence[Tensor | NDArray[Any]],
    size: int,
    ignore_index: int = 255,
) -> Support:
    """Letterbox examples of any sizes, see `FewShotModule.set_support`."""
    check_arguments(make_support, {"size": size}, size="[8, inf)")
    if not len(images) or len(images) != len(masks):
        raise GenSegError(
            f"set_support got {len(images)} images and {len(masks)} masks: give one mask for each "
            "image, and at least one."
        )
    squares = []
    for number, (given, given_mask) in enumerate(zip(images, masks, strict=True), 1):
        image, mask = _unit_image(given, number), _tensor(given_mask)
        if image.ndim != 3 or image.shape[1:] != mask.shape:
            raise GenSegError(
                f"a support image is {tuple(image.shape)} and its mask {tuple(mask.shape)}: give "
                "3 x H x W (a NumPy array: H x W x 3) and H x W."
            )
        odd = set(mask.unique().tolist()) - {0, 1, 255}
        if odd or not (mask == 1).any():
            raise GenSegError(
                f"a support mask holds {f'the values {sorted(odd)}' if odd else 'no object'}: mark "
                "the object with 1, everything else with 0, and what is neither with 255."
            )
        square, valid = letterbox(image[None], size)
        rows, columns = letterbox_size(mask.shape[0], mask.shape[1], size)
        label = resize_labels(mask[None], (rows, columns))[0]
        if not (label == 1).any():
            raise GenSegError(
                f"the object of support {number} is too small to be left at size {size}: give "
                "set_support a larger size, or cut away what is far from it."
            )
        label = F.pad(label, (0, size - columns, 0, size - rows), value=ignore_index)
        squares.append((square[0], label, valid[0]))
    need_background([label for _, label, _ in squares])
    return Support(*(torch.stack(parts) for parts in zip(*squares, strict=True)))


def support_shares(batch: Mapping[str, Any], size: Sequence[int]) -> Tensor:
    """How much of each feature cell is foreground and background: B x K x 2 x h x w in [0, 1].

    Void pixels and padding are neither. Resized bilinearly, which is BAM's soft mask.
    """
    masks, valid = batch["support_mask"], batch["support_valid"]
    both = torch.stack([(masks == label) & valid for label in (1, 0)], 2).float()
    shares: Tensor = resize_aligned(both.flatten(0, 1), size).unflatten(0, masks.shape[:2])
    return shares


def _tensor(array: Tensor | NDArray[Any]) -> Tensor:
    # float32: torch lacks some of NumPy's types; a copy: it may be read-only
    return array if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.float32))


def _unit_image(given: Tensor | NDArray[Any], number: int) -> Tensor:
    """Float 3 x H x W in [0, 1] of what `set_support` takes as its image `number`."""
    if isinstance(given, Tensor):
        return unit_image(given, f"support image {number}")
    if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
        raise GenSegError(
            f"support image {number} is a NumPy array {given.shape} of {given.dtype}: give H x W x "
            "3 of uint8, or a tensor 3 x H x W in [0, 1]."
        )
    return _tensor(given).permute(2, 0, 1) / 255
