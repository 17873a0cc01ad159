"""Object-contextual representations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.fcn import conv_bn_relu


class OCRDecoder(nn.Module):
    """Every pixel attends to one representation per class, gathered from a coarse prediction.

    Y. Yuan, X. Chen, J. Wang, Object-Contextual Representations for Semantic Segmentation,
    ECCV 2020 (arXiv:1909.11065), with the sizes of mmsegmentation's HRNetV2-W48 configuration.
    The stages of stride 4 and coarser are resized to stride 4 and concatenated. To get HRNet's
    branches as they are, choose ``tu-hrnet_w48`` with the option ``feature_location: ""``.

    Args:
        encoder_channels: channels of the encoder's stages of stride 1, 2, 4, ...
        num_classes: number of classes C, of which each is an object region.
        decoder_channels: channels F of the features.
        key_channels: channels in which pixels and regions are compared.
        dropout: probability of dropping a channel of the features.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        num_classes: int,
        decoder_channels: int = 512,
        key_channels: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = dict.fromkeys(("num_classes", "decoder_channels", "key_channels"), "[1, inf)")
        check_arguments(OCRDecoder.__init__, locals(), dropout="[0, 1)", **sizes)
        in_channels = sum(encoder_channels[2:])
        if in_channels == 0:
            raise GenSegError("decoder 'ocrnet' needs an encoder_depth of at least 2.")
        self.coarse = nn.Sequential(
            conv_bn_relu(in_channels, in_channels, 1), nn.Conv2d(in_channels, num_classes, 1)
        )
        self.pixels = conv_bn_relu(in_channels, decoder_channels, 3)
        self.attention = ObjectAttention(decoder_channels, key_channels)
        self.fuse = conv_bn_relu(2 * decoder_channels, decoder_channels, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, stages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encoder stages to features B x F x h x w and coarse scores B x C x h x w of stride 4."""
        size = stages[2].shape[-2:]
        stacked = torch.cat([F.interpolate(x, size, mode="bilinear") for x in stages[2:]], 1)
        scores: Tensor = self.coarse(stacked)
        pixels = self.pixels(stacked)
        context = self.attention(pixels, gather_regions(pixels, scores))
        features: Tensor = self.dropout(self.fuse(torch.cat([context, pixels], dim=1)))
        return features, scores


class ObjectAttention(nn.Module):
    """Attention of pixels (queries) over object regions (keys and values), Eqs. 8 to 10."""

    def __init__(self, channels: int, key_channels: int) -> None:
        super().__init__()
        self.query, self.key = (
            nn.Sequential(
                conv_bn_relu(channels, key_channels, 1), conv_bn_relu(key_channels, key_channels, 1)
            )
            for _ in range(2)
        )
        self.value = conv_bn_relu(channels, key_channels, 1)
        self.out = conv_bn_relu(key_channels, channels, 1)

    def forward(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Pixels (B x D x h x w) and regions (B x D x C x 1) -> context (B x D x h x w)."""
        query = self.query(pixels).flatten(2).transpose(1, 2)  # B x hw x K
        key = self.key(regions).flatten(2)  # B x K x C
        value = self.value(regions).flatten(2).transpose(1, 2)  # B x C x K
        similarity = query @ key * key.shape[1] ** -0.5
        context = similarity.float().softmax(dim=-1).to(value.dtype) @ value
        context = context.transpose(1, 2).unflatten(2, pixels.shape[-2:])
        out: Tensor = self.out(context)
        return out


def gather_regions(pixels: Tensor, scores: Tensor) -> Tensor:
    """Mean pixel feature of every class, weighted by a softmax of its scores over the image, Eq. 7.

    In float32 also under autocast: over tens of thousands of pixels the weights are far below the
    resolution of half precision.

    Args:
        pixels: features (B x D x h x w).
        scores: coarse class scores (B x C x h x w).

    Returns:
        regions (B x D x C x 1), in the dtype of `pixels`.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        weights = scores.float().flatten(2).softmax(dim=-1)
        regions = torch.einsum("bcn,bdn->bdc", weights, pixels.float().flatten(2))
    return regions.unsqueeze(-1).to(pixels.dtype)
