"""Masks for a tokenizer to learn from, without images: drawn at random, or varied."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def procedural_masks(
    count: int, size: Sequence[int], num_classes: int, device: torch.device | None = None
) -> Tensor:
    """Random masks B x H x W int64: a Voronoi diagram with ellipses and thin bars on it.

    Args:
        count: B.
        size: H and W.
        num_classes: K; every region has one of them with equal probability.
        device: of the masks.
    """
    return torch.stack([_procedural_mask(size, num_classes, device) for _ in range(count)])


def _procedural_mask(size: Sequence[int], num_classes: int, device: torch.device | None) -> Tensor:
    height, width = size
    rows = torch.arange(height, device=device)[:, None].float()
    columns = torch.arange(width, device=device).float()
    sites, ellipses, bars = (
        int(torch.randint(low, high, ())) for low, high in ((3, 20), (0, 8), (0, 5))
    )
    # y, x, angle, two radii, width: in shares of the sides, one row for each shape
    draw = torch.rand(sites + ellipses + bars, 6).tolist()
    labels = torch.randint(num_classes, (len(draw),)).tolist()
    best = rows.new_full((height, width), torch.inf)
    mask = torch.zeros(height, width, dtype=torch.int64, device=device)
    for i, ((y, x, angle, long, short, thick), label) in enumerate(zip(draw, labels, strict=True)):
        down, right = rows - y * height, columns - x * width
        if i < sites:
            distance = down**2 + right**2
            inside = distance < best
            best = torch.minimum(best, distance)
        else:
            turn = torch.tensor(torch.pi * angle)
            along, across = (
                turn.cos() * right + turn.sin() * down,
                turn.cos() * down - turn.sin() * right,
            )
            if i < sites + ellipses:
                radii = [(0.03 + 0.25 * share) * min(size) for share in (long, short)]
                inside = (along / radii[0]) ** 2 + (across / radii[1]) ** 2 < 1
            else:
                inside = (across.abs() < 0.5 + 3 * thick) & (along.abs() < (0.1 + long) * max(size))
        mask.masked_fill_(inside, label)
    return mask


def permute_classes(mask: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Exchange the classes of each mask B x H x W at random, so that all are equally frequent."""
    orders = torch.rand(len(mask), num_classes, device=mask.device).argsort(1)
    ignored = mask == ignore_index
    permuted = orders.gather(1, mask.masked_fill(ignored, 0).flatten(1)).view_as(mask)
    return permuted.masked_fill(ignored, ignore_index)


def corrupt(mask: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Masks B x H x W such as an imperfect network predicts.

    Boundaries are frayed, by up to 3 pixels; up to 4 rectangles, at most a quarter of the sides,
    have another class. Ignored pixels move with the rest and no rectangle labels them.
    """
    count, height, width = mask.shape
    coarse = torch.randn(count, 2, -(-height // 4), -(-width // 4), device=mask.device)
    shift = (
        F.interpolate(coarse, (height, width), mode="bilinear").mul(2).round().long().clamp(-3, 3)
    )
    rows = (torch.arange(height, device=mask.device)[:, None] + shift[:, 0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=mask.device) + shift[:, 1]).clamp(0, width - 1)
    frayed = mask.flatten(1).gather(1, (rows * width + columns).flatten(1)).view_as(mask)
    for one in frayed:
        for y, x, tall, wide in torch.rand(int(torch.randint(5, ())), 4).tolist():
            top, left = int(y * height), int(x * width)
            patch = one[
                top : top + 1 + int(tall * height / 4), left : left + 1 + int(wide * width / 4)
            ]
            patch.masked_fill_(patch != ignore_index, int(torch.randint(num_classes, ())))
    return frayed
