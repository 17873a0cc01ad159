"""How strange a pixel is, and thresholds with a promise."""

from lightning_genseg.uncertainty.conformal import (
    Threshold,
    conformal_image_threshold,
    conformal_pixel_threshold,
    image_quantile,
)
from lightning_genseg.uncertainty.scores import (
    AnomalyScores,
    Mahalanobis,
    StandardizedMaxLogit,
    density_score,
    logit_score,
)

__all__ = [
    "AnomalyScores",
    "Mahalanobis",
    "StandardizedMaxLogit",
    "Threshold",
    "conformal_image_threshold",
    "conformal_pixel_threshold",
    "density_score",
    "image_quantile",
    "logit_score",
]
