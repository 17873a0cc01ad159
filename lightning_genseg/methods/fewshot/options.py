"""Options of CGMGM: the mixtures, their posterior, the first mask by matching, the decoder."""

from dataclasses import dataclass
from typing import Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot.matching import Binarization, PatchSimilarity, Refinement
from lightning_genseg.mixtures import Covariance


@dataclass(frozen=True)
class EpisodicMixtureOptions:
    """The mixtures of an episode, one of the object and one of the background.

    Args:
        components: M; the paper takes 3 on PASCAL, 6 on COCO.
        covariance: `diagonal`, or `full` (Fig. 6).
        iterations: of EM.
        prior_strength: kappa: weight of the covariances' prior, in pixels.
        variance_floor: least variance, in mean variances of a channel.
        features: `reduced` ones of the decoder, before dropout, or `raw` ones of the encoder,
            without any learned parameter.
        query_statistics: whether the query's own pixels take part ("cross").
        query_background: which of them are background: the `complement` of M_q (the paper); without
            what the refinement dropped; or those of less than half the threshold (`unlike`).
    """

    components: int = 3
    covariance: Covariance = "diagonal"
    iterations: int = 10
    prior_strength: float = 10.0
    variance_floor: float = 0.1
    features: Literal["reduced", "raw"] = "reduced"
    query_statistics: bool = True
    query_background: Literal["complement", "without_dropped", "unlike"] = "complement"

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_arguments(
            type(self),
            vars(self),
            components="[1, inf)",
            iterations="[0, inf)",
            prior_strength="(0, inf)",
            variance_floor="(0, inf)",
        )


@dataclass(frozen=True)
class PosteriorOptions:
    """The posterior of the query's pixels.

    `bayes` is 0 or 1 nearly everywhere. `literal`, a ratio of log-densities, depends on the unit of
    the features; all others agree in what is above 0.5. The cross-entropy on 240 validation
    episodes of MSRC's four folds: 0.50 `standardized`, 0.58 `tempered`, 1.50 `bayes`
    (docs/results/few_shot.md).

    Args:
        form: `bayes`, sigmoid(log p(x|fg) - log p(x|bg)); `tempered`, the same logit over
            `temperature`; `standardized`, over its standard deviation in the image; `literal`, the
            ratio that Eqs. 12-13 print.
        temperature: of `tempered`; the number of dimensions when left out.
        gradient: whether the loss reaches the features through the posterior; only if `tempered` or
            `standardized`.
    """

    form: Literal["standardized", "tempered", "bayes", "literal"] = "standardized"
    temperature: float | None = None
    gradient: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range, or needs another form."""
        check_arguments(type(self), vars(self), temperature="(0, inf)")
        if self.form != "tempered" and self.temperature is not None:
            raise GenSegError("posterior.temperature needs posterior.form tempered.")
        if self.form in ("bayes", "literal") and self.gradient:
            raise GenSegError(
                "posterior.gradient needs posterior.form standardized or tempered: the gradients "
                "of the others are too large to train with."
            )


@dataclass(frozen=True)
class MatchingOptions:
    """The query's first mask M_q, by similarity to the supports.

    Table 1's mixtures of the oracle `gt` are of the query alone; ours are of the supports as well.

    Args:
        level: features that are compared: `high`, the encoder's last stage (the paper), or
            `middle`, the two before, for encoders that know nothing but ImageNet's classes.
        patch_similarity: cosine of two patches: mean over `offsets`, or of their `mean` features.
        threshold: least similarity of the foreground (`fixed`), or share of the rest (`quantile`).
        binarization: `fixed`, `quantile`, or `otsu`, which finds its own.
        refinement: drops pixels whose best match leads back to the background: by a `cycle` between
            query and supports; by `cycle_support`, through labelled foreground only; as printed
            (`literal`), which drops none; `none` is Table 5 without IMR.
        mask_before_last_stage: whether guidance `prior` masks the supports before the last stage as
            well as after (BAM), or only after.
        prior_cells: over which guidance `prior` is stretched to [0, 1]: `all`, padding too (BAM),
            or the `valid` ones.
        source: `imgr`, or `gt`: the query's own labels, the oracle of Table 1.
    """

    level: Literal["high", "middle"] = "high"
    patch_similarity: PatchSimilarity = "offsets"
    threshold: float = 0.5
    binarization: Binarization = "fixed"
    refinement: Refinement = "cycle"
    mask_before_last_stage: bool = False
    prior_cells: Literal["all", "valid"] = "all"
    source: Literal["imgr", "gt"] = "imgr"

    def __post_init__(self) -> None:
        """Refuse what is out of range or excludes each other."""
        check_arguments(type(self), vars(self), threshold="(0, 1)")
        if self.mask_before_last_stage and self.level == "middle":
            raise GenSegError(
                "matching.mask_before_last_stage concerns the last stage: set matching.level to "
                "high."
            )


@dataclass(frozen=True)
class DecoderOptions:
    """The decoder, and the reduced features that it reads.

    Args:
        width: channels of the reduced features and of the decoder (papers: 256, much for few data).
        dropout: of whole reduced channels, for the decoder only.
        shared_reduction: one 1x1 convolution for supports and query; BAM has two.
        extra_inputs: beside features and guidance: the supports' mean foreground feature
            (`prototype`), the `mask` M_q.
        residual: adds its scores to those of the guidance; not in the papers, for short schedules.
    """

    width: int = 256
    dropout: float = 0.5
    shared_reduction: bool = True
    extra_inputs: tuple[Literal["prototype", "mask"], ...] = ()
    residual: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_arguments(type(self), vars(self), width="[1, inf)", dropout="[0, 1)")
