"""How strange a pixel is: scores by name."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.uncertainty.conformal import Threshold

LogitScore = Literal["msp", "entropy", "max_logit", "energy"]
DensityScore = Literal["density", "marginal_density", "relative_density", "half_relative_density"]
AnomalyName = Literal[LogitScore, "sml", "mahalanobis", "relative_mahalanobis", DensityScore]
DENSITY_SCORES = get_args(DensityScore)
FITTED_SCORES = ("sml", "mahalanobis", "relative_mahalanobis")
_LEAST_PIXELS = 100  # of a class, for statistics of its own
_NOT_FITTED = "{} has no statistics: call observe with training data, then finish."


def logit_score(name: LogitScore, logits: Tensor) -> Tensor:
    """Anomaly score of class logits B x C x H x W: B x 1 x H x W float32, higher is stranger.

    `msp` is 1 - max p, and `entropy` that of p (Hendrycks and Gimpel, ICLR 2017). `max_logit` is
    its negative (Hendrycks et al., ICML 2022), `energy` -log sum exp (Liu et al., NeurIPS 2020).
    """
    check_arguments(logit_score, locals())
    logits = logits.float()
    if name == "max_logit":
        return -logits.amax(1, keepdim=True)
    if name == "energy":
        return -logits.logsumexp(1, keepdim=True)
    if name == "msp":  # from the other classes: 1 - p would lose what lies between p and 1
        largest, index = logits.max(1, keepdim=True)
        others = (logits - largest).exp().scatter(1, index, 0).sum(1, keepdim=True)
        return others / (1 + others)
    if name == "entropy":
        log_p = logits.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1, keepdim=True)
    raise NotImplementedError(f"logit_score does not compute {name}")


def density_score(name: DensityScore, log_density: Tensor) -> Tensor:
    """Anomaly score of log p(x|c), B x C x h x w: B x 1 x h x w float32, higher is stranger.

    `density` is -max_c log p(x|c) (GMMSeg, Section 3.4). `marginal_density` is -log p(x) under
    equally frequent classes. Of the two relative ones `relative_density` is -max_c log p(x|c) plus
    the mean over the classes, and `half_relative_density` is -log p(x) plus half that mean: what
    is improbable for every model of the data is no sign by itself. The thought is that of the
    relative Mahalanobis distance (`Mahalanobis`); the mean class as background is ours.
    """
    check_arguments(density_score, locals())
    log_density = log_density.float()
    largest = log_density.amax(1, keepdim=True)
    if name == "density":
        return -largest
    average = log_density.mean(1, keepdim=True)
    if name == "relative_density":
        return average - largest
    marginal = log_density.logsumexp(1, keepdim=True) - math.log(log_density.shape[1])
    return -marginal if name == "marginal_density" else 0.5 * average - marginal


class StandardizedMaxLogit(nn.Module):
    """Max logit, standardised by mean and deviation over the training pixels of that prediction.

    Jung et al.: Standardized Max Logits, ICCV 2021, Eq. 3 (without the boundary suppression and
    smoothing that follow there). A class that is predicted at fewer than 100 pixels, or never, gets
    the statistics of all: a deviation of a few pixels may be next to nothing.
    """

    average: Tensor | None
    deviation: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", None, persistent=False)
        self.register_buffer("deviation", None, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Forget what was observed."""
        self._sums: Tensor | None = None

    def observe(self, logits: Tensor) -> None:
        """Add the pixels of a training batch, logits B x C x H x W."""
        largest, predicted = logits.double().max(1)
        if self._sums is None:
            self._sums = largest.new_zeros(3, logits.shape[1])
        index, values = predicted.flatten(), largest.flatten()
        for row, part in zip(
            self._sums, (torch.ones_like(values), values, values.square()), strict=True
        ):
            row.index_add_(0, index, part)

    def finish(self) -> None:
        """Turn what was observed into means and deviations."""
        if self._sums is None:
            raise GenSegError(
                "no training pixel was seen, so there are no statistics of the logits."
            )
        every = self._sums.sum(1, keepdim=True)
        enough = self._sums[0] >= _LEAST_PIXELS
        count, first, second = torch.where(enough, self._sums, every)
        average = first / count
        self.average = average.float()
        self.deviation = (second / count - average.square()).clamp_min(1e-12).sqrt().float()
        self._sums = None

    def forward(self, logits: Tensor) -> Tensor:
        """Score B x 1 x H x W of logits B x C x H x W."""
        if self.average is None or self.deviation is None:
            raise GenSegError(_NOT_FITTED.format("StandardizedMaxLogit"))
        largest, predicted = logits.float().max(1, keepdim=True)
        return (self.average[predicted] - largest) / self.deviation[predicted]


