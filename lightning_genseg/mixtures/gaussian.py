"""Gaussian log-densities by matrix products, and class mixtures in fixed-shape tensors."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError

Covariance = Literal["diagonal", "full"]
Mixture = Literal["max", "logsumexp"]
MeanStart = Literal["random", "orthogonal"]

_LOG_2PI = math.log(2.0 * math.pi)
# A full covariance whitens every pixel's offset from every component; this bounds that tensor.
_MAX_WHITENED_ELEMENTS = 2**24
# As many log-densities does a processor's cache hold beside their gradient.
_CACHED_ELEMENTS = 2**17
# Of unit vectors: their squares over it stay below 1e3, which float32 holds to 1e-4.
_LEAST_BOUNDED_VARIANCE = 1e-3


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float64 if it is, else in float32: features are unit norm, half loses them."""
    return x if x.dtype == torch.float64 else x.float()


def has_float64(x: Tensor) -> bool:
    """Whether the device of `x` has it; MPS has not."""
    return x.device.type != "mps"


def double_precision(x: Tensor) -> Tensor:
    """Return `x` in float64, or in float32 where there is none."""
    return x.double() if has_float64(x) else full_precision(x)


def with_squares(x: Tensor) -> Tensor:
    """Features ... x N x D and their squares: diagonal densities and moments are linear in both."""
    return torch.cat([x, x * x], -1)


