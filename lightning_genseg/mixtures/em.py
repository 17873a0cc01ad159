"""Expectation-maximisation: E-step, estimates by shares, M-step, and `fit` for one-off mixtures."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.gaussian import Covariance, GaussianMixture, pooled
from lightning_genseg.mixtures.log_density import full_precision, with_squares
from lightning_genseg.mixtures.memory import Estimate, central, count_groups, ranks_in_group
from lightning_genseg.mixtures.sinkhorn import segments, sinkhorn
from lightning_genseg.ops.processes import Processes

Assignment = Literal["sinkhorn", "em"]


@torch.no_grad()
def e_step(
    mixture: GaussianMixture,
    own_log_density: Tensor,
    labels: Tensor,
    assignment: Assignment = "sinkhorn",
    epsilon: float = 0.05,
    iterations: int = 3,
    rescale: bool = True,
    processes: Processes | None = None,
) -> Tensor:
    """Responsibilities of each pixel's own components, for all classes at once: log q, N x M.

    Takes what `GaussianMixture.own_log_density` gives.

    `sinkhorn` solves GMMSeg's Eq. 9 (equal shares), `em` its Eq. 8 (plain EM, with the weights).
    Labels outside 0..C-1 are ignored. The other arguments are those of `sinkhorn`.
    """
    own = full_precision(own_log_density)
    if assignment == "sinkhorn":
        return sinkhorn(own, labels, mixture.num_classes, epsilon, iterations, rescale, processes)
    index = segments(labels, mixture.num_classes).clamp_max(mixture.num_classes - 1)
    return (own + mixture.log_weights[index]).log_softmax(1)


def estimate(pairs: Tensor, shares: Tensor, full: bool = False) -> Estimate:
    """Weights, means and (co)variances of components, from their shares of the pixels.

    Args:
        pairs: features of `with_squares`, N x 2D, or B x N x 2D for a batch of episodes.
        shares: of each component in each pixel, ... x N, or B x ... x N.
        full: whether covariances are matrices.
    """
    lead, groups = pairs.ndim - 2, shares.shape[pairs.ndim - 2 : -1]
    table = shares.flatten(lead, -2)
    counts = table.sum(-1)
    table = table / counts.clamp_min(1e-12)[..., None]
    if full:
        x = pairs[..., : pairs.shape[-1] // 2]
        means = table @ x
        second = torch.stack([(x * row[..., None]).mT @ x for row in table.unbind(lead)], lead)
    else:
        means, second = (table @ pairs).chunk(2, -1)
    parts = (counts, means, central(second, means))
    return Estimate(*(part.unflatten(lead, groups) for part in parts))


@torch.no_grad()
def m_step(
    mixture: GaussianMixture,
    estimate: Estimate,
    mean_momentum: float = 0.0,
    variance_momentum: float = 0.0,
    variance_floor: float = 1e-2,
    present: Tensor | None = None,
    weights: Tensor | None = None,
    shrinkage: float = 0.0,
) -> None:
    """Write new parameters into the mixture, in place; a component without features keeps its own.

    GMMSeg, Eq. 8 and "momentum EM": mean <- momentum * mean + (1 - momentum) * new mean. As in the
    authors' code, unit means are normalised before they are blended, the new variance is taken
    around the new mean, before momentum, plus a floor, and of diagonal covariances the deviations
    are blended.

    Args:
        mixture: to be updated.
        estimate: of C x M components, or of C M in one row, classes first.
        mean_momentum: share of the old mean that stays.
        variance_momentum: likewise of the deviations, or of a full covariance (0 in the code, 0.999
            in the paper).
        variance_floor: added to every variance (to the diagonal of a full covariance).
        present: C booleans, the classes to update; None for all.
        weights: new mixture weights C x M, positive; None leaves them as they are.
        shrinkage: share of the mean covariance of all components with features in each of them,
            also of absent classes (Friedman: Regularized Discriminant Analysis, JASA 1989, Eq. 8,
            which weighs them by their features); not in the paper.
    """
    if mixture.means.requires_grad:
        raise GenSegError(
            "This mixture's parameters are trained by gradient (trainable=True); EM would undo it."
        )
    shape = mixture.means.shape
    update = estimate.counts.view(*shape[:2], 1) > 0.5  # half a feature, see `Moments.estimate`
    known = wanted = update
    if present is not None:
        update = update & present[:, None, None]
        wanted = known if shrinkage else update  # what is shared moves for all
    average = estimate.means.view(shape)
    mean = F.normalize(average, dim=-1) if mixture.unit_means else average
    shift = mean - average

    def shrunk(covariance: Tensor) -> Tensor:
        if not shrinkage:
            return covariance
        return covariance.lerp(pooled(covariance, known[..., 0]), shrinkage)

    def blend(old: Tensor, new: Tensor, momentum: float, where: Tensor) -> None:
        mixed = momentum * old.to(new.dtype) + (1 - momentum) * new
        old.copy_(torch.where(where, mixed.to(old.dtype), old))

    if mixture.covariance == "full":
        covariance = estimate.covariances.view_as(mixture.covariances)
        covariance = covariance + shift[..., :, None] * shift[..., None, :]
        covariance.diagonal(dim1=-2, dim2=-1).add_(variance_floor)
        blend(mixture.covariances, shrunk(covariance), variance_momentum, wanted[..., None])
    else:
        variance = estimate.covariances.view(shape) + shift.square() + variance_floor
        deviation = (mixture.log_variances / 2).exp().to(variance.dtype)
        blend(deviation, shrunk(variance).sqrt(), variance_momentum, wanted)
        log_variances = 2 * deviation.log()
        mixture.log_variances.copy_(torch.where(wanted, log_variances, mixture.log_variances))
    mixture.means.copy_(torch.where(update, mixture.centres, mixture.means))
    blend(mixture.means, mean, mean_momentum, update)
    if weights is not None:
        some = update.squeeze(-1).any(1, keepdim=True)
        log_weights = (weights / weights.sum(1, keepdim=True)).log().to(mixture.log_weights.dtype)
        mixture.log_weights.copy_(torch.where(some, log_weights, mixture.log_weights))


def k_means_plus_plus(
    x: Tensor, index: Tensor, num_classes: int, components: int, generator: torch.Generator
) -> Tensor:
    """Seeds C x M x D (Arthur and Vassilvitskii, 2007) of N x D features of classes 0..C (C: none).

    A class with fewer pixels than components repeats some.
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


