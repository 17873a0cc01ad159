"""Densities against torch.distributions, scipy and float64."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch.distributions import Independent, MultivariateNormal, Normal

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import (
    GaussianMixture,
    densities,
    diagonal_log_density,
    full_log_density,
    log_density,
)

close = torch.testing.assert_close


def normal(means, variances):
    return Independent(Normal(means, variances.sqrt()), 1)


def test_diagonal_equals_torch_distributions():
    x, means, variances = torch.randn(7, 5), torch.randn(3, 2, 5), torch.rand(3, 2, 5) + 0.1
    expected = normal(means, variances).log_prob(x[:, None, None])
    close(diagonal_log_density(x, means, variances), expected)


def test_full_equals_scipy_and_torch_distributions(monkeypatch):
    mixture, x = GaussianMixture(3, 2, 5, "full"), torch.randn(7, 5)
    root = torch.randn(3, 2, 5, 5)
    mixture.covariances.copy_(root @ root.mT / 5 + 0.1 * torch.eye(5))
    density = mixture.component_log_density(x)
    expected = MultivariateNormal(mixture.means, mixture.covariances).log_prob(x[:, None, None])
    close(density, expected, rtol=1e-4, atol=1e-4)
    for c, m in np.ndindex(3, 2):
        parameters = mixture.means[c, m].numpy(), mixture.covariances[c, m].numpy()
        expected = scipy.stats.multivariate_normal(*parameters).logpdf(x.numpy())
        close(density[:, c, m], torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    close(mixture.variances, mixture.covariances.diagonal(dim1=-2, dim2=-1), rtol=0, atol=0)
    monkeypatch.setattr(log_density, "_MAX_WHITENED_ELEMENTS", 60)
    close(full_log_density(x, mixture.means, mixture.covariances), density)  # in parts


@pytest.mark.parametrize("least", [1e-2, 1e-3])
@pytest.mark.parametrize("dim", [1, 64, 512])
def test_float32_is_close_to_float64_for_unit_features(dim, least):
    # The head's case: unit norm (for D=1: any sign), variances down to the floor.
    x = F.normalize(torch.randn(200, dim), dim=1)
    means = F.normalize(torch.randn(10, dim), dim=1)
    variances = torch.rand(10, dim) * 0.05 + least
    single = diagonal_log_density(x, means, variances, bounded=True)
    double = diagonal_log_density(x.double(), means.double(), variances.double())
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    expected = normal(means.double(), variances.double()).log_prob(x.double()[:, None])
    close(double, expected)
    assert (single - double).abs().max() < 1e-3  # of log-densities of up to a thousand nats


def test_float32_far_from_the_origin():
    # Without centring the expanded square would lose all digits here: 0.5 * 1e6 / 0.1.
    x, means, variances = torch.randn(100, 8) + 1e3, torch.randn(6, 8) + 1e3, torch.rand(6, 8) + 0.1
    expected = normal(means.double(), variances.double()).log_prob(x.double()[:, None])
    close(diagonal_log_density(x, means, variances).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("scale", "variance"),
    [(1, 1e-2), (1, 1e-8), (100, 1e-2), (100, 1e-6), (1e4, 1e-2), (1e4, 1e-4)],
)
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_float32_of_any_features(covariance, scale, variance):
    """Under every component; those of the own one are within 0.01 nats of float64."""
    mixture = GaussianMixture(3, 2, 8, covariance)
    mixture.means.copy_(scale * torch.randn(3, 2, 8))
    shape = torch.rand(3, 2, 8) + 0.5
    if covariance == "full":
        root = torch.randn(3, 2, 8, 8)
        mixture.covariances.copy_(variance * (root @ root.mT / 8 + shape.diag_embed()))
    else:
        mixture.log_variances.copy_((variance * shape).log())
    x = mixture.means[:, :, None] + variance**0.5 * torch.randn(3, 2, 50, 8)
    x, labels = x.flatten(0, 2), torch.arange(3).repeat_interleave(100)
    single, own = mixture.component_log_density(x), mixture.own_log_density(x, labels)
    if covariance == "full":
        exact = full_log_density(x.double(), mixture.means, mixture.covariances)
        there = MultivariateNormal(mixture.means.double(), mixture.covariances.double())
        close(exact, there.log_prob(x.double()[:, None, None]), rtol=1e-6, atol=1e-6)
    else:
        there = normal(mixture.means.double(), mixture.variances.double())
        exact = there.log_prob(x.double()[:, None, None])
    assert single.dtype == own.dtype == torch.float32
    close(single.double(), exact, rtol=1e-6, atol=8e-3)
    near = exact[torch.arange(300), labels].amax(1)
    assert (own.amax(1) - near).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_autocast_does_not_reach_the_density(dtype, covariance):
    mixture, x = GaussianMixture(3, 2, 8, covariance), torch.randn(5, 8)
    with torch.autocast("cpu", dtype):
        density, half = (mixture.log_density(given) for given in (x, x.to(dtype)))
    assert density.dtype == half.dtype == torch.float32
    assert torch.equal(density, mixture.log_density(x))
    assert torch.equal(half, mixture.log_density(x.to(dtype).float()))


def test_gradients_are_right():
    x, means, variances = (torch.rand(n, 3, dtype=torch.double) + 0.5 for n in (4, 2, 2))
    inputs = [tensor.requires_grad_() for tensor in (x, means, variances)]
    assert torch.autograd.gradcheck(diagonal_log_density, inputs)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("classes", [2, 10])  # fewer and more than dimensions
def test_own_density_is_a_part_of_all_densities(classes, covariance):
    mixture = GaussianMixture(classes, 3, 4, covariance, unit_means=True)
    if covariance == "diagonal":
        mixture.log_variances.copy_(torch.randn(classes, 3, 4))
    x, labels = torch.randn(50, 4), torch.randint(classes, (50,))
    labels[::5], labels[::7] = 255, -100
    with torch.autocast("cpu", torch.bfloat16):
        own = mixture.own_log_density(x, labels)
    everything = mixture.component_log_density(x)
    close(mixture.component_log_density(x, 1), everything[:, 1], rtol=1e-4, atol=1e-4)
    valid = torch.where((labels >= 0) & (labels < classes), labels, 0)
    close(own, everything[torch.arange(50), valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixture", ["max", "logsumexp"])
@pytest.mark.parametrize("pixels", [0, 50])
def test_densities_of_a_training_step_and_their_gradient(mixture, pixels, monkeypatch):
    """In one pass, some pixels at a time, as from all log-densities."""
    monkeypatch.setattr(densities, "_CACHED_ELEMENTS", 200)
    torch.manual_seed(0)
    model = GaussianMixture(7, 3, 8, unit_means=True, variance_floor=1e-2)
    model.log_variances.copy_(torch.rand(7, 3, 8) - 3)
    model.log_weights.copy_(torch.randn(7, 3).log_softmax(1))
    x = F.normalize(torch.randn(pixels, 8), dim=1).requires_grad_()
    labels = torch.randint(8, (pixels,))  # 7 is no class

    def gradient(classes, total, own):
        cost = (classes.sin().sum() + total.square().sum() + own.cos().sum()) / 50
        return torch.autograd.grad(cost, x)[0]

    found = model.densities(x, labels, mixture)
    each = model.component_log_density(x)
    index = torch.where(labels == 7, 0, labels)
    expected = (
        model.combine(each, mixture),
        each.flatten(1).logsumexp(1),
        each[torch.arange(pixels), index],
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient(*found), gradient(*expected), atol=1e-3, rtol=1e-3)


def test_components_that_are_alike_share_the_gradient():
    model = GaussianMixture(2, 3, 4, unit_means=True, variance_floor=1e-2)
    model.means.copy_(model.means[:, :1].clone().expand(2, 3, 4))
    x = F.normalize(torch.randn(5, 4), dim=1).requires_grad_()
    found, plain = model.densities(x, torch.zeros(5, dtype=torch.long)), model.log_density(x)
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (found.classes, plain))
    close(*gradients, rtol=1e-4, atol=1e-4)


def test_class_density_is_the_mixture():
    mixture = GaussianMixture(3, 2, 4)
    mixture.log_weights.copy_(torch.tensor([[0.3, 0.7]] * 3).log())
    x = torch.randn(5, 4)
    components = normal(mixture.means, torch.ones(3, 2, 4)).log_prob(x[:, None, None])
    probabilities = components.exp() * torch.tensor([0.3, 0.7])
    close(mixture.log_density(x, "logsumexp"), probabilities.sum(2).log())
    close(mixture.log_density(x, "max"), probabilities.amax(2).log())


def test_density_integrates_to_one():
    mixture = GaussianMixture(2, 3, 1)
    mixture.log_variances.copy_(torch.rand(2, 3, 1) - 1)
    x = torch.linspace(-10, 10, 4001)
    mass = mixture.log_density(x[:, None], "logsumexp").exp().sum(0) * (x[1] - x[0])
    close(mass, torch.ones(2), rtol=0, atol=1e-4)


def test_unit_means_are_normalised_at_use():
    mixture = GaussianMixture(2, 2, 4, unit_means=True)
    x = torch.randn(5, 4)
    before = mixture.log_density(x)
    mixture.means.mul_(7)
    close(mixture.centres.norm(dim=-1), torch.ones(2, 2))
    close(mixture.log_density(x), before)


def test_uses_no_variance_below_the_floor():
    mixture = GaussianMixture(1, 1, 2, trainable=True, variance_floor=0.01)
    with torch.no_grad():
        mixture.log_variances.fill_(-100)
    close(mixture.variances, torch.full((1, 1, 2), 0.01))
    assert mixture.log_density(torch.ones(1, 2)).isfinite()


def test_uses_no_variance_below_the_floor_that_em_has_written():
    mixture = GaussianMixture(1, 1, 2, variance_floor=0.01)
    mixture.log_variances.fill_(-100)
    close(mixture.variances, torch.full((1, 1, 2), 0.01))


def test_a_component_is_fitted_though_one_variance_is_that_of_the_start():
    mixture = GaussianMixture(1, 2, 3)
    mixture.log_variances[0, 0, 1:] = -1
    assert mixture.fitted.tolist() == [[True, False]]


def test_a_variance_near_the_floor_finds_its_way_back():
    mixture = GaussianMixture(1, 1, 2, unit_means=True, trainable=True, variance_floor=0.01)
    close(mixture.variances, torch.full((1, 1, 2), 1 / 2 + 0.01))
    with torch.no_grad():
        mixture.log_variances.fill_(-6)  # below the floor
    mixture.log_density(5 * torch.ones(1, 2)).sum().backward()
    assert (mixture.log_variances.grad > 0).all()  # a wider one explains this far point better


def test_parameters_are_buffers_unless_trainable():
    assert not list(GaussianMixture(3, 2, 4).parameters())
    names = dict(GaussianMixture(3, 2, 4, trainable=True).named_parameters())
    assert set(names) == {"means", "log_variances"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_classes": 0}, "num_classes is 0; it must be at least 1"),
        ({"components": 0}, "components is 0; it must be at least 1"),
        ({"dim": 0}, "dim is 0; it must be at least 1"),
        ({"covariance": "tied"}, "covariance is 'tied'; it must be one of diagonal, full"),
        ({"covariance": "full", "trainable": True}, "use covariance='diagonal'"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(GenSegError, match=words):
        GaussianMixture(**{"num_classes": 2, "components": 2, "dim": 2, **arguments})


@pytest.mark.parametrize("shape", [(5, 3), (5,), (2, 5, 4)])
def test_refuses_features_of_another_shape(shape):
    with pytest.raises(GenSegError, match="takes N x 4 features; got"):
        GaussianMixture(2, 2, 4).log_density(torch.zeros(shape))


@pytest.mark.parametrize(("classes", "components", "dim"), [(7, 5, 64), (19, 5, 64), (3, 1, 2)])
def test_an_orthogonal_start(classes, components, dim):
    mixture = GaussianMixture(classes, components, dim, start="orthogonal")
    means = mixture.means.flatten(0, 1)
    torch.testing.assert_close(means.sum(1), torch.zeros(len(means)), atol=1e-5, rtol=0)
    for basis in means.split(dim - 1):
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    assert not torch.equal(
        GaussianMixture(classes, components, dim, start="orthogonal").means, means
    )
