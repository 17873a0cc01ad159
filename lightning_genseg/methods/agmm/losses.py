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
    shares = present / present.sum(1, keepdim=True).clamp_min(1)
    weights = _weights(shares, present, pixels)
    prediction, target = (_chosen(x, present) for x in (prediction, target))
    terms = target * torch.log(prediction + _EPS) + (1 - target) * torch.log(1 - prediction + _EPS)
    return mean_over(-0.5 * (terms * weights).sum(), pixels.sum())


def absent_class_loss(probability: Tensor, present: Tensor, pixels: Tensor) -> Tensor:
    """Sum over the classes that an image does not have of -log(1 - p), mean over pixels (AGMM).

    Args:
        probability: B x C x H x W.
        present: B x C bool, the classes of each image.
        pixels: B x H x W bool, those of which the mean is taken.
    """
    weights = _weights((~present).float(), ~present, pixels)
    loss = -(torch.log(1 - _chosen(probability, ~present) + _EPS) * weights).sum()
    return mean_over(loss, pixels.sum())


def _weights(shares: Tensor, classes: Tensor, pixels: Tensor) -> Tensor:
    """Shares of classes (B x C) at pixels that count (B x H x W), as `_chosen`."""
    everywhere = pixels[:, None].expand(-1, shares.shape[1], -1, -1)
    return _chosen(everywhere, classes) * _chosen(shares, classes)[:, None, None]


def _chosen(maps: Tensor, classes: Tensor) -> Tensor:
    """Maps (B x C x H x W) of some classes of each image, P x H x W; on a GPU all of them.

    It would have to be waited for, to know how many there are.
    """
    return maps[classes] if maps.device.type == "cpu" else maps.flatten(0, 1)
