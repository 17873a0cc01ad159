"""What every method shares: normalisation, steps, metrics, optimisers, prediction of any image."""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_genseg.errors import GenSegError
from lightning_genseg.metrics.anomaly import AnomalyMetrics
from lightning_genseg.metrics.calibration import CalibrationError
from lightning_genseg.metrics.segmentation import named_scores, segmentation_metrics
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_maps
from lightning_genseg.ops.views import (
    InferenceOptions,
    check_options,
    evaluation_mode,
    has_several_views,
    infer,
    plain_options,
    softmax,
)
from lightning_genseg.uncertainty.scores import FITTED_SCORES, AnomalyName, AnomalyScores

if TYPE_CHECKING:
    from lightning_genseg.data.mixed.taxonomy import TargetClasses


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SegmentationModule(LightningModule, ABC):
    """Base of all methods. A subclass writes `outputs` and `compute_loss`; both work without a Trainer.

    The module normalises images itself, so that a checkpoint is enough to predict.

    Args:
        num_classes: C.
        ignore_index: label that does not count, in losses, EM and scores.
        class_names: C names for logs and reports; their numbers when left out.
        mean: of the encoder's training images, RGB in [0, 1].
        std: likewise.
        inference: sliding window, scales and mirror images at validation, test and prediction.
        optimizer: makes the optimiser from parameter groups; AdamW with lr 1e-4 when left out.
        lr_scheduler: makes the schedule, stepped every iteration; polynomial decay with power 0.9
            to the end of the run when left out.
        head_lr_factor: learning rate of everything but the encoder, as a multiple of the encoder's.
        decay_norms: whether weight decay also applies to vectors (norms and biases) and to position
            parameters (embeddings of positions, tables of relative position biases).
        anomaly_score: how strange a pixel is, by the name of a score: see `anomaly.AnomalyScores`;
            the method's own when left out (GMMSeg: `density`; softmax: none).
    """

    mean: Tensor
    std: Tensor
    features: nn.Module
    own_anomaly_score: ClassVar[AnomalyName | None] = None

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        inference: InferenceOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        head_lr_factor: float = 1.0,
        decay_norms: bool = True,
        anomaly_score: AnomalyName | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise GenSegError(f"num_classes is {num_classes}; segmentation needs at least 2.")
        if class_names is not None and len(class_names) != num_classes:
            raise GenSegError(
                f"class_names has {len(class_names)} entries and num_classes is {num_classes}; "
                "give one name per class, in the order of the class indices."
            )
        check_options(inference)
        if anomaly_score is not None and anomaly_score not in get_args(AnomalyName):
            raise GenSegError(
                f"anomaly_score is {anomaly_score}; known are {', '.join(get_args(AnomalyName))}."
            )
        if anomaly_score == "density" and self.own_anomaly_score != "density":
            raise GenSegError(
                f"anomaly_score is density, but {type(self).__name__} has no class densities: "
                "choose another score, or GMMSeg."
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.class_names, self.inference = class_names, inference
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.head_lr_factor, self.decay_norms = head_lr_factor, decay_norms
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.anomaly_score = anomaly_score or self.own_anomaly_score
        self.anomaly = AnomalyScores()
        self.val_metrics = segmentation_metrics(num_classes, ignore_index)
        self.test_metrics = self.val_metrics.clone()
        # Classes of test data that have others than the module, see `set_target_classes`.
        self.target_classes: TargetClasses | None = None
        self.test_calibration = CalibrationError(ignore_index=ignore_index)
        # Made when there are anomaly labels: it is large.
        self.test_anomaly_metrics: AnomalyMetrics | None = None

    # --- to be written by a method -----------------------------------------------------------

    @abstractmethod
    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """What the network says of images B x 3 x H x W in [0, 1], at the resolution of its features.

        Returns:
            `logits` B x C x h x w, `features` B x F x h x w that they come from, and, from a
            generative method, `log_density` B x C x h x w, log p(x|c).
        """

    @abstractmethod
    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` to be minimised, its parts `loss_*` to be logged, and what EM needs afterwards.

        Args:
            batch: `image` B x 3 x H x W in [0, 1] and `mask` B x H x W int64.
        """

    # --- what every method can then do --------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Class scores B x C x H x W of images B x 3 x H x W in [0, 1], any size."""
        return self.to_image(self.outputs(image)["logits"], image)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """Everything predicted per pixel: `scores` B x C x H x W and, by `anomaly_score`, `anomaly`.

        `anomaly` is B x 1 x H x W, higher is stranger.
        """
        if self.anomaly_score is None:
            return {"scores": self(image)}
        maps = self.score_maps(image, [self.anomaly_score])
        return {"scores": maps["scores"], "anomaly": maps[self.anomaly_score]}

    def computable_scores(self) -> list[AnomalyName]:
        """Names of the anomaly scores that this module can give now."""
        return [
            name
            for name in get_args(AnomalyName)
            if self.anomaly.is_fitted(name)
            and (name != "density" or self.own_anomaly_score == "density")
        ]

    def score_maps(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """`scores` B x C x H x W and the named anomaly scores B x 1 x H x W.

        Scores of logits are taken at the size of the image, those of features before they are
        enlarged.
        """
        outputs = self.outputs(image)
        outputs["logits"] = self.to_image(outputs["logits"], image)
        maps = {"scores": outputs["logits"]}
        for name in names:
            score = self.anomaly(name, outputs)
            from_logits = self.anomaly.needs(name) == "logits"
            maps[name] = score if from_logits else self.to_image(score, image)
        return maps

    # --- shared pieces -----------------------------------------------------------------------

    def normalize(self, image: Tensor) -> Tensor:
        """Images in [0, 1] to what the encoder was trained on."""
        return (image - self.mean) / self.std

    def extract(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Feature map of `self.features` for images in [0, 1], and its auxiliary scores if it has any."""
        image = self.normalize(image)
        if isinstance(self.features, PixelFeatures):
            return self.features.extract(image)
        return self.features(image), None

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Upsample maps of the feature resolution bilinearly to the size of `image`, in float32."""
        height, width = image.shape[-2:]
        if isinstance(self.features, PixelFeatures):
            # Its last row and column may reach beyond the image, which it pads.
            scale = float(self.features.stride)
            return F.interpolate(scores.float(), scale_factor=scale, mode="bilinear")[
                ..., :height, :width
            ]
        return F.interpolate(scores.float(), (height, width), mode="bilinear")

    def cover(self, mask: Tensor, features: Tensor) -> Tensor:
        """Extend a mask by ignored pixels to all that the features see: the network pads images."""
        if not isinstance(self.features, PixelFeatures):
            return mask
        rows, columns = (side * self.features.stride for side in features.shape[-2:])
        padding = (0, columns - mask.shape[-1], 0, rows - mask.shape[-2])
        return F.pad(mask, padding, value=self.ignore_index) if any(padding) else mask

    def add_auxiliary_loss(
        self, losses: dict[str, Tensor], auxiliary: Tensor | None, mask: Tensor
    ) -> dict[str, Tensor]:
        """Add the cross-entropy of the network's own coarse scores (OCRNet), at its weight."""
        if auxiliary is None:
            return losses
        assert isinstance(self.features, PixelFeatures)
        extra = pixel_cross_entropy(self.to_image(auxiliary, mask), mask, self.ignore_index)
        return {
            **losses,
            "loss": losses["loss"] + self.features.auxiliary_weight * extra,
            "loss_auxiliary": extra,
        }

    def predict_maps(self, image: Tensor) -> dict[str, Tensor]:
        """`maps` by the sliding window, scales and mirror images of `inference`."""
        return infer(self.maps, image, self.inference, {"scores": softmax})

    @torch.no_grad()
    def predict_image(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Predict one picture.

        Args:
            image: H x W x 3, uint8 RGB.

        Returns:
            `mask` H x W int64, `scores` C x H x W float32 and, where there is an anomaly score,
            `anomaly` H x W float32 (higher is stranger) and, after calibration, `anomaly_mask` H x
            W bool.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise GenSegError(
                "predict_image takes an RGB picture, H x W x 3 of uint8; "
                f"got {image.shape} of {image.dtype}."
            )
        tensor = torch.tensor(np.ascontiguousarray(image), device=self.device)  # may be read-only
        with evaluation_mode(self):
            maps = self.predict_maps(tensor.permute(2, 0, 1)[None].float() / 255)
        result = {"scores": maps["scores"], **self._prediction(maps)}
        return {name: value[0].cpu().numpy() for name, value in result.items()}

    # --- steps -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a score that training cannot have, which would fail at validation only, and data with supports."""
        if stage == "fit" and self.anomaly_score in FITTED_SCORES:
            raise GenSegError(
                f"anomaly_score is {self.anomaly_score}, which is fitted after training: leave it "
                "out of fit, run `genseg calibrate`, and give it to test and predict."
            )
        data = getattr(self.trainer, "datamodule", None)
        if not getattr(data, "dense", True):
            raise GenSegError(
                f"{type(self).__name__} makes no use of supports, with which the images of "
                f"{type(data).__name__} come: take a few-shot method such as CGMGM, or other data "
                "(for a BaseLearner BaseClassesDataModule)."
            )
        if stage == "test":
            self.set_target_classes(getattr(data, "target_classes", None))

    def set_target_classes(self, target: "TargetClasses | None") -> None:
        """Test in the classes of another data set (`CrossDomainDataModule`), or in the module's own again (None).

        ValueError if these consist of the classes of another model.
        """
        if target is None and self.target_classes is None:
            return
        if target is not None and target.members.shape[1] != self.num_classes:
            raise GenSegError(
                f"the taxonomy of the test data has {target.members.shape[1]} universal classes "
                f"and the model {self.num_classes}: give the table that it was trained with."
            )
        self.target_classes = target
        count = self.num_classes if target is None else len(target.class_names)
        self.test_metrics = segmentation_metrics(count, self.ignore_index).to(self.device)

    def on_train_start(self) -> None:
        """What was fitted to other weights holds no longer."""
        self.anomaly = AnomalyScores()

    def on_test_start(self) -> None:
        """As `on_predict_start`."""
        self.on_predict_start()

    def on_predict_start(self) -> None:
        """Refuse thresholds that were found under other `inference` options: their promise is void."""
        now, then = plain_options(self.inference), self.anomaly.inference
        if self.anomaly.thresholds and now != then:
            raise GenSegError(
                f"the checkpoint was calibrated with inference {then or 'none'} and is used with "
                f"{now or 'none'}: calibrate again with these options, or use the checkpoint from "
                "before."
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss of a batch; everything in it that begins with `loss` is logged."""
        losses = self.compute_loss(batch)
        self._check_finite(losses["loss"], batch, batch_idx)
        for name, value in losses.items():
            if name.startswith("loss"):
                self.log(
                    f"train_{name}", value, prog_bar=name == "loss", batch_size=len(batch["image"])
                )
        return losses

    def _check_finite(self, loss: Tensor, batch: dict[str, Any], batch_idx: int) -> None:
        # Looking at the value makes the CPU wait for the GPU; there, now and then is enough.
        steps: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        every = 1 if loss.device.type == "cpu" else max(1, steps)
        if batch_idx % every == 0 and not torch.isfinite(loss):
            raise GenSegError(
                f"The loss is {loss.item()} at step {self.global_step} "
                f"(images {', '.join(batch.get('name', ['without names']))}); lower the learning "
                "rate, clip gradients (trainer.gradient_clip_val) or train with trainer.precision "
                "32 or bf16-mixed."
            )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Predict, score against `mask`; the predictions are returned for callbacks."""
        return self._evaluate(self.maps_at_labels(batch), batch, self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`; in the classes of `target_classes` where the data have others than the module."""
        maps = self.maps_at_labels(batch)
        probabilities = scores = maps["scores"]  # they are, where views were averaged
        several = has_several_views(self.inference)
        if self.target_classes is not None:
            smallest = torch.finfo(scores.dtype).tiny
            scores = scores.clamp_min(smallest).log() if several else scores
            probabilities = maps["scores"] = self.target_classes.probabilities(scores)
        elif not several:
            probabilities = softmax(scores)
        self.test_calibration.update(probabilities, batch["mask"])
        if "anomaly" in batch and "anomaly" in maps:
            if self.test_anomaly_metrics is None:
                self.test_anomaly_metrics = AnomalyMetrics().to(self.device)
            self.test_anomaly_metrics.update(maps["anomaly"][:, 0], batch["anomaly"])
        return self._evaluate(maps, batch, self.test_metrics)

    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`predict_maps` of a batch at the size of its `mask`, which may be larger than its images."""
        maps = self.predict_maps(batch["image"])
        size = batch["mask"].shape[-2:]
        return {name: resize_maps(x, size) for name, x in maps.items()}

    def _evaluate(
        self, maps: dict[str, Tensor], batch: dict[str, Any], metrics: Callable[..., Any]
    ) -> dict[str, Tensor]:
        prediction = self._prediction(maps)
        metrics.update(prediction["mask"], batch["mask"])  # type: ignore[attr-defined]
        return prediction

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`mask` B x H x W int64, `name`, and `anomaly` B x H x W where there is an anomaly score.

        After `genseg calibrate` also `anomaly_mask` B x H x W bool: what lies above the threshold.
        """
        return {**self._prediction(self.predict_maps(batch["image"])), "name": batch["name"]}

    def _prediction(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prediction = {"mask": maps["scores"].argmax(1)}
        if "anomaly" in maps:
            prediction["anomaly"] = maps["anomaly"][:, 0]
            threshold = self.anomaly.thresholds.get(str(self.anomaly_score))
            if threshold is not None:
                prediction["anomaly_mask"] = prediction["anomaly"] > threshold.value
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log `val_mIoU`, `val_pixel_accuracy` and `val_IoU_<class>`."""
        self._log_scores("val", self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Count anew. What was counted stays after the test, for reports and notebooks to draw."""
        self.test_metrics.reset()
        self.test_calibration.reset()
        self.test_anomaly_metrics = None

    def on_test_epoch_end(self) -> None:
        """Log `test_mIoU`, `test_pixel_accuracy`, `test_IoU_<class>`, `test_ECE`.

        And, if the data have anomaly masks and the module an anomaly score, `test_AUROC`,
        `test_AP`, `test_FPR95`; only these where nothing else is labelled.
        """
        anomaly = self.test_anomaly_metrics
        scores = {"ECE": self.test_calibration.compute()}
        if scores["ECE"].isnan() and anomaly is not None:  # the data have labels of anomalies only
            scores = {}
        else:
            self._log_scores("test", self.test_metrics)
        if anomaly is not None:
            scores |= anomaly.compute()
        for name, value in scores.items():
            self.log(f"test_{name}", value.float(), sync_dist=True)

    def _log_scores(self, prefix: str, metrics: Any) -> None:
        target = self.target_classes if prefix == "test" else None
        names = self.class_names if target is None else target.class_names
        scores = named_scores(metrics.compute(), names)
        metrics.reset()
        for name, value in scores.items():
            # Equal in all processes already; `sync_dist` spares a warning per class.
            self.log(f"{prefix}_{name}", value, prog_bar=name == "mIoU", sync_dist=True)

    # --- optimisation and checkpoints --------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by (encoder or head) and by (decayed or not); empty ones left out."""
        encoder = getattr(self.features, "encoder", self.features)
        inside = {id(p) for p in encoder.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decayed = self.decay_norms or (parameter.ndim > 1 and not _is_position(name))
                groups.setdefault((id(parameter) in inside, decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "name": f"{'encoder' if encoder else 'head'}{'' if decayed else '_no_decay'}",
                **({} if decayed else {"weight_decay": 0.0}),
            }
            for (encoder, decayed), parameters in groups.items()
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The given optimiser and schedule, or the defaults of the class docstring."""
        groups = self.parameter_groups()
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.01)
        else:
            optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            if group["name"].startswith("head"):
                group["lr"] = group["lr"] * self.head_lr_factor
        if self.lr_scheduler is None:
            scheduler: LRScheduler | ReduceLROnPlateau = LambdaLR(optimizer, self._remaining)
        else:
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val_mIoU")  # Lightning's own class has one
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": monitor},
            }
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _remaining(self, step: int) -> float:
        # Only asked for when training has begun: the number of steps makes Lightning build the
        # training loader, and one built before a checkpoint is restored never hears where it was.
        if step == 0:
            return 1.0
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise GenSegError(
                "The default schedule decays to the end of the run, and this run has none; set "
                "trainer.max_epochs or trainer.max_steps, or give an lr_scheduler."
            )
        return float(max(0.0, 1 - step / steps) ** 0.9)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget where weights came from: a checkpoint holds them, nothing else is read to load it."""
        for name in ("encoder_weights", "extractor"):
            if name in checkpoint.get("hyper_parameters", {}):
                checkpoint["hyper_parameters"][name] = None
        # Apart from the hyper-parameters, which arguments of `load_from_checkpoint` overwrite.
        checkpoint["num_classes"] = self.num_classes
        if fitted := self.anomaly.fitted_state():
            checkpoint["anomaly"] = fitted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another number of classes."""
        theirs = checkpoint.get("num_classes", self.num_classes)
        if theirs != self.num_classes:
            raise GenSegError(
                f"The checkpoint was trained on {theirs} classes and the data have "
                f"{self.num_classes}; use the data's num_classes it was trained with, or train "
                "anew."
            )
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names and self.class_names and list(names) != list(self.class_names):
            rank_zero_warn(
                f"the checkpoint was trained on the classes {', '.join(names)} and the data have "
                f"{', '.join(self.class_names)}: classes are compared by their numbers."
            )
        self.anomaly.load_fitted_state(checkpoint.get("anomaly", {}))


def expect_frozen_parts() -> None:
    """Silence Lightning's warning of parts in evaluation mode at the start of a fit, where they are meant to be."""
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")


def need_single_precision(module: LightningModule) -> None:
    """ValueError if the Trainer has made a module's weights and buffers anything but float32, in which maskiges are."""
    precision = str(module.trainer.precision)
    if precision.endswith("true") and precision != "32-true":
        raise GenSegError(
            f"trainer.precision is {precision}, but colours and tokens need float32: run "
            f"{type(module).__name__} with 32-true, bf16-mixed or 16-mixed."
        )


def _is_position(name: str) -> bool:
    # timm's, smp's and mmsegmentation's names: absolute_pos_embed, relative_position_bias_table,
    # rel_pos_h, attention_biases, pos_block, ...
    pattern = r"(^|[._])(pos_(emb|block)|rel_pos|relative_pos|position_(bias|emb)|attention_biases)"
    return re.search(pattern, name) is not None
