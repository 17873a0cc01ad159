"""The log-densities of a training step and their gradient, in one pass over the pixels."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_genseg.mixtures.log_density import linear_form, with_squares

Mixture = Literal["max", "logsumexp"]

# As many log-densities does a processor's cache hold beside their gradient.
_CACHED_ELEMENTS = 2**17


class Densities(NamedTuple):
    """What a training step takes of N pixels' log-densities.

    `classes` N x C; `total` N, of all components, without weights, by `logsumexp`; `own` N x M,
    the components of the pixel's class (class 0's where it is ignored).
    """

    classes: Tensor
    total: Tensor
    own: Tensor


def fused_densities(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    log_weights: Tensor,
    labels: Tensor,
    mixture: Mixture,
) -> Densities:
    """`Densities` of N x D features under diagonal Gaussians C x M x D, float32.

    Its gradient reaches the features alone. `labels` are those of `known_labels`.
    """
    with torch.autocast(x.device.type, enabled=False):
        means, variances = (t.transpose(0, 1).flatten(0, 1) for t in (means, variances))
        centre = means.mean(0)
        factors, constant = linear_form(means - centre, variances)
        arguments = factors, constant, log_weights.T.contiguous(), labels, mixture
        return Densities(*_Densities.apply(x - centre, *arguments))


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
    @once_differentiable
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
    index = known_labels(labels, component_log_density.shape[1])
    return component_log_density[torch.arange(len(labels), device=labels.device), index]


def known_labels(labels: Tensor, count: int) -> Tensor:
    """Labels, and 0 for those that are no class."""
    return torch.where((labels >= 0) & (labels < count), labels, 0)
