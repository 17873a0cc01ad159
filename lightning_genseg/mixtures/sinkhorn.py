"""Sinkhorn assignment of pixels to the components of their class, in the log domain."""

import torch
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.mixtures.log_density import full_precision
from lightning_genseg.ops.processes import Processes


def segments(labels: Tensor, num_classes: int) -> Tensor:
    """Map labels outside 0..C-1 (ignored pixels) to C, a segment that nobody reads."""
    valid = (labels >= 0) & (labels < num_classes)
    return torch.where(valid, labels, num_classes)


def _segment_max(values: Tensor, index: Tensor, count: int, processes: Processes | None) -> Tensor:
    empty = values.new_full((count, *values.shape[1:]), -torch.inf)
    peak = empty.scatter_reduce(0, index[:, None].expand_as(values), values, "amax")
    return peak if processes is None else processes.gather(peak).amax(0)


def _segment_logsumexp(
    values: Tensor, index: Tensor, count: int, processes: Processes | None
) -> Tensor:
    peak = _segment_max(values, index, count, processes)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    total = torch.zeros_like(peak).index_add_(0, index, (values - peak[index]).exp())
    if processes is not None:
        total = processes.gather(total).sum(0)
    return total.log() + peak


@torch.no_grad()
def sinkhorn(
    log_density: Tensor,
    labels: Tensor,
    num_classes: int,
    epsilon: float = 0.05,
    iterations: int = 3,
    rescale: bool = True,
    processes: Processes | None = None,
) -> Tensor:
    """Soft assignments under which every component of a class gets an equal share of its pixels.

    GMMSeg, Eqs. 9-10, solved by Sinkhorn-Knopp for all classes in one pass (segment sums keyed by
    label). In log space nothing overflows, whatever `epsilon`. Columns are normalised before rows,
    so the rows sum to one exactly and the columns nearly.

    Args:
        log_density: log-densities of the pixel's own class, N x M.
        labels: class of each pixel, N; anything outside 0..C-1 is ignored.
        num_classes: C.
        epsilon: entropy weight, in units of the (rescaled) log-density.
        iterations: rounds of column and row normalisation.
        rescale: divide by the class's largest absolute log-density, as the authors' code does (not
            in the paper, whose `epsilon` then means something else for every class and every D).
        processes: the classes' pixels are then those of all processes.

    Returns:
        log Q, N x M; `exp` of a row sums to 1. Rows of ignored pixels carry no meaning.

    Example:
        >>> logp = torch.tensor([[0.0, -1.0], [0.0, -3.0]])
        >>> sinkhorn(logp, torch.tensor([0, 0]), 1, iterations=50, rescale=False).argmax(1)
        tensor([1, 0])
    """
    check_arguments(sinkhorn, locals(), epsilon="(0, inf)", iterations="[0, inf)")
    with torch.autocast(log_density.device.type, enabled=False):
        log_q = full_precision(log_density)
        index = segments(labels, num_classes)
        count = num_classes + 1
        if rescale:
            largest = _segment_max(log_q.abs().amax(1, keepdim=True), index, count, processes)
            tiny = torch.finfo(log_q.dtype).tiny
            log_q = log_q / largest.clamp_min(tiny)[index]
        log_q = log_q / epsilon
        for _ in range(iterations):
            log_q = log_q - _segment_logsumexp(log_q, index, count, processes)[index]
            log_q = log_q.log_softmax(1)
        return log_q if iterations else log_q.log_softmax(1)
