import math

import numpy as np
import pytest
import torch

from lightning_genseg.metrics import named_scores, segmentation_metrics


def reference_iou(prediction, label, num_classes, ignore_index):
    """mmsegmentation's formula: histograms of intersection, prediction and label, summed up."""
    keep = label != ignore_index
    prediction, label = prediction[keep], label[keep]
    hit = np.bincount(prediction[prediction == label], minlength=num_classes)
    count = [np.bincount(x, minlength=num_classes) for x in (prediction, label)]
    union = count[0] + count[1] - hit
    with np.errstate(invalid="ignore"):
        return hit / union, hit.sum() / keep.sum()


@pytest.mark.parametrize("ignore_index", [255, 0])
def test_equals_the_formula_of_papers(ignore_index):
    prediction = torch.randint(0, 6, (4, 33, 17))
    label = torch.where(torch.rand(4, 33, 17) < 0.6, prediction, torch.randint(0, 6, (4, 33, 17)))
    label[torch.rand(4, 33, 17) < 0.2] = ignore_index
    prediction[prediction == 4] = 3  # class 4: labelled, never predicted
    # class 6: in neither mask
    metrics = segmentation_metrics(7, ignore_index)
    for p, t in zip(prediction.split(1), label.split(1), strict=True):
        metrics.update(p, t)
    values = metrics.compute()

    iou, accuracy = reference_iou(prediction.numpy(), label.numpy(), 7, ignore_index)
    if ignore_index == 0:
        # Pixels labelled 0 do not count, so class 0 stands in the table only for what was wrongly
        # predicted as it, and torchmetrics leaves it out of the mean.
        assert values["mIoU"].item() == pytest.approx(np.nanmean(iou[1:]), abs=1e-6)
    else:
        assert values["mIoU"].item() == pytest.approx(np.nanmean(iou), abs=1e-6)
    np.testing.assert_allclose(values["IoU"].numpy(), iou, atol=1e-6)
    assert values["IoU"][4] == 0
    assert math.isnan(values["IoU"][6])
    assert values["pixel_accuracy"].item() == pytest.approx(accuracy, abs=1e-6)


def test_dataset_level_not_mean_over_images():
    metrics = segmentation_metrics(2)
    perfect = torch.zeros(1, 100, 100, dtype=torch.long)
    metrics.update(perfect, perfect)
    tiny = torch.tensor([[[0, 1]]])
    metrics.update(tiny, 1 - tiny)
    assert metrics.compute()["mIoU"].item() == pytest.approx(10000 / 10002 / 2, abs=1e-6)


def test_ignored_pixels_change_nothing():
    label = torch.randint(0, 3, (2, 8, 8))
    prediction = torch.randint(0, 3, (2, 8, 8))
    label[0, :4] = 255
    metrics = segmentation_metrics(3)
    metrics.update(prediction, label)
    before = metrics.compute()
    metrics.reset()
    metrics.update(prediction.masked_fill(label == 255, 2), label)
    metrics.update(prediction, torch.full_like(label, 255))
    torch.testing.assert_close(metrics.compute(), before, rtol=0, atol=0)


def test_only_ignored_pixels_is_nan_not_zero():
    metrics = segmentation_metrics(3)
    metrics.update(torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), 255))
    assert all(value.isnan().all() for value in metrics.compute().values())


def test_memory_is_one_confusion_matrix():
    metrics = segmentation_metrics(5)
    for _ in range(3):
        metrics.update(torch.randint(0, 5, (2, 9, 9)), torch.randint(0, 5, (2, 9, 9)))
    metrics.compute()
    matrices = {metric.confmat.data_ptr() for metric in metrics.values(copy_state=False)}
    assert len(matrices) == 1
    assert metrics["mIoU"].confmat.shape == (5, 5)
    assert metrics["mIoU"].confmat.sum() == 3 * 2 * 81
    assert not metrics.state_dict()  # scores are no part of a checkpoint


def test_named_scores():
    values = {
        "mIoU": torch.tensor(0.5),
        "IoU": torch.tensor([0.25, 0.75, torch.nan]),
        "pixel_accuracy": torch.tensor(0.875),
    }
    scores = named_scores(values, ["road", "traffic light/sign", "Büsche"])
    classes = ["IoU_road", "IoU_traffic_light_sign", "IoU_Büsche"]
    assert list(scores) == ["mIoU", "pixel_accuracy", *classes]
    assert scores["IoU_traffic_light_sign"] == 0.75
    assert scores["mIoU"] == 0.5
    assert math.isnan(scores["IoU_Büsche"])
    assert list(named_scores(values))[2:] == ["IoU_0", "IoU_1", "IoU_2"]
    with pytest.raises(ValueError, match="class_names has 2 entries but there are 3 classes"):
        named_scores(values, ["a", "b"])
    with pytest.raises(ValueError, match="'a b' and 'a_b' are both logged as IoU_a_b"):
        named_scores(values, ["a b", "a_b", "c"])
