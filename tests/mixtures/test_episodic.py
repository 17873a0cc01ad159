"""EM of one episode: acceptance tests of CGMGM's specification; scikit-learn as the outsider."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture as Reference
from torch import Tensor

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot.options import EpisodicMixtureOptions
from lightning_genseg.mixtures import (
    EpisodicMixture,
    diagonal_log_density,
    episodic,
    fit_episodes,
)
from lightning_genseg.mixtures.log_density import pairs_log_density, with_squares

close = torch.testing.assert_close

DIM = 256


def episode(
    foreground: int, background: int = 600, dead: int = 0, episodes: int = 1, noise_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features after a ReLU, two objects apart in all channels (some constant), and 0/1 weights."""
    count = foreground + background
    labels = (torch.arange(count) >= foreground).long()
    means = 1.5 * torch.rand(episodes, 2, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(noise_seed)
    x = (means[:, labels] + torch.randn(episodes, count, DIM, generator=generator)).relu()
    x[..., :dead] = 0.7
    weights = torch.stack([labels == 0, labels == 1]).float().expand(episodes, 2, count)
    return x, weights


def ratio(mixture: EpisodicMixture, x: Tensor) -> Tensor:
    density = mixture.log_density(x)
    return density[..., 0] - density[..., 1]


def balanced_accuracy(logit: Tensor, weights: Tensor) -> float:
    right = (logit[:, None] > 0).float()
    sides = torch.cat([right, 1 - right], 1) * weights
    return float((sides.sum((0, 2)) / weights.sum((0, 2))).mean())


def check_same(one: EpisodicMixture, two: EpisodicMixture, tolerance: float) -> None:
    for a, b in zip(one, two, strict=True):
        close(a, b, rtol=tolerance, atol=tolerance)


def test_recovers_three_gaussians():
    torch.manual_seed(1)
    centres, owner = 4 * torch.randn(3, DIM), torch.arange(300) % 3
    x = (centres[owner] + torch.randn(300, DIM))[None]
    mixture = fit_episodes(x, torch.ones(1, 1, 300))
    found = mixture.means[0, 0] * mixture.scale[0] + mixture.centre[0]
    nearest = torch.cdist(centres, found).argmin(1)
    assert nearest.sort().values.tolist() == [0, 1, 2]
    truth = torch.stack([x[0, owner == m].mean(0) for m in range(3)])
    close(found[nearest], truth, rtol=1e-4, atol=1e-4)
    close(mixture.log_weights.exp(), torch.full((1, 1, 3), 1 / 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 28])
def test_finite_with_few_pixels(count, covariance):
    x, weights = episode(count, 100)
    mixture = fit_episodes(x, weights, covariance=covariance)
    assert ratio(mixture, x).isfinite().all()
    assert mixture.means.isfinite().all()
    # 16 pixels for each component
    assert (mixture.log_weights[0] > -torch.inf).sum(1).tolist() == [1, 3]


@pytest.mark.parametrize("count", [8, 28, 300])
def test_few_pixels_are_enough(count):
    """Accuracy on other pixels; the maximum-likelihood variance of Eq. 11 fails on 8 pixels."""
    x, weights = episode(count, 600, episodes=4)
    held_out, sides = episode(300, 300, episodes=4, noise_seed=1)
    assert balanced_accuracy(ratio(fit_episodes(x, weights), held_out), sides) > 0.98
    if count == 8:
        plain = fit_episodes(x, weights, prior_strength=1e-6, variance_floor=1e-6)
        assert balanced_accuracy(ratio(plain, held_out), sides) < 0.7


def test_constant_channels_do_not_count():
    x, weights = episode(60, 300, dead=DIM // 2)
    alive = x[..., DIM // 2 :].contiguous()
    one, two = (ratio(fit_episodes(features, weights), features) for features in (x, alive))
    close(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_the_unit_of_the_features_does_not_matter(factor):
    x, weights = episode(40, 200)
    before, after = (fit_episodes(x * f, weights) for f in (1.0, factor))
    close(ratio(before, x), ratio(after, x * factor), rtol=1e-3, atol=1e-2)
    # The densities themselves have units, which is why their quotient (Eq. 13) is no posterior.
    shift = before.log_density(x) - after.log_density(x * factor)
    close(shift, torch.full_like(shift, DIM * np.log(factor)), rtol=1e-3, atol=1e-2)


def test_the_same_in_every_batch():
    x, weights = episode(40, 100, episodes=3)
    together = fit_episodes(x, weights)
    check_same(together, fit_episodes(x, weights), 0)
    backwards = fit_episodes(x.flip(0), weights.flip(0))
    check_same(together, EpisodicMixture(*(part.flip(0) for part in backwards)), 1e-5)
    alone = fit_episodes(x[1:2], weights[1:2])
    close(alone.means[0], together.means[1], rtol=1e-4, atol=1e-4)


def test_neither_order_nor_pixels_without_weight_matter():
    x, weights = episode(60, 200)
    order = torch.randperm(260)
    whole = fit_episodes(x, weights)
    check_same(whole, fit_episodes(x[:, order], weights[..., order]), 1e-4)
    padded = torch.cat([x, 100 * torch.rand(1, 50, DIM)], 1)
    check_same(whole, fit_episodes(padded, F.pad(weights, (0, 50))), 1e-4)
    zeros = fit_episodes(torch.cat([x, torch.zeros(1, 50, DIM)], 1), F.pad(weights, (0, 50)))
    check_same(zeros, fit_episodes(padded, F.pad(weights, (0, 50))), 1e-6)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_padding_may_hold_anything(value, covariance):
    x, weights = torch.randn(2, 60, 4), torch.rand(2, 2, 60)
    weights[:, :, 50:] = 0
    expected = fit_episodes(x, weights, covariance=covariance)
    x[:, 50:] = value
    found = fit_episodes(x, weights, covariance=covariance)
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        assert torch.equal(one, other), name
    density = found.log_density(x)
    assert density[:, :50].isfinite().all()
    assert not density[:, 50:].isfinite().any()
    weights[0] = 0  # nothing to fit in this episode
    x[0, 0] = value
    for one in fit_episodes(x, weights, covariance=covariance)[:-1]:
        assert one.isfinite().all()


@pytest.mark.parametrize("floor", [0.1, 1e-6])
def test_float32_of_features_far_from_the_origin(floor):
    x = 100 + 0.1 * torch.randn(2, 200, 16)
    weights = torch.rand(2, 2, 200)
    state = fit_episodes(x, weights, variance_floor=floor)
    double = EpisodicMixture(*(part.double() for part in state))
    close(state.log_density(x).double(), double.log_density(x.double()), rtol=1e-6, atol=2e-3)


def test_the_objective_grows():
    x, weights = (tensor.double() for tensor in episode(80, 200))
    weights = weights * torch.rand(weights.shape)  # soft masks
    share = weights.sum(1).clamp_max(1)
    share = (share / share.sum(1, keepdim=True))[:, None]

    def objective(iterations: int) -> Tensor:
        state = fit_episodes(x, weights, iterations=iterations)
        z = state.standardize(x)
        parts = state.component_log_density(with_squares(z)) + state.log_weights[:, None]
        likelihood = (parts.logsumexp(-1).transpose(1, 2) * weights).sum(-1)
        prior, variance = share @ (z - share @ z).square(), state.covariances
        return likelihood - 5 * (variance.log() + prior[:, None] / variance).sum((2, 3))

    steps = torch.stack([objective(i) for i in range(8)]).diff(dim=0)
    assert (steps > -1e-3).all(), steps  # the spare weight costs a little of the likelihood
    assert (steps[0] > 0).any()


def test_finds_what_scikit_learn_finds():
    """Without prior and floor, from the same start, it is plain EM."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(3, 4, generator=generator)
    x = (centres[torch.arange(400) % 3] + torch.randn(400, 4, generator=generator)).double()
    start, ours = (
        fit_episodes(x[None], torch.ones(1, 1, 400), 3, iterations, 1e-9, 1e-9)
        for iterations in (0, 60)
    )
    means = (start.means[0, 0] * start.scale[0] + start.centre[0]).numpy()
    exactly = {"tol": 1e-9, "max_iter": 500, "reg_covar": 0}
    reference = Reference(3, covariance_type="diag", means_init=means, **exactly).fit(x.numpy())
    assert ours.log_density(x[None]).mean() == pytest.approx(reference.score(x.numpy()), abs=1e-4)


def test_full_covariance_sees_correlation():
    torch.manual_seed(0)
    noise = torch.randn(2, 400, 1).expand(2, 400, 2) + 0.2 * torch.randn(2, 400, 2)
    noise[:, 200:, 1] *= -1  # the classes differ in nothing but the sign of the correlation
    weights = torch.zeros(2, 2, 400)
    weights[:, 0, :200] = weights[:, 1, 200:] = 1
    diagonal, full = (
        balanced_accuracy(ratio(fit_episodes(noise, weights, 1, covariance=kind), noise), weights)
        for kind in ("diagonal", "full")
    )
    assert full > 0.85
    assert diagonal < 0.65


def test_half_precision_is_not_used():
    x, weights = episode(40, 100)
    with torch.autocast("cpu", torch.bfloat16):
        density = fit_episodes(x, weights).log_density(x)
    assert density.dtype == torch.float32
    assert torch.equal(density, fit_episodes(x, weights).log_density(x))


def test_the_start_is_three_steps_of_k_means_from_farthest_points():
    """Of distances that are weighted, in as many components as there are pixels for."""
    x, weights = torch.randn(1, 160, 2).double(), torch.rand(1, 1, 160).double() ** 3
    start = fit_episodes(x, weights, components=3, iterations=0)
    z, w = start.standardize(x)[0], weights[0, 0]
    assert 32 < w.sum() < 48  # for two components of three
    means = [z[((z - w @ z / w.sum()) ** 2).sum(1).argmin()]]
    means.append(z[(w * ((z - means[0]) ** 2).sum(1)).argmax()])
    for _ in range(3):
        owner = torch.cdist(z, torch.stack(means)).argmin(1)
        means = [w[owner == m] @ z[owner == m] / w[owner == m].sum() for m in range(2)]
    close(start.means[0, 0, :2], torch.stack(means))


def test_em_stops_early_only_where_it_has_converged(monkeypatch):
    x, weights = torch.randn(1, 200, 3), torch.rand(1, 2, 200)
    stopped = fit_episodes(x, weights, iterations=200)
    monkeypatch.setattr(episodic, "_SETTLED", -1.0)
    check_same(stopped, fit_episodes(x, weights, iterations=200), 1e-3)


def test_a_component_that_has_lost_its_pixels_gets_the_pooled_variance():
    x = torch.cat([torch.randn(1, 40, 2), torch.tensor([[[90.0, 90]]])], 1)
    weights = torch.ones(1, 1, 41)
    weights[..., 40] = 0.5  # all that the second component has, less than a pixel
    mixture = fit_episodes(x, weights, components=2)
    share = weights / weights.sum()
    pooled = (share @ (x - share @ x).square() / mixture.scale.square())[0, 0]
    lost = mixture.means[0, 0].sum(1).argmax()
    close(mixture.standardize(x)[0, 40], mixture.means[0, 0, lost])
    close(mixture.covariances[0, 0, lost], pooled)


def test_a_pixel_of_two_classes_counts_once_in_the_pooled_mean():
    x, weights = torch.randn(1, 40, 3), torch.ones(1, 2, 40)
    weights[:, 1, 20:] = 0
    close(fit_episodes(x, weights).centre[0], x[0].mean(0, keepdim=True))


def test_a_class_without_pixels_lies_in_the_pooled_mean():
    x, weights = episode(0, 100)
    assert (fit_episodes(x, weights).means[0, 0] == 0).all()


def test_the_defaults_are_those_of_cgmgm():
    x, weights = episode(60, 200)
    options = asdict(EpisodicMixtureOptions())
    names = ("components", "iterations", "prior_strength", "variance_floor", "covariance")
    given = {name: options[name] for name in names}
    check_same(fit_episodes(x, weights), fit_episodes(x, weights, **given), 0)


def test_no_gradient_in_the_fit_but_in_the_density():
    x, weights = episode(40, 100)
    mixture = fit_episodes(x.requires_grad_(), weights)
    assert not any(tensor.requires_grad for tensor in mixture)
    ratio(mixture, x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_batched_densities_are_those_of_each_episode():
    x, means = torch.randn(3, 7, 5).double(), torch.randn(3, 4, 5).double()
    variances = torch.rand(3, 4, 5).double() + 0.1
    each = [diagonal_log_density(*parts) for parts in zip(x, means, variances, strict=True)]
    close(pairs_log_density(with_squares(x), means, variances), torch.stack(each))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.zeros(10, DIM)}, r"B x N x D and weights B x C x N; got \(10, 256\)"),
        ({"components": 0}, "components is 0; it must be at least 1"),
        ({"variance_floor": 0}, "variance_floor is 0; it must be positive"),
        ({"covariance": "tied"}, "covariance is 'tied'; it must be one of diagonal, full"),
    ],
)
def test_wrong_arguments(arguments, words):
    x, weights = episode(5, 5)
    with pytest.raises(GenSegError, match=words):
        fit_episodes(**{"x": x, "weights": weights, **arguments})
