"""E- and M-steps against closed forms, and `fit` against scikit-learn."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture as SklearnMixture

from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import (
    GaussianMixture,
    Moments,
    e_step,
    estimate,
    fit,
    m_step,
    sinkhorn,
)
from lightning_genseg.mixtures.em import k_means_plus_plus
from lightning_genseg.mixtures.log_density import with_squares

close = torch.testing.assert_close
BOTH = pytest.mark.parametrize("covariance", ["diagonal", "full"])


def estimate_of(x, groups, num_groups, covariance="diagonal"):
    """Moments by plain loops, and what they say."""
    full = covariance == "full"
    moments = Moments.zeros(num_groups, x.shape[1], full, x.device)
    for g in range(num_groups):
        own = x[groups == g].double()
        moments.counts[g] = len(own)
        moments.first[g] = own.sum(0)
        moments.second[g] = own.T @ own if full else own.square().sum(0)
    return moments.estimate()


def blobs(counts=(120, 80), dim=3, spread=6.0):
    double = {"dtype": torch.float64}
    parts = [torch.randn(n, dim, **double) @ torch.randn(dim, dim, **double) for n in counts]
    return torch.cat([part + spread * torch.randn(dim, **double) for part in parts])


def spread_of(mixture):
    """Covariances or variances, whichever it has."""
    return mixture.covariances if mixture.covariance == "full" else mixture.variances


# --- E-step ----------------------------------------------------------------------------------


def test_em_is_the_softmax_over_the_own_components():
    mixture = GaussianMixture(3, 4, 2)
    mixture.log_weights.copy_(torch.randn(3, 4).log_softmax(1))
    x, labels = torch.randn(20, 2), torch.randint(3, (20,))
    log_q = e_step(mixture, mixture.own_log_density(x, labels), labels, "em")
    normal = torch.distributions.Normal(mixture.means[labels], 1.0)
    density = normal.log_prob(x[:, None]).sum(2) + mixture.log_weights[labels]
    close(log_q.exp(), density.softmax(1))


@pytest.mark.parametrize(("assignment", "shares"), [("em", (0.9, 0.1)), ("sinkhorn", (0.5, 0.5))])
def test_em_uses_the_weights_and_sinkhorn_equal_shares_of_what_is_labelled(assignment, shares):
    mixture = GaussianMixture(3, 2, 2)
    mixture.log_weights[0] = torch.tensor([0.9, 0.1]).log()
    mixture.means[0] = 0
    x, labels = torch.randn(20, 2), torch.arange(20) % 3
    density, valid = mixture.own_log_density(x, labels), torch.arange(20) % 4 > 0
    log_q = e_step(mixture, density, torch.where(valid, labels, 255), assignment)
    close(log_q[valid], e_step(mixture, density[valid], labels[valid], assignment))
    close(log_q[valid & (labels == 0)].exp(), torch.tensor([shares] * 5))


def test_the_defaults_of_sinkhorn_are_those_of_the_e_step():
    mixture = GaussianMixture(3, 4, 2)
    own, labels = torch.randn(20, 4), torch.arange(20) % 3
    close(e_step(mixture, own, labels), sinkhorn(own, labels, 3))


# --- M-step ----------------------------------------------------------------------------------


@BOTH
def test_m_step_is_the_weighted_mean_and_covariance(covariance):
    mixture = GaussianMixture(2, 2, 3, covariance).double()
    x, groups = torch.randn(80, 3, dtype=torch.float64), torch.randint(4, (80,))
    m_step(mixture, estimate_of(x, groups, 4, covariance), variance_floor=0.02)
    for g in range(4):
        own = x[groups == g]
        expected = torch.from_numpy(np.cov(own.numpy().T, bias=True)) + 0.02 * torch.eye(3)
        expected = expected if covariance == "full" else expected.diagonal()
        close(mixture.means.flatten(0, 1)[g], own.mean(0))
        close(spread_of(mixture).flatten(0, 1)[g], expected)


@BOTH
def test_shrinkage_mixes_in_the_mean_covariance(covariance):
    plain, shrunk = (GaussianMixture(2, 2, 3, covariance).double() for _ in range(2))
    x, groups = (
        torch.randn(80, 3, dtype=torch.float64),
        torch.randint(3, (80,)),
    )  # the last is empty
    estimate, before = estimate_of(x, groups, 4, covariance), spread_of(shrunk).flatten(0, 1)[3]
    m_step(plain, estimate)
    m_step(shrunk, estimate, shrinkage=0.25)
    own, found = (spread_of(mixture).flatten(0, 1) for mixture in (plain, shrunk))
    close(found[:3], 0.75 * own[:3] + 0.25 * own[:3].mean(0))
    close(found[3], before)
    m_step(shrunk, estimate, shrinkage=1.0, present=torch.tensor([True, False]))
    close(spread_of(shrunk).flatten(0, 1)[:3], own[:3].mean(0).expand(3, *own.shape[1:]))


@BOTH
def test_unit_means_and_deviations_from_them(covariance):
    # GMMSeg's M-step: mean = normalised sum, covariance around that mean, floor 1e-2.
    mixture = GaussianMixture(1, 1, 3, covariance, unit_means=True).double()
    x = F.normalize(torch.randn(50, 3, dtype=torch.float64) + 1, dim=1)
    m_step(mixture, estimate_of(x, torch.zeros(50), 1, covariance))
    mean = F.normalize(x.sum(0), dim=0)
    expected = (x - mean).T @ (x - mean) / 50 + 1e-2 * torch.eye(3)
    close(mixture.means[0, 0], mean)
    close(spread_of(mixture)[0, 0], expected if covariance == "full" else expected.diagonal())


@BOTH
def test_momentum_mixes_old_and_new(covariance):
    mixture, fresh = (GaussianMixture(2, 2, 3, covariance).double() for _ in range(2))
    old_means, old_variances = mixture.means.clone(), mixture.variances.clone()
    estimate = estimate_of(torch.randn(80, 3), torch.arange(80) % 4, 4, covariance)
    m_step(fresh, estimate)
    m_step(mixture, estimate, mean_momentum=0.9, variance_momentum=0.75)
    close(mixture.means, 0.9 * old_means + 0.1 * fresh.means)
    if covariance == "full":
        close(mixture.variances, 0.75 * old_variances + 0.25 * fresh.variances)
    else:  # as GMMSeg's code, of deviations
        deviations = 0.75 * old_variances.sqrt() + 0.25 * fresh.variances.sqrt()
        close(mixture.variances.sqrt(), deviations)


@BOTH
def test_an_empty_component_and_an_absent_class_are_untouched_all_in_place(covariance):
    mixture = GaussianMixture(3, 2, 2, covariance)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    places = {name: value.data_ptr() for name, value in mixture.named_buffers()}
    # Groups 0, 2, 4, 5 have features; class 2 (groups 4, 5) is not present.
    m_step(
        mixture,
        estimate_of(torch.randn(8, 2), torch.tensor([0, 0, 0, 2, 2, 4, 5, 5]), 6, covariance),
        present=torch.tensor([True, True, False]),
        weights=torch.rand(3, 2) + 0.1,
    )
    assert places == {name: value.data_ptr() for name, value in mixture.named_buffers()}
    for name in set(before) - {"log_weights"}:
        now = getattr(mixture, name)
        for c, m in ((0, 1), (1, 1), (2, 0), (2, 1)):
            close(now[c, m], before[name][c, m], rtol=0, atol=0)
        for c, m in ((0, 0), (1, 0)):
            assert not torch.equal(now[c, m], before[name][c, m])
    close(mixture.log_weights[2], before["log_weights"][2], rtol=0, atol=0)
    close(mixture.log_weights.exp().sum(1), torch.ones(3))


@BOTH
def test_identical_pixels_leave_the_floor(covariance):
    mixture = GaussianMixture(1, 1, 4, covariance, unit_means=True)
    x = F.normalize(torch.randn(4), dim=0).expand(100, 4)
    m_step(mixture, estimate_of(x, torch.zeros(100), 1, covariance))
    close(mixture.variances, torch.full((1, 1, 4), 1e-2))
    assert mixture.log_density(x).isfinite().all()


def test_em_refuses_a_mixture_that_learns_by_gradient():
    with pytest.raises(GenSegError, match="EM would undo it"):
        m_step(GaussianMixture(1, 1, 2, trainable=True), estimate_of(torch.ones(1, 2), 0, 1))


@pytest.mark.parametrize("full", [False, True])
def test_estimates_are_weighted_means_and_covariances(full):
    """Of one set of pixels and of a batch of two, with groups of one and of two dimensions."""
    x, shares = torch.randn(2, 60, 3, dtype=torch.float64), torch.rand(2, 4, 2, 60).double()
    shares[0, 0] = 0  # an empty group
    counts, means, spreads = estimate(with_squares(x), shares, full)
    assert counts.shape == (2, 4, 2)
    for b, c, m in np.ndindex(2, 4, 2):
        expected = np.zeros((3, 3))
        if counts[b, c, m] > 0:
            expected = np.cov(x[b].numpy().T, bias=True, aweights=shares[b, c, m].numpy())
        close(counts[b, c, m], shares[b, c, m].sum())
        close(means[b, c, m] * counts[b, c, m], shares[b, c, m] @ x[b])
        expected = torch.from_numpy(expected)
        close(spreads[b, c, m], expected if full else expected.diagonal())
    alone = estimate(with_squares(x[1]), shares[1, 2], full)
    for one, batch in zip(alone, (counts, means, spreads), strict=True):
        close(one, batch[1, 2])


# --- fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("covariance", "theirs"), [("diagonal", "diag"), ("full", "full")])
def test_fit_equals_scikit_learn(covariance, theirs):
    x = torch.cat([blobs(), blobs((90,))])
    means = x[[0, 130, 250]]
    matrix = np.cov(x.numpy().T, bias=True) + 1e-6 * np.eye(3)
    precision = 1 / matrix.diagonal() if covariance == "diagonal" else np.linalg.inv(matrix)
    start = {"means_init": means.numpy(), "weights_init": np.full(3, 1 / 3)}
    start["precisions_init"] = np.broadcast_to(precision, (3, *precision.shape))
    stop = {"reg_covar": 1e-6, "tol": 1e-5, "max_iter": 500}
    reference = SklearnMixture(3, covariance_type=theirs, **start, **stop).fit(x.numpy())
    assert reference.converged_
    assert reference.n_iter_ > 5
    ours = fit(x, None, 1, 3, covariance, means=means[None], tolerance=1e-5, iterations=500)
    close(ours.means[0], torch.from_numpy(reference.means_))
    close(spread_of(ours)[0], torch.from_numpy(reference.covariances_))
    close(ours.log_weights[0].exp(), torch.from_numpy(reference.weights_))
    likelihood = ours.log_density(x, "logsumexp").mean().item()
    assert likelihood == pytest.approx(reference.score(x.numpy()), abs=1e-8)
    assert likelihood == pytest.approx(reference.lower_bound_, abs=1e-4)


def test_fit_treats_every_class_alone():
    x, labels = blobs((100, 100, 100)), torch.arange(300) % 3
    labels[:10] = 255
    means = torch.stack([x[labels == c][:2] for c in range(3)])
    together = fit(x, labels, 3, 2, means=means, tolerance=0, iterations=20)
    for c in range(3):
        alone = fit(x[labels == c], None, 1, 2, means=means[[c]], tolerance=0, iterations=20)
        for name, value in alone.state_dict().items():
            close(together.state_dict()[name][c], value[0])


@pytest.mark.parametrize("assignment", ["em", "sinkhorn"])
def test_fit_finds_separate_groups(assignment):
    centres = 20 * torch.eye(4).repeat(2, 1)[:6].view(2, 3, 4)
    centres[1] *= -1
    x = (centres[:, :, None] + torch.randn(2, 3, 50, 4)).flatten(0, 2)
    labels = torch.arange(2).repeat_interleave(150)
    mixture = fit(x, labels, 2, 3, assignment=assignment)
    for c in range(2):
        distance = torch.cdist(centres[c].double(), mixture.means[c])
        assert (distance.amin(0) < 1).all()
        assert distance.argmin(0).unique().numel() == 3
    close(mixture.variances, torch.ones(2, 3, 4).double(), rtol=0, atol=0.7)
    assert (mixture.log_density(x).argmax(1) == labels).all()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_fit_is_of_float64_and_takes_float32(covariance):
    x = torch.randn(60, 3) + 50
    labels = torch.arange(60) % 2
    mixture = fit(x, labels, num_classes=2, components=2, covariance=covariance)
    densities = mixture.log_density(x), mixture.own_log_density(x, labels)
    exact = mixture.log_density(x.double()), mixture.own_log_density(x.double(), labels)
    for single, double in zip(densities, exact, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)


def test_seeds_are_drawn_by_their_squared_distance():
    # 40 000 classes alike, of these four pixels.
    x = torch.tensor([[0.0], [2], [3], [4]])
    index = torch.arange(160_000) // 4
    generator = torch.Generator().manual_seed(0)
    seeds = k_means_plus_plus(x.repeat(40_000, 1), index, 40_000, 2, generator).squeeze(2)
    for first in x[:, 0]:
        drawn = seeds[seeds[:, 0] == first, 1]
        assert len(drawn) == pytest.approx(10_000, abs=500)
        expected = (x - first).square() / (x - first).square().sum()
        close((drawn == x).float().mean(1), expected[:, 0], rtol=0, atol=0.02)


def test_by_default_fit_goes_on_until_it_gains_nothing():
    x = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 2])
    soon, late = (fit(x, components=3, **stop) for stop in ({}, {"tolerance": 1e-6}))
    likelihood = [mixture.log_density(x, "logsumexp").mean() for mixture in (soon, late)]
    assert likelihood[1] - likelihood[0] < 0.02


def test_a_component_that_gets_no_pixel_keeps_some_weight():
    mixture = fit(torch.randn(50, 1), components=2, means=torch.tensor([[[0.0], [1e3]]]))
    assert mixture.log_weights.isfinite().all()


def test_fit_is_deterministic_in_its_seed():
    x = torch.randn(100, 2)
    first, same, other = (fit(x, components=4, seed=s, iterations=2) for s in (1, 1, 2))
    assert torch.equal(first.means, same.means)
    assert not torch.allclose(first.means, other.means)


@pytest.mark.parametrize("unit_means", [False, True])
def test_fit_of_classes_with_no_one_and_few_pixels(unit_means):
    x = F.normalize(torch.randn(5, 3), dim=1)
    labels = torch.tensor([0, 1, 1, 255, 7])
    mixture = fit(x, labels, 4, 5, variance_floor=1e-2, unit_means=unit_means)
    assert mixture.fitted.tolist() == [[True] * 5] * 2 + [[False] * 5] * 2
    assert all(value.isfinite().all() for value in mixture.state_dict().values())
    close(mixture.means[0], x[:1].double().expand(5, 3))
    # Absent: still the Gaussians it started with, and equal weights.
    close(mixture.variances[2:], torch.full((2, 5, 3), 1 / 3 if unit_means else 1.0).double())
    close(mixture.log_weights[2:].exp(), torch.full((2, 5), 0.2).double())
    assert mixture.log_density(x).isfinite().all()


@pytest.mark.parametrize("dim", [1, 512])
@pytest.mark.parametrize("unit_means", [False, True])
def test_fit_of_extreme_sizes(dim, unit_means):
    x = torch.randn(60, dim)
    x = F.normalize(x, dim=1) if unit_means else x
    mixture = fit(x, components=2, variance_floor=1e-2, unit_means=unit_means)
    assert mixture.log_density(x).isfinite().all()
    assert (mixture.variances >= 1e-2).all()
    same = fit(torch.ones(20, dim), components=3)
    close(same.means, torch.ones(1, 3, dim).double())
    assert same.log_density(torch.ones(1, dim)).isfinite().all()


@pytest.mark.parametrize(
    ("x", "arguments", "words"),
    [
        (torch.zeros(0, 2), {}, "N x D features with N > 0"),
        (torch.zeros(2, 3, 4), {}, "N x D features"),
        (torch.zeros(4, 2), {"labels": torch.zeros(3)}, "a label per feature; got 4 and"),
        (torch.zeros(4, 2), {"labels": torch.full((4,), 255)}, "nothing to fit"),
        (torch.tensor([[0.0, torch.nan], [1, 2]]), {}, "1 of 2 features are NaN .*; remove them"),
        (torch.tensor([[0.0, torch.inf], [1, 2]]), {}, "1 of 2 features are NaN .*; remove them"),
        (torch.zeros(4, 2), {"assignment": "hard"}, "assignment is 'hard'; .* one of sinkhorn, em"),
        (
            torch.ones(4, 2),
            {"means": torch.zeros(5, 2)},
            r"means is \(5, 2\) and must be C x M",
        ),
        (torch.zeros(4, 2), {"components": 0}, "components is 0; it must be at least 1"),
    ],
)
def test_fit_refuses_what_it_cannot_use(x, arguments, words):
    with pytest.raises(GenSegError, match=words):
        fit(x, **{"num_classes": 2, **arguments})
