"""Blocks of shifted-window attention over a feature map."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.ops.resize import crop, is_exporting

_WINDOW, _HEAD = 7, 32


class SwinBlocks(nn.Module):
    """Swin blocks on a map of any size, and a LayerNorm behind them.

    Swin Transformer, Liu et al., ICCV 2021, in torchvision's implementation: windows of 7, heads of
    32 channels, twice the channels inside; every other block is shifted by 3. Maps are padded with
    zeros to whole windows after the first norm, and padded places take part in the attention, as in
    GSS' code. Where one window covers the map torchvision does not shift; the code does.

    Args:
        channels: of the map; a multiple of 32.
        depth: number of blocks; with 0 the map is returned as it is.

    Raises:
        GenSegError: `channels` is no multiple of 32, or `depth` is negative.
    """

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        check_arguments(SwinBlocks.__init__, locals(), channels="[1, inf)", depth="[0, inf)")
        if depth and channels % _HEAD:
            raise GenSegError(
                f"Swin blocks have heads of {_HEAD} channels and were given {channels}: choose a "
                f"multiple of {_HEAD}."
            )
        self.blocks = nn.Sequential(
            *(
                SwinTransformerBlock(
                    channels,
                    channels // _HEAD,
                    [_WINDOW] * 2,
                    [_WINDOW // 2 if index % 2 else 0] * 2,
                    mlp_ratio=2.0,
                    attn_layer=_WindowAttention,
                )
                for index in range(depth)
            )
        )
        self.norm = nn.LayerNorm(channels) if depth else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """B x F x h x w, to the same."""
        if not self.blocks:
            return features
        output: Tensor = self.norm(self.blocks(features.movedim(1, -1)))
        return output.movedim(-1, 1)


class _WindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Torchvision's; an exported graph is given whole windows, whatever the size of the map.

    It shifts always: a graph is for maps of more than one window.
    """

    def forward(self, x: Tensor) -> Tensor:
        """B x h x w x F to the same."""
        if not is_exporting():
            attended: Tensor = super().forward(x)
            return attended
        height, width = x.shape[1:3]
        rows, columns = ((side + _WINDOW - 1) // _WINDOW * _WINDOW for side in (height, width))
        padded = F.pad(x, (0, 0, 0, columns - width, 0, rows - height))
        return crop(super().forward(padded).movedim(-1, 1), height, width).movedim(1, -1)
