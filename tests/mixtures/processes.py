"""Several processes of one run, played by threads: what DDP does, without its start-up time."""

import threading
from collections.abc import Callable
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
    posted: list[Tensor | None] = [None] * count
    results: list[T | None] = [None] * count
    errors: list[BaseException] = []

    def process(rank: int) -> None:
        def gather(tensor: Tensor) -> Tensor:
            posted[rank] = tensor.clone()
            barrier.wait()
            tensors = [t for t in posted if t is not None]
            assert len({(t.shape, t.dtype) for t in tensors}) == 1, "ranks disagree in a collective"
            stacked = torch.stack(tensors)
            barrier.wait()  # nobody posts again before all have read
            return stacked

        try:
            results[rank] = work(Processes(gather, rank))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
