"""How well a score tells anomalous pixels from known ones: AUROC, AP, FPR95 by histograms."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError

_BITS = 21  # of 32: sign, exponent and 12 bits of the mantissa


def score_bin(scores: Tensor) -> Tensor:
    """Number of each score's bin, 0 to 2**21 - 1, in the order of the scores.

    The bins are the float32 numbers themselves, cut to 21 bits: no range need be known, and every
    bin is at most 1/4096 of its scores wide, near zero as at 10**6.
    """
    bits = (scores.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # + 0.0: no negative zero
    ordered = torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)
    return ordered >> (32 - _BITS)


def bin_upper_edge(index: Tensor) -> Tensor:
    """Largest float32 score of each bin."""
    ordered = ((index + 1) << (32 - _BITS)) - 1
    bits = torch.where(ordered >> 31 == 1, ordered - 0x80000000, 0xFFFFFFFF - ordered)
    edge = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    return edge.nan_to_num(torch.inf, torch.inf, -torch.inf)  # NaN's numbers lie beyond infinity's


def check_finite(scores: Tensor) -> None:
    """Refuse NaN, which has no place in an order."""
    if bool(scores.isnan().any()):
        raise GenSegError(
            f"{int(scores.isnan().sum())} of {scores.numel()} anomaly scores are NaN: the model's "
            "weights or the images are not finite."
        )


def score_histogram(scores: Tensor) -> Tensor:
    """How many scores fall into each bin of `score_bin`, int64.

    Raises:
        GenSegError: a score is NaN.
    """
    check_finite(scores)
    return torch.bincount(score_bin(scores).flatten(), minlength=2**_BITS)


class ScoreHistogram(Metric):
    """Histograms of the anomaly scores of known and of anomalous pixels: 64 MB for any number.

    Base of the metrics below, which compute their numbers from it as if all scores of a bin were
    equal. Scores may be of any range; bins are 1/4096 of the score wide. `known` and `anomalous`
    are the counts, one per bin of `score_bin`.
    """

    full_state_update = False
    known: Tensor
    anomalous: Tensor

    def __init__(self, **kwargs: Any) -> None:  # torchmetrics' own arguments
        super().__init__(**kwargs)
        for name in ("known", "anomalous"):
            zeros = torch.zeros(2**_BITS, dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count pixels.

        Args:
            scores: any shape, higher is stranger.
            labels: of the same shape: 1 anomalous, 0 known, anything else is left out.

        Raises:
            GenSegError: the shapes differ, or a score is NaN.
        """
        if scores.shape != labels.shape:
            raise GenSegError(
                f"scores are {tuple(scores.shape)} and labels {tuple(labels.shape)}: give one "
                "label per score, 1 for anomalous, 0 for known."
            )
        self.known += score_histogram(scores[labels == 0])
        self.anomalous += score_histogram(scores[labels == 1])

    def compute(self) -> Any:
        """Both histograms, 2 x bins: known, anomalous."""
        return torch.stack([self.known, self.anomalous])

    def _measure(self, *functions: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Functions of the known and anomalous pixels above each threshold, highest first.

        NaN where known or anomalous pixels are missing.
        """
        for name, counts in (("known", self.known), ("anomalous", self.anomalous)):
            if not bool(counts.any()):
                rank_zero_warn(
                    f"no {name} pixel has been seen, so AUROC, AP and FPR95 are undefined (NaN): "
                    "check the masks (1 anomalous, 0 known, 255 ignored)."
                )
                return [torch.tensor(torch.nan, device=self.known.device) for _ in functions]
        some = (self.known + self.anomalous).nonzero().flatten().flip(0)
        false, true = (x[some].cumsum(0).double() for x in (self.known, self.anomalous))
        return [function(false, true) for function in functions]


class AnomalyAUROC(ScoreHistogram):
    """Area under the ROC curve: the chance that an anomalous pixel scores higher than a known one.

    Off the exact value by at most half the share of (known, anomalous) pairs that lie in one bin.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """In [0, 1]; NaN where known or anomalous pixels are missing."""
        return self._measure(_auroc)[0]


class AnomalyAveragePrecision(ScoreHistogram):
    """Average precision, anomalous as the positive class: sum of precision times gain in recall."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """In [0, 1]; NaN where known or anomalous pixels are missing."""
        return self._measure(_average_precision)[0]


class AnomalyFPR(ScoreHistogram):
    """Share of known pixels above the threshold that `recall` of the anomalous ones reach.

    Args:
        recall: in (0, 1]; 0.95 makes it FPR95.
    """

    higher_is_better = False

    def __init__(self, recall: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_arguments(AnomalyFPR.__init__, locals(), recall="(0, 1]")
        self.recall = recall

    def compute(self) -> Tensor:
        """In [0, 1]; NaN where known or anomalous pixels are missing."""
        return self._measure(partial(_false_positive_rate, recall=self.recall))[0]


class AnomalyMetrics(ScoreHistogram):
    """`AUROC`, `AP` and `FPR95` from one pair of histograms, as a dict.

    Example:
        >>> metrics = AnomalyMetrics()
        >>> metrics.update(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([0, 0, 1, 1]))
        >>> {name: round(value.item(), 3) for name, value in metrics.compute().items()}
        {'AUROC': 0.75, 'AP': 0.833, 'FPR95': 0.5}
    """

    def compute(self) -> dict[str, Tensor]:
        """The three in [0, 1]; NaN where known or anomalous pixels are missing."""
        values = self._measure(_auroc, _average_precision, _false_positive_rate)
        return dict(zip(("AUROC", "AP", "FPR95"), values, strict=True))


def _auroc(false: Tensor, true: Tensor) -> Tensor:
    """Of the numbers of known and anomalous pixels above each threshold, highest first."""
    false, true = (torch.cat([x.new_zeros(1), x / x[-1]]) for x in (false, true))
    return torch.trapezoid(true, false).float()


def _average_precision(false: Tensor, true: Tensor) -> Tensor:
    gain = true.diff(prepend=true.new_zeros(1)) / true[-1]
    return (gain * true / (true + false)).sum().float()


def _false_positive_rate(false: Tensor, true: Tensor, recall: float = 0.95) -> Tensor:
    return (false[torch.searchsorted(true / true[-1], recall)] / false[-1]).float()
