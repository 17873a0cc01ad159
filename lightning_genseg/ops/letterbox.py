"""Images of any shape in a square."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.ops.resize import has_size


def letterbox_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width in pixels of an image in a square of `size`, its longer side.

    Both are cut to multiples of 8, at least 8 (BAM's rule): 500 x 375 becomes 472 x 352 for 473.
    """
    longer = torch.sym_max(height, width)
    # Integers: 8 * 60 / 160 in floating point may fall below 3.
    rows, columns = (side * size // longer // 8 * 8 for side in (height, width))
    return cast(int, torch.sym_max(8, rows)), cast(int, torch.sym_max(8, columns))


def letterbox(images: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images B x 3 x H x W in the upper left of a black square, and where: B x S x S bool.

    Made smaller they are smoothed. Episodes of the data modules are not, as in BAM (`Letterbox`).
    """
    height, width = letterbox_size(images.shape[-2], images.shape[-1], size)
    if not has_size(images, (height, width)):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    side = torch.arange(size, device=images.device)
    valid = ((side < height)[:, None] & (side < width)).expand(images.shape[0], -1, -1)
    return F.pad(images.clamp(0, 1), (0, size - width, 0, size - height)), valid
