"""The losses of AGMM."""

import torch
from torch import Tensor

_EPS = 1e-6  # inside logarithms, as in AGMM's code


def class_agreement_loss(prediction: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Half the binary cross-entropy of two maps, over the classes of each pixel's image (AGMM).

    Gradients reach both maps. 0, not NaN, without pixels.

    Args:
        prediction: N x C in [0, 1].
        target: likewise.
        present: N x C bool, the classes that count; pixels without one add 0 to the mean.
    """
    terms = target * torch.log(prediction + _EPS) + (1 - target) * torch.log(1 - prediction + _EPS)
    loss = -0.5 * (terms * present).sum(1) / present.sum(1).clamp_min(1)
    return loss.sum() / max(len(loss), 1)


def absent_class_loss(probability: Tensor, present: Tensor) -> Tensor:
    """Sum over the classes that an image does not have of -log(1 - p), mean over pixels (AGMM).

    Args:
        probability: N x C.
        present: N x C bool, the classes of each pixel's image.
    """
    loss = -(torch.log(1 - probability + _EPS) * ~present).sum(1)
    return loss.sum() / max(len(loss), 1)
