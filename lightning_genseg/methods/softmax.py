"""The baseline: a segmentation network with a softmax classifier."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.methods.pixel import PixelModule
from lightning_genseg.networks.features import feature_channels
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import resize_aligned


class SoftmaxSegmenter(PixelModule):
    """Any segmentation network with a softmax classifier, trained by pixel cross-entropy.

    GMMSeg's Eqs. 1-2: dropout and a 1x1 convolution on the feature map, as in mmsegmentation.

    Args:
        num_classes: C.
        dropout: of whole channels before the classifier.
        align_corners: logits are enlarged with aligned corners, as by AGMM's code; mmsegmentation
            does not.

    Example:
        >>> import torch
        >>> model = SoftmaxSegmenter(num_classes=3, encoder="tu-test_resnet", decoder="fpn")
        >>> model(torch.rand(1, 3, 50, 70)).shape
        torch.Size([1, 3, 50, 70])
    """

    def __init__(
        self, num_classes: int, dropout: float = 0.1, align_corners: bool = False, **kwargs: Any
    ) -> None:
        check_arguments(SoftmaxSegmenter.__init__, locals(), dropout="[0, 1)")
        super().__init__(num_classes, **kwargs)
        self.align_corners = align_corners
        self.classifier = nn.Sequential(
            nn.Dropout2d(dropout), nn.Conv2d(feature_channels(self.features), num_classes, 1)
        )

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """As in the base, or with corners aligned."""
        if self.align_corners:
            return resize_aligned(scores.float(), image.shape[-2:])
        return super().to_image(scores, image)

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` and `features`, as `SegmentationModule` asks."""
        features = self.extract(image)[0]
        return {"logits": self.classifier(features), "features": features}

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pixel cross-entropy, and the network's auxiliary loss where it has one."""
        features, auxiliary = self.extract(batch["image"])
        scores = self.to_image(self.classifier(features), batch["mask"])
        loss = pixel_cross_entropy(scores, batch["mask"], self.ignore_index)
        return self.add_auxiliary_loss({"loss": loss}, auxiliary, batch["mask"])
