"""What a test measures beside IoU: calibration, anomalies, the classes of other data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_genseg.metrics import AnomalyMetrics, CalibrationError
from lightning_genseg.ops.views import softmax

if TYPE_CHECKING:
    from lightning_genseg.data.mixed.taxonomy import TargetClasses


class Evaluation(nn.Module):
    """Calibration and anomaly scores of one pass over labelled images, in bounded memory.

    Args:
        ignore_index: label that does not count.

    Attributes:
        calibration: expected calibration error of the class probabilities.
        anomalies: of the anomaly scores; None until there are anomaly labels, for it is large.
        target_classes: of test data whose classes are unions of the model's
            (`CrossDomainDataModule`).
    """

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.calibration = CalibrationError(ignore_index=ignore_index)
        self.anomalies: AnomalyMetrics | None = None
        self.target_classes: TargetClasses | None = None

    def reset(self) -> None:
        """Count anew."""
        self.calibration.reset()
        self.anomalies = None

    def update(
        self, maps: Mapping[str, Tensor], batch: Mapping[str, Any], averaged: bool
    ) -> dict[str, Tensor]:
        """Count a batch.

        Args:
            maps: `scores` B x C x H x W and, of a module with an anomaly score, `anomaly`.
            batch: `mask` B x H x W and, of data with anomaly labels, `anomaly`.
            averaged: whether `scores` are probabilities, the mean of several views.

        Returns:
            `maps`, with the probabilities of the target classes as `scores` where there are any.
        """
        scores = maps["scores"]
        if self.target_classes is not None:
            logits = scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if averaged else scores
            scores = probabilities = self.target_classes.probabilities(logits)
        else:
            probabilities = scores if averaged else softmax(scores)
        self.calibration.update(probabilities, batch["mask"])
        if "anomaly" in batch and "anomaly" in maps:
            if self.anomalies is None:
                self.anomalies = AnomalyMetrics().to(scores.device)
            self.anomalies.update(maps["anomaly"][:, 0], batch["anomaly"])
        return {**maps, "scores": scores}

    def compute(self) -> dict[str, Tensor]:
        """`ECE` where classes are labelled, and `AUROC`, `AP`, `FPR95` where anomalies are."""
        error = self.calibration.compute()
        scores = {} if self.anomalies is None else self.anomalies.compute()
        return scores if error.isnan() and scores else {"ECE": error, **scores}
