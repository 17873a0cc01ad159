"""Log-densities of many pixels under many Gaussians, by matrix products."""

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)
# A full covariance whitens every pixel's offset from every component; this bounds that tensor.
_MAX_WHITENED_ELEMENTS = 2**24


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float64 if it is, else in float32: features are unit norm, half loses them."""
    return x if x.dtype == torch.float64 else x.float()


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
    product is therefore in float64, at a third of the speed, unless the numbers are `bounded`. The
    result is float32, or float64 if an argument is.

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
    factors, constant = linear_form(means.to(pairs.dtype), variances.to(pairs.dtype))
    if pairs.ndim == 2:
        return torch.addmm(constant, pairs, factors.mT)
    return (few_products(pairs, factors) + constant[..., None]).mT


def linear_form(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ... x 2D of pairs, and constants, that make the log-density."""
    precisions, dim = variances.reciprocal(), means.shape[-1]
    scaled = means * precisions
    constant = -0.5 * ((means * scaled).sum(-1) - precisions.log().sum(-1) + dim * LOG_2PI)
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

    Whitens with the Cholesky factors, for a bounded number of pixels at a time, in float64. The
    result is float32, or float64 if an argument is.

    Args:
        x: features, N x D.
        means: ... x D.
        covariances: ... x D x D, positive definite.

    Returns:
        N x ... log-densities (nats).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(full_precision(x).dtype, full_precision(means).dtype)
        x, means, covariances = (t.double() for t in (x, means, covariances))
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
        density: Tensor = -0.5 * (torch.cat(squared) + dim * LOG_2PI) - log_det
        return density.to(dtype).reshape(x.shape[0], *shape)
