"""Scores of few-shot segmentation: mIoU over classes and FB-IoU, counted over all episodes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_genseg.errors import GenSegError

_CLASSES = 255  # a class of the data set is at most 254


class EpisodeCounts(Metric):
    """Intersections and unions of background and foreground by the class of the episode.

    Base of the metrics below. `intersection` and `union` are 255 x 2 pixels (background,
    foreground), `listed` tells for each of 255 classes whether it takes part.
    """

    full_state_update = False
    higher_is_better = True
    intersection: Tensor
    union: Tensor
    listed: Tensor

    def __init__(self, **kwargs: Any) -> None:  # torchmetrics' own arguments
        super().__init__(**kwargs)
        for name in ("intersection", "union"):
            zeros = torch.zeros(_CLASSES, 2, dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self.add_state("listed", torch.zeros(_CLASSES, dtype=torch.long), dist_reduce_fx="max")

    def update(
        self,
        prediction: Tensor,
        target: Tensor,
        class_index: Tensor | int,
        candidates: Tensor | None = None,
    ) -> None:
        """Count episodes.

        Args:
            prediction: HxW or BxHxW, 1 or True on the foreground, otherwise 0.
            target: of the same shape: 1, 0, and 255 for pixels that do not count.
            class_index: class of each episode, one or B.
            candidates: classes that take part even if they never come, any shape; default: those
                that come.

        Raises:
            GenSegError: the shapes do not match.
        """
        if prediction.shape != target.shape or target.ndim not in (2, 3):
            raise GenSegError(
                f"predictions are {tuple(prediction.shape)} and targets {tuple(target.shape)}: "
                "give both as HxW or BxHxW."
            )
        prediction, target = (x[None] if x.ndim == 2 else x for x in (prediction, target))
        classes = torch.as_tensor(class_index, device=self.union.device).reshape(-1).long()
        if len(classes) != len(target):
            raise GenSegError(
                f"class_index holds {len(classes)} classes for {len(target)} episodes."
            )
        counted = target != 255
        for side in (0, 1):
            said, true = counted & (prediction == side), counted & (target == side)
            for counts, pixels in ((self.intersection, said & true), (self.union, said | true)):
                counts[:, side].index_add_(0, classes, pixels.flatten(1).sum(1))
        self.listed[classes] = 1
        if candidates is not None:
            self.listed[candidates.flatten()] = 1

    def compute(self) -> Any:
        """IoU of the foreground by class, 255; 0 if it never came, NaN if it takes no part."""
        iou = self.intersection[:, 1] / (self.union[:, 1].double() + 1e-10)
        return iou.float().masked_fill(self.listed == 0, torch.nan)


class FewShotMeanIoU(EpisodeCounts):
    """Mean over the classes of (sum of intersections / sum of unions): mIoU of OSLSM, PFENet, BAM.

    Classes among the candidates that no episode was about count 0, as in BAM's code.
    """

    def compute(self) -> Tensor:
        """In [0, 1]; NaN before the first episode."""
        iou: Tensor = super().compute()
        return iou.nanmean()


class ForegroundBackgroundIoU(EpisodeCounts):
    """FB-IoU: mean IoU of background and foreground, pooled over classes and episodes."""

    def compute(self) -> Tensor:
        """In [0, 1]; NaN before the first episode."""
        if not bool(self.listed.any()):
            return torch.tensor(torch.nan, device=self.union.device)
        iou = self.intersection.sum(0) / (self.union.sum(0).double() + 1e-10)
        return iou.mean().float()


def few_shot_metrics() -> MetricCollection:
    """Scores of episodes that share their counts; summed over processes before anything is divided.

    Returns:
        A collection to update like `EpisodeCounts`. Keys: ``mIoU``, ``FB_IoU`` (scalars) and
        ``IoU`` (255, NaN for classes that take no part).
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mIoU": FewShotMeanIoU(),
        "FB_IoU": ForegroundBackgroundIoU(),
        "IoU": EpisodeCounts(),
    }
    return MetricCollection(metrics, compute_groups=[list(metrics)])
