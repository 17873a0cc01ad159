"""Scores over a whole data set, in memory that does not grow with it."""

from lightning_genseg.metrics.anomaly import (
    AnomalyAUROC,
    AnomalyAveragePrecision,
    AnomalyFPR,
    AnomalyMetrics,
    ScoreHistogram,
)
from lightning_genseg.metrics.calibration import CalibrationError
from lightning_genseg.metrics.few_shot import (
    FewShotMeanIoU,
    ForegroundBackgroundIoU,
    few_shot_metrics,
)
from lightning_genseg.metrics.segmentation import named_scores, segmentation_metrics

__all__ = [
    "AnomalyAUROC",
    "AnomalyAveragePrecision",
    "AnomalyFPR",
    "AnomalyMetrics",
    "CalibrationError",
    "FewShotMeanIoU",
    "ForegroundBackgroundIoU",
    "ScoreHistogram",
    "few_shot_metrics",
    "named_scores",
    "segmentation_metrics",
]
