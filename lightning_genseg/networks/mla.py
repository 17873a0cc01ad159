"""Multi-level aggregation and the token head of GSS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.networks.swin import SwinBlocks

Auxiliary = Literal["separate", "shared", "none"]


class MLADecoder(nn.Module):
    """The last four encoder stages, brought to one resolution, merged, and looked at by Swin blocks.

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
        ValueError: fewer than four stages, or auxiliary scores without a number of classes.
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
        stages = encoder_channels[-4:]
        if len(stages) < 4 or 0 in stages:
            raise GenSegError(
                "MLA merges four stages and the encoder has the channels "
                f"{list(encoder_channels)}: choose another encoder or a greater encoder_depth."
            )
        if auxiliary != "none" and num_classes is None:
            raise GenSegError("the auxiliary head of MLA predicts classes: give it num_classes.")
        level = 0 if stride == 4 else 1
        self.merge = _Merge(stages, level_channels, decoder_channels, level)
        self.blocks = SwinBlocks(decoder_channels, depth)
        self.auxiliary: nn.Module | None = None
        self.own_branch = auxiliary == "separate"
        if num_classes is not None and auxiliary == "shared":
            self.auxiliary = nn.Conv2d(decoder_channels, num_classes, 1)
        elif num_classes is not None and auxiliary == "separate":
            self.auxiliary = nn.Sequential(
                _Merge(stages, level_channels, level_channels, level),
                nn.Conv2d(level_channels, num_classes, 1),
            )

    def forward(self, stages: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Encoder stages, finest first -> features B x F x h x w and, if there are any, auxiliary scores B x C x h x w."""
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


class TokenHead(nn.Module):
    """Which of V tokens each cell holds.

    GSS' code: a 1x1 convolution to `width` channels, dropout of whole channels, a 1x1 convolution
    to V. The logits of 8 192 tokens at a quarter of 512 x 512 are 512 MB an image: they are made in
    parts where they are many, in the backward pass once more, and cells that do not count never get
    any.

    Args:
        in_channels: F.
        codebook_size: V.
        width: channels before the classifier.
        dropout: of whole channels.
        logits_at_once: how many logits there may be at a time.

    Raises:
        ValueError: `logits_at_once` or `width` is not positive, or `dropout` no probability.
    """

    def __init__(
        self,
        in_channels: int,
        codebook_size: int,
        width: int = 2048,
        dropout: float = 0.1,
        logits_at_once: int = 2**26,
    ) -> None:
        super().__init__()
        if logits_at_once < 1:
            raise GenSegError(f"logits_at_once is {logits_at_once}; it must be positive.")
        if width < 1:
            raise GenSegError(f"the token head has {width} channels: give it 1 or more.")
        if not 0 <= dropout < 1:
            raise GenSegError(
                f"the dropout of the token head is {dropout} but must be from 0 to below 1."
            )
        self.expand = conv_bn_relu(in_channels, width, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, codebook_size, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        self.cells_at_once = max(1, logits_at_once // codebook_size)

    def forward(self, features: Tensor) -> Tensor:
        """Logits B x V x h x w, all at once."""
        logits: Tensor = self.classifier(self.dropout(self.expand(features)))
        return logits

    def predict(self, features: Tensor) -> Tensor:
        """Likeliest tokens B x h x w."""
        cells = self.dropout(self.expand(features)).movedim(1, -1)
        parts = cells.flatten(0, 2).split(self.cells_at_once)
        with torch.no_grad():
            tokens = torch.cat([F.linear(part, *self._classifier()).argmax(1) for part in parts])
        return tokens.view(cells.shape[:3])

    def cross_entropy(self, features: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """Sum over the cells that count of the cross-entropy, in float32; 0 where none does.

        Args:
            features: B x F x h x w.
            tokens: B x h x w int64.
            valid: B x h x w bool, cells that count.
        """
        cells, targets = self.dropout(self.expand(features)).movedim(1, -1)[valid], tokens[valid]
        weight, bias = self._classifier()
        if len(cells) <= self.cells_at_once:
            return _cross_entropy(cells, weight, bias, targets)
        total: Tensor = cells.new_zeros((), dtype=torch.float32)
        for part, target in zip(
            cells.split(self.cells_at_once), targets.split(self.cells_at_once), strict=True
        ):
            loss: Tensor = checkpoint(
                _cross_entropy, part, weight, bias, target, use_reentrant=False
            )
            total = total + loss
        return total

    def _classifier(self) -> tuple[Tensor, Tensor]:
        assert self.classifier.bias is not None
        return self.classifier.weight.flatten(1), self.classifier.bias


def _cross_entropy(cells: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(cells, weight, bias).float()
    loss: Tensor = F.cross_entropy(logits, target, reduction="sum")
    return loss
