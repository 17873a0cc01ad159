"""DeepLabV3+ with full convolutions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.ops.resize import resize_aligned


class DeepLabDecoder(nn.Module):
    """DeepLabV3+'s decoder as AGMM's authors build it: no convolution is separable.

    L.-C. Chen et al., Encoder-Decoder with Atrous Separable Convolution for Semantic Image
    Segmentation, ECCV 2018 (arXiv:1802.02611), in the sizes of AGMM's code. smp's `deeplabv3plus`
    fuses by one separable convolution of 0.08 million weights, this by two full ones of 1.29
    million, and has none between pyramid and enlargement; it drops channels, not single values.

    Args:
        encoder_channels: channels of the encoder's stages, finest first.
        decoder_channels: channels F of the features.
        atrous_rates: of the pyramid's three 3x3 convolutions.
        dropout: probability of dropping a channel of the pyramid.

    Raises:
        GenSegError: the encoder has no stage of stride 4 before its last.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        decoder_channels: int = 256,
        atrous_rates: tuple[int, int, int] = (6, 12, 18),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_arguments(
            DeepLabDecoder.__init__,
            locals(),
            decoder_channels="[1, inf)",
            atrous_rates="[1, inf)",
            dropout="[0, 1)",
        )
        if len(encoder_channels) < 4 or encoder_channels[2] == 0:
            raise GenSegError("decoder 'deeplabv3plus_full' needs an encoder_depth of at least 3.")
        last, width = encoder_channels[-1], decoder_channels
        self.pyramid = nn.ModuleList(
            [
                conv_bn_relu(last, width, 1),
                *(conv_bn_relu(last, width, 3, rate) for rate in atrous_rates),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_relu(last, width, 1)),
            ]
        )
        self.project = nn.Sequential(conv_bn_relu(5 * width, width, 1), nn.Dropout2d(dropout))
        self.reduce = conv_bn_relu(encoder_channels[2], 48, 1)
        self.fuse = nn.Sequential(conv_bn_relu(width + 48, width, 3), conv_bn_relu(width, width, 3))

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Encoder stages, finest first, to features B x F x h x w of stride 4."""
        last, fine = stages[-1], self.reduce(stages[2])
        branches = [branch(last) for branch in self.pyramid]
        branches[-1] = branches[-1].expand_as(branches[0])
        coarse = resize_aligned(self.project(torch.cat(branches, 1)), fine.shape[-2:])
        features: Tensor = self.fuse(torch.cat([coarse, fine], 1))
        return features
