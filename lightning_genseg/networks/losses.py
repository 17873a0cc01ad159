"""Losses over pixels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_together = False  # whether counts are those of all processes


@contextmanager
def over_processes() -> Iterator[None]:
    """Let `mean_over` divide by the mean count of all processes of `torch.distributed`.

    The mean of the gradients, which DDP takes, is then that of one process with all batches: one
    with few labels does not count as much as one with many. All processes must compute the loss.
    Without a process group nothing changes.
    """
    global _together
    _together = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        _together = False


def mean_over(total: Tensor, count: Tensor | int) -> Tensor:
    """A sum over pixels by their number, of this process or (`over_processes`) of all.

    Args:
        total: scalar; 0 where there is no pixel.
        count: how many there are.
    """
    if not _together:
        return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    processes = torch.distributed.get_world_size()
    everywhere = torch.as_tensor(count, device=total.device).double()
    torch.distributed.all_reduce(everywhere)
    return total / (everywhere.clamp_min(1) / processes).to(total.dtype)


def true_anywhere(flags: Tensor) -> Tensor:
    """Booleans that are true in this process or (`over_processes`) in any."""
    if not _together:
        return flags
    anywhere = flags.to(torch.uint8)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    return anywhere.bool()


def pixel_cross_entropy(
    scores: Tensor, mask: Tensor, ignore_index: int = 255, avg_non_ignore: bool = True
) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not NaN, where every pixel is ignored.

    See `mean_over` for several processes.

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
