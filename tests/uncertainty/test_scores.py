import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy
from sklearn.covariance import EmpiricalCovariance

from lightning_genseg.errors import GenSegError
from lightning_genseg.metrics.anomaly import score_histogram
from lightning_genseg.uncertainty import (
    AnomalyScores,
    Mahalanobis,
    StandardizedMaxLogit,
    conformal_image_threshold,
    conformal_pixel_threshold,
    density_score,
    image_quantile,
    logit_score,
)
from lightning_genseg.uncertainty.conformal import conformal_rank
from lightning_genseg.uncertainty.scores import DENSITY_SCORES, FITTED_SCORES


def test_scores_of_logits_agree_with_scipy():
    logits = 5 * torch.randn(2, 4, 3, 5)
    z = logits.double().numpy()
    expected = {
        "msp": 1 - softmax(z, 1).max(1),
        "entropy": entropy(softmax(z, 1), axis=1),
        "max_logit": -z.max(1),
        "energy": -logsumexp(z, 1),
    }
    for name, value in expected.items():
        score = logit_score(name, logits)
        assert score.shape == (2, 1, 3, 5)
        np.testing.assert_allclose(score[:, 0], value, rtol=2e-4, atol=1e-6, err_msg=name)


def test_scores_of_densities_agree_with_scipy():
    density = 5 * torch.randn(2, 4, 3, 5) - 1000
    z = density.double().numpy()
    marginal = logsumexp(z, 1) - np.log(4)
    expected = {
        "density": -z.max(1),
        "marginal_density": -marginal,
        "relative_density": z.mean(1) - z.max(1),
        "half_relative_density": z.mean(1) / 2 - marginal,
    }
    assert set(expected) == set(DENSITY_SCORES)
    for name, value in expected.items():
        score = AnomalyScores()(name, {"log_density": density})
        assert score.shape == (2, 1, 3, 5)
        np.testing.assert_allclose(score[:, 0], value, rtol=1e-5, atol=2e-4, err_msg=name)


def test_relative_scores_forgive_what_is_improbable_under_everything():
    density = torch.tensor([[0.0, -50.0, -60.0], [-100.0, -150.0, -160.0]]).view(2, 3, 1, 1)
    scores = {name: density_score(name, density).flatten() for name in DENSITY_SCORES}
    rise = {name: score.diff().item() for name, score in scores.items()}
    assert rise == pytest.approx(
        {
            "density": 100,
            "marginal_density": 100,
            "half_relative_density": 50,
            "relative_density": 0,
        },
        abs=1e-4,
    )


def test_confident_pixels_are_still_told_apart():
    logits = torch.tensor([[20.0, 0.0], [25.0, 0.0]]).view(2, 2, 1, 1)
    unsure, sure = logit_score("msp", logits.bfloat16()).flatten()
    assert 0 < sure < unsure < 1e-8


def test_sml_standardises_by_the_predicted_class():
    logits = torch.randn(3, 4, 20, 21) + torch.tensor([0.0, 0.5, 1.0, -30.0]).view(4, 1, 1)
    score = StandardizedMaxLogit()
    for part in logits.split(1):
        score.observe(part)
    score.finish()
    rows = logits.movedim(1, -1).reshape(-1, 4).numpy()
    largest, predicted = rows.max(1), rows.argmax(1)
    expected = np.empty(len(rows))
    for c in range(3):
        mine = largest[predicted == c]
        expected[predicted == c] = -(mine - mine.mean()) / mine.std()
    got = score(logits).movedim(1, -1).flatten().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # The class that was never predicted has the statistics of all.
    assert score.average[3] == pytest.approx(largest.mean(), rel=1e-5)


def test_sml_takes_no_deviation_of_a_few_pixels():
    logits = torch.randn(1, 3, 20, 20)
    logits[0, 2] = -30
    logits[0, 2, 0, :2] = 20
    score = StandardizedMaxLogit()
    score.observe(logits)
    score.finish()
    logits[0, 2, 0, 0] = 20.1
    assert score(logits).abs().amax() < 100  # by the deviation of two equal numbers it was 1e5


def test_sml_of_constant_logits_at_a_hundred_pixels_each():
    """Which are enough for statistics of their own, and leave no deviation."""
    scores, logits = StandardizedMaxLogit(), torch.zeros(1, 2, 10, 20)
    logits[:, 0, :, :10], logits[:, 1, :, 10:] = 5.1, 3.3
    scores.observe(logits)
    scores.finish()
    torch.testing.assert_close(scores.average, torch.tensor([5.1, 3.3]))
    assert scores(logits).isfinite().all()


