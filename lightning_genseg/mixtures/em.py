"""Expectation-maximisation for all classes in one pass: E-steps, M-step, and `fit` for one-off mixtures."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.gaussian import Covariance, GaussianMixture, full_precision
from lightning_genseg.mixtures.memory import Moments, count_groups, ranks_in_group
from lightning_genseg.mixtures.sinkhorn import Processes, segments, sinkhorn

Assignment = Literal["sinkhorn", "em"]

# `fit` weighs every pixel against every component of every class; this bounds that table.
_MAX_TABLE_ELEMENTS = 2**24


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


def soft_moments(x: Tensor, log_q: Tensor, labels: Tensor, num_classes: int, full: bool) -> Moments:
    """Moments of N x D features weighted by responsibilities N x M, keyed by label: G = C x M groups.

    The weights become a N x G table (zero outside the own class), so that all sums are products.
    """
    components, dim = log_q.shape[1], x.shape[1]
    groups = num_classes * components
    total = Moments.zeros(groups, dim, full, x.device)
    index = segments(labels, num_classes)
    offsets = torch.arange(components, device=x.device)
    rows = max(1, _MAX_TABLE_ELEMENTS // max(groups, dim * dim if full else 1))
    for part, part_q, part_index in zip(
        x.split(rows), log_q.split(rows), index.split(rows), strict=True
    ):
        features = part.to(total.first.dtype)
        table = features.new_zeros(len(part), groups + components)
        table.scatter_(1, part_index[:, None] * components + offsets, part_q.exp().to(table))
        table = table[:, :groups]
        total.counts.add_(table.sum(0))
        total.first.add_(table.T @ features)
        if full:
            outer = (features[:, :, None] * features[:, None, :]).flatten(1)
            total.second.add_((table.T @ outer).view(groups, dim, dim))
        else:
            total.second.add_(table.T @ (features * features))
    return total


@torch.no_grad()
def m_step(
    mixture: GaussianMixture,
    moments: Moments,
    mean_momentum: float = 0.0,
    variance_momentum: float = 0.0,
    variance_floor: float = 1e-2,
    present: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Write new parameters into the mixture, in place; a component without features keeps its own.

    GMMSeg, Eq. 8 and "momentum EM": mean <- momentum * mean + (1 - momentum) * new mean. The new
    variance is taken around the new mean, before momentum, plus a floor, as in the authors' code.

    Args:
        mixture: to be updated.
        moments: of G = C x M groups, classes first.
        mean_momentum: share of the old mean that stays.
        variance_momentum: likewise of the covariance (0 in the code, 0.999 in the paper).
        variance_floor: added to every variance (to the diagonal of a full covariance).
        present: C booleans, the classes to update; None for all.
        weights: new mixture weights C x M, positive; None leaves them as they are.
    """
    if mixture.means.requires_grad:
        raise GenSegError(
            "This mixture's parameters are trained by gradient (trainable=True); EM would undo it."
        )
    shape, dim = mixture.means.shape[:2], mixture.dim
    counts = moments.counts.view(*shape, 1)
    update = counts > 0.5  # half a feature: what subtraction may leave of an empty group
    if present is not None:
        update = update & present[:, None, None]
    safe = counts.clamp_min(0.5)
    average = moments.first.view(*shape, dim) / safe
    mean = F.normalize(average, dim=-1) if mixture.unit_means else average

    def blend(old: Tensor, new: Tensor, momentum: float, where: Tensor) -> None:
        mixed = momentum * old.to(new.dtype) + (1 - momentum) * new
        old.copy_(torch.where(where, mixed.to(old.dtype), old))

    if mixture.covariance == "full":
        second = moments.second.view(*shape, dim, dim) / safe[..., None]
        cross = mean[..., :, None] * average[..., None, :]
        outer = mean[..., :, None] * mean[..., None, :]
        covariance = second - cross - cross.mT + outer
        floor = variance_floor * torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
        blend(mixture.covariances, covariance + floor, variance_momentum, update[..., None])
    else:
        second = moments.second.view(*shape, dim) / safe
        variance = (second - 2 * mean * average + mean.square()).clamp_min(0) + variance_floor
        mixed = mixture.log_variances.exp().to(variance.dtype)
        blend(mixed, variance, variance_momentum, update)
        mixture.log_variances.copy_(torch.where(update, mixed.log(), mixture.log_variances))
    blend(mixture.means, mean, mean_momentum, update)
    if weights is not None:
        some = update.squeeze(-1).any(1, keepdim=True)
        log_weights = (weights / weights.sum(1, keepdim=True)).log().to(mixture.log_weights.dtype)
        mixture.log_weights.copy_(torch.where(some, log_weights, mixture.log_weights))


