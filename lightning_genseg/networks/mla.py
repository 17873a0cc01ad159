"""Multi-level aggregation, the decoder of GSS."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.networks.swin import SwinBlocks

Auxiliary = Literal["separate", "shared", "none"]


class MLADecoder(nn.Module):
    """The last four encoder stages at one resolution, merged, and looked at by Swin blocks.

    Generative Semantic Segmentation, Chen et al., CVPR 2023, Sec. 3.3, in the sizes of its code:
    1x1 convolutions of each stage, bilinear enlargement, a 1x1 convolution of all.

    Args:
        encoder_channels: channels of the encoder's stages, finest first.
        level_channels: of each stage once reduced.
        decoder_channels: F, of the merged map; a multiple of 32.
        depth: number of Swin blocks; the code has 2 on Swin-L, 6 on ResNet-101 and HRNet-W48.
        stride: of the map: 4, that of the finest stage (d = 1/4), or 8, that of the next (d = 1/8
            of Table 3).
        auxiliary: coarse class scores beside the features: from a branch of its own (`separate`:
            Cityscapes, ADE20K), from the merged map before the Swin blocks (`shared`: MSeg), or
            `none`.
        num_classes: C of the auxiliary scores.

    Raises:
        GenSegError: fewer than four stages, or auxiliary scores without a number of classes.
    """

    def __init__(
        self,
        encoder_channels: Sequence[int],
        level_channels: int = 384,
        decoder_channels: int = 512,
        depth: int = 2,
        stride: Literal[4, 8] = 4,
        auxiliary: Auxiliary = "none",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_arguments(
            MLADecoder.__init__,
            locals(),
            level_channels="[1, inf)",
            decoder_channels="[1, inf)",
            num_classes="[2, inf)",
        )
        stages = encoder_channels[-4:]
        if len(stages) < 4 or 0 in stages:
            raise GenSegError(
                "MLA merges four stages and the encoder has the channels "
                f"{list(encoder_channels)}: choose another encoder or a greater encoder_depth."
            )
        level = 0 if stride == 4 else 1
        self.merge = _Merge(stages, level_channels, decoder_channels, level)
        self.blocks = SwinBlocks(decoder_channels, depth)
        self.auxiliary: nn.Module | None = None
        self.own_branch = auxiliary == "separate"
        if auxiliary == "none":
            return
        if num_classes is None:
            raise GenSegError("the auxiliary head of MLA predicts classes: give it num_classes.")
        if auxiliary == "shared":
            self.auxiliary = nn.Conv2d(decoder_channels, num_classes, 1)
        else:
            self.auxiliary = nn.Sequential(
                _Merge(stages, level_channels, level_channels, level),
                nn.Conv2d(level_channels, num_classes, 1),
            )

    def forward(self, stages: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Encoder stages, finest first, to features B x F x h x w, and auxiliary scores if any.

        The auxiliary scores are B x C x h x w.
        """
        levels = stages[-4:]
        merged = self.merge(levels)
        features: Tensor = self.blocks(merged)
        if self.auxiliary is None:
            return features
        return features, self.auxiliary(levels if self.own_branch else merged)


class _Merge(nn.Module):
    """All levels at the size of level `finest`."""

    def __init__(
        self, in_channels: Sequence[int], level_channels: int, out_channels: int, finest: int
    ) -> None:
        super().__init__()
        self.finest = finest
        self.levels = nn.ModuleList(conv_bn_relu(c, level_channels, 1) for c in in_channels)
        self.fuse = conv_bn_relu(len(in_channels) * level_channels, out_channels, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[self.finest].shape[-2:]
        reduced = [conv(level) for conv, level in zip(self.levels, levels, strict=True)]
        merged: Tensor = self.fuse(
            torch.cat([F.interpolate(level, size, mode="bilinear") for level in reduced], 1)
        )
        return merged
