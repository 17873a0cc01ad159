"""Mixtures for one episode of few-shot segmentation each: all episodes and classes in one pass of EM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.gaussian import (
    Covariance,
    batched_log_density,
    full_log_density,
    full_precision,
)

# A component needs as many pixels (CGMGM leaves it open).
_PIXELS_PER_COMPONENT = 16
# k-means steps between seeding and EM.
_KMEANS_STEPS = 3
# Pixels that every component gets on top, so that its weight never becomes zero.
_SPARE_WEIGHT = 1e-2


class EpisodicMixture(NamedTuple):
    """One Gaussian mixture per episode and class; lives in features that are centred and scaled.

    Attributes:
        centre: B x 1 x D, pooled mean of the episode's features.
        scale: B x 1 x 1, its one unit: root mean square of the channels' pooled standard
            deviations.
        alive: B x 1 x D, 0 for channels that are constant in the episode, else 1.
        means: B x C x M x D.
        covariances: variances B x C x M x D, or full covariances B x C x M x D x D.
        log_weights: B x C x M; -inf for components that a class has too few pixels for.
    """

    centre: Tensor
    scale: Tensor
    alive: Tensor
    means: Tensor
    covariances: Tensor
    log_weights: Tensor

    def standardize(self, x: Tensor) -> Tensor:
        """Features B x N x D in the mixture's units, in float32 (or float64, if they are)."""
        return (full_precision(x) - self.centre) * (self.alive / self.scale)

    def component_log_density(self, pairs: Tensor) -> Tensor:
        """Standardised features z beside their squares, B x N x 2D, to B x N x C x M log N(z; mean, covariance)."""
        shape = self.means.shape[1:3]
        if self.covariances.ndim == 5:
            z = pairs[..., : self.means.shape[-1]]
            episodes = zip(z, self.means, self.covariances, strict=True)
            return torch.stack([full_log_density(*episode) for episode in episodes])
        means, variances = self.means.flatten(1, 2), self.covariances.flatten(1, 2)
        density: Tensor = batched_log_density(pairs, means, variances).unflatten(2, shape)
        return density

    def log_density(self, x: Tensor) -> Tensor:
        """Class log-densities log p(x|c) (nats) of features B x N x D: B x N x C. CGMGM, Eq. 12.

        Constant channels add the same to every class.
        """
        with torch.autocast(x.device.type, enabled=False):
            pairs = _with_squares(self.standardize(x))
            density = self.component_log_density(pairs) + self.log_weights[:, None]
            return density.logsumexp(-1) - x.shape[-1] * self.scale.log()


@torch.no_grad()
def fit_episodes(
    x: Tensor,
    weights: Tensor,
    components: int = 3,
    iterations: int = 10,
    prior_strength: float = 10.0,
    variance_floor: float = 0.1,
    covariance: Covariance = "diagonal",
) -> EpisodicMixture:
    r"""Fit one mixture per episode and class, for B episodes and C classes at once.

    CGMGM (Shen et al., AAAI 2024), Eqs. 8-11. The paper says neither how EM starts nor how a
    covariance of 256 dimensions is estimated from a handful of pixels; here

    - features are centred, and divided by a single number: no choice below depends on their unit,
      and constant channels do not count;
    - EM starts from farthest points (the first is the pixel next to the class mean; distances are
      weighted), three steps of k-means, and equal weights; nothing is random, shapes are static;
    - the variance is maximum a posteriori, :math:`(N_m S_m + \kappa v_0) / (N_m + \kappa)`, with
      :math:`v_0` the episode's pooled variance per channel, and never below the floor;
    - a class has :math:`\lfloor N_c / 16 \rfloor` components, from 1 to M; one that has lost its
      pixels keeps its mean and gets the pooled variance.

    Runs in float32 under autocast, or in float64 if `x` is.

    Args:
        x: features, B x N x D.
        weights: of each pixel in each class, B x C x N in [0, 1]; 0 everywhere for padding.
        components: M.
        iterations: of EM.
        prior_strength: kappa, in pixels.
        variance_floor: in units of the mean variance of a channel.
        covariance: `diagonal` (the paper's choice) or `full`; `prior_strength` and `variance_floor`
            then add to the diagonal, which makes it invertible whatever N is.

    Raises:
        ValueError: shapes that do not fit, or an argument out of its range.

    Example:
        >>> x, weights = torch.randn(2, 50, 8), torch.rand(2, 1, 50)
        >>> fit_episodes(x, torch.cat([weights, 1 - weights], 1)).log_density(x).shape
        torch.Size([2, 50, 2])
    """
    if x.ndim != 3 or weights.ndim != 3 or (len(weights), weights.shape[2]) != x.shape[:2]:
        raise GenSegError(
            "fit_episodes takes features B x N x D and weights B x C x N; "
            f"got {tuple(x.shape)} and {tuple(weights.shape)}."
        )
    for name, value, least in (("components", components, 1), ("iterations", iterations, 0)):
        if value < least:
            raise GenSegError(f"{name} is {value}; it must be at least {least}.")
    for name, number in (("prior_strength", prior_strength), ("variance_floor", variance_floor)):
        if not number > 0:
            raise GenSegError(f"{name} is {number}; it must be positive.")
    with torch.autocast(x.device.type, enabled=False):
        x = full_precision(x)
        weights = weights.to(x.dtype)
        centre, scale, alive = _units(x, weights)
        pairs = _with_squares((x - centre) * (alive / scale))
        z = pairs[..., : x.shape[-1]]
        full = covariance == "full"
        pooled = _moments(pairs, weights.sum(1)[:, None, :, None].clamp_max(1), full=False)[2]
        prior = pooled.clamp_min(variance_floor) if full else pooled  # B x 1 x 1 x D

        def regularized(counts: Tensor, scatter: Tensor) -> Tensor:
            if full:
                total = counts[..., None, None] * scatter + prior_strength * torch.diag_embed(prior)
                return total / (counts[..., None, None] + prior_strength)
            total = counts[..., None] * scatter + prior_strength * prior
            return (total / (counts[..., None] + prior_strength)).clamp_min(variance_floor)

        class_counts = weights.sum(2)  # B x C
        active = (class_counts / _PIXELS_PER_COMPONENT).floor().clamp(1, components)
        spare = torch.arange(components, device=x.device) >= active[..., None]  # B x C x M
        means = _kmeans(z, weights, _seeds(z, weights, components), spare)
        whole = regularized(*_moments(pairs, weights[..., None], full)[::2])
        spread = [-1, -1, components, *[-1] * (whole.ndim - 3)]
        log_weights = torch.where(spare, -torch.inf, -active.log()[..., None])
        state = EpisodicMixture(centre, scale, alive, means, whole.expand(spread), log_weights)
        for _ in range(iterations):
            density = state.component_log_density(pairs) + state.log_weights[:, None]
            shares = density.softmax(-1).transpose(1, 2) * weights[..., None]  # B x C x N x M
            counts, average, scatter = _moments(pairs, shares, full)
            lost = (counts < 1) | spare
            empty = regularized(torch.zeros_like(counts), torch.zeros_like(scatter))
            broad = lost.reshape(*lost.shape, *[1] * (scatter.ndim - 3))
            weight = (counts + _SPARE_WEIGHT).masked_fill(spare, 0)
            state = state._replace(
                means=torch.where(lost[..., None], state.means, average),
                covariances=torch.where(broad, empty, regularized(counts, scatter)),
                log_weights=(weight / weight.sum(-1, keepdim=True)).log(),
            )
        return state


