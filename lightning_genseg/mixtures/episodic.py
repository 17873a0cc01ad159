"""Mixtures for one episode of few-shot segmentation each: all episodes in one pass of EM."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.em import estimate
from lightning_genseg.mixtures.gaussian import Covariance
from lightning_genseg.mixtures.log_density import (
    few_products,
    full_log_density,
    full_precision,
    pairs_log_density,
    with_squares,
)

# A component needs as many pixels (CGMGM leaves it open).
_PIXELS_PER_COMPONENT = 16
# k-means steps between seeding and EM.
_KMEANS_STEPS = 3
# Pixels that every component gets on top, so that its weight never becomes zero.
_SPARE_WEIGHT = 1e-2
# EM has converged once no pixel's share of a component changes by more.
_SETTLED = 1e-6
# Rows of features that a processor's cache holds.
_IN_CACHE = 1024
_OF_CLASSES = ("means", "covariances", "log_weights")


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
        """Standardised features `with_squares`, B x N x 2D, to log-densities B x N x C x M.

        Pixels are last in memory.
        """
        shape = self.means.shape[1:3]
        if self.covariances.ndim == 5:
            z = pairs[..., : self.means.shape[-1]]
            episodes = zip(z, self.means, self.covariances, strict=True)
            densities = torch.stack([full_log_density(*episode) for episode in episodes])
            return densities.movedim(1, -1).contiguous().movedim(-1, 1)
        means, variances = self.means.flatten(1, 2), self.covariances.flatten(1, 2)
        density: Tensor = pairs_log_density(pairs, means, variances).unflatten(2, shape)
        return density

    def log_density(self, x: Tensor) -> Tensor:
        """Class log-densities log p(x|c) (nats) of features B x N x D: B x N x C. CGMGM, Eq. 12.

        Constant channels add the same to every class.
        """
        with torch.autocast(x.device.type, enabled=False):
            z = self.standardize(x)
            density = self.component_log_density(with_squares(z.double()))
            density = (density + self.log_weights[:, None]).logsumexp(-1)
            return (density - x.shape[-1] * self.scale.log()).to(z.dtype)


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
        x: features, B x N x D; those of padding may be anything, NaN too.
        weights: of each pixel in each class, B x C x N in [0, 1]; 0 everywhere for padding.
        components: M.
        iterations: of EM.
        prior_strength: kappa, in pixels.
        variance_floor: in units of the mean variance of a channel.
        covariance: `diagonal` (the paper's choice) or `full`; `prior_strength` and `variance_floor`
            then add to the diagonal, which makes it invertible whatever N is.

    Raises:
        GenSegError: shapes that do not fit, or an argument out of its range.

    Example:
        >>> x, weights = torch.randn(2, 50, 8), torch.rand(2, 1, 50)
        >>> fit_episodes(x, torch.cat([weights, 1 - weights], 1)).log_density(x).shape
        torch.Size([2, 50, 2])
    """
    check_arguments(
        fit_episodes,
        locals(),
        components="[1, inf)",
        iterations="[0, inf)",
        prior_strength="(0, inf)",
        variance_floor="(0, inf)",
    )
    if x.ndim != 3 or weights.ndim != 3 or (weights.shape[0], weights.shape[2]) != x.shape[:2]:
        raise GenSegError(
            "fit_episodes takes features B x N x D and weights B x C x N; "
            f"got {tuple(x.shape)} and {tuple(weights.shape)}."
        )
    with torch.autocast(x.device.type, enabled=False):
        x, counted = full_precision(x), weights.amax(1) > 0
        weights = weights.to(x.dtype)

        fitted = partial(
            _fit,
            components=components,
            iterations=iterations,
            prior_strength=prior_strength,
            variance_floor=variance_floor,
            full=covariance == "full",
        )
        # Padding may hold anything, and NaN times a weight of 0 is NaN.
        x = x.masked_fill(~counted[..., None], 0)
        if not _chooses_pixels(x):
            return fitted(x, weights)
        each = [
            fitted(one[None] if whole else one[rows][None], shares[None, :, rows])
            for one, shares, rows, whole in zip(
                x, weights, map(_some, counted), counted.all(1).tolist(), strict=True
            )
        ]
        return EpisodicMixture(*map(torch.cat, zip(*each, strict=True)))


