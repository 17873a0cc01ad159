"""The discriminative baseline that every table needs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_genseg.methods.base import IMAGENET_MEAN, IMAGENET_STD, SegmentationModule
from lightning_genseg.networks.features import PixelFeatures, feature_channels
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.views import InferenceOptions
from lightning_genseg.uncertainty.scores import AnomalyName


class SoftmaxSegmenter(SegmentationModule):
    """Any segmentation network with a softmax classifier, trained by pixel cross-entropy.

    GMMSeg's Eqs. 1-2: dropout and a 1x1 convolution on the feature map, as in mmsegmentation.

    Args:
        num_classes: C.
        encoder: any encoder of segmentation_models_pytorch; `tu-<name>` for one of timm.
        decoder: `deeplabv3plus`, `segformer`, `fpn`, ...: see `PixelFeatures`.
        encoder_weights: `imagenet` (downloads), the path of a state dict, or `None`.
        network_options: further arguments of the network, such as `decoder_channels`.
        features: your own network instead: B x 3 x H x W to B x F x h x w.
        dropout: of whole channels before the classifier.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        mean: see there.
        std: see there.
        inference: see there.
        optimizer: see there.
        lr_scheduler: see there.
        head_lr_factor: see there.
        decay_norms: see there.
        anomaly_score: see there.

    Example:
        >>> import torch
        >>> model = SoftmaxSegmenter(num_classes=3, encoder="tu-test_resnet", decoder="fpn")
        >>> model(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])
    """

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet50",
        decoder: str = "deeplabv3plus",
        encoder_weights: str | Path | None = None,
        network_options: dict[str, Any] | None = None,
        features: nn.Module | None = None,
        dropout: float = 0.1,
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
        super().__init__(
            num_classes,
            ignore_index,
            class_names,
            mean,
            std,
            inference,
            optimizer,
            lr_scheduler,
            head_lr_factor,
            decay_norms,
            anomaly_score,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "features"])
        self.features = features or PixelFeatures(
            encoder, decoder, encoder_weights, num_classes, network_options
        )
        self.classifier = nn.Sequential(
            nn.Dropout2d(dropout), nn.Conv2d(feature_channels(self.features), num_classes, 1)
        )

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` and `features`: see the base."""
        features = self.extract(image)[0]
        return {"logits": self.classifier(features), "features": features}

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pixel cross-entropy, and the network's auxiliary loss where it has one (OCRNet)."""
        features, auxiliary = self.extract(batch["image"])
        scores = self.to_image(self.classifier(features), batch["mask"])
        loss = pixel_cross_entropy(scores, batch["mask"], self.ignore_index)
        return self.add_auxiliary_loss({"loss": loss}, auxiliary, batch["mask"])
