"""Several processes that train one model: what they exchange."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_together = False  # whether counts are those of all processes


class Processes(NamedTuple):
    """Several processes that keep one mixture, such as those of DDP.

    `gather` stacks a tensor of one shape over the processes, along a new first axis; `rank` is the
    own place in it.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int

    @classmethod
    def found(cls) -> "Processes | None":
        """All processes of `torch.distributed`; None where it is not initialised or has one."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return None
        count = torch.distributed.get_world_size()
        return cls(_gather, torch.distributed.get_rank()) if count > 1 else None


def _gather(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


@contextmanager
def over_processes() -> Iterator[None]:
    """Let `mean_over` divide by the mean count of all processes of `torch.distributed`.

    The mean of the gradients, which DDP takes, is then that of one process with all batches: one
    with few labels does not count as much as one with many. All processes must compute the loss.
    Without a process group nothing changes.
    """
    global _together
    outside = _together
    _together = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        _together = outside


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
    """Booleans that are true in any process of `torch.distributed`; all of them must ask."""
    processes = Processes.found()
    if processes is None:
        return flags
    anywhere = flags.to(torch.uint8)
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX)
    return anywhere.bool()
