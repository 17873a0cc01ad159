"""Maskiges: masks as pictures, and the ways back from pictures to classes (GSS)."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.networks.swin import SwinBlocks

Color = tuple[int, int, int]


class Maskige(nn.Module):
    """Draw masks in the colours of their classes: X of GSS, Eq. 3, frozen.

    Generative Semantic Segmentation, Chen et al., CVPR 2023. Unlike a picture for people, its
    colours are chosen so that a tokenizer keeps them apart: see `class_colors`.

    Args:
        colors: K + 1 colours, (red, green, blue) from 0 to 255; the last is that of unlabelled
            pixels, which is never predicted.
        ignore_index: label of unlabelled pixels.

    Attributes:
        colors: buffer (K + 1) x 3 in [0, 1].

    Raises:
        GenSegError: fewer than three colours, one outside 0..255, or one colour for two classes.

    Example:
        >>> maskige = Maskige([(255, 0, 0), (0, 0, 255), (0, 0, 0)])
        >>> maskige(torch.tensor([[[0, 1, 255]]]))[0, :, 0].T.tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """

    colors: Tensor

    def __init__(self, colors: Sequence[Sequence[float]], ignore_index: int = 255) -> None:
        super().__init__()
        table = torch.as_tensor(colors, dtype=torch.float32)
        shaped = table.ndim == 2 and table.shape[1] == 3 and len(table) >= 3
        if not shaped or not bool(((table >= 0) & (table <= 255)).all()):
            raise GenSegError(
                "colors must be (red, green, blue), each from 0 to 255, of at least two classes "
                "and, last, of unlabelled pixels."
            )
        if len(table[:-1].unique(dim=0)) < len(table) - 1:
            raise GenSegError(
                "colors gives one colour to two classes, which no inverse can tell apart."
            )
        self.register_buffer("colors", table / 255)
        self.ignore_index = ignore_index

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.colors) - 1

    def forward(self, mask: Tensor) -> Tensor:
        """Maskiges B x 3 x H x W in [0, 1] of masks B x H x W int64.

        Raises:
            GenSegError: a label has no colour.
        """
        ignored = mask == self.ignore_index
        # Looking at a value makes the CPU wait for the GPU, which stops at such a label itself.
        look = mask.numel() and mask.device.type == "cpu"
        largest = int(mask.masked_fill(ignored, 0).max()) if look else 0
        if largest >= self.num_classes:
            raise GenSegError(
                f"the mask has label {largest} and there are colours for {self.num_classes} "
                "classes: give colours for all."
            )
        colors = F.embedding(mask.masked_fill(ignored, 0), self.colors[:-1])
        return torch.where(ignored[..., None], self.colors[-1], colors).movedim(-1, 1)

    def fingerprint(self) -> str:
        """Short digest of the colours: what belongs to other colours does not fit."""
        table = (self.colors.double().cpu() * 255).round().to(torch.uint8)
        return hashlib.sha256(table.numpy().tobytes()).hexdigest()[:16]


class NearestColor(nn.Module):
    """Class scores by the distance to each colour: the inverse of GSS-FF, frozen.

    argmin_k |x - b_k|^2 = argmax_k x.b_k - |b_k|^2 / 2, a 1x1 convolution. The paper prints a
    linear least squares instead (`LeastSquares`); its code takes the nearest colour, as here.

    Args:
        colors: K x 3 in [0, 1], those of the classes alone.

    Example:
        >>> colors = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
        >>> NearestColor(colors)(torch.tensor([0.9, 0.2, 0.3]).view(1, 3, 1, 1)).argmax(1).item()
        0
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, colors: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", colors.clone(), persistent=False)
        self.register_buffer("bias", -colors.square().sum(1) / 2, persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        """Scores B x K x H x W of pictures x, B x 3 x H x W in [0, 1]: (|x|^2 - distance^2) / 2."""
        # Half precision, or a convolution's TF32, would take neighbouring colours for one another.
        with torch.autocast(picture.device.type, enabled=False):
            scores = torch.einsum("kc,bchw->bkhw", self.weight, picture.float())
            return scores + self.bias[:, None, None]


class LeastSquares(nn.Module):
    """Class scores by the inverse that the paper prints, (b^T b)^-1 b^T, frozen; an ablation.

    Supplement A. The greatest score of a linear map belongs to a corner of the colours' convex
    hull, wherever the picture's colour lies. Even of the exact colours it recovers 14 of 150
    classes of ADE20K's table, 5 of 19 of Cityscapes' and 9 of 194 of MSeg's.

    Args:
        colors: K x 3 in [0, 1], those of the classes alone.
    """

    weight: Tensor

    def __init__(self, colors: Tensor) -> None:
        super().__init__()
        inverse = torch.linalg.pinv(colors.double()).T.to(colors.dtype)
        self.register_buffer("weight", inverse, persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        """Scores B x K x H x W of pictures B x 3 x H x W in [0, 1]."""
        with torch.autocast(picture.device.type, enabled=False):
            return torch.einsum("kc,bchw->bkhw", self.weight, picture.float())


class ConvInverse(nn.Sequential):
    """Class scores by three convolutions, 1x1, 3x3 and 1x1: X^-1 of GSS-FT, learned.

    Generative Semantic Segmentation, Sec. 3.2; the width is that of the authors' early code.

    Args:
        num_classes: K.
        width: channels in between.
    """

    def __init__(self, num_classes: int, width: int = 128) -> None:
        check_arguments(ConvInverse.__init__, locals(), width="[1, inf)")
        super().__init__(
            conv_bn_relu(3, width, 1),
            conv_bn_relu(width, width, 3),
            nn.Conv2d(width, num_classes, 1),
        )


class SwinInverse(nn.Module):
    """Class scores by shifted-window attention over the pixels: X^-1 of GSS-FT-W, learned.

    Generative Semantic Segmentation, Sec. 3.2, in the sizes of its code.

    Args:
        num_classes: K.
        width: channels; a multiple of 32.
        depth: number of Swin blocks; the code has 2 on ADE20K and MSeg, 1 on Cityscapes.
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


def class_votes(scores: Tensor) -> Tensor:
    """1 for the highest of the class scores B x K x H x W of each pixel, 0 for the others.

    To be averaged when maskiges are resized, in place of scores: between two colours there may be
    that of a third class.
    """
    return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
