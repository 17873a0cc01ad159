"""What the heads cost alone: GMMSeg's beside a plain version, GSS' beside softmax; EM's memory."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from measure import Row, compare, peak, row
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from lightning_genseg import EMOptions, GMMHead, MixtureOptions, TokenDecoderOptions
from lightning_genseg.methods.gmmseg.options import Memory
from lightning_genseg.methods.gss.head import TokenHead
from lightning_genseg.mixtures.sinkhorn import Processes
from lightning_genseg.networks.losses import pixel_cross_entropy

BATCH, CHANNELS, COMPONENTS, DIM = 2, 256, 5, 64
IGNORE = -1  # 255 is one of a thousand classes
COCO_STUFF = 171  # classes


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


def gaussian_step(
    name: str,
    classes: int,
    size: int,
    device: str,
    components: int = COMPONENTS,
    dim: int = DIM,
    memory: Memory = "ring",
    processes: Processes | None = None,
) -> Callable[[], None]:
    """A training step of a head on random features, with a mask of the map's size."""
    torch.manual_seed(0)
    features = torch.randn(BATCH, CHANNELS, size, size, device=device, requires_grad=True)
    patches = torch.randint(classes, (BATCH, -(-size // 8), -(-size // 8)))
    patches[torch.rand(patches.shape) < 0.1] = IGNORE
    mask = patches.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :size, :size]
    mask = mask.contiguous().to(device)
    if name == "plain":
        return partial(PlainHead(classes, 1000).to(device).train_step, features, mask)
    mixture = MixtureOptions(components=components, embedding_dim=dim)
    em = EMOptions(memory=memory, memory_size=1000)
    head = GMMHead(CHANNELS, classes, mixture, em, ignore_index=IGNORE).to(device)
    assert head.memory is not None
    head.memory.to(torch.device(device))

    def step() -> None:
        losses = head.compute_loss(features, mask)
        losses["loss"].backward()
        head.update_mixture(losses["embedding"], mask, losses["assignment"], processes)

    return step


def _peak_of(name: str, classes: int, size: int, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    gaussian_step(name, 2, 8, device)()  # everything is imported and allocated once
    return peak(gaussian_step(name, classes, size, device), device)


def gaussian_head(device: str, repeats: int, size: int = 64) -> Iterator[Row]:
    """Loops over classes and components, as in published code, over matrix products."""
    what = f"GMMSeg's head alone at {COCO_STUFF} classes, {size} x {size}: plain loops over ours"
    ours, plain = (gaussian_step(n, COCO_STUFF, size, device) for n in ("ours", "plain"))
    times = compare(ours, plain, max(1, repeats // 4), device)
    yield row(f"{what}, time", times, "≥ 40", inverse=True)
    del ours, plain
    peaks = []
    for name in ("ours", "plain"):  # each in a process of its own: memory once freed is kept
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            threads = torch.get_num_threads()
            peaks.append(pool.submit(_peak_of, name, COCO_STUFF, size, device, threads).result())
    detail = f"{peaks[0]:.0f} and {peaks[1]:.0f} MB"
    yield Row(f"{what}, peak memory", peaks[1] / peaks[0], "≥ 30", detail)


def mixture_memory() -> Iterator[Row]:
    """Bytes that EM keeps for COCO-Stuff's classes, and what one of two processes sends."""
    sent = 0

    def gather(tensor: Tensor) -> Tensor:
        nonlocal sent
        sent += tensor.nbytes
        return torch.stack([tensor, torch.zeros_like(tensor)])

    torch.manual_seed(0)
    mask = torch.randint(COCO_STUFF, (1, 128, 128)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    features, statistics = torch.randn(1, CHANNELS, 128, 128), COCO_STUFF * COMPONENTS
    statistics *= 8 * (2 * DIM + 1)
    for memory in get_args(Memory):
        # Its storage follows the size of the ring; this one is for what is sent.
        head = GMMHead(CHANNELS, COCO_STUFF, em=EMOptions(memory=memory, memory_size=1000))
        kept = statistics + 4 * (32_000 * DIM * COCO_STUFF * COMPONENTS if memory == "ring" else 0)
        assert head.memory is not None
        moments = head.memory.moments()
        assert sum(tensor.nbytes for tensor in moments) == statistics
        default = ", the default" if memory == EMOptions().memory else ""
        what = f"EM's memory at {COCO_STUFF} classes, {memory}{default}, MB"
        obstacle = "the features themselves; the default, `decay`, keeps their moments alone"
        yield Row(what, kept / 2**20, "≤ 50", obstacle=obstacle)
        sent = 0
        losses = head.compute_loss(features, mask)
        head.update_mixture(losses["embedding"], mask, processes=Processes(gather, 0))
        what = f"bytes that a process sends in an EM step over those of the statistics, {memory}"
        # Counts of labels and groups, and of Sinkhorn's rounds C M numbers each, come on top.
        detail = f"{sent / 1e6:.3g} MB, batch 1 of 512 x 512"
        yield Row(what, sent / statistics, "≤ 1.05", detail, "its features travel")


def token_head(device: str, repeats: int, size: int = 32, tokens: int = 8192) -> Iterator[Row]:
    """Forward, loss and backward on 512 channels; two images, 2 048 channels before the tokens."""
    torch.manual_seed(0)
    shape = (2, size, size)
    features = torch.randn(2, 512, size, size, device=device, requires_grad=True)
    # A maskige's tokens are few, and most cells hold those of a plain area.
    held = torch.randperm(tokens)[:400]
    drawn = held[(400 * torch.rand(shape) ** 4).long()].to(device)
    labelled = torch.rand(shape, device=device) > 0.1
    classifier = nn.Conv2d(512, 150, 1).to(device)
    mask = (drawn % 150).masked_fill(~labelled, IGNORE)
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)

    def softmax() -> None:
        scores = F.interpolate(classifier(features), mask.shape[1:], mode="bilinear")
        pixel_cross_entropy(scores, mask, IGNORE).backward()

    for slots in (None, 512):
        head = TokenHead(tokens, TokenDecoderOptions(vocabulary=slots)).to(device)

        def step(head: TokenHead = head) -> None:
            head.cross_entropy(features, drawn, labelled).backward()
            head.zero_grad()

        which = "all have logits" if slots is None else f"vocabulary of {slots}"
        what = f"GSS' head over softmax's, {tokens} tokens, {size} x {size}: {which}"
        obstacle = "the 2 048 channels before the classifier; the whole network's row counts"
        yield row(what, compare(step, softmax, repeats, device), "≤ 3", obstacle=obstacle)
