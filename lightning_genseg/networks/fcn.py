"""Decoder of the fully convolutional network as mmsegmentation trains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation, ReLU."""
    padding = kernel_size // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class FCNDecoder(nn.Module):
    """Two 3x3 convolutions on the last encoder stage, and a third over their result and the stage.

    J. Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015
    (arXiv:1411.4038), in the "FCN-D8" form of mmsegmentation: the encoder is dilated to stride 8.
    Its auxiliary head on the stage before is left out.

    Args:
        encoder_channels: channels of the encoder's stages, finest first.
        decoder_channels: channels F of the features.
        dropout: probability of dropping a channel of the features.
    """

    def __init__(
        self, encoder_channels: Sequence[int], decoder_channels: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        check_arguments(
            FCNDecoder.__init__, locals(), decoder_channels="[1, inf)", dropout="[0, 1)"
        )
        in_channels = encoder_channels[-1]
        self.convs = nn.Sequential(
            conv_bn_relu(in_channels, decoder_channels, 3),
            conv_bn_relu(decoder_channels, decoder_channels, 3),
        )
        self.fuse = conv_bn_relu(in_channels + decoder_channels, decoder_channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Encoder stages, finest first, to features B x F x h x w of the size of the last one."""
        last = stages[-1]
        features: Tensor = self.dropout(self.fuse(torch.cat([last, self.convs(last)], dim=1)))
        return features
