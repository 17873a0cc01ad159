"""Several processes of one run, played by threads: what DDP does, without its start-up time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lightning_genseg.mixtures import Processes

T = TypeVar("T")


def run_processes(work: Callable[[Processes], T], count: int) -> list[T]:
    """Run `work` in `count` threads whose `gather` is a true collective; results by rank.

    Shapes and dtypes that differ between the ranks fail, as they would hang or corrupt in DDP.
    """
    barrier = threading.Barrier(count, timeout=60)
    posted: list[Tensor] = [torch.empty(0)] * count

    def process(rank: int) -> T:
        def gather(tensor: Tensor) -> Tensor:
            posted[rank] = tensor.clone()
            barrier.wait()
            assert len({(t.shape, t.dtype) for t in posted}) == 1, "ranks disagree in a collective"
            stacked = torch.stack(posted)
            barrier.wait()  # nobody posts again before all have read
            return stacked

        try:
            return work(Processes(gather, rank))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(process, rank) for rank in range(count)]
    # The first error of work itself; the others only saw their barrier break.
    errors = [task.exception() for task in running]
    for error in sorted(
        filter(None, errors), key=lambda e: isinstance(e, threading.BrokenBarrierError)
    ):
        raise error
    return [task.result() for task in running]
