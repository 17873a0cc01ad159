"""CGMGM: few-shot segmentation by mixtures of supports and query; and BAM, its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_genseg.arguments import as_options, check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot.base import FewShotModule
from lightning_genseg.methods.fewshot.base_learner import load_base_learner
from lightning_genseg.methods.fewshot.matching import (
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
    PyramidPooling,
    ShotWeights,
    StageFeatures,
    gram_distance,
)
from lightning_genseg.methods.fewshot.options import (
    DecoderOptions,
    EpisodicMixtureOptions,
    MatchingOptions,
    PosteriorOptions,
)
from lightning_genseg.methods.fewshot.published import load_published
from lightning_genseg.methods.fewshot.support import support_shares
from lightning_genseg.mixtures import fit_episodes
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_aligned

# With fewer foreground pixels, the background's mixture wins nearly everywhere: the similarity
# guides instead.
_FEWEST_PIXELS = 5


class _Episodes(NamedTuple):
    """Features and masks of a batch of episodes."""

    query: StageFeatures
    valid: Tensor  # B x 1 x h x w bool: query pixels that are no padding
    support: StageFeatures  # of B K images
    shares: Tensor  # B x K x 2 x h x w in [0, 1]: foreground and background
    weights: Tensor  # B x K: how much each support counts


class CGMGM(FewShotModule):
    """Segments a new object from a few examples, guided by mixtures of its pixels and of the rest.

    CGMGM: A Cross-Gaussian Mixture Generative Model for Few-Shot Semantic Segmentation, Shen et
    al., AAAI 2024. Of the query, a first mask is found by similarity to the supports (IMGR:
    `matching`); mixtures are fitted to the pixels of supports and query (CDGMG:
    `mixtures.fit_episodes`). The posterior of the query's pixels (QCPE) guides a decoder, whose
    scores are merged with those of a base learner, as in Learning What Not to Segment (BAM), Lang
    et al., CVPR 2022. Encoder and base learner are frozen.

    BAM is this with `guidance="prior"`, `matching.mask_before_last_stage`,
    `decoder.extra_inputs=["prototype"]` and without `decoder.shared_reduction`.

    - As BAM's authors, to 5e-6 of their numbers: decoder, prior, prototype, weights of the shots,
      ensemble, losses and their gradients. Not as they: the base learner's dropout is off in
      training too, its loss (a constant) is left out, and two layers weight the shots whatever
      their `kshot_trans_dim`.
    - As the paper of CGMGM, of which no code was published: similarities (Eqs. 2-4), diagonal
      mixtures of supports and query together (Eqs. 8-11), guidance and features to BAM's decoder.
      By option: `posterior.form` bayes, and as printed `literal` (Eqs. 12-13) and
      `matching.refinement` literal (Eqs. 5-7), which cannot be what was run.
    - Ours: answers have the merged probabilities, which BAM's code takes for logits, so that none
      is surer than about 0.8.
    - Ours, where the paper is silent: the best support pixel counts, a threshold of 0.5, start and
      prior of EM (`mixtures.fit_episodes`), features before dropout, no gradient through the
      posterior, the pixels of all supports in one mixture, the similarity as guidance where an
      object has less than five cells. Ours, measured: the default `posterior.form`.

    Args:
        base_learner: checkpoint of a `BaseLearner` of the same fold. Without one, give `encoder`
            and set `ensemble` to false.
        shots: K of training; with another number of supports all count alike.
        guidance: what the decoder is given beside features: the `posterior`, the `mask` M_q
            (Table 5 without C&Q), or the `prior`, the similarity of BAM and PFENet.
        answer: who decides: the `decoder`, or the `guidance` itself, which needs no training: then
            `mixture.features` has to be `raw`, and no base learner takes part.
        mixture: the mixtures of an episode.
        posterior: the probability that they give each pixel of the query.
        matching: the query's first mask.
        decoder: the decoder, and the features that it reads.
        ensemble: whether the base learner takes part in the prediction; not in answer `guidance`.
        meta_loss_weight: of the cross-entropy of the decoder's own scores.
        num_base_classes: of a base learner without checkpoint, background not counted; what a
            checkpoint of this module sets.
        published: checkpoint of BAM's authors, to be tested, with `encoder` tu-resnet50s or
            vgg16_bn, BAM's options, and the `shots` and `num_base_classes` of its training.

    Raises:
        GenSegError: arguments that exclude each other, or a base learner of another kind.
        MissingFileError: the base learner's checkpoint does not exist.

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
        guidance: Literal["posterior", "mask", "prior"] = "posterior",
        answer: Literal["decoder", "guidance"] = "decoder",
        mixture: EpisodicMixtureOptions = EpisodicMixtureOptions(),
        posterior: PosteriorOptions = PosteriorOptions(),
        matching: MatchingOptions = MatchingOptions(),
        decoder: DecoderOptions = DecoderOptions(),
        ensemble: bool = True,
        meta_loss_weight: float = 1.0,
        num_base_classes: int | None = None,
        published: Path | None = None,
        **kwargs: Any,
    ) -> None:
        least = dict.fromkeys(("shots", "num_base_classes"), "[1, inf)")
        check_arguments(CGMGM.__init__, locals(), meta_loss_weight="[0, inf)", **least)
        mixture = as_options(EpisodicMixtureOptions, mixture)
        posterior = as_options(PosteriorOptions, posterior)
        matching = as_options(MatchingOptions, matching)
        decoder = as_options(DecoderOptions, decoder)
        ensemble = ensemble and answer == "decoder"
        reduced = guidance == "posterior" and mixture.features == "reduced"
        if reduced and answer == "guidance":
            raise GenSegError(
                "answer guidance trains no reduction of features: set mixture.features to raw."
            )
        if reduced and not decoder.shared_reduction:
            raise GenSegError(
                "guidance posterior models supports and query in one space: set "
                "decoder.shared_reduction to true, or mixture.features to raw."
            )
        if guidance != "prior":
            for name in ("mask_before_last_stage", "prior_cells"):
                if getattr(matching, name) != getattr(MatchingOptions(), name):
                    raise GenSegError(
                        f"matching.{name} is an option of the prior and guidance is {guidance}: "
                        "set guidance to prior, or leave it out."
                    )
        if ensemble and base_learner is None and num_base_classes is None:
            raise GenSegError(
                "the ensemble needs base_learner, the checkpoint of a BaseLearner run on the same "
                "fold: give it, or set ensemble to false."
            )
        base = None if base_learner is None else load_base_learner(base_learner)
        if base is not None and num_base_classes not in (None, base.num_classes - 1):
            raise GenSegError(
                f"num_base_classes is {num_base_classes} beside a base learner of "
                f"{base.num_classes - 1}: leave it out."
            )
        super().__init__(base=base, **kwargs)
        self.guidance, self.answer = guidance, answer
        self.needs_training = answer == "decoder" and published is None
        self.mixture, self.posterior, self.matching = mixture, posterior, matching
        self.extra_inputs, self.meta_loss_weight = decoder.extra_inputs, meta_loss_weight

        low, mid, high = self.features.channels
        width = decoder.width
        self.reduction = _reduction(low + mid, width)
        self.has_prototype = "prototype" in self.extra_inputs and answer == "decoder"
        self.support_reduction: nn.Module | None = None
        if self.has_prototype and not decoder.shared_reduction:  # else nothing reads it
            self.support_reduction = _reduction(low + mid, width)
        self.dropout = nn.Dropout2d(decoder.dropout)
        extra = sum({"prototype": width, "mask": 1}[name] for name in self.extra_inputs)
        self.decoder = GuidedDecoder(width + 1 + extra, width)
        self.guidance_residual = GuidanceResidual() if decoder.residual else None
        # What else the weights decide is out of the gradient's reach: they would stay random.
        self.shot_weights = ShotWeights(shots if ensemble or self.has_prototype else 1)
        self.base_head: nn.Module | None = None
        self.ensemble: Ensemble | None = None
        if base is not None:
            num_base_classes = self._of_base["num_base_classes"] = base.num_classes - 1
        self.num_base_classes = num_base_classes or 0
        if ensemble:
            if base is not None:
                self.base_head = nn.Sequential(base.pyramid, base.classifier)
            else:
                pyramid = PyramidPooling(high)
                classifier = nn.Conv2d(pyramid.out_channels, self.num_base_classes + 1, 1)
                self.base_head = nn.Sequential(pyramid, nn.Sequential(nn.Dropout2d(), classifier))
            self.base_head.requires_grad_(False)
            self.ensemble = Ensemble()
        if published is not None:
            load_published(self, published)
        self.train(self.training)

    def train(self, mode: bool = True) -> CGMGM:
        """Set the mode; encoder and base learner stay in evaluation mode."""
        super().train(mode)
        if self.base_head is not None:
            self.base_head.eval()
        return self

    def setup(self, stage: str) -> None:
        """Refuse to fit with the weight of a loss that there is not; else as the base."""
        super().setup(stage)
        # Not when it is built: older checkpoints may hold such a weight.
        if stage == "fit" and self.ensemble is None and self.meta_loss_weight != 1:
            raise GenSegError(
                "meta_loss_weight weighs the decoder's loss against that of the ensemble, and "
                "there is none: leave it out, or set ensemble to true."
            )

    def on_fit_start(self) -> None:
        """Refuse classes that the ensemble lacks, warn of another number of supports."""
        super().on_fit_start()
        self._need_base_classes(len(getattr(self._data(), "base_classes", None) or ()))
        mine = self.shot_weights.shots
        theirs = getattr(self._data(), "shots", mine)
        if theirs != mine and (self.ensemble is not None or self.has_prototype):
            rank_zero_warn(
                f"the data have shots={theirs} and the model shots={mine}, so that all supports "
                "count alike and nothing is learned about them: set --model.shots to that of the "
                "data."
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As the base; older checkpoints hold layers that nothing had trained."""
        untrained = self._untrained(state_dict)
        kept = {name: value for name, value in state_dict.items() if name not in untrained}
        return super().load_state_dict(kept, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on training where the optimiser counts layers that are gone."""
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting and self._untrained(checkpoint["state_dict"]):
            raise GenSegError(
                "the checkpoint is of an older version, which had layers that nothing trained: "
                "training cannot go on from it. Train anew; test and predict take it."
            )

    def _untrained(self, state: Mapping[str, Any]) -> set[str]:
        """Names of the layers in a state dict that only older versions had."""
        parts = ("shot_weights.layers.", "support_reduction.")
        return {name for name in state.keys() - self.state_dict() if name.startswith(parts)}

    def to_logits(self, scores: Tensor) -> Tensor:
        """See the base: the ensemble's scores are no logits."""
        return scores if self.ensemble is None else self.ensemble.to_logits(scores)

    def undeployable(self) -> str | None:
        """Options whose size depends on the image."""
        if self.matching.binarization != "fixed" or self.mixture.covariance == "full":
            return (
                "a graph holds neither matching.binarization otsu or quantile nor "
                "mixture.covariance full: train with fixed and diagonal."
            )
        return super().undeployable()

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy of the final scores (`loss_final`), of the decoder's own (`loss_meta`).

        Raises:
            GenSegError: there is nothing to train (`answer` guidance), or the ensemble is not told
                the base class of each episode (`base_index`), or one that its base learner lacks.
        """
        if self.answer == "guidance":
            raise GenSegError("answer is guidance, which trains nothing: set it to decoder.")
        if self.ensemble is not None and self.training:
            if "base_index" not in batch:
                raise GenSegError(
                    "a batch has no base_index, the class of its episode among those of the base "
                    "learner: take training episodes of EpisodesDataModule, or set ensemble to "
                    "false."
                )
            if batch["base_index"].device.type == "cpu":  # a GPU would have to be waited for
                self._need_base_classes(int(batch["base_index"].max()))
        outputs, mask = self.episode_outputs(batch), batch["mask"]
        meta = pixel_cross_entropy(self.to_image(outputs["meta"], mask), mask, self.ignore_index)
        if self.ensemble is None:
            return {"loss": meta}
        final = self.to_image(outputs["scores"], mask)
        final = pixel_cross_entropy(final, mask, self.ignore_index)
        loss = final + self.meta_loss_weight * meta
        return {"loss": loss, "loss_final": final, "loss_meta": meta}

    def episode_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """See the base; also `meta` B x 2 x h x w, the decoder's own scores."""
        shape = batch["support_image"].shape[:2]  # B x K
        query = self.extract_stages(batch["image"], batch["valid"])
        support = self.extract_stages(
            batch["support_image"].flatten(0, 1), batch["support_valid"].flatten(0, 1)
        )
        size = query.mid.shape[-2:]
        with torch.no_grad():
            lows = resize_aligned(query.low, size).repeat_interleave(shape[1], 0)
            style = gram_distance(lows, resize_aligned(support.low, size)).view(shape)
        shares = support_shares(batch, support.mid.shape[-2:])
        episodes = _Episodes(
            query, _resized(batch["valid"], size), support, shares, self.shot_weights(style)
        )
        reduced = self.reduction(query.middle())
        support_reduced = None
        reads_posterior = self.guidance == "posterior" and self.mixture.features == "reduced"
        if reads_posterior or self.has_prototype:
            support_reduced = (self.support_reduction or self.reduction)(support.middle())

        maps: dict[str, Tensor] = {}
        if self.guidance == "prior":
            maps["prior"] = self._prior(episodes)
        if self.guidance != "prior" or "mask" in self.extra_inputs:
            maps |= self._initial_mask(episodes, batch)
        if self.guidance == "posterior":
            modelled = query.middle(), support.middle()
            if support_reduced is not None and reads_posterior:
                modelled = reduced, support_reduced
            maps["posterior"] = self._posterior(modelled, episodes, maps)
        guidance = maps["refined" if self.guidance == "mask" else self.guidance]
        maps.setdefault("initial", guidance)  # for pictures
        outputs = {"guidance": guidance.detach(), **maps}
        if self.answer == "guidance":
            probability = guidance.clamp(1e-6, 1 - 1e-6)
            return {"scores": torch.cat([1 - probability, probability], 1).log(), **outputs}

        inputs = [self.dropout(reduced), guidance]
        if support_reduced is not None and self.has_prototype:
            masks = shares[:, :, :1]
            totals = (self.dropout(support_reduced).unflatten(0, shape) * masks).sum((3, 4))
            means = totals / (masks.sum((3, 4)) + 5e-4)  # B x K x C
            prototype = (means * episodes.weights[..., None]).sum(1)
            inputs.append(prototype[..., None, None].expand_as(reduced))
        if "mask" in self.extra_inputs:
            inputs.append(maps["refined"])
        meta = self.decoder(torch.cat([part.to(reduced.dtype) for part in inputs], 1))
        if self.guidance_residual is not None:
            meta = meta + self.guidance_residual(guidance.to(meta.dtype))
        outputs |= {"scores": meta, "meta": meta}
        if self.ensemble is not None:
            distance = (style * episodes.weights).sum(1)
            known = self._known(query.high, batch)
            outputs["scores"] = self.ensemble(meta.float().softmax(1), known, distance)
        return outputs

    # --- parts -------------------------------------------------------------------------------

    def _need_base_classes(self, count: int) -> None:
        if self.ensemble is not None and count > self.num_base_classes:
            raise GenSegError(
                f"the episodes have a base class {count} and the base learner knows "
                f"{self.num_base_classes}: take the base learner of the same fold, or set ensemble "
                "to false."
            )

    @torch.no_grad()
    def _known(self, high: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Probability of any base class, B x 1 x h x w; in training but the episode's own."""
        assert self.base_head is not None
        probabilities = self.base_head(high).float().softmax(1)
        known: Tensor = probabilities[:, 1:].sum(1, keepdim=True)
        if self.training:
            own = batch["base_index"].view(-1, 1, 1, 1)
            episode = probabilities.gather(1, own.expand_as(known))
            known = known - episode * (own > 0)
        return known

    def _compared(self, stages: StageFeatures) -> Tensor:
        return stages.high if self.matching.level == "high" else stages.middle()

    def _prior(self, episodes: _Episodes) -> Tensor:
        """BAM's prior mask: similarity to each support, summed by the supports' weights."""
        query, valid, support, shares, weights = episodes
        with torch.no_grad():
            mask = shares[:, :, :1].flatten(0, 1)
            keys = self._compared(support)
            if self.matching.mask_before_last_stage:
                keys = self.features.last(support.mid * mask.to(support.mid.dtype))
            keys = (keys * mask).unflatten(0, weights.shape)
            pixels = self._compared(query)
            cells = valid | (self.matching.prior_cells == "all")
            maps = [global_similarity(pixels, one, cells) for one in keys.unbind(1)]
        return (torch.stack(maps, 1) * weights[..., None, None, None]).sum(1)

    @torch.no_grad()
    def _initial_mask(self, episodes: _Episodes, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """IMGR, all B x 1 x h x w: `initial` similarity in [0, 1], `coarse` M0, `refined` M_q."""
        query, valid, support, shares, weights = episodes
        options, masks = self.matching, shares[:, :, :1]
        pixels, keys = self._compared(query), self._compared(support).unflatten(0, weights.shape)
        # A cosine does not see how much of a pixel is foreground: edges would count in full.
        foreground = masks > 0.5
        foreground |= (masks > 0) & ~foreground.flatten(2).any(2)[..., None, None, None]
        similarity = torch.zeros_like(valid, dtype=torch.float32)
        for shot, weight in enumerate(weights.unbind(1)):
            masked = keys[:, shot] * foreground[:, shot]
            patches = local_similarity(pixels, masked, valid, options.patch_similarity)
            both = global_similarity(pixels, masked, valid) + patches
            similarity = similarity + both / 2 * weight[:, None, None, None]
        similarity = stretch(similarity, valid)
        coarse = binarize(similarity, valid, options.threshold, options.binarization)
        if options.source == "imgr":
            inside = _resized(batch["support_valid"].flatten(0, 1), masks.shape[-2:])
            inside = inside.unflatten(0, weights.shape)
            refined = refine(coarse, pixels, valid, keys, masks, inside, options.refinement)
        elif "mask" in batch:
            refined = _resized(batch["mask"] == 1, valid.shape[-2:])
        else:
            raise GenSegError(
                "matching.source gt takes the query's own labels, and plain images have none: test "
                "it on episodes, or set matching.source to imgr."
            )
        return {"initial": similarity, "coarse": coarse.float(), "refined": refined.float()}

    def _posterior(
        self, modelled: tuple[Tensor, Tensor], episodes: _Episodes, maps: Mapping[str, Tensor]
    ) -> Tensor:
        """CDGMG and QCPE: probability of the foreground, B x 1 x h x w."""
        query, support = modelled
        options, valid, shares = self.mixture, episodes.valid, episodes.shares
        x = query.flatten(2).mT  # B x h w x C
        with torch.no_grad():
            pixels = support.unflatten(0, shares.shape[:2]).flatten(3).mT.flatten(1, 2)
            weights = shares.flatten(3).transpose(1, 2).flatten(2)  # B x 2 x K h w
            if options.query_statistics:
                inside = maps["refined"]
                outside = 1 - inside
                if options.query_background == "without_dropped":
                    outside = 1 - maps["coarse"].maximum(inside)
                elif options.query_background == "unlike":
                    outside = outside * (maps["initial"] < self.matching.threshold / 2)
                own = (torch.cat([inside, outside], 1) * valid).flatten(2)
                pixels = torch.cat([pixels, x], 1)
                weights = torch.cat([weights, own], 2)
            mixture = fit_episodes(
                pixels,
                weights,
                components=options.components,
                iterations=options.iterations,
                prior_strength=options.prior_strength,
                variance_floor=options.variance_floor,
                covariance=options.covariance,
            )
        density = mixture.log_density(x if self.posterior.gradient else x.detach())
        foreground, background = density.unbind(-1)
        if self.posterior.form == "literal":
            total = foreground + background
            probability = foreground / torch.where(total.abs() < 1e-6, 1e-6, total)
        else:
            ratio = foreground - background
            probability = (ratio / self._unit(ratio, valid.flatten(1), x.shape[-1])).sigmoid()
        enough = (weights[:, 0].sum(1) >= _FEWEST_PIXELS)[:, None, None, None]
        probability = probability.unflatten(1, query.shape[-2:])[:, None]
        return torch.where(enough, probability, maps["initial"]).masked_fill(~valid, 0)

    def _unit(self, ratio: Tensor, valid: Tensor, dim: int) -> Tensor | float:
        """By what the log-likelihood ratio B x N is divided; `valid` is B x N bool."""
        if self.posterior.form == "bayes":
            return 1.0
        if self.posterior.form == "tempered":
            return self.posterior.temperature or dim
        ratio = ratio.detach().masked_fill(~valid, 0)
        share = valid / valid.sum(1, keepdim=True).clamp_min(1)
        spread = ratio - (ratio * share).sum(1, keepdim=True)
        deviation = (spread.square() * share).sum(1, keepdim=True).sqrt()
        return deviation.clamp_min(1e-6)


def _resized(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks B x H x W bool to B x 1 x h x w bool: true where most of a cell is."""
    return resize_aligned(masks[:, None].float(), size) > 0.5


def _reduction(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.ReLU())
