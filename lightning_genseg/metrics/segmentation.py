"""Scores of a segmentation, counted over a whole data set."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from lightning_genseg.errors import GenSegError


class _ClassIoU(MulticlassJaccardIndex):
    """Intersection over union of each class, C; NaN where a class is in neither mask."""

    def compute(self) -> Tensor:
        absent = self.confmat.sum(0) + self.confmat.sum(1) == 0
        return super().compute().masked_fill(absent, torch.nan)


class _PixelAccuracy(MulticlassConfusionMatrix):
    """Share of the labelled pixels that are right; NaN when no pixel is labelled."""

    def compute(self) -> Tensor:
        return self.confmat.diagonal().sum() / self.confmat.sum()


def segmentation_metrics(num_classes: int, ignore_index: int = 255) -> MetricCollection:
    """Dataset-level scores that share one C x C confusion matrix.

    The matrix is summed over all images (and processes) before anything is divided, so that
    ``mIoU`` is the number papers report: the unweighted mean over the classes that occur in the
    labels or the predictions. It equals mmsegmentation's ``IoUMetric``. Memory does not grow.

    Args:
        num_classes: C.
        ignore_index: label of the pixels that do not count.

    Returns:
        A collection to update with predictions and labels, both B x H x W of class indices. Keys:
        ``mIoU`` (scalar), ``IoU`` (C, NaN for absent classes), ``pixel_accuracy`` (scalar). All
        are NaN while no labelled pixel has been seen.
    """
    # validate_args costs a torch.unique over every pixel of every batch; the datamodule checks
    # the labels, and the predictions are an argmax over C scores.
    options: dict[str, Any] = {"ignore_index": ignore_index, "validate_args": False}
    metrics: dict[str, Metric | MetricCollection] = {
        "mIoU": MulticlassJaccardIndex(num_classes, average="macro", **options),
        "IoU": _ClassIoU(num_classes, average="none", **options),
        "pixel_accuracy": _PixelAccuracy(num_classes, **options),
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])


def named_scores(
    values: Mapping[str, Tensor], class_names: Sequence[str] | None = None
) -> dict[str, float]:
    """Flatten what `segmentation_metrics` computes into names to log.

    Args:
        values: ``mIoU``, ``IoU`` and ``pixel_accuracy``.
        class_names: C names; their indices when left out.

    Returns:
        ``mIoU``, ``pixel_accuracy`` and ``IoU_<class>`` in class order; everything but letters,
        digits, ``-`` and ``_`` becomes ``_``, because a logged name ends up in file names. Absent
        classes are NaN.

    Raises:
        GenSegError: the names do not fit the number of classes, or two become the same.
    """
    scores = {key: values[key].item() for key in ("mIoU", "pixel_accuracy")}
    class_iou: list[float] = values["IoU"].tolist()
    names = [str(i) for i in range(len(class_iou))] if class_names is None else list(class_names)
    if len(names) != len(class_iou):
        raise GenSegError(
            f"class_names has {len(names)} entries but there are {len(class_iou)} classes: "
            "give one name per class, in the order of the class indices."
        )
    keys = score_keys(names)
    return scores | dict(zip(keys, class_iou, strict=True))


def score_keys(class_names: Sequence[str]) -> list[str]:
    """Log keys ``IoU_<class>`` of classes.

    Raises:
        GenSegError: two become the same.
    """
    keys = ["IoU_" + re.sub(r"[^\w-]+", "_", name) for name in class_names]
    for key in keys:
        same = [name for name, other in zip(class_names, keys, strict=True) if other == key]
        if len(same) > 1:
            raise GenSegError(
                f"class_names {' and '.join(map(repr, same))} are both logged as {key}: rename all "
                "but one."
            )
    return keys


_RISE = ("mIoU", "IoU_", "FB_IoU", "GmIoU", "pixel_accuracy", "AUROC", "AP")
_FALL = ("loss", "ECE", "FPR95")


def better(name: str) -> Literal["min", "max"] | None:
    """Whether less or more is better of what is logged as `name`; None if it is none of ours."""
    score = re.sub(r"^(train|val|test)_", "", name)
    if score == name:
        return None
    return "max" if score.startswith(_RISE) else "min" if score.startswith(_FALL) else None
