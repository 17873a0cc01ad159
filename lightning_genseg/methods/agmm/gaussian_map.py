"""Gaussians around the labelled pixels of an image: one class centre each, and maps around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.mixtures.log_density import full_precision

_EPS = 1e-6
# On a GPU the gradient of `torch.cdist` holds the differences between all pixels and centres; this
# bounds that tensor.
_MAX_DIFFERENCES = 2**24


def class_centres(features: Tensor, mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of the labelled pixels of each class, image by image (AGMM's mu_i).

    The mean of the features once enlarged bilinearly to the mask. They are not: the labels are
    brought down by the transposed enlargement, of a shape that no label changes.

    Args:
        features: B x D x h x w.
        mask: B x H x W int64; what is no class is not labelled.
        num_classes: C.

    Returns:
        Centres B x C x D, 0 where the class has no pixel, and whether it has one, B x C bool.
    """
    features = full_precision(features)
    index = torch.where((mask >= 0) & (mask < num_classes), mask, num_classes).flatten(1)
    counts = features.new_zeros(len(mask), num_classes + 1)
    counts = counts.scatter_add_(1, index, counts.new_ones(()).expand_as(index))[:, :-1]
    present = counts > 0
    rows, columns = (
        _enlargement(small, large, features)
        for small, large in zip(features.shape[-2:], mask.shape[-2:], strict=True)
    )
    labelled = labels_of(mask, present).to(features.dtype)
    shares = everywhere(rows.T @ (labelled @ columns), present)
    centres = torch.einsum("bchw,bdhw->bcd", shares, features)
    return centres / counts.clamp_min(1)[..., None], present


def chosen(maps: Tensor, classes: Tensor) -> Tensor:
    """Maps B x C x ... of some classes of each image (B x C bool): P x ...; on a GPU all of them.

    It would have to be waited for, to know how many there are.
    """
    return maps[classes] if maps.device.type == "cpu" else maps.flatten(0, 1)


def everywhere(maps: Tensor, classes: Tensor) -> Tensor:
    """Maps of `chosen`, P x ..., as B x C x ...; 0 of the other classes on a CPU."""
    if maps.device.type != "cpu":
        return maps.view(*classes.shape, *maps.shape[1:])
    whole = maps.new_zeros(*classes.shape, *maps.shape[1:])
    whole[classes] = maps
    return whole


def labels_of(mask: Tensor, classes: Tensor) -> Tensor:
    """Where a mask B x H x W has each of some classes (B x C bool): P x H x W bool, as `chosen`."""
    image, number = (torch.arange(n, device=mask.device) for n in classes.shape)
    images = chosen(image[:, None].expand_as(classes), classes)
    numbers = chosen(number.expand_as(classes), classes)
    return mask[images] == numbers[:, None, None]


def _enlargement(small: int, large: int, like: Tensor) -> Tensor:
    """Bilinear enlargement of a row of `small` numbers as a matrix, large x small."""
    unit = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(unit, large, mode="linear")[0].T


def centre_distance(features: Tensor, centres: Tensor, present: Tensor) -> Tensor:
    """Mean absolute difference over the D channels between each pixel and each class centre.

    Not a squared Euclidean distance as in `mixtures.log_density`. One image at a time, and some of
    its pixels: the tensor of all differences would take gigabytes.

    Args:
        features: B x D x h x w.
        centres: B x C x D.
        present: B x C bool.

    Returns:
        B x C x h x w, 0 for absent classes.
    """
    features = full_precision(features)
    batch, dim, height, width = features.shape
    maps = []
    # Taken apart at once: each part by itself would have a gradient as large as the whole.
    for here, centre, image in zip(present, centres.unbind(), features.unbind(), strict=True):
        # Absent classes cost time on a CPU; on a GPU it costs more to wait for how many there are.
        some = here if features.device.type == "cpu" else slice(None)
        own, pixels = centre[some], image.flatten(1).T
        parts = pixels.split(max(1, _MAX_DIFFERENCES // max(1, own.numel())))
        distance = features.new_zeros(centres.shape[1], height * width)
        distance[some] = torch.cat([torch.cdist(own, x, p=1) for x in parts], 1) / dim
        maps.append(distance)
    return torch.stack(maps).view(batch, -1, height, width) * present[:, :, None, None]


def gaussian_variance(distance: Tensor, weights: Tensor, shares: Tensor | None = None) -> Tensor:
    """Weighted mean of the squared distance to each centre, without gradient (AGMM's sigma_i^2).

    Args:
        distance: B x C x h x w.
        weights: likewise, or B x 1 x h x w.
        shares: whose sum divides, where it is not that of the weights; of the same shapes.

    Returns:
        B x C x 1 x 1.
    """
    with torch.no_grad():
        total = (weights * distance.square()).sum((2, 3), keepdim=True)
        divisor = weights if shares is None else shares
        return total / (divisor.sum((2, 3), keepdim=True) + _EPS)


def gaussian_map(distance: Tensor, present: Tensor, variance: Tensor | None = None) -> Tensor:
    """Unnormalised Gaussian of each class, exp(-d^2 / 2 sigma^2), in [0, 1].

    Args:
        distance: B x C x h x w.
        present: B x C bool; the map of an absent class is 0.
        variance: B x C x 1 x 1; None: 2 sigma^2 = 1.
    """
    squared = distance.square()
    if variance is not None:
        squared = squared / (2 * variance + _EPS)
    return torch.exp(-squared) * present[:, :, None, None]


def centre_similarity(centres: Tensor, present: Tensor) -> Tensor:
    """Mean over all pairs of classes of exp(-d^2) between their centres; 0 with fewer than two.

    Args:
        centres: C x D.
        present: C bool; absent classes do not count.
    """
    # All pairs, with a gradient that is 0, not NaN, where two centres meet.
    upper = torch.triu_indices(len(centres), len(centres), 1, device=centres.device)
    pairs = present[upper].all(0)
    distance = (centres[upper[0]] - centres[upper[1]]).abs().mean(1)
    return (torch.exp(-distance.square()) * pairs).sum() / pairs.sum().clamp_min(1)
