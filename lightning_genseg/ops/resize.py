"""Resizing of maps and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Whether torch.export traces; PyTorch 2.6 does not tell this from torch.compile.
is_exporting: Callable[[], bool] = getattr(
    torch.compiler, "is_exporting", torch.compiler.is_compiling
)


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B x C x H x W) at another size, bilinearly with corners of pixels at those of maps.

    Maps that have the size already come back as they are, likewise from `resize_aligned`.
    """
    if has_size(maps, size):
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
    if has_size(maps, size):
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=True)


def labelled_cells(
    mask: Tensor, size: Sequence[int], num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Most frequent class in each cell of a coarser grid; of equally frequent ones the first.

    Args:
        mask: B x H x W int64; what is no class does not count.
        size: (h, w) of the grid.
        num_classes: C.
        ignore_index: label of cells without a class.

    Returns:
        B x h x w int64.
    """
    batch, height, width = mask.shape
    image, row, column = (torch.arange(n, device=mask.device) for n in mask.shape)
    rows = image[:, None] * size[0] + row * size[0] // height
    cell = rows[:, :, None] * size[1] + column * size[1] // width
    cells = batch * size[0] * size[1]
    valid = (mask >= 0) & (mask < num_classes)
    # Counted without asking how many there are, which would make the CPU wait for the GPU.
    index = torch.where(valid, cell * num_classes + mask, cells * num_classes).flatten()
    counts = index.new_zeros(cells * num_classes + 1).index_add(0, index, torch.ones_like(index))
    counts = counts[:-1].view(cells, num_classes)
    most, label = counts.max(1)
    return torch.where(most > 0, label, ignore_index).view(batch, *size)


def crop(maps: Tensor, rows: int, columns: int, top: int = 0, left: int = 0) -> Tensor:
    """A part of maps B x C x H x W: so many rows and columns, from `top` and `left`."""
    if not is_exporting():
        return maps[..., top : top + rows, left : left + columns]
    # A slice asks whether it leaves anything out, and a graph would hold for that case alone.
    rows_kept, columns_kept = (
        first + torch.arange(count, device=maps.device)
        for first, count in ((top, rows), (left, columns))
    )
    return maps.index_select(-2, rows_kept).index_select(-1, columns_kept)


def for_each(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """A function of one image, for each of a batch: one after the other, which saves memory.

    In an exported graph, whose batch has any size, for all at once.
    """
    if is_exporting():
        result: Tensor = torch.vmap(function)(*batches)
        return result
    return torch.stack([function(*one) for one in zip(*batches, strict=True)])


def has_size(maps: Tensor, size: Sequence[int]) -> bool:
    """Whether maps have a size already; in an exported graph never, so that it resizes always."""
    return not is_exporting() and tuple(maps.shape[-2:]) == tuple(size)
