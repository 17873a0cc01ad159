import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from lightning_genseg.metrics import CalibrationError


def draw():
    probabilities = (3 * torch.randn(4, 5, 20, 30)).softmax(1)
    labels = torch.where(
        torch.rand(4, 20, 30) < 0.6, probabilities.argmax(1), torch.randint(5, (4, 20, 30))
    )
    labels[0, :4] = 255
    return probabilities, labels


def test_agrees_with_torchmetrics():
    probabilities, labels = draw()
    metric = CalibrationError()
    for p, y in zip(probabilities.split(1), labels.split(1), strict=True):
        metric.update(p, y)
    reference = MulticlassCalibrationError(5, n_bins=15, ignore_index=255)
    assert metric.compute() == pytest.approx(reference(probabilities, labels).item(), abs=1e-5)


def test_the_diagram_sums_to_the_error():
    metric = CalibrationError(num_bins=10)
    metric.update(*draw())
    confidence, accuracy, share = metric.reliability().T
    assert share.sum() == pytest.approx(1)
    assert ((confidence - accuracy).abs() * share).nansum() == pytest.approx(metric.compute())
    edges = torch.arange(11) / 10
    some = share > 0
    assert (confidence[some] > edges[:-1][some]).all()
    assert (confidence[some] <= edges[1:][some] + 1e-6).all()


def test_extremes():
    metric = CalibrationError()
    sure = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    metric.update(sure, torch.full((1, 1, 1), 255))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(sure, torch.zeros(1, 1, 1, dtype=torch.long))
    assert metric.compute() == 0
    metric.reset()
    metric.update(sure, torch.ones(1, 1, 1, dtype=torch.long))
    assert metric.compute() == 1
    with pytest.raises(ValueError, match="num_bins is 0"):
        CalibrationError(num_bins=0)