def test_mahalanobis_agrees_with_scikit_learn():
    labels = torch.randint(3, (2, 8, 9))
    labels[0, 0] = 255
    centres = torch.randn(3, 6)
    scales = torch.tensor([1.0, 0.1, 2.0, 1.0, 0.0, 3.0])  # one feature is constant within classes
    features = (centres[labels % 3] + scales * torch.randn(2, 8, 9, 6)).movedim(-1, 1)
    score = Mahalanobis()
    for x, y in zip(features.split(1), labels.split(1), strict=True):
        score.observe(x, y, 4)  # class 3 never occurs
    score.finish()
    x, y = features.movedim(1, -1)[labels < 3].double().numpy(), labels[labels < 3].numpy()
    keep = [0, 1, 2, 3, 5]
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    covariance = EmpiricalCovariance(assume_centered=True).fit((x - means[y])[:, keep])
    distances = [covariance.mahalanobis((x - m)[:, keep]) for m in means]
    got = score(features)[:, 0][labels < 3]
    # The constant feature differs between classes, so that the own class is the nearest.
    expected = np.stack(distances, 1)[np.arange(len(y)), y]
    np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-2)
    assert score.means.shape == (3, 6)
    everything = EmpiricalCovariance().fit(x).mahalanobis(x)
    difference = (score(features) - score(features, relative=True))[:, 0][labels < 3]
    np.testing.assert_allclose(difference, everything, rtol=1e-2, atol=1e-2)


def test_mahalanobis_ignores_every_label_that_is_no_class():
    features, labels = torch.randn(1, 4, 6, 6), torch.randint(-1, 4, (1, 6, 6))  # of 3 classes
    one, other = Mahalanobis(), Mahalanobis()
    one.observe(features, labels, 3)
    other.observe(features, labels.masked_fill((labels < 0) | (labels > 2), 255), 3)
    for scores in (one, other):
        scores.finish()
    torch.testing.assert_close(one(features), other(features))
    with pytest.raises(GenSegError, match="no labelled training pixel was seen"):
        one.finish()  # what was observed is used up


def test_mahalanobis_far_from_the_origin():
    labels = torch.randint(3, (1, 20, 20))
    features = torch.randn(3, 5)[labels].movedim(-1, 1) + torch.randn(1, 5, 20, 20)
    distances = []
    for shift in (0, 1000):
        score = Mahalanobis()
        score.observe(features + shift, labels, 3)
        score.finish()
        distances.append(score(features + shift))
    torch.testing.assert_close(distances[1], distances[0], rtol=1e-2, atol=1e-2)


def test_what_is_not_fitted_or_not_there_says_what_to_do():
    scores, outputs = AnomalyScores(), {"logits": torch.randn(1, 3, 4, 4)}
    with pytest.raises(ValueError, match="run `genseg calibrate"):
        scores("sml", outputs)
    with pytest.raises(ValueError, match="no class densities: choose one of msp, entropy"):
        scores("density", outputs)
    with pytest.raises(ValueError, match="name is 'foo'; it must be one of msp, entropy"):
        scores("foo", outputs)
    with pytest.raises(ValueError, match="name is 'density'; it must be one of msp, entropy"):
        logit_score("density", outputs["logits"])
    with pytest.raises(ValueError, match="no training pixel"):
        scores.sml.finish()
    with pytest.raises(ValueError, match="no labelled training pixel"):
        scores.mahalanobis.finish()


def test_the_fitted_state_travels():
    scores, outputs = AnomalyScores(), {"logits": torch.randn(1, 3, 4, 4)}
    outputs["features"] = torch.randn(1, 5, 4, 4)
    assert scores.fitted_state() == {}
    scores.sml.observe(outputs["logits"])
    scores.sml.finish()
    scores.mahalanobis.observe(outputs["features"], torch.randint(3, (1, 4, 4)), 3)
    scores.mahalanobis.finish()
    scores.thresholds["msp"] = conformal_image_threshold([0.1] * 20, 0.05, 0.1)
    scores.inference, scores.ranges = {"flip": True}, {"msp": (0.0, 0.5)}
    other = AnomalyScores()
    other.load_fitted_state(scores.fitted_state())
    for name in FITTED_SCORES:
        torch.testing.assert_close(other(name, outputs), scores(name, outputs))
    assert other.thresholds == scores.thresholds
    assert (other.inference, other.ranges) == (scores.inference, scores.ranges)
    assert not other.state_dict()  # a checkpoint's weights stay those of the network
    other.load_fitted_state({})  # of another checkpoint
    assert not any(other.is_fitted(name) for name in FITTED_SCORES)
    with pytest.raises(GenSegError, match=r"statistics 'sml\.observe' that no anomaly score knows"):
        other.load_fitted_state({"statistics": {"sml.observe": torch.zeros(1)}})


