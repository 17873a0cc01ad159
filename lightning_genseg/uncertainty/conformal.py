"""Thresholds with a promise: split-conformal prediction."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.metrics.anomaly import bin_upper_edge, check_finite

Level = Literal["pixel", "image"]


class Threshold(NamedTuple):
    """A score above which a pixel is called anomalous, and what was promised of it."""

    value: float
    false_positive_rate: float
    level: Level
    risk: float
    samples: int

    def promise(self) -> str:
        """What holds of new images, in a sentence without its full stop."""
        share = f"at most {self.false_positive_rate:.2%} of the known pixels lie above it"
        promised = f"Of new images {share}"
        if self.level == "image":
            promised = (
                f"In a new image of the known world {share}, with probability {1 - self.risk:.2%}"
            )
        return f"{promised}; found on {self.samples} held-out {self.level}s"


def conformal_pixel_threshold(histogram: Tensor, false_positive_rate: float) -> Threshold:
    """Threshold above which a new known pixel lies with at most the promised probability.

    Split conformal prediction (Vovk et al., 2005): the ceil((n + 1)(1 - rate))-th smallest of n
    scores of known pixels. The promise holds if the new pixel is exchangeable with these; the
    pixels of one image are not, which is what `conformal_image_threshold` is for.

    Args:
        histogram: of the scores of held-out known pixels, see `metrics.anomaly.score_histogram`.
        false_positive_rate: in (0, 1).

    Raises:
        GenSegError: a rate outside (0, 1), or too few pixels for it.
    """
    check_arguments(conformal_pixel_threshold, locals(), false_positive_rate="(0, 1)")
    count = int(histogram.sum())
    rank = conformal_rank(count, false_positive_rate, "false_positive_rate", "known pixels")
    value = float(bin_upper_edge(torch.searchsorted(histogram.cumsum(0), rank)))
    return Threshold(value, false_positive_rate, "pixel", false_positive_rate, count)


def conformal_image_threshold(
    quantiles: list[float], false_positive_rate: float, risk: float
) -> Threshold:
    """Threshold that a new image keeps with probability 1 - risk.

    At most the promised share of its known pixels is then above the threshold. Split conformal
    prediction over images, which may be exchangeable where pixels are not: each image's score is
    the threshold that it would need itself (`image_quantile`); the threshold is the
    ceil((n + 1)(1 - risk))-th smallest of these.

    Args:
        quantiles: of each held-out image, see `image_quantile`.
        false_positive_rate: promised share of an image's known pixels, in (0, 1).
        risk: probability that a new image breaks the promise, in (0, 1).

    Raises:
        GenSegError: a share outside (0, 1), or too few images for the risk.
    """
    check_arguments(
        conformal_image_threshold, locals(), false_positive_rate="(0, 1)", risk="(0, 1)"
    )
    rank = conformal_rank(len(quantiles), risk, "risk", "held-out images")
    value = sorted(quantiles)[rank - 1]
    return Threshold(value, false_positive_rate, "image", risk, len(quantiles))


def image_quantile(scores: Tensor, false_positive_rate: float) -> float:
    """Threshold above which at most that share of an image's scores lies; they have any shape.

    Raises:
        GenSegError: a score is NaN.
    """
    check_finite(scores)
    rank = max(1, math.ceil(scores.numel() * (1 - false_positive_rate) - 1e-9))
    return float(scores.flatten().float().kthvalue(rank).values)


def conformal_rank(count: int, share: float, name: str, what: str) -> int:
    """Which of `count` sorted values a new one exceeds with probability `share` at most, from 1.

    Raises:
        GenSegError: too few values; the sentence calls them `what` and the share `name`.
    """
    rank = math.ceil((count + 1) * (1 - share) - 1e-9)  # 20 x 0.95 must stay 19
    if rank > count:
        needed = math.ceil(1 / share) - 1
        raise GenSegError(
            f"{count} {what} are too few to promise a {name} of {share:g}: use at least {needed}, "
            f"or a larger {name}."
        )
    return rank
