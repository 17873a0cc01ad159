"""The losses of AGMM."""

import torch
from torch import Tensor

from lightning_genseg.methods.agmm.gaussian_map import chosen
from lightning_genseg.ops.processes import mean_over

_EPS = 1e-6  # inside logarithms, as in AGMM's code


def class_agreement_loss(
    prediction: Tensor, target: Tensor, present: Tensor, pixels: Tensor
) -> Tensor:
    """Half the binary cross-entropy of two maps, over the classes of each image (AGMM).

    Gradients reach both maps. 0, not NaN, without pixels.

    Args:
        prediction: P x H x W in [0, 1], `chosen` by `present`.
        target: likewise.
        present: B x C bool, the classes that count; an image without one adds 0 to the mean.
        pixels: B x H x W bool, those of which the mean is taken.
    """
    shares = present / present.sum(1, keepdim=True).clamp_min(1)
    inside = chosen(pixels[:, None].expand(-1, present.shape[1], -1, -1), present)
    weights = inside * chosen(shares, present)[:, None, None]
    terms = target * torch.log(prediction + _EPS) + (1 - target) * torch.log(1 - prediction + _EPS)
    return mean_over(-0.5 * (terms * weights).sum(), pixels.sum())


def absent_class_loss(probability: Tensor, present: Tensor, pixels: Tensor) -> Tensor:
    """Sum over the classes that an image does not have of -log(1 - p), mean over pixels (AGMM).

    Args:
        probability: B x C x H x W.
        present: B x C bool, the classes of each image.
        pixels: B x H x W bool, those of which the mean is taken.
    """
    # All classes: to leave out those that are there takes longer, above all in the gradient. Image
    # by image, for the memory of one serves the next.
    total = probability.new_zeros(())
    for maps, absent, inside in zip(probability.unbind(), ~present, pixels, strict=True):
        sums = torch.log(1 - maps + _EPS).flatten(1) @ inside.flatten().to(maps.dtype)
        total = total - sums @ absent.to(maps.dtype)
    return mean_over(total, pixels.sum())
