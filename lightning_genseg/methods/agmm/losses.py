"""The losses of AGMM."""

import torch
from torch import Tensor

from lightning_genseg.networks.losses import mean_over

_EPS = 1e-6  # inside logarithms, as in AGMM's code


def class_agreement_loss(
    prediction: Tensor, target: Tensor, present: Tensor, pixels: Tensor
) -> Tensor:
    """Half the binary cross-entropy of two maps, over the classes of each image (AGMM).

    Gradients reach both maps. 0, not NaN, without pixels.

    Args:
        prediction: B x C x H x W in [0, 1].
        target: likewise.
        present: B x C bool, the classes that count; an image without one adds 0 to the mean.
        pixels: B x H x W bool, those of which the mean is taken.
    """
    terms = target * torch.log(prediction + _EPS) + (1 - target) * torch.log(1 - prediction + _EPS)
    shares = present / present.sum(1, keepdim=True).clamp_min(1)
    loss = -0.5 * torch.einsum("bchw,bc->bhw", terms, shares.to(terms.dtype))
    return mean_over((loss * pixels).sum(), pixels.sum())


def absent_class_loss(probability: Tensor, present: Tensor, pixels: Tensor) -> Tensor:
    """Sum over the classes that an image does not have of -log(1 - p), mean over pixels (AGMM).

    Args:
        probability: B x C x H x W.
        present: B x C bool, the classes of each image.
        pixels: B x H x W bool, those of which the mean is taken.
    """
    terms = torch.log(1 - probability + _EPS)
    loss = -torch.einsum("bchw,bc->bhw", terms, (~present).to(terms.dtype))
    return mean_over((loss * pixels).sum(), pixels.sum())