def _units(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre B x 1 x D and scale B x 1 x 1 of the pixels that count, and which channels vary."""
    share = weights.sum(1).clamp_max(1)
    share = (share / share.sum(1, keepdim=True).clamp_min(1e-12))[:, None]  # B x 1 x N
    centre = share @ x
    variance = share @ (x - centre).square()
    alive = variance > 1e-6 * variance.amax(-1, keepdim=True)  # else: rounding, or a dead channel
    number = alive.sum(-1, keepdim=True).clamp_min(1)
    scale = ((variance * alive).sum(-1, keepdim=True) / number).sqrt()
    return centre, torch.where(scale > 0, scale, 1.0), alive.to(x.dtype)


def _with_squares(z: Tensor) -> Tensor:
    """B x N x D to B x N x 2D, from which both densities and moments are one matrix product."""
    return torch.cat([z, z * z], 2)


def _moments(pairs: Tensor, shares: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums B x C x M, means B x C x M x D and (co)variances by shares B x C x N x M of features and their squares."""
    shape = shares.shape[1], shares.shape[3]
    table = shares.transpose(2, 3).flatten(1, 2)  # B x CM x N
    counts = table.sum(2)
    table = table / counts.clamp_min(1e-12)[..., None]
    if full:
        z = pairs[..., : pairs.shape[2] // 2]
        mean = table @ z
        parts = [(z * row[:, :, None]).mT @ z for row in table.unbind(1)]
        second = torch.stack(parts, 1) - mean[..., :, None] * mean[..., None, :]
    else:
        mean, second = (table @ pairs).chunk(2, 2)
        second = (second - mean.square()).clamp_min(0)
    return counts.unflatten(1, shape), mean.unflatten(1, shape), second.unflatten(1, shape)


def _squared_distances(z: Tensor, points: Tensor) -> Tensor:
    """Features B x N x D and points B x C x M x D: B x C x M x N squared distances."""
    flat = points.flatten(1, 2)
    squares = z.square().sum(-1)[:, None] + flat.square().sum(-1)[..., None]
    squares = (squares - 2 * flat @ z.mT).clamp_min(0)
    distances: Tensor = squares.unflatten(1, points.shape[1:3])
    return distances


def _seeds(z: Tensor, weights: Tensor, components: int) -> Tensor:
    """Pixels that are far from each other, for every class: B x C x M x D. A class without pixels: the origin."""
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


def _kmeans(z: Tensor, weights: Tensor, means: Tensor, spare: Tensor) -> Tensor:
    """A few steps of k-means; a centre without pixels stays. Spare components take no part."""
    for _ in range(_KMEANS_STEPS):
        distances = _squared_distances(z, means).masked_fill(spare[..., None], torch.inf)
        owner = torch.zeros_like(distances).scatter_(2, distances.argmin(2, keepdim=True), 1.0)
        table = owner * weights[:, :, None]  # B x C x M x N
        counts = table.sum(-1, keepdim=True)
        sums = (table.flatten(1, 2) @ z).view_as(means)
        means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), means)
    return means
