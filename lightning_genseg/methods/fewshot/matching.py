"""Which pixels of a query look like the object in a support: CGMGM's initial mask (IMGR)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.ops.resize import for_each

PatchSimilarity = Literal["offsets", "mean"]
Binarization = Literal["fixed", "otsu", "quantile"]
Refinement = Literal["none", "cycle", "cycle_support", "literal"]

_EPSILON = 1e-7
# Where no pixel passes the threshold, this share of the most similar ones does.
_FALLBACK_SHARE = 0.01


def global_similarity(query: Tensor, support: Tensor, valid: Tensor) -> Tensor:
    """Largest cosine with any support pixel, stretched to [0, 1]: CGMGM, Eq. 2.

    This is PFENet's prior mask. The equation only has "MatMul"; the maximum over support pixels is
    PFENet's.

    Args:
        query: features, B x C x h x w.
        support: features of one support each, already masked, B x C x h' x w'.
        valid: query pixels that are no padding, B x 1 x h x w bool.

    Returns:
        B x 1 x h x w, 0 on padding.
    """
    return stretch(_max_cosine(query[:, None], support[:, None]), valid)


def local_similarity(
    query: Tensor, support: Tensor, valid: Tensor, patches: PatchSimilarity = "offsets"
) -> Tensor:
    """As `global_similarity`, between patches of 2 x 2 pixels: CGMGM, Eqs. 3-4.

    `offsets` compares pixels of equal position in two patches and takes the mean of the four
    cosines; `mean` compares the patches' mean features. Then the best support patch counts,
    enlarged bilinearly. A row or column too few is repeated and counts as masked out.
    """
    height, width = query.shape[-2:]
    check_arguments(local_similarity, locals())
    similarity = _max_cosine(_patches(query, patches, True), _patches(support, patches, False))
    rows, columns = similarity.shape[-2:]
    enlarged = F.interpolate(similarity, (2 * rows, 2 * columns), mode="bilinear")
    return stretch(enlarged[..., :height, :width], valid)


def stretch(maps: Tensor, valid: Tensor) -> Tensor:
    """Scale each map B x 1 x h x w so that its valid pixels reach from 0 to 1; 0 elsewhere."""
    low = maps.masked_fill(~valid, torch.inf).amin((2, 3), keepdim=True)
    high = maps.masked_fill(~valid, -torch.inf).amax((2, 3), keepdim=True)
    return ((maps - low) / (high - low + _EPSILON)).masked_fill(~valid, 0)


def binarize(
    maps: Tensor, valid: Tensor, threshold: float = 0.5, method: Binarization = "fixed"
) -> Tensor:
    """Initial mask M0 of similarities in [0, 1]; never empty: else the top 1 % of the valid pixels.

    The paper names no threshold.

    Args:
        maps: B x 1 x h x w.
        valid: likewise, bool.
        threshold: of `fixed`; share of the valid pixels below it of `quantile`; `otsu` finds its
            own.
        method: how.

    Returns:
        B x 1 x h x w bool.
    """
    check_arguments(binarize, locals())
    # No shape depends on a value: the CPU never waits for the GPU.
    values, counts = maps.flatten(1), valid.flatten(1)
    limit: Tensor | float = threshold
    if method == "quantile":
        limit = values.masked_fill(~counts, torch.nan).nanquantile(threshold, 1, keepdim=True)
    elif method == "otsu":
        limit = _otsu(values, counts)
    mask = (values > limit) & counts
    number = (_FALLBACK_SHARE * counts.sum(1, keepdim=True)).round().clamp_min(1)
    # By rank, not by value: a constant map would be all object. ONNX has no stable sort.
    order = values.masked_fill(~counts, -torch.inf).argsort(dim=1, descending=True)
    likeliest = (order.argsort(1) < number) & counts
    return (mask | (likeliest & ~mask.any(1, keepdim=True))).view_as(maps)


def refine(
    mask: Tensor,
    query: Tensor,
    valid: Tensor,
    support: Tensor,
    support_mask: Tensor,
    support_valid: Tensor,
    method: Refinement = "cycle",
) -> Tensor:
    """Drop foreground whose best match in the supports leads back to the background.

    CGMGM, Eqs. 5-7. `literal` hides the query's background before matching, as printed, and changes
    nothing: what is hidden is similar to nothing, so that every way back ends in the mask. `cycle`
    matches all pixels and is otherwise as printed. `cycle_support` also requires that the best
    match in the supports is labelled foreground, as CyCTR (Zhang et al., NeurIPS 2021) does. A mask
    that would become empty stays as it was.

    Args:
        mask: M0, B x 1 x h x w bool; no padding in it.
        query: features, B x C x h x w.
        valid: pixels that are no padding, B x 1 x h x w bool.
        support: features of all supports, B x K x C x h' x w'.
        support_mask: B x K x 1 x h' x w', foreground in [0, 1].
        support_valid: likewise, bool.
        method: see above.

    Returns:
        M_q, B x 1 x h x w bool.
    """
    check_arguments(refine, locals())
    if method == "none":
        return mask

    def one(mask: Tensor, query: Tensor, valid: Tensor, *of_support: Tensor) -> Tensor:
        support, support_mask, support_valid = of_support
        inside = mask.flatten()
        keys = F.normalize(support.transpose(0, 1).flatten(1).float(), dim=0)  # C x S
        pixels = F.normalize(query.flatten(1).float(), dim=0)  # C x N
        if method == "literal":
            pixels = pixels * inside
        affinity = _products(keys, pixels).masked_fill(~support_valid.flatten()[:, None], -2)
        best = affinity.argmax(0)  # support pixel of each query pixel
        back = affinity.masked_fill(~valid.flatten(), -2).argmax(1)[best]
        kept = inside & inside[back]
        if method == "cycle_support":
            kept = kept & (support_mask.flatten()[best] > 0.5)
        return (kept | (inside & ~kept.any())).view_as(mask)

    return for_each(one, mask, query, valid, support, support_mask, support_valid)


def _patches(features: Tensor, patches: PatchSimilarity, repeat: bool) -> Tensor:
    """B x C x h x w to B x O x C x h/2 x w/2: the O = 4 pixels of a patch apart, or their mean."""
    right, bottom = features.shape[-1] % 2, features.shape[-2] % 2
    if right or bottom:
        mode = "replicate" if repeat else "constant"
        features = F.pad(features, (0, right, 0, bottom), mode)
    if patches == "mean":
        return F.avg_pool2d(features, 2)[:, None]
    corners: Tensor = F.pixel_unshuffle(features, 2).unflatten(1, (-1, 4)).transpose(1, 2)
    return corners


def _max_cosine(query: Tensor, support: Tensor) -> Tensor:
    """Mean cosine over O of the best support position; B x O x C x h x w each, to B x 1 x h x w.

    Positions of the support that are all zero are masked out; 0 where all are. One image at a time:
    the affinity of two maps of 60 x 60 takes 52 MB.
    """

    def one(pixels: Tensor, keys: Tensor) -> Tensor:
        positions = pixels.shape[0]
        pixels, keys = (
            F.normalize(f.flatten(2).float(), dim=1, eps=_EPSILON) for f in (pixels, keys)
        )
        keys, pixels = keys.flatten(0, 1), pixels.flatten(0, 1)
        seen = keys.ne(0).any(0)
        # Their cosine of 0 would beat the negative ones that features with signs have.
        affinity = _products(keys, pixels).masked_fill(~seen[:, None], -torch.inf)
        return (affinity.amax(0) / positions).masked_fill(~seen.any(), 0)

    cosines: Tensor = for_each(one, query, support).unflatten(1, query.shape[-2:])
    return cosines[:, None]


def _products(keys: Tensor, pixels: Tensor) -> Tensor:
    """C x S and C x N float32 to S x N, in float32: cosines near 1 differ by less than bfloat16."""
    with torch.autocast(keys.device.type, enabled=False):
        return keys.mT @ pixels


def _otsu(values: Tensor, valid: Tensor, bins: int = 64) -> Tensor:
    """Thresholds B x 1 that maximise the variance between the two sides (Otsu, 1979) of B x N."""
    index = (values * bins).long().clamp(0, bins - 1)
    counts = values.new_zeros(len(values), bins).scatter_add(1, index, valid.to(values.dtype))
    centres = (torch.arange(bins, device=values.device) + 0.5) / bins
    below, moment = counts.cumsum(1), (counts * centres).cumsum(1)
    total, whole = below[:, -1:], moment[:, -1:]
    above = total - below
    between = (whole * below - moment * total).square() / (below * above).clamp_min(1e-12)
    return (between[:, :-1].argmax(1, keepdim=True) + 1) / bins
