import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.methods.fewshot.matching import (
    binarize,
    global_similarity,
    local_similarity,
    refine,
    stretch,
)

EVERYWHERE = torch.ones(1, 1, 8, 8, dtype=torch.bool)


def scene(size: int = 8, channels: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query and support, of non-negative features, with an object and a distractor each, and their object masks."""
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
    found = global_similarity(query, support * mask, EVERYWHERE)
    keys = support[0][:, mask[0, 0]]  # C x S
    cosine = torch.stack(
        [
            max(F.cosine_similarity(pixel, key, dim=0) for key in keys.T)
            for pixel in query[0].flatten(1).T
        ]
    ).view(1, 1, 8, 8)
    expected = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


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
    """Eq. 4: for each of four offsets a cosine between patches; their mean; the best support patch."""
    query, support = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    best = torch.full((2, 2), -1.0)
    for y in range(2):
        for x in range(2):
            for v in range(2):
                for u in range(2):
                    cosines = [
                        F.cosine_similarity(
                            query[0, :, 2 * y + a, 2 * x + b],
                            support[0, :, 2 * v + a, 2 * u + b],
                            dim=0,
                        )
                        for a in range(2)
                        for b in range(2)
                    ]
                    best[y, x] = max(best[y, x], sum(cosines) / 4)
    enlarged = F.interpolate(best[None, None], (4, 4), mode="bilinear")
    valid = EVERYWHERE[..., :4, :4]
    torch.testing.assert_close(
        local_similarity(query, support, valid), stretch(enlarged, valid), atol=1e-5, rtol=0
    )


def test_masked_out_pixels_match_nothing():
    """Where all cosines are negative, that of a zero vector would be the largest."""
    support = torch.zeros(1, 2, 8, 8)
    support[:, 0, 2:6, 2:6] = 1
    angle = torch.linspace(0.6 * torch.pi, torch.pi, 64).view(1, 1, 8, 8)
    query = torch.cat([angle.cos(), angle.sin()], 1)
    expected = stretch(angle.cos(), EVERYWHERE)
    torch.testing.assert_close(
        global_similarity(query, support, EVERYWHERE), expected, atol=1e-5, rtol=0
    )
    assert local_similarity(query, support, EVERYWHERE).amax() == pytest.approx(1)
    for function in (global_similarity, local_similarity):
        assert (function(query, support * 0, EVERYWHERE) == 0).all()


def test_padding_has_no_similarity():
    query, support, _, mask = scene()
    valid = EVERYWHERE.clone()
    valid[..., 6:] = False
    changed = query.clone()
    changed[..., 6:] = 50 * torch.rand(1, 16, 8, 2)
    for function in (global_similarity, local_similarity):
        one, two = (function(q, support * mask, valid) for q in (query, changed))
        if function is global_similarity:
            assert torch.equal(one, two)
        assert (one[..., 6:] == 0).all()
        assert one.amax() == pytest.approx(1)
    nothing = stretch(torch.full((1, 1, 8, 8), 0.3), valid)
    assert (nothing == 0).all()


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
    nowhere = torch.zeros_like(EVERYWHERE)
    assert not binarize(maps, nowhere).any()


def coarse(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    return binarize(global_similarity(query, support * mask, EVERYWHERE), EVERYWHERE, 0.6)


def refined(method: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    query, support, truth, mask = scene()
    initial = coarse(query, support, mask)
    soft = mask[:, None].float()
    result = refine(
        initial, query, EVERYWHERE, support[:, None], soft, torch.ones_like(soft) > 0, method
    )
    return initial, result, truth


def iou(mask: Tensor, truth: Tensor) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_refinement_changes_nothing(seed):
    initial, result, _ = refined("literal", seed)
    assert torch.equal(initial, result)
    assert torch.equal(refined("none", seed)[1], initial)


@pytest.mark.parametrize("seed", range(5))
def test_refinement_only_removes(seed):
    for method in ("cycle", "cycle_support"):
        initial, result, _ = refined(method, seed)
        assert not (result & ~initial).any()
        assert result.any()


def test_the_support_check_removes_the_distractor():
    before, after = zip(
        *(
            (iou(initial, truth), iou(result, truth))
            for initial, result, truth in (refined("cycle_support", seed) for seed in range(5))
        ),
        strict=True,
    )
    assert sum(after) > sum(before) + 0.5
    assert all(b <= a for b, a in zip(before, after, strict=True))


def test_invalid_support_pixels_are_no_match():
    torch.manual_seed(0)
    query, support, truth, mask = scene()
    valid = torch.ones(1, 1, 1, 8, 8, dtype=torch.bool)
    valid[..., 6:, :] = False  # the distractor lies on padding there: nothing contradicts
    soft = mask[:, None].float()
    initial = coarse(query, support, mask)
    one = refine(initial, query, EVERYWHERE, support[:, None], soft, valid, "cycle_support")
    changed = support.clone()
    changed[..., 6:, :] = query[..., :2, :]
    two = refine(initial, query, EVERYWHERE, changed[:, None], soft, valid, "cycle_support")
    assert torch.equal(one, two)
    assert (one & truth).any()


def test_padding_of_the_query_is_no_way_back():
    torch.manual_seed(0)
    query, support, _, mask = scene()
    valid = EVERYWHERE.clone()
    valid[..., 6:] = False
    initial = coarse(query, support, mask) & valid
    soft = mask[:, None].float()
    results = []
    for copied in (query, support):  # as padding, what the support's pixels resemble most
        padded = query.clone()
        padded[..., 6:] = copied[..., 2:4]
        given = (padded, valid, support[:, None], soft, soft >= 0, "cycle")
        results.append(refine(initial, *given))
    assert initial.any()
    assert torch.equal(*results)


def test_several_supports_are_one_pool():
    torch.manual_seed(1)
    query, support, _, mask = scene()
    initial = coarse(query, support, mask)
    both = torch.stack([support[0], support[0].flip(-1)])[None]
    masks = torch.stack([mask[0], mask[0].flip(-1)])[None].float()
    results = [
        refine(
            initial, query, EVERYWHERE, both[:, o], masks[:, o], masks[:, o] >= 0, "cycle_support"
        )
        for o in ([0, 1], [1, 0])
    ]
    assert torch.equal(*results)
