"""Class mixtures of Gaussians in fixed-shape tensors."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures.densities import (
    Densities,
    Mixture,
    fused_densities,
    known_labels,
    own_class,
)
from lightning_genseg.mixtures.log_density import (
    LOG_2PI,
    diagonal_log_density,
    full_log_density,
    full_precision,
)

Covariance = Literal["diagonal", "full"]
MeanStart = Literal["random", "orthogonal"]

# Of unit vectors: their squares over it stay below 1e3, which float32 holds to 1e-4.
_LEAST_BOUNDED_VARIANCE = 1e-3


def orthogonal_vectors(count: int, dim: int) -> Tensor:
    """Unit vectors N x D of zero sum, drawn at random, D - 1 at a time orthogonal to each other.

    LayerNorm gives every feature the sum zero: what a start has besides lies outside their space.
    """
    if dim == 1:
        return torch.ones(count, 1)
    bases = []
    for _ in range(-(-count // (dim - 1))):
        vectors = torch.randn(dim, dim - 1, dtype=torch.float64)  # the last ones are hardly new
        bases.append(torch.linalg.qr(vectors - vectors.mean(0)).Q.T)
    return torch.cat(bases)[:count].float()


def pooled(covariances: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen ones (C x M booleans) of C x M (co)variances; zero where there is none."""
    # A product: a GPU need not tell how many are chosen.
    weights = chosen.view(*chosen.shape, *[1] * (covariances.ndim - chosen.ndim))
    return (covariances * weights).sum((0, 1)) / weights.sum().clamp_min(1)