@torch.no_grad()
def fit(
    x: Tensor,
    labels: Tensor | None = None,
    num_classes: int = 1,
    components: int = 5,
    covariance: Covariance = "diagonal",
    assignment: Assignment = "em",
    iterations: int = 100,
    tolerance: float = 1e-3,
    variance_floor: float = 1e-6,
    unit_means: bool = False,
    means: Tensor | None = None,
    seed: int = 0,
) -> GaussianMixture:
    """Fit one mixture per class to N x D features, for post-hoc and few-shot use.

    Plain (or Sinkhorn) EM from k-means++ seeds, on the device of `x`, in float64. It is
    deterministic in `seed`. With one class and the same start it finds what scikit-learn's
    `GaussianMixture` finds. A class without pixels keeps the Gaussians of the
    start, which are not `fitted`.

    Args:
        x: features, N x D.
        labels: class of each, N; outside 0..C-1 is ignored; None for one class.
        num_classes: C.
        components: M.
        covariance: `diagonal` or `full`.
        assignment: `em`, or `sinkhorn` for equal shares.
        iterations: at most so many.
        tolerance: stop when the mean log-likelihood per pixel gains less (nats).
        variance_floor: added to every variance.
        unit_means: L2-normalised means, for L2-normalised features.
        means: start C x M x D instead of k-means++ seeds.
        seed: of the start.

    Raises:
        GenSegError: features of the wrong shape, not finite, or without a single labelled pixel.

    Example:
        >>> x = torch.cat([torch.randn(50, 2) - 5, torch.randn(50, 2) + 5])
        >>> fit(x, components=2).log_weights.exp().round(decimals=1).tolist()
        [[0.5, 0.5]]
    """
    check_arguments(fit, locals(), iterations="[0, inf)", variance_floor="[0, inf)")
    if x.ndim != 2 or len(x) == 0:
        raise GenSegError(f"fit takes N x D features with N > 0; got {tuple(x.shape)}.")
    labels = x.new_zeros(len(x), dtype=torch.long) if labels is None else labels.long()
    if labels.shape != x.shape[:1]:
        raise GenSegError(f"fit takes a label per feature; got {len(x)} and {tuple(labels.shape)}.")
    x = x.double()
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(1).sum())
        raise GenSegError(
            f"{bad} of {len(x)} features are NaN or infinite; remove them before fit."
        )
    index = segments(labels, num_classes)
    counts = count_groups(index, num_classes + 1)[:num_classes]
    if not bool(counts.any()):
        raise GenSegError(f"No label lies in 0..{num_classes - 1}; there is nothing to fit.")

    mixture = GaussianMixture(num_classes, components, x.shape[1], covariance, unit_means).to(x)
    if means is not None and means.shape != mixture.means.shape:
        raise GenSegError(
            f"means is {tuple(means.shape)} and must be C x M x D, {tuple(mixture.means.shape)}."
        )
    if means is None:
        generator = torch.Generator().manual_seed(seed)
        means = k_means_plus_plus(x, index, num_classes, components, generator)
    mixture.means.copy_(torch.where(counts[:, None, None] > 0, means.to(x), mixture.means))
    full, dim = covariance == "full", x.shape[1]
    parts = [with_squares(x[index == c]) for c in range(num_classes)]

    def estimates(shares: list[Tensor]) -> Estimate:
        each = [estimate(pairs, own, full) for pairs, own in zip(parts, shares, strict=True)]
        return Estimate(*map(torch.stack, zip(*each, strict=True)))

    # The first E-step needs a scale: each class's own spread, for all its components.
    spread = GaussianMixture(num_classes, 1, dim, covariance).to(x)
    whole = estimates([x.new_ones(1, len(pairs)) for pairs in parts])
    m_step(spread, whole, variance_floor=variance_floor)
    name = "covariances" if full else "log_variances"
    start = getattr(mixture, name)  # of a class without pixels it stays
    seen = (counts > 0).view(-1, *[1] * (start.ndim - 1))
    start.copy_(torch.where(seen, getattr(spread, name), start))

    previous = -math.inf
    for _ in range(iterations):
        total, shares = x.new_zeros(()), []
        for c, pairs in enumerate(parts):
            density = mixture.component_log_density(pairs[:, :dim], c)
            total += (density + mixture.log_weights[c]).logsumexp(1).sum()
            # Unscaled, with epsilon 1, Sinkhorn is EM under equal shares (Mena et al., 2020) and
            # converges; the authors' rescaling softens it the more, the tighter the components are.
            own = index.new_full((len(pairs),), c)
            log_q = e_step(mixture, density, own, assignment, epsilon=1.0, rescale=False)
            shares.append(log_q.exp().T)
        new = estimates(shares)
        # Like scikit-learn, a weight never becomes exactly zero.
        weights = new.counts + 10 * torch.finfo(x.dtype).eps if assignment == "em" else None
        m_step(mixture, new, variance_floor=variance_floor, weights=weights)
        likelihood = float(total) / int(counts.sum())
        if abs(likelihood - previous) < tolerance:
            break
        previous = likelihood
    return mixture
