"""Losses over pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-6  # inside logarithms, as in AGMM's code


def pixel_cross_entropy(scores: Tensor, mask: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean cross-entropy over the labelled pixels; 0, not NaN, where every pixel is ignored.

    Args:
        scores: B x C x H x W (or N x C); taken to float32.
        mask: B x H x W (or N), int64.
        ignore_index: label that does not count.
    """
    if scores.ndim == 4 and scores.is_contiguous(memory_format=torch.channels_last):
        # A view, and half the time.
        scores, mask = scores.movedim(1, -1).flatten(0, 2), mask.flatten()
    total = F.cross_entropy(scores.float(), mask, ignore_index=ignore_index, reduction="sum")
    return total / (mask != ignore_index).sum().clamp_min(1)


def class_agreement_loss(prediction: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Half the binary cross-entropy between two maps, over the classes of each pixel's image (AGMM).

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
