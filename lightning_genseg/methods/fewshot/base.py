"""What the few-shot methods share: a frozen encoder, supports, episodes and their scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SegmentationModule,
    expect_frozen_parts,
)
from lightning_genseg.methods.fewshot.base_learner import BaseLearner
from lightning_genseg.methods.fewshot.networks import EncoderStages, OutputStride, StageFeatures
from lightning_genseg.methods.fewshot.support import SUPPORT_KEYS, Support, make_support
from lightning_genseg.metrics import few_shot_metrics
from lightning_genseg.metrics.calibration import CalibrationError
from lightning_genseg.metrics.segmentation import score_keys
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.letterbox import letterbox, letterbox_size
from lightning_genseg.ops.resize import crop, resize_aligned, resize_maps
from lightning_genseg.ops.views import softmax
from lightning_genseg.uncertainty.scores import AnomalyName

Scoring = Literal["compat", "exact"]
_NO_SCORE = "it knows background and foreground, and no class to be unlike"


class FewShotModule(SegmentationModule):
    """Base of the methods that find an object after a few examples; they write `episode_outputs`.

    Trained and tested on episodes (`EpisodesDataModule`); on plain images after `set_support`, or
    with batches that carry supports. Its encoder is frozen, and in evaluation mode also in
    training. Two classes: background and foreground. Logged are `mIoU` over the classes of the
    episodes, `FB_IoU`, `IoU_<class>`, in tests `ECE` and, where a method has it, `GmIoU`, the mIoU
    of its guidance alone (CGMGM, Table 1). That table's guidance of BAM is the cosine with the
    prototypes; ours is the prior mask, so that these two do not compare.

    Args:
        base: trained `BaseLearner`, whose encoder and normalisation are used.
        encoder: without a base learner: any of segmentation_models_pytorch, or `tu-<name>`.
        encoder_weights: of `encoder`: `imagenet` (downloads), the path of a state dict, or `None`.
        output_stride: of `encoder`; VGG always has 16.
        scoring: how scores of the square image become those of the query at its own size: `compat`
            as BAM's code, which is off by a few pixels where sides are no multiples of 8; `exact`
            cuts off the padding first.
        num_classes: 2.

    Raises:
        GenSegError: neither or both of `base` and `encoder`, or a wrong one; beside `base` another
            `output_stride`, `mean` or `std` than its own, or `encoder_weights`.
    """

    features: EncoderStages
    support: Support | None
    takes_supports = True
    batch_keys = (
        *SegmentationModule.batch_keys,
        *("valid", *SUPPORT_KEYS, "class_index"),
    )
    # Maps that the pictures of an episode show, and their titles (see `Report`).
    picture_maps: ClassVar[Mapping[str, str]] = {
        "initial": "similarity",
        "coarse": "initial mask",
        "refined": "refined mask",
        "posterior": "posterior",
    }
    not_kept = (*SegmentationModule.not_kept, "base", "inference", "anomaly_score")
    sources = (*SegmentationModule.sources, "base_learner", "published")
    chosen_anew = (*SegmentationModule.chosen_anew, "scoring")

    def __init__(
        self,
        base: BaseLearner | None = None,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        output_stride: OutputStride = 8,
        scoring: Scoring = "compat",
        num_classes: int = 2,
        **kwargs: Any,
    ) -> None:
        check_arguments(FewShotModule.__init__, locals())
        if num_classes != 2:
            raise GenSegError(
                f"num_classes is {num_classes}, but a few-shot method knows only background and "
                "foreground: give it data in episodes, such as EpisodesDataModule."
            )
        ignored = kwargs.get("ignore_index")
        if isinstance(ignored, int) and ignored != IGNORE:
            raise GenSegError(
                f"ignore_index is {ignored}, but masks of a few-shot method are 1 "
                "on the object, 0 elsewhere and 255 where nothing counts: write 255 for it."
            )
        if (base is None) == (encoder is None):
            raise GenSegError(
                "a few-shot method needs an encoder: give base_learner, the checkpoint of a "
                "BaseLearner run, or the name of an encoder, not both."
            )
        for name, reason in (
            ("inference", "queries and supports fill one square, without windows or scales"),
            ("anomaly_score", _NO_SCORE),
        ):
            if name in kwargs:
                raise GenSegError(f"{type(self).__name__} takes no {name}: {reason}. Leave it out.")
        self._of_base: dict[str, Any] = {}  # arguments in checkpoints, instead of the base learner
        if base is not None:
            # What says the same is let through, and defaults, which LightningCLI always gives.
            unused = ["encoder_weights"] if encoder_weights is not None else []
            if output_stride not in (8, base.features.output_stride):
                unused.append("output_stride")
            for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
                if name not in kwargs:
                    continue
                given = kwargs[name]
                check_arguments(SegmentationModule.__init__, {name: given})
                own = getattr(base, name).flatten().cpu()
                same = torch.equal(torch.tensor(given, dtype=own.dtype), own)
                if not same and tuple(given) != default:
                    unused.append(name)
            if unused:
                raise GenSegError(
                    f"{' and '.join(unused)} is given beside a base learner, whose own is used: "
                    "leave one of them out."
                )
            self._of_base = {
                "mean": base.mean.flatten().tolist(),
                "std": base.std.flatten().tolist(),
            }
            kwargs |= self._of_base
        super().__init__(num_classes, inference=None, anomaly_score=None, **kwargs)
        if base is None:
            self.features = EncoderStages(str(encoder), encoder_weights, output_stride)
        else:
            self.features = base.features
            stages = {"encoder": base.features.name, "output_stride": base.features.output_stride}
            self._of_base |= {"base_learner": None, **stages}
        self.features.requires_grad_(False).eval()
        self.scoring, self.support = scoring, None
        self.base_classes = None if base is None else (base.class_names or [])[1:]
        self.val_metrics, self.test_metrics = few_shot_metrics(), few_shot_metrics()
        self.val_guidance, self.test_guidance = few_shot_metrics(), few_shot_metrics()

    @abstractmethod
    def episode_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of the queries of episodes, at the resolution of the features.

        Returns:
            `scores` B x 2 x h x w, whose larger one decides and of which `to_logits` makes logits,
            and, where the method has them, `guidance` B x 1 x h x w in [0,
            1] and maps for pictures, of its shape: `initial`, `coarse`, `refined`, `posterior`.
        """

    def to_logits(self, scores: Tensor) -> Tensor:
        """Logits from the `scores` of `episode_outputs`, of any resolution: here the same."""
        return scores

    def computable_scores(self) -> list[AnomalyName]:
        """None: it knows background and foreground, and no class to be unlike."""
        return []

    def set_anomaly_score(self, name: AnomalyName | None) -> None:
        """Refuse all."""
        if name is not None:
            raise GenSegError(f"{type(self).__name__} takes no anomaly_score: {_NO_SCORE}.")
        super().set_anomaly_score(None)

    def undeployable(self) -> str | None:
        """It needs to know what to look for."""
        if self.support is None:
            return "nothing says what to look for: call set_support, or give support_root."
        return super().undeployable()

    # --- plain images ------------------------------------------------------------------------

    def set_support(
        self,
        images: Sequence[Tensor | NDArray[Any]],
        masks: Sequence[Tensor | NDArray[Any]],
        size: int | None = None,
    ) -> None:
        """Set what is to be found from now on in plain images (`forward`, `predict_image`).

        Args:
            images: K images of any sizes: tensors 3 x H x W in [0, 1], or, as for `predict_image`,
                NumPy arrays H x W x 3 of uint8.
            masks: K masks H x W, tensors or NumPy arrays: 1 on the object, 0 elsewhere, 255 where
                it is unknown.
            size: side in pixels of the square in which the network sees supports and queries, at
                least 8; left out, that of its training, or 473 where that is not known. What is
                larger is smoothed as it shrinks (`ops.letterbox`); in episodes and with
                `FewShotFolderDataModule` it is not, so that pixels differ a little.

        Raises:
            GenSegError: a wrong size, no image, another number of masks, other sizes or values, no
                object, or none that is left at this size, or nothing but the object.
        """
        size = self.training_size if size is None else size
        self.support = make_support(images, masks, size, self.ignore_index)

    @property
    def training_size(self) -> int:
        """Side in pixels of the squares of its training; the papers' 473 where it is not known."""
        size: int = self.facts.get("size", 473)
        return size

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` B x 2 x H x W of plain images, for the object of `set_support`.

        Raises:
            GenSegError: there is no support.
        """
        if self.support is None:
            raise GenSegError(
                "nothing says what to look for: call set_support, or predict with data that carry "
                "supports, such as FewShotFolderDataModule."
            )
        square, valid = letterbox(image, self.support.images.shape[-1])
        batch = {"image": square, "valid": valid}
        for key, part in zip(SUPPORT_KEYS, self.support, strict=True):
            batch[key] = part.to(image.device).expand(image.shape[0], *part.shape)
        scores = self.to_image(self.episode_outputs(batch)["scores"], square)
        return {"logits": self.to_logits(self._to_query(scores, image.shape[-2:], "exact"))}

    def extract_stages(self, images: Tensor, valid: Tensor | None = None) -> StageFeatures:
        """Features of the frozen encoder for images in [0, 1].

        Where `valid` (B x H x W bool) says that there is padding, NaN and infinity count as black.
        """
        with torch.no_grad():
            if valid is not None:
                images = torch.where(valid[:, None], images, images.nan_to_num(0, 0, 0))
            stages: StageFeatures = self.features(self.normalize(images))
        return stages

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Upsample bilinearly with aligned corners, as BAM."""
        return resize_aligned(scores.float(), image.shape[-2:])

    def _to_query(self, maps: Tensor, size: Sequence[int], scoring: Scoring) -> Tensor:
        """Maps of a square B x C x S x S to the query's own size H x W."""
        height, width = size
        if scoring == "compat":  # the square becomes one of the longer side
            longer = max(height, width)
            return resize_aligned(maps, (longer, longer))[..., :height, :width]
        rows, columns = letterbox_size(height, width, maps.shape[-1])
        return resize_maps(crop(maps, rows, columns), size)

    # --- steps -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FewShotModule:
        """Set the mode; the encoder stays in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pixel cross-entropy of the queries."""
        scores = self.to_image(self.episode_outputs(batch)["scores"], batch["mask"])
        return {"loss": pixel_cross_entropy(scores, batch["mask"], self.ignore_index)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict and score episodes; `mask` and the method's maps are returned for pictures."""
        return self._score_episodes(batch, self.val_metrics, self.val_guidance)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._score_episodes(
            batch, self.test_metrics, self.test_guidance, self.evaluation.calibration
        )

    def _score_episodes(
        self,
        batch: dict[str, Any],
        metrics: MetricCollection,
        guidance_metrics: MetricCollection,
        calibration: CalibrationError | None = None,
    ) -> dict[str, Tensor]:
        self._check_batch(batch)
        outputs = self.episode_outputs(batch)
        target = batch.get("full_mask", batch["mask"])

        def at_target(maps: Tensor) -> Tensor:
            if "full_mask" in batch:
                maps = self._to_query(maps, target.shape[-2:], self.scoring)
            return maps

        def count(foreground: Tensor, collection: MetricCollection) -> None:
            collection.update(foreground, target, batch["class_index"], batch.get("candidates"))

        square = self.to_image(outputs["scores"], batch["image"])
        scores = at_target(square)
        count(scores[:, 1] > scores[:, 0], metrics)
        if calibration is not None:
            calibration.update(softmax(self.to_logits(scores)), target)
        if "guidance" in outputs:
            guidance = at_target(self.to_image(outputs["guidance"], batch["image"]))
            count(guidance[:, 0] > 0.5, guidance_metrics)
        shown = {
            name: self.to_image(outputs[name], batch["image"])[:, 0]
            for name in self.picture_maps
            if name in outputs
        }
        return {"mask": square.argmax(1), **shown}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`mask` B x H x W int64 and `name`; supports in the batch come before `set_support`'s.

        Raises:
            GenSegError: the images of the batch have different supports.
        """
        if "support_image" not in batch:
            return super().predict_step(batch, batch_idx)
        parts = [batch[key] for key in SUPPORT_KEYS]
        if not all(torch.equal(part, part[:1].expand_as(part)) for part in parts):
            raise GenSegError(
                "the images of a batch have different supports, and one set is for all: set "
                "batch_size to 1."
            )
        size, trained = parts[0].shape[-1], self.facts.get("size", parts[0].shape[-1])
        if batch_idx == 0 and size != trained:
            rank_zero_warn(
                f"the model was trained in squares of {trained} pixels and sees the images in "
                f"squares of {size}: set data.size to {trained}."
            )
        before, self.support = self.support, Support(*(part[0] for part in parts))
        try:
            return super().predict_step(batch, batch_idx)
        finally:
            self.support = before

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        super().on_validation_epoch_start()
        self.val_guidance.reset()

    def on_validation_epoch_end(self) -> None:
        """Log `val_mIoU`, `val_FB_IoU`, `val_IoU_<class>`, and `val_GmIoU` if there is guidance."""
        self._log_episode_scores("val", self.val_metrics, self.val_guidance)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, and `test_ECE`."""
        self._log_episode_scores("test", self.test_metrics, self.test_guidance)
        self.log("test_ECE", self.evaluation.calibration.compute(), sync_dist=True)

    def _log_episode_scores(
        self, prefix: str, metrics: MetricCollection, guidance: MetricCollection
    ) -> None:
        values = metrics.compute()
        scores = {name: values[name] for name in ("mIoU", "FB_IoU")}
        if guidance["mIoU"].update_called:
            scores["GmIoU"] = guidance.compute()["mIoU"]
        keys = score_keys(self._names())
        for index in values["IoU"].isfinite().nonzero().flatten().tolist():
            scores[keys[index] if keys else f"IoU_{index}"] = values["IoU"][index]
        metrics.reset()
        guidance.reset()
        for name, value in scores.items():
            self.log(f"{prefix}_{name}", value, prog_bar=name == "mIoU", sync_dist=True)

    # --- what fits together ------------------------------------------------------------------

    def _note_training(self) -> None:
        super()._note_training()
        size = getattr(self._data(), "size", None)
        if isinstance(size, int):
            self.facts["size"] = size

    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _names(self) -> Sequence[str]:
        """Names of the classes of the episodes, if the data have any."""
        return getattr(getattr(self._data(), "data", None), "class_names", None) or ()

    def setup(self, stage: str) -> None:
        """Refuse to fit where there is nothing to train, and names alike; else as the base."""
        super().setup(stage)
        score_keys(self._names())
        if stage == "fit" and not self.needs_training:
            raise GenSegError(
                f"this {type(self).__name__} has nothing to train: run `genseg test` or `genseg "
                "predict` at once."
            )

    def on_fit_start(self) -> None:
        """Refuse data of another fold: the encoder would know the novel classes."""
        super().on_fit_start()
        expect_frozen_parts()
        self.on_validation_start()

    def on_validation_start(self) -> None:
        """Refuse data of another fold."""
        theirs = getattr(self._data(), "base_classes", None)
        if theirs is None or not self.base_classes or list(theirs) == list(self.base_classes):
            return
        raise GenSegError(
            f"the base learner was trained on {', '.join(self.base_classes)}, and the base classes "
            f"of the data are {', '.join(theirs)}: use the base learner of the same fold."
        )

    def on_test_start(self) -> None:
        """Refuse novel classes that the base learner knows; other data it may be tested on."""
        super().on_test_start()
        self.test_guidance.reset()  # as the base does with the other counts
        novel = getattr(self._data(), "novel_classes", ())
        known = [name for name in novel if name in (self.base_classes or ())]
        if known:
            raise GenSegError(
                f"the base learner was trained on {', '.join(known)}, which the data take for "
                "novel: use the base learner of the same fold."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the base learner's checkpoint said, and forget where it was."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= self._of_base
        if self.base_classes:
            checkpoint["base_classes"] = list(self.base_classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        self.base_classes = checkpoint.get("base_classes", self.base_classes)
