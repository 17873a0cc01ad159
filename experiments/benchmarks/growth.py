"""How the cost of GMMSeg's head grows, beside what the machine's arithmetic and memory allow."""

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import matplotlib
import torch
from heads import CHANNELS, gaussian_step
from matplotlib.axes import Axes
from measure import Row, peak, seconds
from torch import Tensor, distributed

from lightning_genseg.methods.gmmseg.options import Memory
from lightning_genseg.mixtures import Processes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).with_name("growth.png")


class Size(NamedTuple):
    """Of a head and its two maps: what grows, one at a time."""

    classes: int = 60
    components: int = 5
    dim: int = 64
    side: int = 48

    @property
    def pixels(self) -> int:
        """Of both maps."""
        return 2 * self.side**2

    @property
    def densities(self) -> int:
        """One for each pixel and component."""
        return self.pixels * self.classes * self.components

    @property
    def operations(self) -> float:
        """Of the products that a step cannot do without: densities and projection, and back.

        Each product has two of its kind in the backward pass of the projection, whose weights
        learn, and one in that of the densities, whose Gaussians do not.
        """
        projection = 2 * self.pixels * CHANNELS * self.dim
        return 2 * (2 * self.densities * 2 * self.dim) + 3 * projection

    @property
    def bytes(self) -> float:
        """What passes through memory at least: log-densities written and read back, features too.

        The projection reads its input twice and writes its gradient.
        """
        return 4 * (2 * self.densities + 3 * self.pixels * CHANNELS)


GROWTH = {
    "classes C": ("classes", (19, 60, 171, 400, 1000)),
    "components M": ("components", (1, 3, 5, 10, 20)),
    "dimensions D": ("dim", (16, 32, 64, 128, 256)),
    "pixels": ("side", (16, 32, 48, 64, 96)),
}

PROCESSES = (1, 2, 4, 8)


class Share(NamedTuple):
    """Of one of several processes, in a step that all take together."""

    milliseconds: float
    peak: float  # MB
    sent: float  # MB


class Group:
    """The first `count` processes: gathers among them, and counts what each sends."""

    def __init__(self, count: int) -> None:
        self.count, self.sent = count, 0
        self.group = distributed.new_group(list(range(count)))

    def gather(self, tensor: Tensor) -> Tensor:
        """One tensor of each, along a new first axis."""
        self.sent += tensor.nbytes
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(parts, tensor.contiguous(), self.group)
        return torch.stack(parts)


def _shares(store: str, threads: int, repeats: int, rank: int) -> dict[Memory, list[Share]]:
    """Of the process `rank`, in each of `PROCESSES` that it belongs to; on CPUs, by gloo."""
    torch.set_num_threads(threads)
    world = PROCESSES[-1]
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    size = Size()
    sizes = (size.classes, size.side, "cpu", size.components, size.dim)
    found: dict[Memory, list[Share]] = {memory: [] for memory in get_args(Memory)}
    for group in [Group(count) for count in PROCESSES]:
        if rank >= group.count:
            continue
        for memory, measured in found.items():
            step = gaussian_step("ours", *sizes, memory, Processes(group.gather, rank))
            step()
            time = min(seconds(step, "cpu") for _ in range(repeats))
            group.sent = 0
            most = peak(step, "cpu")
            measured.append(Share(1e3 * time, most, group.sent / 2**20))
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def shares(repeats: int) -> dict[Memory, list[Share]]:
    """What the first process spends, needs and sends, for each of `PROCESSES`."""
    world, context = PROCESSES[-1], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, context) as pool:
        share = partial(_shares, f"{folder}/store", torch.get_num_threads(), repeats)
        return next(iter(pool.map(share, range(world))))


