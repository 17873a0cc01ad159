import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot.matching import (
    binarize,
    global_similarity,
    local_similarity,
    refine,
    stretch,
)

EVERYWHERE = torch.ones(1, 1, 8, 8, dtype=torch.bool)
LEFT = EVERYWHERE.clone()
LEFT[..., 6:] = False


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def scene(size: int = 8, channels: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Non-negative query and support with an object and a distractor each, and the object masks."""
    kinds = F.relu(torch.randn(3, channels)) + 0.1
    layouts = torch.zeros(2, size, size, dtype=torch.long)
    layouts[0, 1:4, 1:4] = layouts[1, 3:6, 2:6] = 1
    layouts[:, 6:, 5:] = 2  # like the object, but not it
    kinds[2] = kinds[1] + 0.35 * kinds[2]
    maps = kinds[layouts].permute(0, 3, 1, 2) + 0.03 * torch.rand(2, channels, size, size)
    masks = (layouts == 1)[:, None]
    return maps[:1], maps[1:], masks[:1], masks[1:]


def test_global_similarity_by_hand():
    query, support, _, mask = scene()
    keys, pixels = support[0][:, mask[0, 0]].T, query[0].flatten(1).T
    cosine = F.cosine_similarity(pixels[:, None], keys, dim=2).amax(1).view(1, 1, 8, 8)
    expected = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    close(global_similarity(query, support * mask, EVERYWHERE), expected)


def test_cosines_are_in_full_precision():
    """Those of trained features lie near 1, where bfloat16 knows few numbers."""
    query, support = 1 + 0.1 * torch.rand(2, 1, 16, 8, 8)
    everything = torch.ones(1, 1, 1, 8, 8)

    def found() -> list[Tensor]:
        maps = global_similarity(query, support, EVERYWHERE)
        mask = maps > 0.5
        options = (mask, query, EVERYWHERE, support[None], everything, everything.bool())
        return [maps, refine(*options, method="cycle")]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for mine, theirs in zip(found(), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("patches", ["offsets", "mean"])
@pytest.mark.parametrize("size", [8, 9])
def test_local_similarity(patches, size):
    query, support, truth, mask = scene(size)
    valid = torch.ones(1, 1, size, size, dtype=torch.bool)
    similarity = local_similarity(query, support * mask, valid, patches)
    assert similarity.shape == (1, 1, size, size)
    assert similarity.min() == 0
    assert similarity.max() == pytest.approx(1)
    assert similarity[truth].mean() > similarity[~truth].mean() + 0.2


def test_local_similarity_by_hand():
    """Eq. 4: for each of four offsets a cosine between patches; their mean; the best patch."""
    query, support = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    best = torch.full((2, 2), -1.0)
    for y, x, v, u in np.ndindex(2, 2, 2, 2):
        mine, theirs = query[0, :, 2 * y :, 2 * x :], support[0, :, 2 * v :, 2 * u :]
        cosines = F.cosine_similarity(mine[:, :2, :2], theirs[:, :2, :2], dim=0)
        best[y, x] = max(best[y, x], cosines.mean())
    enlarged = F.interpolate(best[None, None], (4, 4), mode="bilinear")
    valid = EVERYWHERE[..., :4, :4]
    close(local_similarity(query, support, valid), stretch(enlarged, valid))


def test_masked_out_pixels_match_nothing():
    """Where all cosines are negative, that of a zero vector would be the largest."""
    support = torch.zeros(1, 2, 8, 8)
    support[:, 0, 2:6, 2:6] = 1
    angle = torch.linspace(0.6 * torch.pi, torch.pi, 64).view(1, 1, 8, 8)
    query = torch.cat([angle.cos(), angle.sin()], 1)
    close(global_similarity(query, support, EVERYWHERE), stretch(angle.cos(), EVERYWHERE))
    assert local_similarity(query, support, EVERYWHERE).amax() == pytest.approx(1)
    for function in (global_similarity, local_similarity):
        assert (function(query, support * 0, EVERYWHERE) == 0).all()


def test_padding_has_no_similarity():
    query, support, _, mask = scene()
    changed = query.clone()
    changed[..., 6:] = 50 * torch.rand(1, 16, 8, 2)
    one, two = (global_similarity(q, support * mask, LEFT) for q in (query, changed))
    assert torch.equal(one, two)
    for similarity in (one, local_similarity(query, support * mask, LEFT)):
        assert (similarity[..., 6:] == 0).all()
        assert similarity.amax() == pytest.approx(1)
    assert (stretch(torch.full((1, 1, 8, 8), 0.3), LEFT) == 0).all()


def test_binarize():
    maps = torch.arange(64).view(1, 1, 8, 8) / 63
    assert binarize(maps, EVERYWHERE).sum() == 32
    assert binarize(maps, EVERYWHERE, 0.75, "quantile").sum() == 16
    two_heaps = torch.where(maps > 0.8, 0.9 + maps / 100, maps / 10)
    assert torch.equal(binarize(two_heaps, EVERYWHERE, method="otsu"), maps > 0.8)
    low = binarize(maps / 10, EVERYWHERE)  # nothing reaches the threshold
    assert low.flatten().nonzero().flatten().tolist() == [63]
    constant = binarize(torch.zeros(1, 1, 20, 20), torch.ones(1, 1, 20, 20) > 0)
    assert constant.sum() == 4  # 1 %
    assert not binarize(maps, ~EVERYWHERE).any()


def coarse(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    return binarize(global_similarity(query, support * mask, EVERYWHERE), EVERYWHERE, 0.6)


def refined(method: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Initial mask, refined mask and truth of a scene."""
    torch.manual_seed(seed)
    query, support, truth, mask = scene()
    initial, soft = coarse(query, support, mask), mask[:, None].float()
    given = (query, EVERYWHERE, support[:, None], soft, soft >= 0)
    return initial, refine(initial, *given, method), truth  # type: ignore[arg-type]


def iou(mask: Tensor, truth: Tensor) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize("seed", range(5))
def test_refinement_only_removes_and_the_printed_one_nothing(seed):
    for method in ("cycle", "cycle_support"):
        initial, result, _ = refined(method, seed)
        assert not (result & ~initial).any()
        assert result.any()
    for method in ("literal", "none"):
        assert torch.equal(refined(method, seed)[1], initial)


def test_the_support_check_removes_the_distractor():
    scores = [
        (iou(initial, truth), iou(result, truth))
        for initial, result, truth in (refined("cycle_support", seed) for seed in range(5))
    ]
    assert sum(after - before for before, after in scores) > 0.5
    assert all(before <= after for before, after in scores)


def test_invalid_support_pixels_are_no_match():
    torch.manual_seed(0)
    query, support, truth, mask = scene()
    valid = EVERYWHERE.clone()[:, None]
    valid[..., 6:, :] = False  # the distractor lies on padding there: nothing contradicts
    initial, soft = coarse(query, support, mask), mask[:, None].float()
    changed = support.clone()
    changed[..., 6:, :] = query[..., :2, :]
    one, two = (
        refine(initial, query, EVERYWHERE, keys[:, None], soft, valid, "cycle_support")
        for keys in (support, changed)
    )
    assert torch.equal(one, two)
    assert (one & truth).any()


def test_padding_of_the_query_is_no_way_back():
    torch.manual_seed(0)
    query, support, _, mask = scene()
    initial, soft = coarse(query, support, mask) & LEFT, mask[:, None].float()
    assert initial.any()
    results = []
    for copied in (query, support):  # as padding, what the support's pixels resemble most
        padded = query.clone()
        padded[..., 6:] = copied[..., 2:4]
        results.append(refine(initial, padded, LEFT, support[:, None], soft, soft >= 0, "cycle"))
    assert torch.equal(*results)


def test_several_supports_are_one_pool():
    torch.manual_seed(1)
    query, support, _, mask = scene()
    initial = coarse(query, support, mask)
    both, masks = (torch.stack([part[0], part[0].flip(-1)])[None] for part in (support, mask))
    one, two = (
        refine(initial, query, EVERYWHERE, keys, soft.float(), soft >= 0, "cycle_support")
        for keys, soft in ((both, masks), (both.flip(1), masks.flip(1)))
    )
    assert torch.equal(one, two)


def test_unknown_choices():
    maps = torch.rand(1, 1, 8, 8)
    with pytest.raises(GenSegError, match="method is 'mean'; it must be one of fixed, otsu"):
        binarize(maps, EVERYWHERE, method="mean")  # type: ignore[arg-type]
    with pytest.raises(GenSegError, match="patches is 'max'; it must be one of offsets, mean"):
        local_similarity(maps, maps, EVERYWHERE, "max")  # type: ignore[arg-type]
    with pytest.raises(GenSegError, match="method is 'twice'; it must be one of none, cycle"):
        refine(EVERYWHERE, maps, EVERYWHERE, maps, maps, maps, "twice")  # type: ignore[arg-type]
