"""Images of any shape in a square."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def letterbox_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image in a square of `size`: the longer side fills it, both are cut to multiples of 8.

    BAM's rule: 500 x 375 becomes 472 x 352 for a size of 473. At least 8 x 8.
    """
    longer = max(height, width)
    # Integers: 8 * 60 / 160 in floating point may fall below 3.
    rows, columns = (side * size // longer // 8 * 8 for side in (height, width))
    return max(8, rows), max(8, columns)


def letterbox(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images B x 3 x H x W in the upper left corner of a black square, and where they are: B x S x S bool."""
    height, width = letterbox_size(images.shape[-2], images.shape[-1], size)
    if (height, width) != tuple(images.shape[-2:]):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    valid = torch.zeros(len(images), size, size, dtype=torch.bool, device=images.device)
    valid[:, :height, :width] = True
    return F.pad(images.clamp(0, 1), (0, size - width, 0, size - height)), valid
