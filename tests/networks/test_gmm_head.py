"""The head against a plain reference with loops, on hostile data, and learning."""

import copy
from collections import deque

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Independent, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_genseg.mixtures import Processes, spread_evenly
from lightning_genseg.networks.gmm_head import GMMHead
from tests.mixtures.processes import run_processes
from tests.mixtures.test_sinkhorn import plain as plain_sinkhorn


def make_head(**options):
    defaults = {"in_channels": 6, "num_classes": 3, "embedding_dim": 4, "memory_size": 40}
    return GMMHead(**defaults | options)


def make_batch(classes=3, size=8, channels=6, stride=4, count=2):
    """Features that tell the class, and a mask at image resolution with an ignored border."""
    small = torch.randint(classes, (count, size, size))
    features = torch.randn(count, channels, size, size)
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(5))
    features = features + 2 * centres[small].movedim(-1, 1)
    mask = small.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    mask[:, : 2 * stride] = 255
    return features, mask


def step(head, features, mask, **options):
    losses = head.compute_loss(features, mask)
    head.update_mixture(losses["embedding"], mask, **options)
    return losses


def state(head):
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_same_state(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


# --- scores and losses -----------------------------------------------------------------------


def plain_densities(head, embedding):
    """torch.distributions, pixel by component by dimension: N x C x M."""
    x = embedding.movedim(1, -1).flatten(0, 2)[:, None, None]
    mixture = head.mixture
    return Independent(Normal(mixture.centres, mixture.variances.sqrt()), 1).log_prob(x)


def test_scores_equal_torch_distributions():
    head = make_head(components=3).eval()
    head.mixture.log_variances.copy_(-torch.rand(3, 3, 4))
    features, _ = make_batch()
    embedding = head.embed(features)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2, 8, 8))
    density = plain_densities(head, embedding).amax(2) - torch.tensor(3.0).log()
    logits, anomaly = head.scores(embedding)
    expected = F.layer_norm(density, (3,)).view(2, 8, 8, 3).movedim(-1, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(anomaly, -density.amax(1).view(2, 1, 8, 8))


def test_losses_equal_the_plain_ones():
    head = make_head(components=3, component_loss_weight=0.5)
    features, mask = make_batch()
    losses = head.compute_loss(features, mask)
    density = plain_densities(head, losses["embedding"])
    logits = F.layer_norm(density.amax(2), (3,)).view(2, 8, 8, 3).movedim(-1, 1)
    large = F.interpolate(logits, (32, 32), mode="bilinear")
    labels = mask[:, ::4, ::4].flatten()
    own = density[torch.arange(128), labels % 255]
    target = plain_sinkhorn(own, labels).argmax(1) + 3 * labels
    valid = labels < 255
    expected = {
        "loss_ce": F.cross_entropy(large, mask, ignore_index=255),
        "loss_component": F.cross_entropy(density.flatten(1)[valid], target[valid]),
    }
    expected["loss"] = expected["loss_ce"] + 0.5 * expected["loss_component"]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)


def test_without_the_component_loss():
    head = make_head(component_loss_weight=0)
    losses = head.compute_loss(*make_batch())
    assert set(losses) == {"loss", "loss_ce", "embedding"}
    assert losses["loss"] == losses["loss_ce"]


def test_labels_are_read_in_the_middle_of_a_cell():
    mask = torch.zeros(1, 8, 8, dtype=torch.long)
    mask[:, 2::4, 2::4] = 1
    labels = make_head().labels(mask, torch.zeros(1, 4, 2, 2))
    assert labels.tolist() == [1, 1, 1, 1]


def test_any_mask_size():
    head = make_head()
    features = torch.randn(1, 6, 5, 7)
    for size in ((5, 7), (19, 27), (3, 2)):
        mask = torch.randint(3, (1, *size))
        assert step(head, features, mask)["loss"].isfinite()


@pytest.mark.parametrize("train_mixture", ["em", "gradient", "posthoc"])
def test_who_learns_by_gradient(train_mixture):
    head = make_head(train_mixture=train_mixture)
    features, mask = make_batch()
    features.requires_grad_()
    losses = head.compute_loss(features, mask)
    losses["loss"].backward()
    assert features.grad.abs().sum() > 0
    assert head.projection[0].weight.grad.abs().sum() > 0
    assert not losses["embedding"].requires_grad
    parameters = dict(head.mixture.named_parameters())
    if train_mixture == "gradient":
        assert set(parameters) == {"means", "log_variances"}
        assert all(p.grad.abs().sum() > 0 for p in parameters.values())
        with pytest.raises(ValueError, match="learns by gradient; there is no EM to run"):
            head.update_mixture(losses["embedding"], mask)
    else:
        assert not parameters
        assert not any(buffer.requires_grad for buffer in head.buffers())


def test_gradient_is_that_of_the_plain_densities():
    head = make_head(logit_norm="none", component_loss_weight=0).double()
    head.mixture.log_variances.copy_(-torch.rand(3, 5, 4))
    embedding = F.normalize(torch.randn(1, 4, 3, 3, dtype=torch.double), dim=1).requires_grad_()
    mine = head.scores(embedding)[0].logsumexp(1).sum()
    theirs = plain_densities(head, embedding).amax(2).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(mine, embedding)
    (expected,) = torch.autograd.grad(theirs, embedding)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_densities(dtype):
    head = make_head()
    features, mask = make_batch()
    with torch.autocast("cpu", dtype):
        embedding = head.embed(features)
        density = head.component_log_density(embedding)
        scores, anomaly = head.scores(embedding)
        losses = step(head, features, mask)
    assert embedding.dtype == density.dtype == scores.dtype == anomaly.dtype == torch.float32
    torch.testing.assert_close(density, head_density_outside(embedding, density, head, features))
    assert losses["loss"].dtype == torch.float32
    losses["loss"].backward()
    for name, buffer in head.mixture.named_buffers():
        assert buffer.dtype == torch.float32, name
        assert buffer.isfinite().all(), name


def head_density_outside(embedding, density, head, features):
    """The density of the same embedding without autocast, by the mixture as it was then."""
    fresh = make_head()
    fresh.load_state_dict(head.state_dict() | {"mixture.means": START["means"]})
    fresh.mixture.log_variances.zero_()
    return fresh.component_log_density(embedding)
