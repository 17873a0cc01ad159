"""What the few-shot methods share: episodes, supports, scores; and a baseline that needs no training."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SegmentationModule,
    expect_frozen_parts,
)
from lightning_genseg.methods.fewshot.base_learner import BaseLearner
from lightning_genseg.methods.fewshot.networks import EncoderStages, OutputStride, StageFeatures
from lightning_genseg.metrics.few_shot import few_shot_metrics
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.letterbox import letterbox, letterbox_size
from lightning_genseg.ops.resize import resize_aligned, resize_labels

Scoring = Literal["compat", "exact"]

# What the pictures of an episode show, in this order.
EPISODE_MAPS = ("initial", "coarse", "refined", "posterior")


class Support(NamedTuple):
    """Annotated images of one object, all in one square: K x 3 x S x S, K x S x S, K x S x S bool."""

    images: Tensor
    masks: Tensor
    valid: Tensor


class FewShotModule(SegmentationModule):
    """Base of the methods that segment an object after a few examples; a subclass writes `episode_outputs`.

    Trained and tested on episodes (see `datasets.TrainEpisodes`); on plain images after
    `set_support`, or with batches that carry supports. Its encoder is frozen, and in evaluation
    mode also in training. Two classes: background and foreground. Logged are `mIoU` over the
    classes of the episodes, `FB_IoU`, `IoU_<class>` and, where a method has it, `GmIoU`, the mIoU
    of its guidance alone (CGMGM, Table 1).

    Args:
        base: trained `BaseLearner`, whose encoder is used.
        encoder: instead of it; any encoder of segmentation_models_pytorch, or `tu-<name>`.
        encoder_weights: of `encoder`: `imagenet` (downloads), the path of a state dict, or `None`.
        output_stride: of `encoder`, see `EncoderStages`.
        scoring: how scores of the square image become those of the query at its own size: `compat`
            as BAM's code, which is off by a few pixels where sides are no multiples of 8; `exact`
            cuts off the padding first.
        num_classes: 2.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        mean: see there; the base learner's, if there is one.
        std: likewise.
        optimizer: see there.
        lr_scheduler: see there.
        decay_norms: see there.

    Raises:
        ValueError: neither or both of `base` and `encoder`, or a wrong one.
    """

    features: EncoderStages
    needs_training = True
    takes_supports = True
    not_kept = (*SegmentationModule.not_kept, "base")

    def __init__(
        self,
        base: BaseLearner | None = None,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        output_stride: OutputStride = 8,
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
        if num_classes != 2:
            raise GenSegError(
                f"num_classes is {num_classes}, but a few-shot method knows only background and "
                "foreground: give it data in episodes, such as EpisodesDataModule."
            )
        if (base is None) == (encoder is None):
            raise GenSegError(
                "a few-shot method needs an encoder: give base_learner, the checkpoint of a "
                "BaseLearner run, or the name of an encoder, not both."
            )
        super().__init__(
            num_classes,
            mean if base is None else base.mean.flatten().tolist(),
            std if base is None else base.std.flatten().tolist(),
            ignore_index=ignore_index,
            class_names=class_names,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            decay_norms=decay_norms,
        )
        if base is not None:
            self.features = base.features
        else:
            assert encoder is not None
            self.features = EncoderStages(encoder, encoder_weights, output_stride)
        self.features.requires_grad_(False)
        self.scoring = scoring
        self.support: Support | None = None
        self.base_classes = None if base is None else (base.class_names or [])[1:]
        # What a checkpoint needs to be loaded without the base learner's.
        self._of_base: dict[str, Any] = {}
        if base is not None:
            stages = base.features
            self._of_base = {"encoder": stages.name, "output_stride": stages.output_stride}
        self.val_metrics, self.test_metrics = few_shot_metrics(), few_shot_metrics()
        self.val_guidance, self.test_guidance = few_shot_metrics(), few_shot_metrics()

    # --- to be written by a method -----------------------------------------------------------

    @abstractmethod
    def episode_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the network says of the queries of episodes, at the resolution of its features.

        Returns:
            `logits` B x 2 x h x w and, where the method has them, `guidance` B x 1 x h x w in [0,
            1] and maps for pictures, of its shape: `initial`, `coarse`, `refined`, `posterior`.
        """

    # --- episodes and plain images -----------------------------------------------------------

    def set_support(
        self,
        images: Sequence[Tensor | NDArray[Any]],
        masks: Sequence[Tensor | NDArray[Any]],
        size: int = 473,
    ) -> None:
        """Say what is to be found from now on in plain images (`forward`, `predict_image`).

        Args:
            images: K images of any sizes: tensors 3 x H x W in [0, 1], or, as for `predict_image`,
                NumPy arrays H x W x 3 of uint8.
            masks: K masks H x W, tensors or NumPy arrays: 1 on the object, 0 elsewhere, 255 where
                nothing is said.
            size: side in pixels of the square in which the network sees supports and queries.

        Raises:
            ValueError: no image, another number of masks, other sizes or values, or no object, or
                none that is left at this size.
        """
        if not len(images) or len(images) != len(masks):
            raise GenSegError(
                f"set_support got {len(images)} images and {len(masks)} masks: give one mask for "
                "each image, and at least one."
            )
        squares = []
        for number, (given, given_mask) in enumerate(zip(images, masks, strict=True), 1):
            image, mask = _unit_image(given, number), _tensor(given_mask)
            if image.ndim != 3 or image.shape[1:] != mask.shape:
                raise GenSegError(
                    f"a support image is {tuple(image.shape)} and its mask {tuple(mask.shape)}: "
                    "give 3 x H x W (a NumPy array: H x W x 3) and H x W."
                )
            odd = set(mask.unique().tolist()) - {0, 1, 255}
            if odd or not (mask == 1).any():
                raise GenSegError(
                    f"a support mask holds {f'the values {sorted(odd)}' if odd else 'no object'}: "
                    "mark the object with 1, everything else with 0, and what is neither with 255."
                )
            square, valid = letterbox(image[None], size)
            rows, columns = letterbox_size(mask.shape[0], mask.shape[1], size)
            label = resize_labels(mask[None], (rows, columns))[0]
            if not (label == 1).any():
                raise GenSegError(
                    f"the object of support {number} is too small to be left at size {size}: give "
                    "set_support a larger size, or cut image and mask around the object."
                )
            label = F.pad(label, (0, size - columns, 0, size - rows), value=self.ignore_index)
            squares.append((square[0], label, valid[0]))
        self.support = Support(*(torch.stack(parts) for parts in zip(*squares, strict=True)))

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` B x 2 x H x W of plain images, for the object of `set_support`.

        Raises:
            ValueError: there is no support.
        """
        if self.support is None:
            raise GenSegError(
                "nothing says what to look for: call set_support, or predict with data that carry "
                "supports, such as FewShotFolderDataModule."
            )
        support = Support(*(part.to(image.device) for part in self.support))
        square, valid = letterbox(image, support.images.shape[-1])
        batch = {"image": square, "valid": valid}
        for name, part in (
            ("image", support.images),
            ("mask", support.masks),
            ("valid", support.valid),
        ):
            batch[f"support_{name}"] = part.expand(len(image), *part.shape)
        logits = self.to_image(self.episode_outputs(batch)["logits"], square)
        return {"logits": self._to_query(logits, image.shape[-2:], "exact")}

    def extract_stages(self, images: Tensor) -> StageFeatures:
        """Features of the frozen encoder for images in [0, 1]."""
        with torch.no_grad():
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
        return resize_aligned(maps[..., :rows, :columns], size, align_corners=False)

    # --- steps -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FewShotModule:
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pixel cross-entropy of the queries."""
        scores = self.to_image(self.episode_outputs(batch)["logits"], batch["mask"])
        return {"loss": pixel_cross_entropy(scores, batch["mask"], self.ignore_index)}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict and score episodes; `mask` and the maps of the method are returned for pictures."""
        return self._score_episodes(batch, self.val_metrics, self.val_guidance)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`."""
        return self._score_episodes(batch, self.test_metrics, self.test_guidance)

    def _score_episodes(
        self, batch: dict[str, Any], metrics: MetricCollection, guidance_metrics: MetricCollection
    ) -> dict[str, Tensor]:
        outputs = self.episode_outputs(batch)
        target = batch.get("full_mask", batch["mask"])
        classes, candidates = batch["class_index"], batch.get("candidates")

        def count(maps: Tensor, collection: MetricCollection) -> None:
            if "full_mask" in batch:
                maps = self._to_query(maps, target.shape[-2:], self.scoring)
            foreground = maps[:, 1] > maps[:, 0] if maps.shape[1] == 2 else maps[:, 0] > 0.5
            collection.update(foreground, target, classes, candidates)

        logits = self.to_image(outputs["logits"], batch["image"])
        count(logits, metrics)
        if "guidance" in outputs:
            count(self.to_image(outputs["guidance"], batch["image"]), guidance_metrics)
        shown = {
            name: self.to_image(outputs[name], batch["image"])[:, 0]
            for name in EPISODE_MAPS
            if name in outputs
        }
        return {"mask": logits.argmax(1), **shown}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`mask` B x H x W int64 and `name`. Supports in the batch, the same for all its images, are taken over."""
        if "support_image" in batch:
            names = ("support_image", "support_mask", "support_valid")
            self.support = Support(*(batch[name][0] for name in names))
        return super().predict_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val_mIoU`, `val_FB_IoU`, `val_IoU_<class>` and, where there is guidance, `val_GmIoU`."""
        self._log_episode_scores("val", self.val_metrics, self.val_guidance)

    def on_test_epoch_start(self) -> None:
        """Count anew."""
        super().on_test_epoch_start()
        self.test_guidance.reset()

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_episode_scores("test", self.test_metrics, self.test_guidance)

    def _log_episode_scores(
        self, prefix: str, metrics: MetricCollection, guidance: MetricCollection
    ) -> None:
        values = metrics.compute()
        scores = {name: values[name] for name in ("mIoU", "FB_IoU")}
        if guidance["mIoU"].update_called:
            scores["GmIoU"] = guidance.compute()["mIoU"]
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(getattr(data, "data", None), "class_names", None)
        for index in values["IoU"].isfinite().nonzero().flatten().tolist():
            name = str(index) if names is None else re.sub(r"[^\w-]+", "_", names[index])
            scores[f"IoU_{name}"] = values["IoU"][index]
        for collection in (metrics, guidance):
            collection.reset()
        for name, value in scores.items():
            self.log(f"{prefix}_{name}", value, prog_bar=name == "mIoU", sync_dist=True)

    def setup(self, stage: str) -> None:
        """Refuse to fit where there is nothing to train."""
        super().setup(stage)
        if stage == "fit" and not self.needs_training:
            raise GenSegError(
                f"this {type(self).__name__} has nothing to train: run `genseg test` or `genseg "
                "predict` at once."
            )

    # --- the fold ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Refuse data of another fold: the encoder would know the novel classes."""
        expect_frozen_parts()
        self._check_fold()

    def on_validation_start(self) -> None:
        """As `on_fit_start`."""
        self._check_fold()

    def on_test_start(self) -> None:
        """Refuse data whose novel classes the base learner knows; other data it may be tested on."""
        super().on_test_start()
        data = getattr(self.trainer, "datamodule", None)
        novel = getattr(data, "novel_classes", ())
        known = [name for name in novel if name in (self.base_classes or ())]
        if known:
            raise GenSegError(
                f"the base learner was trained on {', '.join(known)}, which the data take for "
                "novel: use the base learner of the same fold."
            )

    def _check_fold(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        theirs = getattr(data, "base_classes", None)
        if theirs is None or not self.base_classes:
            return
        if list(theirs) != list(self.base_classes):
            raise GenSegError(
                f"the base learner was trained on {', '.join(self.base_classes)}, and the base "
                f"classes of the data are {', '.join(theirs)}: use the base learner of the same "
                "fold."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what the base learner's checkpoint said, and forget where it was."""
        super().on_save_checkpoint(checkpoint)
        if self._of_base:
            checkpoint["hyper_parameters"] |= {
                "base_learner": None,
                **self._of_base,
                "mean": self.mean.flatten().tolist(),
                "std": self.std.flatten().tolist(),
            }
        if self.base_classes:
            checkpoint["base_classes"] = list(self.base_classes)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        self.base_classes = checkpoint.get("base_classes", self.base_classes)


def support_shares(batch: Mapping[str, Any], size: Sequence[int]) -> Tensor:
    """How much of each feature cell of the supports is foreground and background: B x K x 2 x h x w in [0, 1].

    Void pixels and padding are neither. Resized bilinearly, which is BAM's soft mask.
    """
    masks, valid = batch["support_mask"], batch["support_valid"]
    both = torch.stack([(masks == label) & valid for label in (1, 0)], 2).float()
    shares: Tensor = resize_aligned(both.flatten(0, 1), size).unflatten(0, masks.shape[:2])
    return shares


def _tensor(array: Tensor | NDArray[Any]) -> Tensor:
    # float32: torch lacks some of NumPy's types; a copy: it may be read-only
    return array if isinstance(array, Tensor) else torch.from_numpy(array.astype(np.float32))


def _unit_image(given: Tensor | NDArray[Any], number: int) -> Tensor:
    """Float 3 x H x W in [0, 1] of what `set_support` takes as its image `number`."""
    image = _tensor(given).float()
    if not isinstance(given, Tensor):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
            raise GenSegError(
                f"support image {number} is a NumPy array {given.shape} of {given.dtype}: give H x "
                "W x 3 of uint8, or a tensor 3 x H x W in [0, 1]."
            )
        image = image.permute(2, 0, 1)
    if given.dtype in (np.uint8, torch.uint8):
        return image / 255
    if not ((image >= 0) & (image <= 1)).all():
        raise GenSegError(
            f"support image {number} has values from {float(image.min()):g} to "
            f"{float(image.max()):g}: divide it by its white, so that they lie in [0, 1]."
        )
    return image
