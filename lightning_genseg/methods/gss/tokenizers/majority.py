"""The commonest class of a cell as its token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.ops.resize import labelled_cells

_DISTANCES_AT_ONCE = 2**24


class CellMajority(Tokenizer):
    """The commonest class of a cell as its token: what any learned tokenizer must beat.

    Ours, in neither paper nor code. Nothing is learned, and GSS becomes coarse classification. On a
    tie the lower class wins.

    Args:
        colors: K x 3 in [0, 1].
        downsample: f, side of a cell in pixels.

    Example:
        >>> tokenizer = CellMajority(torch.eye(3), downsample=2)
        >>> picture = torch.eye(3)[torch.tensor([[0, 0, 1, 2], [0, 1, 2, 2]])].movedim(-1, 0)[None]
        >>> tokenizer.encode(picture).tolist(), tokenizer.decode(tokenizer.encode(picture)).shape
        ([[[0, 2]]], torch.Size([1, 3, 2, 4]))
    """

    colors: Tensor

    def __init__(self, colors: Tensor, downsample: int = 4) -> None:
        super().__init__()
        check_arguments(CellMajority.__init__, locals(), downsample="[1, inf)")
        self.register_buffer("colors", colors.clone())
        self.codebook_size, self.downsample = len(colors), downsample

    def config(self) -> dict[str, Any]:
        """Kind and size."""
        return {"kind": "majority", "downsample": self.downsample}

    def _encode(self, picture: Tensor) -> Tensor:
        pixels = picture.movedim(1, -1)
        # In parts: the distances to 150 colours of a few crops would be gigabytes.
        parts = pixels.flatten(0, 2).split(max(1, _DISTANCES_AT_ONCE // self.codebook_size))
        nearest = torch.cat([torch.cdist(part, self.colors).argmin(1) for part in parts])
        size = [side // self.downsample for side in picture.shape[-2:]]
        return labelled_cells(nearest.view(pixels.shape[:3]), size, self.codebook_size)

    def _decode(self, tokens: Tensor) -> Tensor:
        cells = F.embedding(tokens, self.colors).movedim(-1, 1).contiguous()
        return F.interpolate(cells, scale_factor=float(self.downsample), mode="nearest")

    def decode_soft(self, weights: Tensor) -> Tensor:
        """The mean of the colours of classes, B x V x h x w that sum to 1."""
        with torch.autocast(weights.device.type, enabled=False):
            cells = torch.einsum("bvhw,vc->bchw", weights.float(), self.colors)
        return F.interpolate(cells, scale_factor=float(self.downsample), mode="nearest")