def test_the_pixel_threshold_keeps_its_promise():
    kept = []
    for _ in range(100):
        held_out, fresh = torch.randn(99), torch.randn(1000)
        threshold = conformal_pixel_threshold(score_histogram(held_out), 0.1)
        kept.append((fresh > threshold.value).float().mean())
    # Over draws of the held-out pixels the mean rate is at most 0.1, and not far below.
    assert 0.085 < torch.stack(kept).mean() < 0.11


def test_the_image_threshold_keeps_its_promise_although_pixels_depend_on_each_other():
    def images(count):  # each has its own shift: pixels of an image are far from exchangeable
        return torch.randn(count, 1) + 0.3 * torch.randn(count, 500)

    broken_image, broken_pixel = [], []
    for _ in range(50):
        held_out, fresh = images(39), images(50)
        of_images = conformal_image_threshold(
            [image_quantile(image, 0.05) for image in held_out], 0.05, 0.1
        )
        of_pixels = conformal_pixel_threshold(score_histogram(held_out), 0.05)
        for broken, threshold in ((broken_image, of_images), (broken_pixel, of_pixels)):
            share = (fresh > threshold.value).float().mean(1)
            broken.append((share > 0.05).float().mean())
    assert 0.05 < torch.stack(broken_image).mean() < 0.12  # at most a risk of 0.1, not much less
    assert torch.stack(broken_pixel).mean() > 0.12  # which the pixel threshold never promised


def test_thresholds_are_the_smallest_that_keep_the_promise():
    scores = torch.arange(1.0, 100)[torch.randperm(99)]
    pixel = conformal_pixel_threshold(score_histogram(scores), 0.1)
    assert 90 <= pixel.value < 91
    assert conformal_image_threshold(scores.tolist(), 0.05, 0.1).value == 90


def test_which_of_the_sorted_scores_is_taken_whatever_rounding_says():
    for count, percent in product(range(100, 130), range(1, 100)):
        exact = math.ceil((count + 1) * Fraction(100 - percent, 100))
        assert conformal_rank(count, percent / 100, "risk", "images") == exact


def test_a_promise_in_words():
    of_images = conformal_image_threshold([0.1] * 20, 0.05, 0.2)
    assert of_images.promise() == (
        "In a new image of the known world at most 5.00% of the known pixels lie above it, with "
        "probability 80.00%; found on 20 held-out images"
    )
    of_pixels = conformal_pixel_threshold(score_histogram(torch.rand(50)), 0.05)
    assert of_pixels.promise() == (
        "Of new images at most 5.00% of the known pixels lie above it; found on 50 held-out pixels"
    )


def test_image_quantile_lets_no_more_pass():
    scores = torch.randn(20, 30)
    for rate in (0.01, 0.05, 0.5):
        for some in (scores, scores[0, :7]):
            assert (some > image_quantile(some, rate)).float().mean() <= rate
    assert image_quantile(torch.ones(1), 0.05) == 1


def test_too_few_and_wrong_shares_are_refused():
    with pytest.raises(ValueError, match=r"8 held-out images are too few .* use at least 9"):
        conformal_image_threshold([0.0] * 8, 0.05, 0.1)
    assert conformal_image_threshold([0.0] * 9, 0.05, 0.1).samples == 9
    with pytest.raises(ValueError, match="known pixels are too few"):
        conformal_pixel_threshold(score_histogram(torch.rand(5)), 0.01)
    with pytest.raises(ValueError, match="false_positive_rate is 1"):
        conformal_pixel_threshold(score_histogram(torch.rand(5)), 1)
    with pytest.raises(ValueError, match="risk is 0"):
        conformal_image_threshold([0.0] * 9, 0.05, 0)
