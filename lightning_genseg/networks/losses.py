"""Losses over pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.ops.processes import mean_over


def pixel_cross_entropy(
    scores: Tensor, mask: Tensor, ignore_index: int = 255, avg_non_ignore: bool = True
) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not NaN, where every pixel is ignored.

    See `ops.processes.mean_over` for several processes.

    Args:
        scores: B x C x H x W (or N x C); taken to float32.
        mask: B x H x W (or N), int64.
        ignore_index: label that does not count.
        avg_non_ignore: divide by the number of labelled pixels, or by that of all (mmsegmentation).
    """
    if scores.ndim == 4 and scores.is_contiguous(memory_format=torch.channels_last):
        # A view, and half the time.
        scores, mask = scores.movedim(1, -1).flatten(0, 2), mask.flatten()
    total = F.cross_entropy(scores.float(), mask, ignore_index=ignore_index, reduction="sum")
    return mean_over(total, (mask != ignore_index).sum() if avg_non_ignore else mask.numel())
