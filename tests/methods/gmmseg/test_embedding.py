"""The head in other people's training loops."""

import pytest
import torch
from torch import nn

from lightning_genseg import GMMHead
from tests.contract import NUM_CLASSES, batch_of, scenes


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.Conv2d(16, 24, 3, padding=1))


def test_a_plain_loop():
    backbone, head = small_network(), GMMHead(24, NUM_CLASSES, embedding_dim=16, mean_momentum=0.9)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-2)
    seen = []
    for step in range(60):
        batch = batch_of(4 * step % len(scenes()), 4)
        losses = head.compute_loss(backbone(batch["image"]), batch["mask"])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        head.update_mixture(losses["embedding"], batch["mask"])
        seen.append(losses["loss"].item())
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    batch = batch_of(0, 8)
    features = backbone(batch["image"])
    logits, anomaly = head.eval().scores(head.embed(features))
    assert logits.shape == (8, NUM_CLASSES, 12, 16)
    assert anomaly.shape == (8, 1, 12, 16)
    labels = batch["mask"][:, 2::4, 2::4]
    right = (logits.argmax(1) == labels)[labels != 255].float().mean()
    assert right > 0.6  # the largest class covers 0.41 of the pixels


def test_somebody_elses_labels():
    """Another ignore index, masks at the resolution of the features."""
    head = GMMHead(8, 3, components=2, embedding_dim=None, ignore_index=-1)
    features = torch.randn(2, 8, 6, 6, requires_grad=True)
    mask = torch.randint(-1, 3, (2, 6, 6))
    losses = head.compute_loss(features, mask)
    losses["loss"].backward()
    head.update_mixture(losses["embedding"], mask)
    assert head.memory is not None
    counts = head.memory.moments().counts.view(3, 2).sum(1)
    assert counts.tolist() == [(mask == c).sum().item() for c in range(3)]
    ignored = (mask == -1)[:, None].expand_as(features)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(features.grad, torch.zeros_like(features))
    assert features.grad is not None
    assert not features.grad[ignored].any()
