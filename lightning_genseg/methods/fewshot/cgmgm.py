"""CGMGM: few-shot segmentation by Gaussian mixtures of the supports and the query; and BAM, its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_genseg.methods.fewshot.base import FewShotModule, Scoring, support_shares
from lightning_genseg.methods.fewshot.base_learner import load_base_learner
from lightning_genseg.methods.fewshot.matching import (
    Binarization,
    PatchSimilarity,
    Refinement,
    binarize,
    global_similarity,
    local_similarity,
    refine,
    stretch,
)
from lightning_genseg.methods.fewshot.networks import (
    Ensemble,
    GuidanceResidual,
    GuidedDecoder,
    OutputStride,
    PyramidPooling,
    ShotWeights,
    StageFeatures,
    gram_distance,
)
from lightning_genseg.mixtures.episodic import fit_episodes
from lightning_genseg.mixtures.gaussian import Covariance
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_aligned

Guidance = Literal["posterior", "mask", "prior"]
Posterior = Literal["bayes", "tempered", "literal"]
QueryBackground = Literal["complement", "without_dropped", "unlike"]

# With fewer foreground pixels, the background's mixture wins nearly everywhere: the similarity
# guides instead.
_FEWEST_PIXELS = 5


class CGMGM(FewShotModule):
    """Segments a new object from a few examples, guided by a mixture of its pixels and one of the background's.

    CGMGM: A Cross-Gaussian Mixture Generative Model for Few-Shot Semantic Segmentation, Shen et
        al., AAAI 2024.
    Of the query, a first mask is found by similarity to the supports (IMGR: `networks.matching`);
    mixtures are fitted to the pixels of supports and query (CDGMG: `mixtures.fit_episodes`); the
    posterior of the query's pixels (QCPE) guides a decoder, whose scores are merged with those of a
    base learner, as in Learning What Not to Segment (BAM), Lang et al., CVPR 2022. Encoder and base
    learner are frozen.

    No code was published, and two printed equations cannot be what was run; `refinement="literal"`
    and `posterior="literal"` are these. With `guidance="prior"`, `extra_inputs=["prototype"]`,
    `shared_reduction=False` and `mask_before_last_stage=True` this is BAM.

    Args:
        base_learner: checkpoint of a `BaseLearner` of the same fold. Without one, give `encoder`
            and set `ensemble` to false.
        shots: K of training, see `ShotWeights`.
        guidance: what the decoder is given beside the query's features: the `posterior`, the `mask`
            M_q (Table 5 without C&Q), or the `prior`, the similarity of BAM and PFENet.
        answer: who decides: the `decoder`, or the `guidance` itself, which needs no training: then
            `mixture_features` has to be `raw`, and no base learner takes part.
        guidance_residual: whether the decoder's scores are added to those of the guidance, see
            `GuidanceResidual`; not in the papers, for short schedules. Without effect where the
            guidance itself answers.
        extra_inputs: what else the decoder is given: the supports' mean foreground feature
            (`prototype`), the `mask`.
        components: M; the paper takes 3 on PASCAL, 6 on COCO.
        covariance: `diagonal`, or `full` (Fig. 6).
        em_iterations: see `fit_episodes`, like the next two.
        prior_strength: see there.
        variance_floor: see there.
        mixture_features: what is modelled: the `reduced` features of the decoder, before dropout,
            or the `raw` ones of the encoder, without any learned parameter.
        query_statistics: whether the query's own pixels take part (the "cross" of the title).
        query_background: which of them are background: the `complement` of M_q (the paper); without
            the pixels that the refinement dropped; or only those `unlike` the object, of similarity
            below half the threshold.
        mq_source: `imgr`, or `gt`: the query's own labels, the oracle of Table 1, whose mixtures
            are of the query alone where ours are of the supports as well.
        matching_level: features by which supports and query are compared: `high`, the encoder's
            last stage (the paper), or `middle`, the two before, which suits encoders whose last
            stage knows nothing but ImageNet's classes.
        patch_similarity: see `local_similarity`.
        threshold: see `binarize`.
        binarization: see there.
        refinement: see `refine`; `none` is Table 5 without IMR.
        posterior: `bayes`, p = sigmoid(log p(x|fg) - log p(x|bg)); `tempered`, the same logit over
            `temperature`; or `literal`, the ratio of log-densities that Eqs. 12-13 print, which
            depends on the features' unit.
        temperature: of `tempered`; the number of dimensions when left out.
        posterior_gradient: whether the loss reaches the features through the posterior; only if
            `tempered`.
        shared_reduction: one 1x1 convolution for supports and query; BAM has two, which no joint
            mixture can have.
        mask_before_last_stage: whether the similarity of `prior` masks the supports before the last
            stage as well as after (BAM), or only after.
        ensemble: whether the base learner takes part in the prediction.
        meta_loss_weight: of the cross-entropy of the decoder's own scores.
        width: channels of the reduced features, which are what is modelled, and of the decoder.
            Less than the papers' 256 is for small data and slow machines.
        dropout: of whole channels of the reduced features, for the decoder only.
        encoder: see `FewShotModule`, also for the arguments that follow.
        encoder_weights: see there.
        output_stride: see there.
        num_base_classes: of a base learner without checkpoint, background not counted; what a
            checkpoint of this module sets.
        scoring: see `FewShotModule`, also for the arguments that follow.
        num_classes: see there.
        ignore_index: see there.
        class_names: see there.
        mean: see there.
        std: see there.
        optimizer: see there.
        lr_scheduler: see there.
        decay_norms: see there.

    Raises:
        ValueError: arguments that exclude each other, or a base learner of another kind.
        FileNotFoundError: the base learner's checkpoint does not exist.

    Example:
        >>> model = CGMGM(encoder="tu-test_resnet", ensemble=False).eval()
        >>> mask = torch.zeros(40, 50)
        >>> mask[10:30, 10:40] = 1
        >>> model.set_support(torch.rand(1, 3, 40, 50), [mask], size=65)
        >>> model(torch.rand(2, 3, 30, 60)).shape
        torch.Size([2, 2, 30, 60])
    """

    def __init__(
        self,
        base_learner: Path | None = None,
        shots: int = 1,
        guidance: Guidance = "posterior",
        answer: Literal["decoder", "guidance"] = "decoder",
        guidance_residual: bool = False,
        extra_inputs: list[Literal["prototype", "mask"]] | None = None,
        components: int = 3,
        covariance: Covariance = "diagonal",
        em_iterations: int = 10,
        prior_strength: float = 10.0,
        variance_floor: float = 0.1,
        mixture_features: Literal["reduced", "raw"] = "reduced",
        query_statistics: bool = True,
        query_background: QueryBackground = "complement",
        mq_source: Literal["imgr", "gt"] = "imgr",
        matching_level: Literal["high", "middle"] = "high",
        patch_similarity: PatchSimilarity = "offsets",
        threshold: float = 0.5,
        binarization: Binarization = "fixed",
        refinement: Refinement = "cycle",
        posterior: Posterior = "bayes",
        temperature: float | None = None,
        posterior_gradient: bool = False,
        shared_reduction: bool = True,
        mask_before_last_stage: bool = False,
        ensemble: bool = True,
        meta_loss_weight: float = 1.0,
        width: int = 256,
        dropout: float = 0.5,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        output_stride: OutputStride = 8,
        num_base_classes: int | None = None,
        scoring: Scoring = "compat",
        num_classes: int = 2,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        decay_norms: bool = True,
    ) -> None:
        for name, number, least in (
            ("shots", shots, 1),
            ("components", components, 1),
            ("em_iterations", em_iterations, 0),
            ("width", width, 1),
        ):
            if number < least:
                raise GenSegError(f"{name} is {number}; it must be at least {least}.")
        for name, value in (("prior_strength", prior_strength), ("variance_floor", variance_floor)):
            if not value > 0:
                raise GenSegError(f"{name} is {value}; it must be positive.")
        if not 0 < threshold < 1:
            raise GenSegError(f"threshold is {threshold}; it must be between 0 and 1.")
        if temperature is not None and (posterior != "tempered" or not temperature > 0):
            raise GenSegError(
                f"temperature is {temperature}; it must be positive, and posterior must be "
                "tempered."
            )
        if posterior_gradient and posterior != "tempered":
            raise GenSegError(
                "posterior_gradient needs posterior tempered: the gradients of the others are too "
                "large to train with."
            )
        if guidance == "posterior" and mixture_features == "reduced" and not shared_reduction:
            raise GenSegError(
                "guidance posterior models supports and query in one space: set shared_reduction "
                "to true, or mixture_features to raw."
            )
        if answer == "guidance":
            ensemble = False
            if guidance == "posterior" and mixture_features == "reduced":
                raise GenSegError(
                    "answer guidance trains no reduction of the features: set mixture_features to "
                    "raw."
                )
        if mask_before_last_stage and matching_level == "middle":
            raise GenSegError(
                "mask_before_last_stage concerns the last stage: set matching_level to high."
            )
        if ensemble and base_learner is None and num_base_classes is None:
            raise GenSegError(
                "the ensemble needs base_learner, the checkpoint of a BaseLearner run on the same "
                "fold: give it, or set ensemble to false."
            )
        base = None if base_learner is None else load_base_learner(base_learner)
        super().__init__(
            base,
            encoder,
            encoder_weights,
            output_stride,
            scoring,
            num_classes,
            ignore_index,
            class_names,
            mean,
            std,
            optimizer,
            lr_scheduler,
            decay_norms,
        )
        self.guidance, self.extra_inputs = guidance, tuple(extra_inputs or ())
        self.answer, self.needs_training = answer, answer == "decoder"
        self.components, self.covariance, self.em_iterations = components, covariance, em_iterations
        self.prior_strength, self.variance_floor = prior_strength, variance_floor
        self.mixture_features, self.query_statistics = mixture_features, query_statistics
        self.query_background, self.mq_source = query_background, mq_source
        self.matching_level = matching_level
        self.patch_similarity, self.threshold = patch_similarity, threshold
        self.binarization, self.refinement = binarization, refinement
        self.posterior, self.temperature = posterior, temperature
        self.posterior_gradient, self.mask_before_last_stage = (
            posterior_gradient,
            mask_before_last_stage,
        )
        self.meta_loss_weight = meta_loss_weight

        low, mid, high = self.features.channels
        self.reduction = _reduction(low + mid, width)
        self.support_reduction = None if shared_reduction else _reduction(low + mid, width)
        self.dropout = nn.Dropout2d(dropout)
        sizes = {"prototype": width, "mask": 1}
        extra = sum(sizes[name] for name in self.extra_inputs)
        self.decoder = GuidedDecoder(width + 1 + extra, width)
        self.guidance_residual = GuidanceResidual() if guidance_residual else None
        self.shot_weights = ShotWeights(shots)
        self.base_head: nn.Module | None = None
        self.ensemble: Ensemble | None = None
        if ensemble:
            if base is not None:
                self.base_head = nn.Sequential(base.pyramid, base.classifier)
            else:
                assert num_base_classes is not None
                pyramid = PyramidPooling(high)
                classifier = nn.Conv2d(pyramid.out_channels, num_base_classes + 1, 1)
                self.base_head = nn.Sequential(pyramid, nn.Sequential(nn.Dropout2d(), classifier))
            self.base_head.requires_grad_(False)
            self.ensemble = Ensemble()
        if base is not None:
            self._of_base["num_base_classes"] = base.num_classes - 1
        self.train(self.training)

    def train(self, mode: bool = True) -> CGMGM:
        """Set the mode; encoder and base learner stay in evaluation mode."""
        super().train(mode)
        if self.base_head is not None:
            self.base_head.eval()
        return self

    def on_fit_start(self) -> None:
        """Warn if the data have another number of supports; and see the base."""
        super().on_fit_start()
        mine = self.shot_weights.shots
        theirs = getattr(getattr(self.trainer, "datamodule", None), "shots", mine)
        if theirs != mine:
            rank_zero_warn(
                f"the data have shots={theirs} and the model shots={mine}, so that all supports "
                "count alike and nothing is learned about them: set --model.shots to that of the "
                "data."
            )

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the final scores (`loss_final`) and of the decoder's own (`loss_meta`)."""
        outputs = self.episode_outputs(batch)
        losses = {
            f"loss_{name}": pixel_cross_entropy(
                self.to_image(outputs[key], batch["mask"]), batch["mask"], self.ignore_index
            )
            for name, key in (("final", "logits"), ("meta", "meta"))
        }
        if self.ensemble is None:  # then the two are the same
            return {"loss": losses["loss_meta"]}
        return {
            "loss": losses["loss_final"] + self.meta_loss_weight * losses["loss_meta"],
            **losses,
        }

    def episode_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See the base; also `meta` B x 2 x h x w, the decoder's own scores."""
        episodes, shots = batch["support_image"].shape[:2]
        query = self.extract_stages(batch["image"])
        support = self.extract_stages(batch["support_image"].flatten(0, 1))
        size = query.mid.shape[-2:]
        shares = support_shares(batch, support.mid.shape[-2:])  # B x K x 2 x h x w
        valid = resize_aligned(batch["valid"][:, None].float(), size) > 0.5

        with torch.no_grad():
            style = gram_distance(
                resize_aligned(query.low, size).repeat_interleave(shots, 0),
                resize_aligned(support.low, size),
            ).view(episodes, shots)
        weights = self.shot_weights(style)  # B x K

        reduced = self.reduction(query.middle())
        support_reduced = (self.support_reduction or self.reduction)(support.middle())
        maps: dict[str, Tensor] = {}
        if self.guidance == "prior":
            maps["prior"] = self._prior(query, support, shares, valid, weights)
        if self.guidance != "prior" or "mask" in self.extra_inputs:
            maps |= self._initial_mask(batch, query, support, shares, valid, weights.detach())
        if self.guidance == "posterior":
            raw = self.mixture_features == "raw"
            maps["posterior"] = self._posterior(
                query.middle() if raw else reduced,
                support.middle() if raw else support_reduced,
                shares,
                valid,
                maps,
            )
        guidance = maps["refined" if self.guidance == "mask" else self.guidance]
        maps.setdefault("initial", guidance)  # for pictures
        outputs = {"guidance": guidance.detach(), **maps}
        if self.answer == "guidance":
            probability = guidance.clamp(1e-6, 1 - 1e-6)
            return {"logits": torch.cat([1 - probability, probability], 1).log(), **outputs}
        inputs = [self.dropout(reduced), guidance.to(reduced.dtype)]
        if "prototype" in self.extra_inputs:
            means = _masked_mean(
                self.dropout(support_reduced).unflatten(0, (episodes, shots)), shares[:, :, :1]
            )
            prototype = (means * weights[..., None]).sum(1)
            inputs.append(prototype[..., None, None].expand_as(reduced).to(reduced.dtype))
        if "mask" in self.extra_inputs:
            inputs.append(maps["refined"].to(reduced.dtype))
        meta = self.decoder(torch.cat(inputs, 1))
        if self.guidance_residual is not None:
            meta = meta + self.guidance_residual(guidance.to(meta.dtype))
        outputs |= {"logits": meta, "meta": meta}
        if self.ensemble is not None:
            known = self._known(query.high, batch)
            distance = (style * weights).sum(1)
            outputs["logits"] = self.ensemble(meta.float().softmax(1), known, distance)
        return outputs

    # --- parts -------------------------------------------------------------------------------

    @torch.no_grad()
    def _known(self, high: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Probability of any base class, B x 1 x h x w; in training the episode's own does not count."""
        assert self.base_head is not None
        probabilities = self.base_head(high).float().softmax(1)
        known: Tensor = probabilities[:, 1:].sum(1, keepdim=True)
        if self.training:
            own = batch["base_index"].view(-1, 1, 1, 1)
            episode = probabilities.gather(1, own.expand_as(known))
            known = known - episode * (own > 0)
        return known

    def _compared(self, stages: StageFeatures) -> Tensor:
        return stages.high if self.matching_level == "high" else stages.middle()

    def _prior(
        self,
        query: StageFeatures,
        support: StageFeatures,
        shares: Tensor,
        valid: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """BAM's prior mask: similarity to each support, summed by the supports' weights."""
        with torch.no_grad():
            mask = shares[:, :, :1].flatten(0, 1)
            keys = self._compared(support)
            if self.mask_before_last_stage:
                keys = self.features.last(support.mid * mask.to(support.mid.dtype))
            keys = (keys * mask).unflatten(0, weights.shape)
            pixels = self._compared(query)
            maps = [global_similarity(pixels, one, valid) for one in keys.unbind(1)]
        return (torch.stack(maps, 1) * weights[..., None, None, None]).sum(1)

    @torch.no_grad()
    def _initial_mask(
        self,
        batch: Mapping[str, Any],
        query: StageFeatures,
        support: StageFeatures,
        shares: Tensor,
        valid: Tensor,
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """IMGR: `initial` similarity in [0, 1], `coarse` M0 and `refined` M_q, all B x 1 x h x w float32."""
        masks = shares[:, :, :1]
        pixels, keys = self._compared(query), self._compared(support).unflatten(0, weights.shape)
        similarity = torch.zeros_like(valid, dtype=torch.float32)
        # A cosine does not see how much of a pixel is foreground: those at the edge would count in
        # full.
        foreground = masks > 0.5
        foreground |= (masks > 0) & ~foreground.flatten(2).any(2)[..., None, None, None]
        for shot in range(weights.shape[1]):
            masked = keys[:, shot] * foreground[:, shot]
            both = global_similarity(pixels, masked, valid) + local_similarity(
                pixels, masked, valid, self.patch_similarity
            )
            similarity = similarity + both / 2 * weights[:, shot, None, None, None]
        similarity = stretch(similarity, valid)
        coarse = binarize(similarity, valid, self.threshold, self.binarization)
        if self.mq_source == "gt":
            if "mask" not in batch:
                raise GenSegError(
                    "mq_source gt takes the query's own labels, and plain images have none: test "
                    "it on episodes, or set mq_source to imgr."
                )
            refined = resize_aligned((batch["mask"] == 1)[:, None].float(), valid.shape[-2:]) > 0.5
        else:
            support_valid = resize_aligned(
                batch["support_valid"].flatten(0, 1)[:, None].float(), masks.shape[-2:]
            ).unflatten(0, weights.shape)
            refined = refine(
                coarse, pixels, valid, keys, masks, support_valid > 0.5, self.refinement
            )
        return {"initial": similarity, "coarse": coarse.float(), "refined": refined.float()}

    def _posterior(
        self,
        query: Tensor,
        support: Tensor,
        shares: Tensor,
        valid: Tensor,
        maps: Mapping[str, Tensor],
    ) -> Tensor:
        """CDGMG and QCPE: probability of the foreground, B x 1 x h x w."""
        episodes, shots = shares.shape[:2]
        with torch.no_grad():
            pixels = (
                support.unflatten(0, (episodes, shots)).flatten(3).transpose(2, 3).flatten(1, 2)
            )
            weights = shares.flatten(3).transpose(1, 2).flatten(2)  # B x 2 x K h w
            if self.query_statistics:
                inside = maps["refined"]
                outside = 1 - inside
                if self.query_background == "without_dropped":
                    outside = 1 - maps["coarse"].maximum(inside)
                elif self.query_background == "unlike":
                    outside = outside * (maps["initial"] < self.threshold / 2)
                own = (torch.cat([inside, outside], 1) * valid).flatten(2)
                pixels = torch.cat([pixels, query.flatten(2).mT], 1)
                weights = torch.cat([weights, own], 2)
            mixture = fit_episodes(
                pixels,
                weights,
                self.components,
                self.em_iterations,
                self.prior_strength,
                self.variance_floor,
                self.covariance,
            )
        x = query.flatten(2).mT
        density = mixture.log_density(x if self.posterior_gradient else x.detach())
        foreground, background = density.unbind(-1)
        if self.posterior == "literal":
            total = foreground + background
            total = torch.where(total.abs() < 1e-6, 1e-6, total)
            probability = foreground / total
        else:
            tempered = self.posterior == "tempered"
            temperature = (self.temperature or x.shape[-1]) if tempered else 1.0
            probability = ((foreground - background) / temperature).sigmoid()
        enough = weights[:, 0].sum(1) >= _FEWEST_PIXELS
        probability = probability.unflatten(1, query.shape[-2:])[:, None]
        probability = torch.where(enough[:, None, None, None], probability, maps["initial"])
        return probability.masked_fill(~valid, 0)


def _reduction(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU())


def _masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Mean of features B x K x C x h x w where a mask B x K x 1 x h x w is: B x K x C."""
    return (features * mask).sum((3, 4)) / (mask.sum((3, 4)) + 5e-4)
