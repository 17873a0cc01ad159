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


def resize_labels(labels: Tensor, size: Sequence[int], corner: bool = False) -> Tensor:
    """Nearest label (B x H x W int64) for each pixel of another size.

    That in the middle of the pixel's cell, or in its upper left `corner`, as in mmsegmentation.
    """
    mode = "nearest" if corner else "nearest-exact"
    return F.interpolate(labels[:, None].float(), list(size), mode=mode)[:, 0].long()


def resize_aligned(maps: Tensor, size: Sequence[int]) -> Tensor:
    """As `resize_maps`, with aligned corners, as PFENet and its descendants do."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=True)
