"""Learned inverses of maskiges: from pictures to class scores (GSS-FT and GSS-FT-W)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.networks.swin import SwinBlocks


class ConvInverse(nn.Sequential):
    """Class scores of a maskige by three convolutions, 1x1, 3x3 and 1x1: X^-1 of GSS-FT.

    Generative Semantic Segmentation, Chen et al., CVPR 2023, Sec. 3.2; the width is that of the
    authors' early code.

    Args:
        num_classes: K.
        width: channels in between.

    Example:
        >>> import torch
        >>> ConvInverse(num_classes=5)(torch.rand(1, 3, 20, 30)).shape
        torch.Size([1, 5, 20, 30])
    """

    def __init__(self, num_classes: int, width: int = 128) -> None:
        super().__init__(
            conv_bn_relu(3, width, 1),
            conv_bn_relu(width, width, 3),
            nn.Conv2d(width, num_classes, 1),
        )


class SwinInverse(nn.Module):
    """Class scores of a maskige by shifted-window attention over its pixels: X^-1 of GSS-FT-W.

    Generative Semantic Segmentation, Chen et al., CVPR 2023, Sec. 3.2, in the sizes of its code.

    Args:
        num_classes: K.
        width: channels; a multiple of 32.
        depth: number of Swin blocks; the code has 2 on ADE20K and MSeg, 1 on Cityscapes.

    Example:
        >>> import torch
        >>> SwinInverse(num_classes=5)(torch.rand(1, 3, 20, 30)).shape
        torch.Size([1, 5, 20, 30])
    """

    def __init__(self, num_classes: int, width: int = 128, depth: int = 1) -> None:
        super().__init__()
        self.projection = conv_bn_relu(3, width, 1)
        self.blocks = SwinBlocks(width, depth)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, picture: Tensor) -> Tensor:
        """Scores B x K x H x W of pictures B x 3 x H x W in [0, 1]."""
        scores: Tensor = self.classifier(self.blocks(self.projection(picture)))
        return scores
