import torch

from lightning_genseg.methods.gss.training.mask_variation import (
    corrupt,
    permute_classes,
    procedural_masks,
)


def test_procedural_masks():
    masks = procedural_masks(20, (30, 40), 7)
    assert masks.shape == (20, 30, 40)
    assert masks.dtype == torch.int64
    assert masks.unique().tolist() == list(range(7))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 20
    changes = (masks.diff(dim=2) != 0).float().mean()
    assert 0.01 < changes < 0.3  # regions, not noise
    assert procedural_masks(1, (1, 1), 2).shape == (1, 1, 1)


def test_permuted_classes_are_the_same_regions():
    mask = torch.randint(6, (50, 4, 5))
    mask[:, 0] = 255
    permuted = permute_classes(mask, 6)
    assert torch.equal(permuted == 255, mask == 255)
    for before, after in zip(mask.flatten(1), permuted.flatten(1), strict=True):
        pairs = set(zip(before.tolist(), after.tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert (permuted != mask).any()
    shares = permute_classes(torch.zeros(3000, 1, 1, dtype=torch.int64), 6).flatten().bincount()
    assert shares.min() > 400


def test_corruption():
    mask = torch.zeros(40, 32, 48, dtype=torch.int64)
    mask[:, :, 24:] = 1
    mask[:, :, :8] = 255
    before = mask.clone()
    corrupted = corrupt(mask, 5)
    assert torch.equal(mask, before)
    assert corrupted.unique().tolist() == [0, 1, 2, 3, 4, 255]
    changed = corrupted != mask
    assert 0.01 < changed.float().mean() < 0.25
    frayed = (corrupted == 255) != (mask == 255)  # no rectangle labels what is ignored
    assert frayed[:, :, 4:12].any()
    assert not frayed[:, :, 11:].any()
    assert not frayed[:, :, :5].any()
