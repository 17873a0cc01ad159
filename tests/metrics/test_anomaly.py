import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from lightning_genseg.metrics import (
    AnomalyAUROC,
    AnomalyAveragePrecision,
    AnomalyFPR,
    AnomalyMetrics,
)
from lightning_genseg.metrics.anomaly import bin_upper_edge, score_bin


def exact(scores: Tensor, labels: Tensor) -> dict[str, float]:
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return {
        "AUROC": roc_auc_score(labels, scores),
        "AP": average_precision_score(labels, scores),
        "FPR95": false[(true >= 0.95).argmax()],
    }


def ours(scores: Tensor, labels: Tensor) -> dict[str, float]:
    metrics = AnomalyMetrics()
    for part, part_labels in zip(scores.chunk(3), labels.chunk(3), strict=True):
        metrics.update(part, part_labels)
    return {name: value.item() for name, value in metrics.compute().items()}


def draw(kind: str, pixels: int = 200_000) -> tuple[Tensor, Tensor]:
    labels = (torch.rand(pixels) < 0.03).long()
    noise = torch.randn(pixels) + 1.5 * labels
    scores = {
        "log-density": -80 + 5 * noise,
        "one minus a probability": torch.sigmoid(3 * noise - 6),
        "tiny": 1e-30 * noise,
        "huge": 1e30 * noise,
        "many ties": noise.round(),
        "around zero": noise,
    }[kind]
    return scores, labels


KINDS = ["log-density", "one minus a probability", "tiny", "huge", "many ties", "around zero"]


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_scikit_learn(kind):
    scores, labels = draw(kind)
    measured, expected = ours(scores, labels), exact(scores, labels)
    for name in expected:
        assert measured[name] == pytest.approx(expected[name], abs=1e-3), name


def test_the_error_of_the_auroc_is_bounded_as_documented():
    # All scores lie in a few bins: this is as bad as it gets.
    labels = (torch.rand(5000) < 0.3).long()
    scores = 100 + 0.04 * torch.rand(5000) + 0.01 * labels
    bins = score_bin(scores)
    known, anomalous = (torch.bincount(bins[labels == i]).double() for i in (0, 1))
    size = min(len(known), len(anomalous))
    shared = (known[:size] * anomalous[:size]).sum() / (known.sum() * anomalous.sum())
    difference = abs(ours(scores, labels)["AUROC"] - exact(scores, labels)["AUROC"])
    assert 0 < difference <= 0.5 * shared
    assert shared > 0.1


def test_bins_keep_the_order_and_hold_their_scores():
    scores = torch.cat([torch.randn(1000) * 10.0**k for k in range(-30, 30, 5)])
    special = torch.tensor([-torch.inf, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, torch.inf])
    scores = torch.cat([scores, special]).sort().values
    bins = score_bin(scores)
    assert (bins.diff() >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < 2**21
    edge = bin_upper_edge(bins)
    assert (edge >= scores).all()
    normal = scores.isfinite() & (scores.abs() > 1e-37)
    assert ((edge - scores)[normal] <= scores[normal].abs() / 4096).all()
    assert score_bin(torch.tensor([-0.0])) == score_bin(torch.tensor([0.0]))


def test_only_known_and_anomalous_pixels_count():
    scores, labels = torch.rand(2, 8, 9), torch.randint(2, (2, 8, 9))
    labels[0, :3] = 255
    expected = exact(scores[labels < 2], labels[labels < 2])
    metrics = AnomalyMetrics()
    metrics.update(scores, labels)
    for name, value in metrics.compute().items():
        assert value.item() == pytest.approx(expected[name], abs=2e-3)


@pytest.mark.parametrize(("label", "missing"), [(0, "anomalous"), (1, "known")])
def test_a_set_of_one_kind_is_undefined_and_says_so(label, missing):
    metrics = AnomalyMetrics()
    metrics.update(torch.rand(5), torch.full((5,), label))
    with pytest.warns(UserWarning, match=f"no {missing} pixel has been seen"):
        values = metrics.compute()
    assert all(value.isnan() for value in values.values())


def test_half_precision_scores_count():
    scores, labels = draw("around zero", 2000)
    half = scores.bfloat16()
    assert ours(half, labels) == pytest.approx(exact(half.float(), labels), abs=1e-3)


def test_nan_and_wrong_shapes_are_refused():
    metric = AnomalyAUROC()
    with pytest.raises(ValueError, match="1 of 3 anomaly scores are NaN"):
        metric.update(torch.tensor([0.0, torch.nan, 1.0]), torch.zeros(3))
    with pytest.raises(ValueError, match="one label per score"):
        metric.update(torch.zeros(1, 4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="recall is 0"):
        AnomalyFPR(recall=0)


def test_the_single_metrics_are_those_of_all():
    scores, labels = draw("log-density", 3000)
    expected = ours(scores, labels)
    for name, metric in {
        "AUROC": AnomalyAUROC(),
        "AP": AnomalyAveragePrecision(),
        "FPR95": AnomalyFPR(),
    }.items():
        metric.update(scores, labels)
        assert metric.compute().item() == expected[name]


def test_sums_over_processes():
    scores, labels = draw("log-density", 4000)
    parts = [AnomalyAUROC() for _ in range(2)]
    for metric, s, y in zip(parts, scores.chunk(2), labels.chunk(2), strict=True):
        metric.update(s, y)
    parts[0].merge_state(parts[1])
    assert parts[0].compute().item() == pytest.approx(ours(scores, labels)["AUROC"])