def _seeds(
    x: Tensor, index: Tensor, num_classes: int, components: int, generator: torch.Generator
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007) for all classes at once: C x M x D.

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


def _own_log_density(mixture: GaussianMixture, x: Tensor, labels: Tensor) -> Tensor:
    width = mixture.components * max(mixture.num_classes, mixture.dim)
    rows = max(1, _MAX_TABLE_ELEMENTS // width)
    parts = zip(x.split(rows), labels.split(rows), strict=True)
    return torch.cat([mixture.own_log_density(a, b) for a, b in parts])


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

    Plain (or Sinkhorn) EM from k-means++ seeds, all classes in one pass, on the device of `x`, in
    float64. It is deterministic in `seed`. With one class and the same start it finds what
    scikit-learn's `GaussianMixture` finds. A class without pixels keeps unit Gaussians.

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
        ValueError: features of the wrong shape, not finite, or without a single labelled pixel.

    Example:
        >>> x = torch.cat([torch.randn(50, 2) - 5, torch.randn(50, 2) + 5])
        >>> fit(x, components=2).log_weights.exp().round(decimals=1).tolist()
        [[0.5, 0.5]]
    """
    if x.ndim != 2 or len(x) == 0:
        raise GenSegError(f"fit takes N x D features with N > 0; got {tuple(x.shape)}.")
    labels = x.new_zeros(len(x), dtype=torch.long) if labels is None else labels.long()
    if labels.shape != x.shape[:1]:
        raise GenSegError(f"fit takes a label per feature; got {len(x)} and {tuple(labels.shape)}.")
    x = x.double() if x.device.type != "mps" else full_precision(x)
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(1).sum())
        raise GenSegError(
            f"{bad} of {len(x)} features are NaN or infinite; remove them before fit."
        )
    index = segments(labels, num_classes)
    present = count_groups(index, num_classes + 1)[:num_classes] > 0
    if not bool(present.any()):
        raise GenSegError(f"No label lies in 0..{num_classes - 1}; there is nothing to fit.")

    mixture = GaussianMixture(num_classes, components, x.shape[1], covariance, unit_means).to(x)
    if means is None:
        generator = torch.Generator().manual_seed(seed)
        means = _seeds(x, index, num_classes, components, generator)
    mixture.means.copy_(torch.where(present[:, None, None], means.to(x), mixture.means))
    # The first E-step needs a scale: each class's own spread, for all its components.
    whole = soft_moments(x, torch.zeros_like(x[:, :1]), index, num_classes, covariance == "full")
    spread = GaussianMixture(num_classes, 1, x.shape[1], covariance).to(x)
    m_step(spread, whole, variance_floor=variance_floor)
    for name in ("covariances", "log_variances"):
        if hasattr(mixture, name):
            getattr(mixture, name).copy_(getattr(spread, name).expand_as(getattr(mixture, name)))

    previous = -torch.inf
    for _ in range(iterations):
        own = _own_log_density(mixture, x, index)
        if assignment == "em":
            own = own + mixture.log_weights[index.clamp_max(num_classes - 1)]
            log_q = own.log_softmax(1)
        else:
            # Unscaled, with epsilon 1, it is EM under equal shares (Mena et al., 2020) and
            # converges; the authors' rescaling softens it the more, the tighter the components are.
            log_q = sinkhorn(own, index, num_classes, epsilon=1.0, rescale=False)
        likelihood = float(own.logsumexp(1)[index < num_classes].mean())
        moments = soft_moments(x, log_q, index, num_classes, covariance == "full")
        # Like scikit-learn, a weight never becomes exactly zero.
        weights = moments.counts.view(num_classes, components) + 10 * torch.finfo(x.dtype).eps
        m_step(
            mixture,
            moments,
            variance_floor=variance_floor,
            weights=weights if assignment == "em" else None,
        )
        if abs(likelihood - previous) < tolerance:
            break
        previous = likelihood
    return mixture
