"""Whether a model is right as often as it says."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_genseg.arguments import check_arguments


class CalibrationError(Metric):
    """Expected calibration error of the predicted class, in equally wide bins of confidence.

    Guo et al.: On Calibration of Modern Neural Networks, ICML 2017, Eq. 3. Unlike torchmetrics' own
    it keeps sums per bin instead of every pixel, so that any number of pixels fits.

    Args:
        num_bins: of confidence, over (0, 1].
        ignore_index: label of the pixels that do not count.
    """

    full_state_update = False
    higher_is_better = False
    counts: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self, num_bins: int = 15, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_arguments(CalibrationError.__init__, locals(), num_bins="[1, inf)")
        self.num_bins, self.ignore_index = num_bins, ignore_index
        for name in ("counts", "confidence", "correct"):
            zeros = torch.zeros(num_bins, dtype=torch.float64)  # exact up to 2**53 pixels
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Count pixels.

        Args:
            probabilities: B x C x H x W.
            labels: B x H x W, 0 to C-1 or `ignore_index`.
        """
        confidence, predicted = probabilities.float().max(1)
        valid = labels != self.ignore_index
        confidence, right = confidence[valid], (predicted == labels)[valid]
        index = (confidence * self.num_bins).ceil().long().sub(1).clamp(0, self.num_bins - 1)
        for state, values in (
            (self.counts, torch.ones_like(confidence)),
            (self.confidence, confidence),
            (self.correct, right),
        ):
            state.index_add_(0, index, values.to(state.dtype))

    def compute(self) -> Tensor:
        """Mean over pixels of the gap of accuracy and confidence in their bins; NaN without any."""
        gaps = (self.correct - self.confidence).abs().sum()
        return (gaps / self.counts.sum()).float()

    def reliability(self) -> Tensor:
        """Reliability diagram, bins x 3: mean confidence, accuracy (NaN if empty), share."""
        columns = (self.confidence / self.counts, self.correct / self.counts)
        return torch.stack([*columns, self.counts / self.counts.sum()], 1).float()
