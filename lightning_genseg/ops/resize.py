"""Resizing of maps and labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B x C x H x W) at another size, bilinearly with corners of pixels at those of maps.

    Maps that have the size already come back as they are, likewise from `resize_aligned`.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear")


def resize_rows(maps: Tensor, size: Sequence[int], rows: slice) -> Tensor:
    """Some rows of `resize_maps`, made from those around them only."""
    if rows == slice(0, size[0]):
        return resize_maps(maps, size)
    height = maps.shape[-2]
    place = torch.arange(rows.start, rows.stop, dtype=torch.float32, device=maps.device)
    place = ((place + 0.5) * (height / size[0]) - 0.5).clamp(0, height - 1)
    upper = place.long()
    lower = (upper + 1).clamp(max=height - 1)
    weight = (place - upper)[:, None].to(maps.dtype)
    first, last = int(upper[0]), int(lower[-1])
    wide = resize_maps(maps[..., first : last + 1, :], (last + 1 - first, size[1]))
    above, below = wide[..., upper - first, :], wide[..., lower - first, :]
    return above.lerp_(below, weight)


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
