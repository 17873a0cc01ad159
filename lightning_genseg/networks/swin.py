"""Blocks of shifted-window attention over a feature map."""

from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError

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