class Mahalanobis(nn.Module):
    """Squared Mahalanobis distance to the nearest class mean, under one covariance for all classes.

    Lee et al.: A Simple Unified Framework for Detecting Out-of-Distribution Samples, NeurIPS 2018,
    Eq. 2, on the features that the classifier sees. Classes without a training pixel do not
    compete. `relative` subtracts the distance to one Gaussian of all pixels: Ren et al.: A Simple
    Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2106.09022, Eq. 2.
    """

    means: Tensor | None
    centre: Tensor | None
    whitener: Tensor | None
    background: Tensor | None  # whitener of all pixels together

    def __init__(self) -> None:
        super().__init__()
        for name in ("means", "centre", "whitener", "background"):
            self.register_buffer(name, None, persistent=False)
        self.reset()

    def reset(self) -> None:
        """Forget what was observed."""
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def observe(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Add the pixels of a training batch: features B x F x h x w, labels B x h x w."""
        labels = labels.long()
        valid = (labels >= 0) & (labels < num_classes)
        x, y = features.movedim(1, -1)[valid].double(), labels[valid]
        if self._sums is None:
            dim = x.shape[1]
            self._sums = (
                x.new_zeros(num_classes),
                x.new_zeros(num_classes, dim),
                x.new_zeros(dim, dim),
            )
        counts, first, second = self._sums
        counts.index_add_(0, y, torch.ones_like(y, dtype=x.dtype))
        first.index_add_(0, y, x)
        second.addmm_(x.T, x)

    def finish(self) -> None:
        """Turn what was observed into class means and the whitening of their common covariance."""
        if self._sums is None or not bool(self._sums[0].any()):
            raise GenSegError(
                "no labelled training pixel was seen, so no class Gaussian can be fitted."
            )
        counts, first, second = self._sums
        means = first / counts.clamp_min(1)[:, None]
        # Whitened features far from the origin would lose their differences in float32.
        centre = first.sum(0) / counts.sum()
        within = (second - (means * counts[:, None]).T @ means) / counts.sum()
        whitener = _whitener(within)
        self.centre, self.whitener = centre.float(), whitener.float()
        self.means = ((means - centre) @ whitener.T)[counts > 0].float()
        self.background = _whitener(second / counts.sum() - centre.outer(centre)).float()
        self._sums = None

    def forward(self, features: Tensor, relative: bool = False) -> Tensor:
        """Score B x 1 x h x w of features B x F x h x w."""
        if self.means is None or self.centre is None or self.whitener is None:
            raise GenSegError(_NOT_FITTED.format("Mahalanobis"))
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float().movedim(1, -1) - self.centre
            white = centred @ self.whitener.T
            distance = torch.cdist(white, self.means[None].expand(len(white), 1, -1, -1))
            score = distance.amin(-1).square()[:, None]
            if relative:
                assert self.background is not None
                score = score - (centred @ self.background.T).square().sum(-1)[:, None]
            return score


def _whitener(covariance: Tensor) -> Tensor:
    """Inverse of the Cholesky factor."""
    # ReLU features may be constant in a channel; a millionth of the mean variance keeps it regular.
    ridge = covariance.diagonal().mean().clamp_min(1e-12) * 1e-6
    identity = torch.eye(len(covariance)).to(covariance)
    factor = torch.linalg.cholesky(covariance + ridge * identity)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse


class AnomalyScores(nn.Module):
    """Every score by its name, with what has been fitted for it: statistics and thresholds.

    A score reads one of a module's `outputs`: `logits` (B x C x H x W, at the size of the image),
    `features` (B x F x h x w), or `log_density` (B x C x h x w, log p(x|c)). `sml`, `mahalanobis`
    and `relative_mahalanobis` are fitted first (`genseg calibrate`, or `observe` and `finish` of
    `self.sml` and `self.mahalanobis`). What was fitted is in no state dict: a module of your own
    keeps `fitted_state` in its checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sml, self.mahalanobis = StandardizedMaxLogit(), Mahalanobis()
        self.thresholds: dict[str, Threshold] = {}
        self.inference: dict[str, Any] = {}  # options under which the thresholds were found
        # For pictures: the 1st and the 99th percentile of some validation images.
        self.ranges: dict[str, tuple[float, float]] = {}

    def needs(self, name: str) -> str:
        """Which of a module's outputs a score reads."""
        if name in DENSITY_SCORES:
            return "log_density"
        return "features" if name.endswith("mahalanobis") else "logits"

    def is_fitted(self, name: str) -> bool:
        """Whether a score can be computed: `FITTED_SCORES` only after they are fitted."""
        fitted = {
            "sml": self.sml.average,
            "mahalanobis": self.mahalanobis.means,
            "relative_mahalanobis": self.mahalanobis.background,
        }
        return name not in fitted or fitted[name] is not None

    def forward(self, name: AnomalyName, outputs: Mapping[str, Tensor]) -> Tensor:
        """Score B x 1 x ..., higher is stranger, at the resolution of what it reads.

        Raises:
            GenSegError: no such score, no such output of the module, or a score that is not fitted.
        """
        check_arguments(AnomalyScores.forward, {"name": name})
        if self.needs(name) not in outputs:
            raise GenSegError(
                f"anomaly_score is {name}, but this model has no class densities: choose one of "
                f"{', '.join(n for n in get_args(AnomalyName) if self.needs(n) in outputs)}."
            )
        if not self.is_fitted(name):
            raise GenSegError(
                f"anomaly_score is {name}, whose statistics of the training data are not in this "
                "checkpoint: run `genseg calibrate --config CONFIG --ckpt_path CHECKPOINT` and use "
                "the checkpoint that it writes."
            )
        score: Tensor
        match name:
            case "sml":
                score = self.sml(outputs["logits"])
            case "mahalanobis" | "relative_mahalanobis":
                score = self.mahalanobis(outputs["features"], name != "mahalanobis")
            case "density" | "marginal_density" | "relative_density" | "half_relative_density":
                score = density_score(name, outputs["log_density"])
            case _:
                score = logit_score(name, outputs["logits"])
        return score

    def fitted_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; empty when nothing was fitted."""
        statistics = {name: value for name, value in self.named_buffers() if value is not None}
        thresholds = {name: list(value) for name, value in self.thresholds.items()}
        ranges = {name: list(value) for name, value in self.ranges.items()}
        if not statistics and not thresholds and not ranges:
            return {}
        fitted = {"statistics": statistics, "thresholds": thresholds, "inference": self.inference}
        return {**fitted, "ranges": ranges}

    def load_fitted_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `fitted_state` has returned, and nothing else of what was fitted before."""
        statistics = state.get("statistics", {})
        known = {
            f"{prefix}.{name}": (module, name)
            for prefix, module in self.named_children()
            for name in module._buffers
        }
        for module, name in known.values():
            setattr(module, name, None)
        for name, value in statistics.items():
            if name not in known:
                raise GenSegError(
                    f"the checkpoint has statistics '{name}' that no anomaly score knows: it was "
                    "changed, or is of another version."
                )
            setattr(*known[name], value)
        self.thresholds = {
            name: Threshold(*value) for name, value in state.get("thresholds", {}).items()
        }
        self.inference = dict(state.get("inference", {}))
        self.ranges = {name: (low, high) for name, (low, high) in state.get("ranges", {}).items()}