def diagonal_log_density(
    x: Tensor, means: Tensor, variances: Tensor, bounded: bool = False
) -> Tensor:
    r"""Log-density of every pixel under every diagonal Gaussian, by one matrix product.

    GMMSeg, Eq. 4: :math:`-\frac12 \sum_d [\log 2\pi\sigma_d^2 + (x_d - \mu_d)^2 / \sigma_d^2]`,
    with the square expanded, so that no `N x K x D` tensor exists. Expanded squares of large
    numbers cancel: in float32 by up to 41 nats for means around 100 and variances of 0.01. The
    product is therefore in float64, at a third of the speed, unless the numbers are `bounded`. On
    MPS, which has no float64, nothing is expanded. The result is float32, or float64 if an argument
    is.

    Args:
        x: features, N x D.
        means: ... x D, any leading shape.
        variances: as `means`, positive.
        bounded: whether features and means have norms up to 1 and variances are at least 1e-3:
            float32 will do, with errors below 1e-3 nats.

    Returns:
        N x ... log-densities (nats).

    Example:
        >>> diagonal_log_density(torch.zeros(1, 2), torch.zeros(3, 2), torch.ones(3, 2)).shape
        torch.Size([1, 3])
    """
    with torch.autocast(x.device.type, enabled=False):
        x, means, variances = full_precision(x), full_precision(means), full_precision(variances)
        dtype, shape, dim = torch.promote_types(x.dtype, means.dtype), means.shape[:-1], x.shape[-1]
        means, variances = means.reshape(-1, dim), variances.reshape(-1, dim)
        if not bounded and not has_float64(x):
            rows = max(1, _MAX_WHITENED_ELEMENTS // means.numel())
            parts = [(part[:, None] - means).square() / variances for part in x.split(rows)]
            constant = variances.log().sum(-1) + dim * _LOG_2PI
            squared = torch.cat([part.sum(-1) for part in parts])
            return (-0.5 * (squared + constant)).reshape(x.shape[0], *shape)
        if not bounded:
            x, means, variances = x.double(), means.double(), variances.double()
        centre = means.detach().mean(0)
        density = pairs_log_density(with_squares(x - centre), means - centre, variances)
        return density.to(dtype).reshape(x.shape[0], *shape)


def pairs_log_density(pairs: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """`diagonal_log_density` of features around the origin, also for a batch of episodes.

    Args:
        pairs: of `with_squares`, N x 2D or B x N x 2D, float32 or float64, outside autocast.
        means: K x D or B x K x D.
        variances: as `means`, positive.

    Returns:
        N x K or B x N x K log-densities (nats), of the dtype of `pairs`.
    """
    factors, constant = _linear(means.to(pairs.dtype), variances.to(pairs.dtype))
    if pairs.ndim == 2:
        return torch.addmm(constant, pairs, factors.mT)
    return (few_products(pairs, factors) + constant[..., None]).mT


def _linear(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ... x 2D of pairs, and constants, that make the log-density."""
    precisions, dim = variances.reciprocal(), means.shape[-1]
    scaled = means * precisions
    constant = -0.5 * ((means * scaled).sum(-1) - precisions.log().sum(-1) + dim * _LOG_2PI)
    return torch.cat([scaled, -0.5 * precisions], -1), constant


def few_products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Products of rows B x N x D with few vectors B x K x D: B x K x N.

    On a CPU vector by vector: the product of matrices takes seven times as long for three.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return vectors @ rows.mT
    each = [torch.stack([x @ v for v in own]) for x, own in zip(rows, vectors, strict=True)]
    return torch.stack(each)


def full_log_density(x: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Log-density of every pixel under every full-covariance Gaussian (meant for D <= 64).

    Whitens with the Cholesky factors, for a bounded number of pixels at a time, in float64 unless
    the device has none. The result is float32, or float64 if an argument is.

    Args:
        x: features, N x D.
        means: ... x D.
        covariances: ... x D x D, positive definite.

    Returns:
        N x ... log-densities (nats).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(full_precision(x).dtype, full_precision(means).dtype)
        x, means, covariances = (double_precision(t) for t in (x, means, covariances))
        shape, dim = means.shape[:-1], means.shape[-1]
        means, covariances = means.reshape(-1, dim), covariances.reshape(-1, dim, dim)
        factors = torch.linalg.cholesky(covariances)
        identity = torch.eye(dim, dtype=factors.dtype, device=factors.device).expand_as(factors)
        whiteners = torch.linalg.solve_triangular(factors, identity, upper=False)  # K x D x D
        log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        pixels = max(1, _MAX_WHITENED_ELEMENTS // means.numel())
        squared = [
            torch.einsum("kij,nkj->nki", whiteners, part[:, None] - means).square().sum(-1)
            for part in x.split(pixels)
        ]
        density: Tensor = -0.5 * (torch.cat(squared) + dim * _LOG_2PI) - log_det
        return density.to(dtype).reshape(x.shape[0], *shape)


class Densities(NamedTuple):
    """What a training step takes of N pixels' log-densities.

    `classes` N x C; `total` N, of all components, without weights, by `logsumexp`; `own` N x M,
    the components of the pixel's class (class 0's where it is ignored).
    """

    classes: Tensor
    total: Tensor
    own: Tensor


class _Densities(torch.autograd.Function):
    """`Densities` from features around the origin, with their gradient, some pixels at a time.

    The gradient of all components is as large as they are, and made of several parts; here it
    never leaves the processor's cache. Components come before classes in memory: the largest of
    few is then found for many classes at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factors: Tensor,
        constant: Tensor,
        log_weights: Tensor,
        labels: Tensor,
        mixture: Mixture,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features N x D, factors M C x 2D, constants M C, log-weights M x C, labels N."""
        density = x.new_empty(len(x), len(factors))
        classes, total = [], []
        rows = _rows_in_cache(density)
        for part, out in zip(x.split(rows), density.split(rows), strict=True):
            torch.addmm(constant, with_squares(part), factors.T, out=out)
            weighted = out.view(-1, *log_weights.shape) + log_weights
            largest = mixture == "max"
            classes.append(weighted.amax(1) if largest else weighted.logsumexp(1))
            total.append(out.logsumexp(1))
        own = _own_columns(density.view(-1, *log_weights.shape), labels).squeeze(2)
        ctx.mixture = mixture
        result = torch.cat(classes), torch.cat(total), own
        ctx.save_for_backward(x, factors, log_weights, labels, density, *result[:2])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the features."""
        x, factors, log_weights, labels, density, classes, total = ctx.saved_tensors
        rows, result = _rows_in_cache(density), torch.empty_like(x)
        everything = (x, labels, density, classes, total, *gradients, result)
        for parts in zip(*(tensor.split(rows) for tensor in everything), strict=True):
            z, label, d, best, whole, of_classes, of_total, of_own, out = parts
            gradient = (d - whole[:, None]).exp_().mul_(of_total[:, None])
            by_class = gradient.view(-1, *log_weights.shape)
            weighted = d.view_as(by_class) + log_weights
            if ctx.mixture == "max":
                won = (weighted == best[:, None]).to(d.dtype)  # of equal ones, all alike
                by_class.addcmul_(won, (of_classes / won.sum(1))[:, None])
            else:
                by_class += (weighted - best[:, None]).exp_() * of_classes[:, None]
            index = label[:, None, None].expand(-1, len(log_weights), 1)
            by_class.scatter_add_(2, index, of_own[:, :, None])
            first, second = (gradient @ factors).chunk(2, -1)
            torch.addcmul(first, z, second, value=2, out=out)
        return result, None, None, None, None, None


def _rows_in_cache(density: Tensor) -> int:
    """How many pixels at a time; on a GPU all."""
    if density.device.type != "cpu":
        return max(1, len(density))
    return max(1, _CACHED_ELEMENTS // density.shape[1])


def _own_columns(density: Tensor, labels: Tensor) -> Tensor:
    """Of N x M x C the classes N, as N x M x 1."""
    return density.gather(2, labels[:, None, None].expand(-1, density.shape[1], 1))


def own_class(component_log_density: Tensor, labels: Tensor) -> Tensor:
    """Pick from N x C x M the components of each pixel's class: N x M (class 0's where ignored)."""
    index = _valid(labels, component_log_density.shape[1])
    return component_log_density[torch.arange(len(labels), device=labels.device), index]


def _valid(labels: Tensor, count: int) -> Tensor:
    return torch.where((labels >= 0) & (labels < count), labels, 0)


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
        variance_floor: no variance is used below it (EM adds its own; gradients need this one).
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
        variance = 1 / dim + variance_floor if unit_means else 1.0
        if covariance == "full":
            state["covariances"] = variance * torch.eye(dim).repeat(num_classes, components, 1, 1)
        else:
            state["log_variances"] = torch.full(shape, math.log(variance))
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
            towards: whose covariances are averaged over classes and components.
            share: of that average, in [0, 1].
        """
        if self.covariance == "full":
            self.covariances.lerp_(towards.covariances.mean((0, 1)).to(self.covariances), share)
        else:
            pooled = towards.variances.mean((0, 1)).to(self.log_variances)
            self.log_variances.copy_(self.variances.lerp(pooled, share).log())

    @torch.no_grad()
    def append(self, other: "GaussianMixture") -> None:
        """Take over the classes of another mixture of the same form, behind the own ones."""
        for name, own in list(self.state_dict(keep_vars=True).items()):
            both = torch.cat([own, other.get_buffer(name).to(own)])
            setattr(self, name, nn.Parameter(both) if isinstance(own, nn.Parameter) else both)
        self.num_classes += other.num_classes

    @property
    def centres(self) -> Tensor:
        """The means as used: C x M x D, unit norm when `unit_means`."""
        return F.normalize(self.means, dim=-1) if self.unit_means else self.means

    @property
    def variances(self) -> Tensor:
        """Variance per dimension: C x M x D (of a full covariance, its diagonal)."""
        if self.covariance == "full":
            return self.covariances.diagonal(dim1=-2, dim2=-1)
        return self.log_variances.exp().clamp_min(self.variance_floor)

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
        index = _valid(labels, self.num_classes)
        simple = self.covariance == "diagonal" and self._is_bounded
        simple = simple and x.dtype == self.means.dtype == torch.float32
        # A compiler makes one pass of it by itself.
        if not simple or self.means.requires_grad or torch.compiler.is_compiling():
            components = self.component_log_density(x)
            own = own_class(components, index)
            total = components.flatten(1).logsumexp(1)
            return Densities(self.combine(components, mixture), total, own)
        with torch.autocast(x.device.type, enabled=False):
            means, variances = (
                t.transpose(0, 1).flatten(0, 1) for t in (self.centres, self.variances)
            )
            centre = means.mean(0)
            factors, constant = _linear(means - centre, variances)
            arguments = factors, constant, self.log_weights.T.contiguous(), index, mixture
            return Densities(*_Densities.apply(x - centre, *arguments))

    @torch.no_grad()
    def own_log_density(self, x: Tensor, labels: Tensor) -> Tensor:
        """N x D features and their labels N to N x M, under the components of the own class only.

        What an E-step needs. Where the label is ignored, class 0's.
        """
        if self.covariance == "full" or self.num_classes <= self.dim:  # then C x M are few
            return own_class(self.component_log_density(x), labels)
        index = _valid(labels, self.num_classes)
        with torch.autocast(x.device.type, enabled=False):
            x, means, variances = (full_precision(t) for t in (x, self.centres, self.variances))
            constant = -0.5 * (variances.log().sum(-1) + self.dim * _LOG_2PI)
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
