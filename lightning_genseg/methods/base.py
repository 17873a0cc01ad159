"""The contract of a method, its steps and its logging.

A method with an encoder and a decoder by name derives from `PixelModule` (`pixel.py`), one with a
network of its own kind from `SegmentationModule` here. What it shares with everything that is
trained is in `trained.py`, the scores of a test are in `evaluation.py`, optimisers in
`optimisation.py`. A method with a mixture runs EM in a callback at `on_train_batch_end`: see
`gmmseg/module.py`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.images import read_image
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.evaluation import Evaluation
from lightning_genseg.methods.trained import TrainedModule
from lightning_genseg.metrics import segmentation_metrics
from lightning_genseg.metrics.segmentation import score_keys
from lightning_genseg.ops.inference_options import (
    InferenceOptions,
    check_options,
    has_several_views,
    plain_options,
)
from lightning_genseg.ops.resize import resize_maps
from lightning_genseg.ops.views import (
    Activation,
    as_float,
    evaluation_mode,
    infer,
    infer_rows,
    merge_rows,
    softmax,
)
from lightning_genseg.uncertainty.scores import (
    DENSITY_SCORES,
    FITTED_SCORES,
    AnomalyName,
    AnomalyScores,
)

if TYPE_CHECKING:
    from lightning_genseg.data.mixed.taxonomy import TargetClasses

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SegmentationModule(TrainedModule):
    """Base of all methods. A subclass writes `outputs` and `compute_loss`, which need no Trainer.

    One whose `outputs` have a `log_density` sets `own_anomaly_score` to `density`.
    The module normalises images itself, so that a checkpoint is enough to predict.

    Args:
        mean: of the encoder's training images, RGB in [0, 1].
        std: their standard deviation.
        inference: sliding window, scales and mirror images at validation, test and prediction.
        anomaly_score: how strange a pixel is, by the name of one of `AnomalyScores`; the method's
            own when left out (GMMSeg: `density`; softmax: none).
    """

    mean: Tensor
    std: Tensor
    features: nn.Module
    chosen_anew = (*TrainedModule.chosen_anew, "inference", "anomaly_score")
    own_anomaly_score: ClassVar[AnomalyName | None] = None
    constant_scores: ClassVar[tuple[AnomalyName, ...]] = ()  # that tell nothing of this method
    takes_supports: ClassVar[bool] = False  # whether its data are few-shot episodes
    takes_bytes: ClassVar[bool] = True  # predicts images of uint8 as well, which are a quarter
    view_activation: ClassVar[Activation | None] = softmax  # of the scores that views average

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        inference: InferenceOptions | None = None,
        anomaly_score: AnomalyName | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(SegmentationModule.__init__, locals(), mean="[0, 1]", std="(0, 1]")
        check_options(inference)
        if len(mean) != 3 or len(std) != 3:
            raise GenSegError(f"mean is {mean} and std is {std}; give 3 numbers each: R, G, B.")
        super().__init__(num_classes, **kwargs)
        self.inference = inference
        self.register_buffer("mean", _of_colors(mean), persistent=False)
        self.register_buffer("std", _of_colors(std), persistent=False)
        self.set_anomaly_score(anomaly_score)
        self.anomaly = AnomalyScores()
        self.evaluation = Evaluation(self.ignore_index)

    def set_anomaly_score(self, name: AnomalyName | None) -> None:
        """Choose the score of predictions, also of saved ones; `None` is the method's own, if any.

        Raises:
            GenSegError: the method does not have it.
        """
        check_arguments(SegmentationModule.__init__, {"anomaly_score": name})
        if name in DENSITY_SCORES and self.own_anomaly_score != "density":
            raise GenSegError(
                f"anomaly_score is {name}, but {type(self).__name__} has no class densities: "
                "choose another score, or GMMSeg."
            )
        if name in self.constant_scores:
            raise GenSegError(
                f"anomaly_score is {name}, which is the same for every pixel with "
                f"{type(self).__name__}: choose another, such as msp or entropy."
            )
        self.anomaly_score = name or self.own_anomaly_score
        if "anomaly_score" in self.hparams:
            self.hparams["anomaly_score"] = name

    # --- the contract -------------------------------------------------------------------------

    @abstractmethod
    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs of the network for images B x 3 x H x W in [0, 1], at its features' resolution.

        Returns:
            `logits` B x C x h x w, `features` B x F x h x w that they come from, and, from a
            generative method, `log_density` B x C x h x w, log p(x|c).
        """

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Upsample maps of the feature resolution bilinearly to the size of `image`, in float32."""
        return resize_maps(scores.float(), image.shape[-2:])

    def cover(self, mask: Tensor, features: Tensor) -> Tensor:
        """A mask extended to all that the features see, which is more than an image if padded."""
        return mask

    def normalize(self, image: Tensor) -> Tensor:
        """Images in [0, 1], or bytes, to what the encoder was trained on."""
        return (as_float(image) - self.mean) / self.std

    # --- prediction ---------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Class scores B x C x H x W of images B x 3 x H x W in [0, 1], any size."""
        return self.to_image(self.outputs(image)["logits"], image)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """Everything predicted per pixel: `scores` B x C x H x W and, if asked for, `anomaly`.

        `anomaly`, by the name in `anomaly_score`, is B x 1 x H x W; higher is stranger.
        """
        if self.anomaly_score is None:
            return {"scores": self(image)}
        maps = self.score_maps(image, [self.anomaly_score])
        return {"scores": maps["scores"], "anomaly": maps[self.anomaly_score]}

    def undeployable(self) -> str | None:
        """Why it cannot become a graph (`genseg export`), in a sentence; None if it can."""
        return None

    def prediction_options(self) -> dict[str, Any]:
        """What is chosen anew at each run and changes scores: thresholds hold under these alone."""
        return plain_options(self.inference)

    def computable_scores(self) -> list[AnomalyName]:
        """Names of the anomaly scores that this module can give now."""
        return [
            name
            for name in get_args(AnomalyName)
            if self.anomaly.is_fitted(name)
            and name not in self.constant_scores
            and (name not in DENSITY_SCORES or self.own_anomaly_score == "density")
        ]

    def score_maps(self, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """`scores` B x C x H x W and the named anomaly scores B x 1 x H x W.

        Scores of logits are taken at the size of the image, those of features before enlarging.
        """
        outputs = self.outputs(image)
        outputs["logits"] = self.to_image(outputs["logits"], image)
        maps = {"scores": outputs["logits"]}
        for name in names:
            score = self.anomaly(name, outputs)
            from_logits = self.anomaly.needs(name) == "logits"
            maps[name] = score if from_logits else self.to_image(score, image)
        return maps

    def maps_to_average(self, image: Tensor) -> dict[str, Tensor]:
        """`maps` with `scores` in the form in which windows average them and sizes change them."""
        return self.maps(image)

    def from_average(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """`maps` again, of those of `maps_to_average`; of several views they are probabilities."""
        return maps

    def predict_maps(self, image: Tensor) -> dict[str, Tensor]:
        """`maps` by the sliding window, scales and mirror images of `inference`."""
        return self.from_average(self._average(image))

    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`predict_maps` of a batch at the size of its `mask`, which may exceed its images."""
        size = batch["mask"].shape[-2:]
        maps = {name: resize_maps(x, size) for name, x in self._average(batch["image"]).items()}
        return self.from_average(maps)

    def anomaly_maps(
        self, image: Tensor, names: Sequence[str], size: Sequence[int]
    ) -> dict[str, Tensor]:
        """Anomaly scores by name, B x H x W of that size, by the views of `inference`."""
        forward = partial(self.score_maps, names=names)
        maps = infer(forward, image, self.inference, {"scores": softmax})
        return {name: resize_maps(maps[name], size)[:, 0] for name in names}

    def _average(self, image: Tensor) -> dict[str, Tensor]:
        return infer(self.maps_to_average, image, self.inference, self._activations)

    @property
    def _activations(self) -> dict[str, Activation | None]:
        return {"scores": type(self).view_activation}

    @torch.no_grad()
    def predict_image(
        self, image: NDArray[np.uint8] | Image.Image | Path | str
    ) -> dict[str, NDArray[Any]]:
        """Predict one picture.

        Args:
            image: path of a file, PIL image, or array H x W x 3, uint8 RGB.

        Returns:
            `mask` H x W int64, `scores` C x H x W float32 and, where there is an anomaly score,
            `anomaly` H x W float32 (higher is stranger) and, after calibration, `anomaly_mask`
            H x W bool.

        Raises:
            GenSegError: it is no such array, or a file that cannot be read; the model was
                calibrated under other options of `inference`.
        """
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise GenSegError(
                "predict_image takes an RGB picture, H x W x 3 of uint8; "
                f"got {image.shape} of {image.dtype}."
            )
        self._check_thresholds()
        tensor = torch.tensor(np.ascontiguousarray(image), device=self.device)  # may be read-only
        with evaluation_mode(self):
            maps = self.predict_maps(tensor.permute(2, 0, 1)[None].float() / 255)
        result = {"scores": maps["scores"], **self._prediction(maps)}
        return {name: value[0].cpu().numpy() for name, value in result.items()}

    def _prediction(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prediction = super()._prediction(maps)
        if "anomaly" in maps:
            prediction["anomaly"] = maps["anomaly"][:, 0]
            threshold = self.anomaly.thresholds.get(str(self.anomaly_score))
            if threshold is not None:
                prediction["anomaly_mask"] = prediction["anomaly"] > threshold.value
        return prediction

    # --- Lightning ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse scores that only calibration makes, and supports that nothing would use."""
        super().setup(stage)
        if stage == "fit" and self.anomaly_score in FITTED_SCORES:
            raise GenSegError(
                f"anomaly_score is {self.anomaly_score}, which is fitted after training: leave it "
                "out of fit, run `genseg calibrate`, and give it to test and predict."
            )
        data = getattr(self.trainer, "datamodule", None)
        if not getattr(data, "dense", True) and not self.takes_supports:
            raise GenSegError(
                f"{type(self).__name__} makes no use of the supports of {type(data).__name__}: "
                "take a few-shot method such as CGMGM, or other data (for a BaseLearner "
                "BaseClassesDataModule)."
            )
        if stage == "test":
            self.set_target_classes(getattr(data, "target_classes", None))

    @property
    def target_classes(self) -> TargetClasses | None:
        """Classes of the test data, where they are not the module's own."""
        return self.evaluation.target_classes

    def set_target_classes(self, target: TargetClasses | None) -> None:
        """Test in the classes of other data (`CrossDomainDataModule`); None: the module's own.

        Raises:
            GenSegError: they consist of the classes of another model.
        """
        if target is None and self.target_classes is None:
            return
        if target is not None and target.members.shape[1] != self.num_classes:
            raise GenSegError(
                f"the taxonomy of the test data has {target.members.shape[1]} universal classes "
                f"and the model {self.num_classes}: give the table that it was trained with."
            )
        score_keys(target.class_names if target is not None else ())
        self.evaluation.target_classes = target
        count = self.num_classes if target is None else len(target.class_names)
        self.test_metrics = segmentation_metrics(count, self.ignore_index).to(self.device)

    def on_train_start(self) -> None:
        """Forget what was fitted to other weights."""
        self.anomaly = AnomalyScores()
        super().on_train_start()

    def on_test_start(self) -> None:
        """As `on_predict_start`."""
        self.on_predict_start()

    def on_predict_start(self) -> None:
        """Refuse thresholds that were found under other `prediction_options`."""
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        now, then = self.prediction_options(), self.anomaly.inference
        if self.anomaly.thresholds and now != then:
            raise GenSegError(
                f"the checkpoint was calibrated with the options {then or 'none'} and is used with "
                f"{now or 'none'}: calibrate again with these options, or use the checkpoint from "
                "before calibration."
            )

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As `validation_step`, with calibration and anomalies, in the target classes if any."""
        self._check_batch(batch)
        averaged = has_several_views(self.inference)
        maps = self.evaluation.update(self.maps_at_labels(batch), batch, averaged)
        return self._score(maps, batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`mask` B x H x W int64, and `name` and `anomaly` B x H x W where there are any.

        After `genseg calibrate` also `anomaly_mask` B x H x W bool: what lies above the threshold.
        Decided piece by piece, so that memory follows the window of `inference` and not the
        picture. Where `image` is uint8, so is `mask`.
        """
        image = batch["image"]
        bar: Any = getattr(self._trainer, "progress_bar_callback", None)
        pieces = infer_rows(
            self.maps_to_average, image, self.inference, self._activations, progress=bar is not None
        )

        def decided() -> Iterator[tuple[slice, dict[str, Tensor]]]:
            for rows, maps in pieces:
                found = self._prediction(self.from_average(maps))
                if not image.is_floating_point():
                    found["mask"] = found["mask"].to(torch.uint8)
                yield rows, found

        named = {"name": batch["name"]} if "name" in batch else {}
        return {**merge_rows(decided(), image.shape[-2]), **named}

    def on_test_epoch_start(self) -> None:
        """Count anew. What was counted stays after the test, for reports and notebooks to draw."""
        super().on_test_epoch_start()
        self.evaluation.reset()

    def on_test_epoch_end(self) -> None:
        """Log `test_mIoU`, `test_pixel_accuracy`, `test_IoU_<class>`, `test_ECE`.

        Of data with anomaly labels also `test_AUROC`, `test_AP`, `test_FPR95`; only these where
        nothing else is labelled.
        """
        scores = self.evaluation.compute()
        if "ECE" in scores:
            target = self.target_classes
            names = self.class_names if target is None else target.class_names
            self._log_scores("test", self.test_metrics, names)
        for name, value in scores.items():
            self.log(f"test_{name}", value.float(), sync_dist=True)

    @property
    def backbone(self) -> nn.Module:
        """`features.encoder`, or all `features` where there is none; for `BackboneFinetuning`."""
        encoder: nn.Module = getattr(self.features, "encoder", self.features)
        return encoder

    def encoder_parameters(self) -> set[nn.Parameter]:
        """Those of the `backbone`."""
        return set(self.backbone.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what calibration has fitted."""
        super().on_save_checkpoint(checkpoint)
        if fitted := self.anomaly.fitted_state():
            checkpoint["anomaly"] = fitted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what calibration has fitted."""
        super().on_load_checkpoint(checkpoint)
        self.anomaly.load_fitted_state(checkpoint.get("anomaly", {}))


def expect_frozen_parts() -> None:
    """Silence Lightning's warning of parts in evaluation mode where they are frozen on purpose."""
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")


def _of_colors(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1)
