"""What GMMSeg's head costs, against a plain version of it and against softmax: one table, one run.

    python experiments/benchmarks/gmm_head.py            # some minutes on two cores
    python experiments/benchmarks/gmm_head.py --stride 4 # with the losses at the size of the image
    python experiments/benchmarks/gmm_head.py --quick    # small sizes, under a minute

A training step is forward, losses, backward, memory and EM (no optimiser); an inference pass ends
at the logits of the feature map. All heads get the same features and masks, in one process; times
are medians. By default the mask has the size of the feature map. In training it is four times as
large (`--stride 4`), and most of the step is then what every head has: the cross-entropy of logits
enlarged to it. `PlainHead` is the reference: the same mathematics as published code does it, with a
tensor of pixels x components x dimensions through `torch.distributions`, Python loops over classes
and components, and a queue of features that every EM step goes through as a whole.

Peak memory on the CPU is the rise of the resident set during one pass, in a process of its own that
has already imported everything, made the inputs and run a small pass; on CUDA it is the
allocator's. What is held between steps (weights, queue) is not in it.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from lightning_genseg import EMOptions, GMMHead, MixtureOptions
from lightning_genseg.networks.losses import pixel_cross_entropy

BATCH, CHANNELS, COMPONENTS, DIM, IGNORE = 2, 256, 5, 64, 255
HEADS = ("ours", "plain", "softmax")


class PlainHead(nn.Module):
    """GMMSeg's head by broadcasting and loops, in the manner of the public code."""

    def __init__(self, num_classes: int, slots: int, samples: int = 100) -> None:
        super().__init__()
        self.num_classes, self.slots, self.samples = num_classes, slots, samples
        self.projection = nn.Sequential(
            nn.Conv2d(CHANNELS, DIM, 1, bias=False), nn.BatchNorm2d(DIM), nn.ReLU()
        )
        self.feature_norm, self.logit_norm = nn.LayerNorm(DIM), nn.LayerNorm(num_classes)
        shape = (num_classes, COMPONENTS, DIM)
        self.means = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.scales = nn.Parameter(torch.ones(shape), requires_grad=False)
        groups = num_classes * COMPONENTS
        self.queue = F.normalize(torch.randn(groups, slots, DIM), dim=-1)
        self.pointer = torch.zeros(groups, dtype=torch.long)

    def to(self, device: str) -> "PlainHead":
        self.queue, self.pointer = self.queue.to(device), self.pointer.to(device)
        return super().to(device)

    def densities(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x = self.projection(features).permute(0, 2, 3, 1).flatten(0, 2)
        x = F.normalize(self.feature_norm(x), dim=-1)
        self.means.data.copy_(F.normalize(self.means, dim=-1))
        gaussians = Independent(Normal(self.means.flatten(0, 1), self.scales.flatten(0, 1)), 1)
        return x, gaussians.log_prob(x[:, None]).view(-1, self.num_classes, COMPONENTS)

    def forward(self, features: Tensor) -> Tensor:
        return self.to_map(self.densities(features)[1], features)

    def to_map(self, density: Tensor, features: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        logits = self.logit_norm(density.amax(-1))
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def train_step(self, features: Tensor, mask: Tensor) -> None:
        x, density = self.densities(features)
        scores = self.to_map(density, features)
        small = F.interpolate(mask[:, None].float(), features.shape[2:], mode="nearest")
        labels = small.long().flatten()
        target = labels.clone()
        for c in labels.unique():
            if c == IGNORE:
                continue
            own = density[labels == c, c].detach()
            chosen = plain_sinkhorn(own / own.abs().max()).argmax(1)
            target[labels == c] = chosen + COMPONENTS * c
        target[labels == IGNORE] = self.num_classes * COMPONENTS
        large = F.interpolate(scores, mask.shape[1:], mode="bilinear")
        loss = F.cross_entropy(large, mask, ignore_index=IGNORE)
        contrast = F.cross_entropy(
            density.flatten(1), target, ignore_index=self.num_classes * COMPONENTS
        )
        (loss + 0.01 * contrast).backward()
        with torch.no_grad():
            self.remember(x.detach(), labels, target)
            self.em(labels)

    def remember(self, x: Tensor, labels: Tensor, target: Tensor) -> None:
        for c in labels.unique():
            if c == IGNORE:
                continue
            for m in range(COMPONENTS):
                group = int(c) * COMPONENTS + m
                new = x[target == group]
                if len(new) == 0:
                    continue
                if len(new) > self.samples:
                    spread = torch.linspace(0, len(new) - 1, self.samples, device=x.device)
                    new = new[spread.long()]
                places = (int(self.pointer[group]) + torch.arange(len(new))) % self.slots
                self.queue[group, places.to(x.device)] = new
                self.pointer[group] = (self.pointer[group] + len(new)) % self.slots

    def em(self, labels: Tensor) -> None:
        means, scales = self.means.data.clone(), self.scales.data.clone()
        for c in labels.unique():
            if c == IGNORE:
                continue
            for m in range(COMPONENTS):
                memory = self.queue[int(c) * COMPONENTS + m]
                mean = F.normalize(memory.sum(0), dim=0)
                means[c, m] = 0.999 * means[c, m] + 0.001 * mean
                scales[c, m] = ((memory - mean).square().mean(0) + 1e-2).sqrt()
        self.means = nn.Parameter(means, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)


def plain_sinkhorn(log_density: Tensor) -> Tensor:
    """One class's pixels: exponentials as they are, three rounds of columns and rows."""
    q = (log_density / 0.05).exp()
    q = q / q.sum()
    pixels, components = q.shape
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) / components
        q = q / q.sum(1, keepdim=True) / pixels
    return q * pixels


class OurHead(GMMHead):
    def train_step(self, features: Tensor, mask: Tensor) -> None:
        losses = self.compute_loss(features, mask)
        losses["loss"].backward()
        self.update_mixture(losses["embedding"], mask)


class SoftmaxHead(nn.Sequential):
    def train_step(self, features: Tensor, mask: Tensor) -> None:
        scores = F.interpolate(self(features), mask.shape[1:], mode="bilinear")
        pixel_cross_entropy(scores, mask, IGNORE).backward()


def make_head(name: str, classes: int, slots: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "softmax":
        return SoftmaxHead(nn.Dropout2d(0.1), nn.Conv2d(CHANNELS, classes, 1)).to(device)
    if name == "plain":
        return PlainHead(classes, slots).to(device)
    mixture = MixtureOptions(components=COMPONENTS, embedding_dim=DIM)
    head = OurHead(CHANNELS, classes, mixture, EMOptions(memory_size=slots)).to(device)
    assert head.memory is not None
    head.memory.to(torch.device(device))
    return head


def make_batch(classes: int, size: int, stride: int, device: str) -> tuple[Tensor, Tensor]:
    """Random features; a mask of patches of 8 x 8 feature pixels, a tenth of them ignored."""
    torch.manual_seed(1)
    features = torch.randn(BATCH, CHANNELS, size, size).to(device).requires_grad_()
    patches = torch.randint(classes, (BATCH, -(-size // 8), -(-size // 8)))
    patches[torch.rand(patches.shape) < 0.1] = IGNORE
    mask = patches.repeat_interleave(8 * stride, 1).repeat_interleave(8 * stride, 2)
    return features, mask[:, : size * stride, : size * stride].contiguous().to(device)


def one_pass(head: nn.Module, mode: str, features: Tensor, mask: Tensor) -> None:
    if mode == "train":
        head.train()
        head.train_step(features, mask)  # type: ignore[operator]
        head.zero_grad()
        features.grad = None
    else:
        head.eval()
        with torch.inference_mode():
            head(features)
    if features.is_cuda:
        torch.cuda.synchronize()


# --- memory ----------------------------------------------------------------------------------


def peak_resident() -> int:
    """Highest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would also know what the parent held when it forked
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def measure(name: str, mode: str, classes: int, size: int, args: argparse.Namespace) -> int:
    """Bytes that one pass needs at its peak on top of what there was."""
    torch.set_num_threads(args.threads)
    head = make_head(name, classes, args.slots, args.device)
    features, mask = make_batch(classes, size, args.stride, args.device)
    one_pass(head, mode, *make_batch(classes, 8, args.stride, args.device))
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(head, mode, features, mask)
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # Linux: the highest resident set becomes the present one
    before = peak_resident()
    one_pass(head, mode, features, mask)
    return peak_resident() - before


def measurer() -> ProcessPoolExecutor:
    """Every task in a process of its own, forked from one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning_genseg"])
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


# --- time ------------------------------------------------------------------------------------


def plain_gigabytes(classes: int, size: int, mode: str) -> float:
    """What the plain head will need: some five tensors of N x CM x D to train, three to predict."""
    tensor = BATCH * size**2 * classes * COMPONENTS * DIM * 4
    return tensor * (5 if mode == "train" else 3) / 2**30


def bench(
    classes: int, size: int, mode: str, args: argparse.Namespace, pool: ProcessPoolExecutor
) -> dict[str, float]:
    names = list(HEADS)
    needed = plain_gigabytes(classes, size, mode)
    if needed > args.max_gb:
        names.remove("plain")
        print(
            f"(plain head left out at {classes} classes, {size} x {size}, {mode}: it needs about "
            f"{needed:.0f} GB and --max-gb is {args.max_gb:g})",
            flush=True,
        )
    heads = {name: make_head(name, classes, args.slots, args.device) for name in names}
    features, mask = make_batch(classes, size, args.stride, args.device)
    times: dict[str, list[float]] = {name: [] for name in names}
    # Ours and softmax in turn, since little lies between them; the plain head after them, since the
    # gigabytes that it takes and gives back slow down whatever comes next.
    for group in (("ours", "softmax"), ("plain",)):
        for repeat in range(args.repeats + 1):  # the first only warms up
            for name in (name for name in group if name in names):
                if sum(times[name]) > args.max_seconds:
                    continue
                start = time.perf_counter()
                one_pass(heads[name], mode, features, mask)
                taken = time.perf_counter() - start
                if repeat or taken > args.max_seconds:
                    times[name].append(taken)
    row = {f"{name} ms": 1e3 * statistics.median(times[name]) for name in names}
    for name in names:
        peak = pool.submit(measure, name, mode, classes, size, args).result()
        row[f"{name} MB"] = peak / 2**20
    return row


def table(rows: list[tuple[int, int, str, dict[str, float]]]) -> str:
    head = (
        "| classes | map | pass | ours ms | plain ms | plain / ours | softmax ms | ours / softmax "
    )
    head += "| ours MB | plain MB | plain / ours | softmax MB | ours / softmax |"
    lines = [head, "|" + " ---: |" * head.count("|", 1)]
    for classes, size, mode, row in rows:
        cells = [str(classes), f"{size} x {size}", mode]
        for unit in ("ms", "MB"):
            ours, plain, softmax = (row.get(f"{name} {unit}") for name in HEADS)
            cells += [f"{ours:.0f}"]
            cells += ["-", "-"] if plain is None else [f"{plain:.0f}", f"**{plain / ours:.1f}**"]
            cells += [f"{softmax:.0f}", f"{ours / max(softmax, 1e-9):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of GMMSeg's head.")
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 150, 171])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="of the map")
    parser.add_argument("--stride", type=int, default=1, help="mask pixels per feature pixel")
    parser.add_argument("--slots", type=int, default=1000, help="K of both memories")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-gb", type=float, default=12, help="leave the plain head out above")
    parser.add_argument("--max-seconds", type=float, default=60, help="of a head, per row")
    parser.add_argument("--quick", action="store_true", help="19 classes, 32 x 32, 2 repeats")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.classes, args.sizes, args.repeats = [19], [32], 2
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"{args.threads} CPU threads"
    print(
        f"{name}, torch {torch.__version__}; batch {BATCH}, M {COMPONENTS}, D {DIM}, F {CHANNELS}, "
        f"K {args.slots}, mask at {args.stride} x the map, {args.repeats} repeats",
        flush=True,
    )
    cases = [
        (classes, size, mode)
        for classes in args.classes
        for size in args.sizes
        for mode in ("train", "predict")
    ]
    with measurer() as pool:
        print(table([(*case, bench(*case, args, pool)) for case in cases]))


if __name__ == "__main__":
    main()
