"""Where EM starts: k-means++ for class mixtures, farthest points and k-means for episodes."""

import torch
from torch import Tensor

from lightning_genseg.mixtures.memory import ranks_in_group


def k_means_plus_plus(
    x: Tensor, index: Tensor, num_classes: int, components: int, generator: torch.Generator
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007) for all classes at once.

    A class with fewer pixels than components repeats some.

    Args:
        x: features, N x D.
        index: class of each, N in 0..C; C for none.
        num_classes: C.
        components: M.
        generator: of random numbers, on the CPU.

    Returns:
        C x M x D of the features; zeros for a class without any.
    """
    order = torch.randperm(len(x), generator=generator).to(x.device)
    first = ranks_in_group(index[order], num_classes + 1) == 0
    centres = x.new_zeros(num_classes + 1, components, x.shape[1])
    centres[index[order[first]], 0] = x[order[first]]
    nearest = (x - centres[index, 0]).square().sum(1)
    for component in range(1, components):
        # Gumbel-max draws one pixel a class with probability proportional to its squared distance.
        noise = -torch.empty(len(x)).exponential_(generator=generator).log().to(x)
        key = nearest.clamp_min(torch.finfo(x.dtype).tiny).log() + noise
        best = key.new_full((num_classes + 1,), -torch.inf).scatter_reduce(0, index, key, "amax")
        drawn = key == best[index]
        centres[index[drawn], component] = x[drawn]
        nearest = nearest.minimum((x - centres[index, component]).square().sum(1))
    return centres[:num_classes]


def farthest_points(z: Tensor, weights: Tensor, components: int) -> Tensor:
    """For every episode and class, pixels that are far from each other, without randomness.

    The first is the pixel next to the class mean; distances count by the pixels' weights.

    Args:
        z: features around the origin, B x N x D.
        weights: of each pixel in each class, B x C x N.
        components: M.

    Returns:
        B x C x M x D; the origin for a class without pixels.
    """
    rows = torch.arange(len(z), device=z.device)[:, None]

    def pixel(score: Tensor) -> Tensor:
        return z[rows, score.argmax(-1)][:, :, None]  # B x C x 1 x D

    total = weights.sum(-1, keepdim=True)
    mean = (weights @ z / total.clamp_min(1e-12))[:, :, None]
    nearest = -_squared_distances(z, mean)[:, :, 0]
    seeds = pixel(nearest.masked_fill(weights == 0, -torch.inf))
    for _ in range(components - 1):
        seeds = torch.cat([seeds, pixel(weights * _squared_distances(z, seeds).amin(2))], 2)
    return seeds * (total > 0)[..., None]


def k_means(z: Tensor, weights: Tensor, means: Tensor, spare: Tensor, steps: int) -> Tensor:
    """A few steps of k-means from `farthest_points`; a centre without pixels stays.

    Spare components (B x C x M bool) take no part.
    """
    for _ in range(steps):
        distances = _squared_distances(z, means).masked_fill(spare[..., None], torch.inf)
        owner = torch.zeros_like(distances).scatter_(2, distances.argmin(2, keepdim=True), 1.0)
        table = owner * weights[:, :, None]  # B x C x M x N
        counts = table.sum(-1, keepdim=True)
        sums = (table.flatten(1, 2) @ z).view_as(means)
        means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), means)
    return means


def _squared_distances(z: Tensor, points: Tensor) -> Tensor:
    """Features B x N x D and points B x C x M x D: B x C x M x N squared distances."""
    flat = points.flatten(1, 2)
    squares = z.square().sum(-1)[:, None] + flat.square().sum(-1)[..., None]
    squares = (squares - 2 * flat @ z.mT).clamp_min(0)
    distances: Tensor = squares.unflatten(1, points.shape[1:3])
    return distances