class GaussianMixture(nn.Module):
    """One Gaussian mixture per class, all classes in tensors of one fixed shape.

    GMMSeg (Liang et al., NeurIPS 2022), Eq. 4. The parameters are buffers that EM writes in place;
    `trainable=True` makes them `nn.Parameter` instead (the paper's discriminative GMM, Table 4).

    Args:
        num_classes: C.
        components: M, components per class.
        dim: D, embedding size.
        covariance: `diagonal` (variances C x M x D) or `full` (covariances C x M x D x D).
        unit_means: L2-normalise the means before every use, for L2-normalised features. Variances
            then start at 1/D plus the floor, since that much is what a unit vector has per
            dimension, else at 1.
        trainable: parameters by gradient; `diagonal` only.
        variance_floor: no variance is used below it; with `trainable` it is added, so that one
            near it still has a gradient (EM adds its own).
        start: of the means: `random` unit vectors, or `orthogonal` ones of zero sum.

    Example:
        >>> mixture = GaussianMixture(num_classes=3, components=2, dim=4)
        >>> mixture.log_density(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """

    means: Tensor
    log_variances: Tensor
    covariances: Tensor
    log_weights: Tensor

    def __init__(
        self,
        num_classes: int,
        components: int,
        dim: int,
        covariance: Covariance = "diagonal",
        unit_means: bool = False,
        trainable: bool = False,
        variance_floor: float = 0.0,
        start: MeanStart = "random",
    ) -> None:
        super().__init__()
        sizes = dict.fromkeys(("num_classes", "components", "dim"), "[1, inf)")
        check_arguments(GaussianMixture.__init__, locals(), variance_floor="[0, inf)", **sizes)
        if covariance == "full" and trainable:
            raise GenSegError(
                "covariance='full' cannot be trained by gradient; use covariance='diagonal'."
            )
        self.num_classes, self.components, self.dim = num_classes, components, dim
        self.covariance, self.unit_means = covariance, unit_means
        self.variance_floor = variance_floor
        shape = (num_classes, components, dim)
        means = torch.randn(shape)
        if start == "orthogonal":
            means = orthogonal_vectors(num_classes * components, dim).view(shape)
        state = {"means": F.normalize(means, dim=-1)}
        self._start_variance = variance = 1 / dim + variance_floor if unit_means else 1.0
        if covariance == "full":
            state["covariances"] = variance * torch.eye(dim).repeat(num_classes, components, 1, 1)
        else:
            free = variance - variance_floor if trainable else variance
            state["log_variances"] = torch.full(shape, math.log(free))
        for name, tensor in state.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("log_weights", torch.full(shape[:2], -math.log(components)))

    @torch.no_grad()
    def shrink(self, towards: "GaussianMixture", share: float) -> None:
        """Mix the mean covariance of another mixture of the same form into the own ones.

        Friedman: Regularized Discriminant Analysis, JASA 1989, Eq. 8, there with all classes. A
        covariance of few samples is too small, and its class claims pixels of others for that.

        Args:
            towards: whose covariances are averaged, all components alike but those never fitted.
            share: of that average, in [0, 1].
        """
        fitted = towards.fitted
        if not bool(fitted.any()):
            return
        if self.covariance == "full":
            mean = pooled(towards.covariances, fitted).to(self.covariances)
            self.covariances.copy_(self.covariances.lerp(mean, share))
        else:
            mean = pooled(towards.variances, fitted).to(self.log_variances)
            self.log_variances.copy_(self.variances.lerp(mean, share).log())

    @torch.no_grad()
    def append(self, other: "GaussianMixture") -> None:
        """Take over the classes of another mixture of the same form, behind the own ones."""
        for name, own in list(self.state_dict(keep_vars=True).items()):
            theirs: Tensor = getattr(other, name)
            if name == "log_variances":
                theirs = self._free(other.variances).log()
            both = torch.cat([own, theirs.to(own)])
            if isinstance(own, nn.Parameter):
                both = nn.Parameter(both, own.requires_grad)
            setattr(self, name, both)
        self.num_classes += other.num_classes

    def _free(self, variances: Tensor) -> Tensor:
        """What is kept of variances: where they are trained, what lies above the floor."""
        if not isinstance(self.log_variances, nn.Parameter):
            return variances
        return (variances - self.variance_floor).clamp_min(torch.finfo(variances.dtype).tiny)

    @property
    def centres(self) -> Tensor:
        """The means as used: C x M x D, unit norm when `unit_means`."""
        return F.normalize(self.means, dim=-1) if self.unit_means else self.means

    @property
    def variances(self) -> Tensor:
        """Variance per dimension: C x M x D (of a full covariance, its diagonal)."""
        if self.covariance == "full":
            return self.covariances.diagonal(dim1=-2, dim2=-1)
        if isinstance(self.log_variances, nn.Parameter):
            return self.log_variances.exp() + self.variance_floor
        return self.log_variances.exp().clamp_min(self.variance_floor)

    @property
    def fitted(self) -> Tensor:
        """C x M booleans: whether the covariance is no longer that of the start."""
        start = self.means.new_full((), self._start_variance)
        return ~self.variances.isclose(start).all(-1)

    def component_log_density(self, x: Tensor, classes: int | slice = slice(None)) -> Tensor:
        """N x D features to N x C x M log N(x; mean, covariance), without the weights.

        With the number of a class, N x M of that class alone.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise GenSegError(
                f"The mixture lives in {self.dim} dimensions and takes N x {self.dim} features; "
                f"got {tuple(x.shape)}."
            )
        if self.covariance == "full":
            return full_log_density(x, self.centres[classes], self.covariances[classes])
        return diagonal_log_density(
            x, self.centres[classes], self.variances[classes], self._is_bounded
        )

    @property
    def _is_bounded(self) -> bool:
        return self.unit_means and self.variance_floor >= _LEAST_BOUNDED_VARIANCE

    def densities(self, x: Tensor, labels: Tensor, mixture: Mixture = "max") -> Densities:
        """All that a training step needs of N x D features and their labels N.

        Its gradient reaches the features and, where they are `nn.Parameter`, the Gaussians.
        """
        index = known_labels(labels, self.num_classes)
        simple = self.covariance == "diagonal" and self._is_bounded
        simple = simple and x.dtype == self.means.dtype == torch.float32
        # A compiler makes one pass of it by itself.
        if not simple or self.means.requires_grad or torch.compiler.is_compiling():
            components = self.component_log_density(x)
            own = own_class(components, index)
            total = components.flatten(1).logsumexp(1)
            return Densities(self.combine(components, mixture), total, own)
        means, variances, weights = self.centres, self.variances, self.log_weights
        return fused_densities(x, means, variances, weights, index, mixture)

    @torch.no_grad()
    def own_log_density(self, x: Tensor, labels: Tensor) -> Tensor:
        """N x D features and their labels N to N x M, under the components of the own class only.

        What an E-step needs. Where the label is ignored, class 0's.
        """
        if self.covariance == "full" or self.num_classes <= self.dim:  # then C x M are few
            return own_class(self.component_log_density(x), labels)
        index = known_labels(labels, self.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            x, means, variances = (full_precision(t) for t in (x, self.centres, self.variances))
            constant = -0.5 * (variances.log().sum(-1) + self.dim * LOG_2PI)
            offsets = x[:, None] - means[index]  # N x M x D
            squared = offsets.square_().mul_(variances.reciprocal()[index]).sum(-1)
            return constant[index] - 0.5 * squared

    def combine(self, component_log_density: Tensor, mixture: Mixture = "max") -> Tensor:
        """Component log-densities (N x C x M) to class log-densities (N x C).

        `max` is the paper's winner-take-all (Section 3.3), `logsumexp` the mixture of Eq. 4.
        """
        weighted = component_log_density + self.log_weights
        if mixture == "logsumexp":
            return weighted.logsumexp(-1)
        # The same number: `amax` is the faster forward, `max` the faster backward.
        return weighted.max(-1).values if weighted.requires_grad else weighted.amax(-1)

    def log_density(self, x: Tensor, mixture: Mixture = "max") -> Tensor:
        """Class log-densities log p(x|c) of N x D features: N x C."""
        return self.combine(self.component_log_density(x), mixture)