def _chooses_pixels(x: Tensor) -> bool:
    """Whether work may depend on numbers: a GPU would have to be waited for, a graph be fixed."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _some(counted: Tensor) -> Tensor:
    """Positions of true entries; none of nothing would be no features: then the first."""
    positions = counted.nonzero()[:, 0]
    return positions if len(positions) else torch.zeros_like(counted[:1], dtype=torch.long)


def _fit(
    x: Tensor,
    weights: Tensor,
    components: int,
    iterations: int,
    prior_strength: float,
    variance_floor: float,
    full: bool,
) -> EpisodicMixture:
    """`fit_episodes` of features and weights of one dtype."""
    centre, scale, variance = _units(x, weights)
    alive = (variance > 0).to(x.dtype)
    prior = (variance / scale.square())[:, :, None]
    if full:
        prior = prior.clamp_min(variance_floor).diag_embed()

    def regularized(counts: Tensor, scatter: Tensor) -> Tensor:
        counts = counts[(..., *[None] * (scatter.ndim - counts.ndim))]
        posterior = (counts * scatter + prior_strength * prior) / (counts + prior_strength)
        return posterior if full else posterior.clamp_min(variance_floor)

    def mixture(pairs: Tensor, weights: Tensor) -> EpisodicMixture:
        active = (weights.sum(2) / _PIXELS_PER_COMPONENT).floor().clamp(1, components)  # B x C
        spare = torch.arange(components, device=x.device) >= active[..., None]  # B x C x M
        z, squares = pairs[..., : x.shape[-1]], pairs[..., x.shape[-1] :].sum(-1)
        seeds = farthest_points(z, squares, weights, components)
        means = k_means(z, squares, weights, seeds, spare)
        whole = estimate(pairs, weights[:, :, None], full)
        spread = regularized(whole.counts, whole.covariances)
        spread = spread.expand(-1, -1, components, *[-1] * (spread.ndim - 3))
        log_weights = torch.where(spare, -torch.inf, -active.log()[..., None])
        state = EpisodicMixture(centre, scale, alive, means, spread, log_weights)
        last: Tensor | None = None
        for _ in range(iterations):
            density = state.component_log_density(pairs).movedim(1, -1)  # B x C x M x N
            shares = (density + state.log_weights[..., None]).softmax(2) * weights[:, :, None]
            if last is not None and bool((shares - last).abs().max() < _SETTLED):
                break
            last = shares if _chooses_pixels(x) else None
            counts, average, scatter = estimate(pairs, shares, full)
            lost = (counts < 1) | spare
            weight = (counts + _SPARE_WEIGHT).masked_fill(spare, 0)
            state = state._replace(
                means=torch.where(lost[..., None], state.means, average),
                covariances=regularized(counts.masked_fill(lost, 0), scatter),
                log_weights=(weight / weight.sum(-1, keepdim=True)).log(),
            )
        return state

    if not _chooses_pixels(x):
        return mixture(with_squares((x - centre) * (alive / scale)), weights)
    each = []
    for shares in weights[0]:  # there is one episode
        rows = _some(shares > 0)
        pairs = x.new_empty(1, len(rows), 2 * x.shape[-1])
        for part, own in zip(pairs[0].split(_IN_CACHE), rows.split(_IN_CACHE), strict=True):
            z, squares = part.chunk(2, 1)
            z.copy_(x[0, own].sub_(centre[0]).mul_((alive / scale)[0]))
            torch.mul(z, z, out=squares)
        each.append(mixture(pairs, shares[None, None, rows]))
    parts = (torch.cat([getattr(one, name) for one in each], 1) for name in _OF_CLASSES)
    return EpisodicMixture(centre, scale, alive, *parts)


def _units(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre B x 1 x D, scale B x 1 x 1 and variance B x 1 x D of the pixels that count.

    The variance is 0 for channels that do not vary but by rounding.
    """
    share = weights.sum(1).clamp_max(1)
    share = (share / share.sum(1, keepdim=True).clamp_min(1e-12))[:, None]  # B x 1 x N
    centre = share @ x
    parts = zip(share.split(_IN_CACHE, 2), x.split(_IN_CACHE, 1), strict=True)
    variance = torch.stack([own @ (part - centre).square_() for own, part in parts]).sum(0)
    alive = variance > 1e-6 * variance.amax(-1, keepdim=True)  # else: rounding, or a dead channel
    variance = variance * alive
    scale = (variance.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp_min(1)).sqrt()
    return centre, torch.where(scale > 0, scale, 1.0), variance


def farthest_points(z: Tensor, squares: Tensor, weights: Tensor, components: int) -> Tensor:
    """Seeds B x C x M x D: pixels far from each other; the origin for a class without pixels."""
    rows = torch.arange(z.shape[0], device=z.device)[:, None]

    def pixel(score: Tensor) -> Tensor:
        return z[rows, score.argmax(-1)][:, :, None]  # B x C x 1 x D

    total = weights.sum(-1, keepdim=True)
    mean = (weights @ z / total.clamp_min(1e-12))[:, :, None]
    distance = _squared_distances(z, squares, mean)[:, :, 0]
    seeds = pixel((-distance).masked_fill(weights == 0, -torch.inf))
    nearest: Tensor | None = None
    for _ in range(components - 1):
        distance = _squared_distances(z, squares, seeds[:, :, -1:])[:, :, 0]
        nearest = distance if nearest is None else nearest.minimum(distance)
        seeds = torch.cat([seeds, pixel(weights * nearest)], 2)
    return seeds * (total > 0)[..., None]


def k_means(z: Tensor, squares: Tensor, weights: Tensor, means: Tensor, spare: Tensor) -> Tensor:
    """A few steps of k-means; a centre without pixels stays. Spare components take no part."""
    for _ in range(_KMEANS_STEPS):
        distances = _squared_distances(z, squares, means).masked_fill(spare[..., None], torch.inf)
        # The first of the nearest; `argmin` over a few numbers takes as long as the product.
        owner = distances == distances.amin(2, keepdim=True)
        owner &= owner.cumsum(2) == 1
        table = owner * weights[:, :, None]  # B x C x M x N
        counts = table.sum(-1, keepdim=True)
        sums = (table.flatten(1, 2) @ z).view_as(means)
        means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), means)
    return means


def _squared_distances(z: Tensor, squares: Tensor, points: Tensor) -> Tensor:
    """Features B x N x D, their squared norms, and points B x C x M x D: B x C x M x N."""
    flat = points.flatten(1, 2)
    own = flat.square().sum(-1)[..., None]
    distances = (squares[:, None] + own - 2 * few_products(z, flat)).clamp_min(0)
    per_class: Tensor = distances.unflatten(1, points.shape[1:3])
    return per_class
