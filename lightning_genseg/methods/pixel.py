"""What the methods share that classify the features of a segmentation network pixel by pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.resize import crop


class PixelModule(SegmentationModule):
    """Base of the methods with an encoder and a decoder by name, or a network of your own.

    Args:
        num_classes: C.
        encoder: any encoder of segmentation_models_pytorch; `tu-<name>` for one of timm.
        decoder: `deeplabv3plus`, `segformer`, `upernet`, `fpn`, `pspnet`, `pan`, `unet`,
            `unetplusplus`, `manet`, `linknet`, `deeplabv3`, `deeplabv3plus_full` (AGMM's), `fcn`,
            `ocrnet`, `mla` (GSS') or `hypercolumns` (the encoder's stages, nothing to train).
        encoder_weights: `imagenet` (downloads), the path of a state dict, or `None`.
        network_options: further arguments of the network, such as `decoder_channels`.
        features: your own network instead: B x 3 x H x W to B x F x h x w.

    Raises:
        GenSegError: `features` beside weights or options of a network by name.
    """

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet50",
        decoder: str = "deeplabv3plus",
        encoder_weights: str | Path | None = None,
        network_options: dict[str, Any] | None = None,
        features: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        self._own_features = features is not None
        named = {"encoder_weights": encoder_weights, "network_options": network_options}
        for name, value in named.items():
            if self._own_features and value:
                raise GenSegError(
                    f"{name} is of a network by name, and features is a network of your own: give "
                    f"one or the other ({name} None, also where a checkpoint holds it)."
                )
        if features is None:
            features = PixelFeatures(
                encoder, decoder, encoder_weights, num_classes=num_classes, options=network_options
            )
        self.features = features

    @property
    def own_features(self) -> str | None:
        """Import path of the network that was given as `features`; None for one by name."""
        kind = type(self.features)
        return f"{kind.__module__}.{kind.__qualname__}" if self._own_features else None

    def extract(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images in [0, 1], and the network's auxiliary scores if it has any."""
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
            scores = F.interpolate(scores.float(), scale_factor=scale, mode="bilinear")
            return crop(scores, height, width)
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
        """Add the cross-entropy of the coarse scores of `ocrnet` or `mla`, at its weight."""
        if auxiliary is None:
            return losses
        assert isinstance(self.features, PixelFeatures)
        extra = pixel_cross_entropy(self.to_image(auxiliary, mask), mask, self.ignore_index)
        return {
            **losses,
            "loss": losses["loss"] + self.features.auxiliary_weight * extra,
            "loss_auxiliary": extra,
        }
