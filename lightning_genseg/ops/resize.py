"""Resizing of maps and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B x C x H x W) at another size, bilinearly with corners of pixels at those of maps.

    Maps that have the size already come back as they are, likewise from `resize_aligned`.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear")


def resize_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest label (B x H x W int64) for each pixel of another size.

    `nearest-exact` reads the middle of a pixel's cell; `nearest` would read its corner.
    """
    return F.interpolate(labels[:, None].float(), list(size), mode="nearest-exact")[:, 0].long()


def resize_aligned(maps: Tensor, size: Sequence[int]) -> Tensor:
    """As `resize_maps`, with aligned corners, as PFENet and its descendants do."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=True)
