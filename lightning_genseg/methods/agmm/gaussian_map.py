"""Gaussians around the labelled pixels of an image: one class centre each, and maps around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.mixtures.gaussian import full_precision

_EPS = 1e-6
# On a GPU the gradient of `torch.cdist` holds the differences between all pixels and centres; this
# bounds that tensor.
_MAX_DIFFERENCES = 2**24


def class_centres(features: Tensor, mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature of the labelled pixels of each class, image by image (AGMM's mu_i).

    The features are enlarged bilinearly to the mask, but only at labelled pixels.

    Args:
        features: B x D x h x w.
        mask: B x H x W int64; what is no class is not labelled.
        num_classes: C.

    Returns:
        Centres B x C x D, 0 where the class has no pixel, and whether it has one, B x C bool.
    """
    features = full_precision(features)
    height, width = mask.shape[-2:]
    centres, present = [], []
    for image, labels in zip(features, mask, strict=True):
        rows, columns = ((labels >= 0) & (labels < num_classes)).nonzero(as_tuple=True)
        classes = labels[rows, columns]
        # The middles of the pixels, from -1 to 1 over the image.
        x, y = (2 * columns.to(image) + 1) / width - 1, (2 * rows.to(image) + 1) / height - 1
        grid = torch.stack([x, y], -1)[None, None]
        points = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[
            0, :, 0
        ]
        counts = torch.bincount(classes, minlength=num_classes)
        sums = points.new_zeros(num_classes, len(points)).index_add(0, classes, points.T)
        centres.append(sums / counts.clamp_min(1)[:, None])
        present.append(counts > 0)
    return torch.stack(centres), torch.stack(present)


def centre_distance(features: Tensor, centres: Tensor, present: Tensor) -> Tensor:
    """Mean absolute difference over the D channels between each pixel and each class centre.

    Not a squared Euclidean distance as in `mixtures.gaussian`. One image at a time, only its
    classes, and some of its pixels: the tensor of all differences would take gigabytes.

    Args:
        features: B x D x h x w.
        centres: B x C x D.
        present: B x C bool.

    Returns:
        B x C x h x w, 0 for absent classes.
    """
    features = full_precision(features)
    batch, dim, height, width = features.shape
    distance = features.new_zeros(batch, centres.shape[1], height * width)
    for b in range(batch):
        own, pixels = centres[b, present[b]], features[b].flatten(1).T
        parts = pixels.split(max(1, _MAX_DIFFERENCES // max(1, own.numel())))
        distance[b, present[b]] = torch.cat([torch.cdist(own, x, p=1) for x in parts], 1) / dim
    return distance.view(batch, -1, height, width)


def gaussian_variance(distance: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the squared distance to each centre, without gradient (AGMM's sigma_i^2).

    Args:
        distance: B x C x h x w.
        weights: likewise, or B x 1 x h x w.

    Returns:
        B x C x 1 x 1.
    """
    with torch.no_grad():
        total = (weights * distance.square()).sum((2, 3), keepdim=True)
        return total / (weights.sum((2, 3), keepdim=True) + _EPS)


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
    own = centres[present]
    # With a gradient that is 0, not NaN, where two centres meet.
    upper = torch.triu_indices(len(own), len(own), 1, device=own.device)
    distance = (own[upper[0]] - own[upper[1]]).abs().mean(1)
    return torch.exp(-distance.square()).sum() / max(len(distance), 1)
