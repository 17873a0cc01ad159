"""How two things are compared: in turns, so that whatever else the machine does falls on both."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

Step = Callable[[], object]
# Seconds of one comparison, after which no further turn begins: the whole takes some minutes.
_ENOUGH = 25.0


class Row(NamedTuple):
    """A line of the table: what was divided by what, the quotient, and what it should be.

    `obstacle` is what stands in the way where the goal is missed.
    """

    what: str
    ratio: float
    goal: str
    detail: str = ""
    obstacle: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal, a limit behind its sign, is reached."""
        sign, limit = self.goal.split()
        return self.ratio <= float(limit) if sign == "≤" else self.ratio >= float(limit)


def seconds(step: Step, device: str, wall: bool = False) -> float:
    """Processor time of all threads, which other programs disturb little; on a GPU wall time."""
    if wall:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    ours: Step, other: Step, repeats: int, device: str = "cpu", wall: bool = False
) -> tuple[float, float]:
    """Least seconds of each of two, which take turns; the first turn only warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > 1 and time.perf_counter() - began > _ENOUGH:
            break
        for step, spent in zip((ours, other), times, strict=True):
            spent.append(seconds(step, device, wall))
    gc.collect()
    return min(times[0][1:]), min(times[1][1:])


def row(
    what: str,
    times: tuple[float, float],
    goal: str,
    inverse: bool = False,
    detail: str = "",
    obstacle: str = "",
) -> Row:
    """Ours over the other, or `inverse`: how many times faster ours is."""
    ours, other = times
    value = other / ours if inverse else ours / other
    spent = f"{1e3 * ours:.3g} and {1e3 * other:.3g} ms"
    return Row(what, value, goal, ", ".join(filter(None, (spent, detail))), obstacle)


def peak(step: Step, device: str) -> float:
    """MB that one step needs at its peak on top of what there was (on a CPU: Linux only)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before is not there for this step
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set becomes the present
    before = _highest_resident()
    step()
    return (_highest_resident() - before) / 2**10


def _highest_resident() -> int:
    """In KB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
