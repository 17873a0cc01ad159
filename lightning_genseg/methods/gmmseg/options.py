"""Options of GMMSeg: what the mixtures are, and how EM fits them."""

from dataclasses import dataclass
from typing import Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.mixtures import Assignment, Covariance, MeanStart, Mixture

LogitNorm = Literal["layernorm", "none"]
Memory = Literal["ring", "decay"]


@dataclass(frozen=True)
class MixtureOptions:
    """The Gaussian mixture of each class, and the space that it lives in.

    Args:
        components: M, Gaussians per class (paper: 5; authors' code: 8 on ADE20K).
        embedding_dim: D; `None` leaves out the projection, and D is F.
        normalize_features: LayerNorm and L2-normalise the embedding, and the means likewise.
        covariance: `diagonal`, or `full` for D <= 64 (the paper restricts it "for efficiency").
        density: of a class, its largest component (`max`, winner-take-all) or `logsumexp`.
        variance_floor: added to every variance.
        start: of the means: `random` unit vectors (code), or `orthogonal` ones of zero sum.
        shrinkage: share of the mean covariance in each (ours; 1 suits untrained features).
        class_prior: `uniform` (paper), or the `frequency` of labels (suits untrained features).
    """

    components: int = 5
    embedding_dim: int | None = 64
    normalize_features: bool = True
    covariance: Covariance = "diagonal"
    density: Mixture = "max"
    variance_floor: float = 1e-2
    start: MeanStart = "random"
    shrinkage: float = 0.0
    class_prior: Literal["uniform", "frequency"] = "uniform"

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_arguments(
            type(self),
            vars(self),
            components="[1, inf)",
            embedding_dim="[1, inf)",
            variance_floor="[1e-12, inf)",
            shrinkage="[0, 1]",
        )


@dataclass(frozen=True)
class EMOptions:
    """Expectation-maximisation at the end of each training batch.

    Args:
        train: `em` (the method); `gradient` (Table 4's discriminative GMM), which learns the
            mixtures without M-steps or memory; `posthoc` (Table 3's, after softmax training), which
            runs EM on a frozen network. It needs `mixture.embedding_dim` null and `extractor`,
            `features`, or `encoder_weights` with decoder `hypercolumns`.
        assignment: E-step by `sinkhorn` (Eq. 9) or plain `em` (Eq. 8).
        sinkhorn_epsilon: entropy weight.
        sinkhorn_iterations: rounds.
        loops: E- and M-steps per update.
        interval: of M-steps, in steps of the optimiser (paper 1, code 5); features enter at each.
        mean_momentum: share of the old means that stays in an update.
        variance_momentum: likewise of the deviations (code 0, paper 0.999).
        memory: `ring` keeps the last features, gigabytes (paper and code); `decay` moments that
            forget, megabytes, level in short runs.
        memory_size: K, features per component; of `decay`, in effect.
        memory_start: `empty`, or full of `random` unit vectors (code), which keep the variances
            large until they fade.
        memory_dtype: of the features in a `ring`.
        memory_filter: which pixels may enter: all `labelled` ones (paper), or `correct`, those
            that are classified correctly (code; starves rare classes in short runs).
        samples_per_component: at most so many enter per component and update.
        label_reduction: label of a feature, which is smaller than the labels: that in the middle of
            its cell (`nearest`), in its upper left `corner` (code), or, for points and scribbles,
            the most frequent one of its `labelled` pixels.
    """

    train: Literal["em", "gradient", "posthoc"] = "em"
    assignment: Assignment = "sinkhorn"
    sinkhorn_epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    loops: int = 1
    interval: int = 5
    mean_momentum: float = 0.999
    variance_momentum: float = 0.0
    memory: Memory = "decay"
    memory_size: int = 32_000
    memory_start: Literal["empty", "random"] = "empty"
    memory_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_filter: Literal["labelled", "correct"] = "labelled"
    samples_per_component: int = 100
    label_reduction: Literal["nearest", "corner", "labelled"] = "nearest"

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_arguments(
            type(self),
            vars(self),
            sinkhorn_epsilon="(0, inf)",
            sinkhorn_iterations="[1, inf)",
            loops="[1, inf)",
            interval="[1, inf)",
            mean_momentum="[0, 1]",
            variance_momentum="[0, 1]",
            memory_size="[1, inf)",
            samples_per_component="[1, inf)",
        )
        if self.memory == "decay" and self.memory_dtype != "float32":
            raise GenSegError("em.memory_dtype needs em.memory ring: decay keeps no features.")