def growth(device: str, repeats: int) -> Iterator[Row]:
    """Training steps (loss, backward, memory, EM) at `GROWTH`; draws `growth.png`.

    The row is the step at 1 000 classes over its bound, the larger one of both.
    """
    rate, width = _operations_a_second(device), _bytes_a_second(device)
    figure, axes = plt.subplots(2, len(GROWTH) + 1, figsize=(15, 5.6), layout="constrained")
    last = 0.0
    for column, (label, (name, values)) in enumerate(GROWTH.items()):
        sizes = [Size(**{name: value}) for value in values]
        x = [size.pixels if name == "side" else getattr(size, name) for size in sizes]
        times, peaks = [], []
        for size in sizes:
            step = gaussian_step("ours", size.classes, size.side, device, *size[1:3])
            step()
            times.append(1e3 * min(seconds(step, device) for _ in range(max(2, repeats // 2))))
            peaks.append(peak(step, device))
            del step
        arithmetic = [1e3 * size.operations / rate for size in sizes]
        bandwidth = [1e3 * size.bytes / width for size in sizes]
        if name == "classes":
            last = times[-1] / max(arithmetic[-1], bandwidth[-1])
        above, below = axes[0, column], axes[1, column]
        above.plot(x, times, "o-", label="measured")
        above.plot(x, arithmetic, "--", label="bound by arithmetic")
        above.plot(x, bandwidth, ":", label="bound by bandwidth")
        below.plot(x, peaks, "o-", label="measured, peak of a step")
        below.plot(x, [4 * s.densities / 2**20 for s in sizes], "--", label="log-densities, once")
        _scale(axes[:, column], x, label)
    default = Size()
    cpu_rate = rate if device == "cpu" else _operations_a_second("cpu")
    _draw_processes(axes[:, -1], repeats, default, cpu_rate)
    axes[0, 0].set_ylabel("training step, ms")
    axes[1, 0].set_ylabel("memory, MB")
    for axis in (*axes[:, 0], *axes[:, -1]):
        axis.legend(fontsize=8)
    figure.suptitle(
        f"GMMSeg's head alone, one axis at a time from C = {default.classes}, "
        f"M = {default.components}, D = {default.dim}, {default.pixels} pixels"
    )
    figure.savefig(PICTURE, dpi=90)
    plt.close(figure)
    yield Row(
        "GMMSeg's head, a step at 1000 classes over its bound by arithmetic or bandwidth",
        last,
        "≤ 2",
        f"{rate / 1e9:.0f} GFLOP/s and {width / 1e9:.0f} GB/s measured; growth.png",
        "softmax, the search for the largest and the gradient pass over the log-densities",
    )


def _draw_processes(axes: Sequence[Axes], repeats: int, size: Size, rate: float) -> None:
    """The column of processes, each with as many pixels as the one of the other columns."""
    above, below = axes
    for (memory, found), mark in zip(shares(max(2, repeats // 2)).items(), "os", strict=True):
        above.plot(PROCESSES, [s.milliseconds for s in found], f"{mark}-", label=memory)
        below.plot(PROCESSES, [s.peak for s in found], f"{mark}-", label=f"{memory}, peak")
        sent = [s.sent for s in found[1:]]
        below.plot(PROCESSES[1:], sent, f"{mark}:", label=f"{memory}, sent by each")
    arithmetic = 1e3 * size.operations / rate
    above.plot(PROCESSES, [arithmetic] * len(PROCESSES), "--", label="bound by arithmetic")
    statistics = 8 * size.classes * size.components * (2 * size.dim + 1) / 2**20
    below.plot(PROCESSES, [statistics] * len(PROCESSES), "--", label="C M (2 D + 1) numbers")
    _scale(axes, PROCESSES, "processes, time of one")


def _scale(axes: Sequence[Axes], x: Sequence[int], label: str) -> None:
    for axis in axes:
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(x, [str(value) for value in x], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(label)


def _operations_a_second(device: str) -> float:
    """Of one large product."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    return 2 * 2048**3 / min(seconds(lambda: a @ b, device) for _ in range(4))


def _bytes_a_second(device: str) -> float:
    """Read and written by a copy that no cache holds."""
    a, b = (torch.zeros(2**26, device=device) for _ in range(2))
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(4))
