"""Tokenizers: pictures as grids of discrete tokens, and back (GSS)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tokenizer(nn.Module, ABC):
    """Base of the tokenizers: a subclass writes `_encode` and `_decode`.

    Pictures are in [0, 1]; what a network makes of that range is its own affair. Computed in float32 under autocast
    too, since a near-tie would otherwise become another token on another machine.

    Attributes:
        codebook_size: V, how many tokens there are.
        downsample: f, pixels a token covers in each direction.
    """

    codebook_size: int
    downsample: int

    @abstractmethod
    def _encode(self, picture: Tensor) -> Tensor:
        """Tokens B x h x w of pictures B x 3 x (f h) x (f w)."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """Pictures B x 3 x (f h) x (f w) in [0, 1] of tokens B x h x w."""

    def decode_soft(self, weights: Tensor) -> Tensor:
        """Pictures of mixtures of tokens, B x V x h x w that sum to 1; NotImplementedError where there is no such thing."""
        raise NotImplementedError(f"{type(self).__name__} cannot decode mixtures of tokens.")

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """Tokens B x ceil(H/f) x ceil(W/f) int64 of pictures B x 3 x H x W in [0, 1].

        Sides that are no multiples of f are continued by their last pixels.
        """
        rows, columns = (-side % self.downsample for side in picture.shape[-2:])
        with torch.autocast(picture.device.type, enabled=False):
            padded = F.pad(picture.float(), (0, columns, 0, rows), mode="replicate")
            return self._encode(padded)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures B x 3 x (f h) x (f w) float32 in [0, 1] of tokens B x h x w."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._decode(tokens)

    def fingerprint(self) -> str:
        """Short digest of kind and weights: what was learned with another tokenizer does not fit."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.codebook_size}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class CellMajority(Tokenizer):
    """The commonest class of a cell as its token: nothing is learned, and GSS becomes coarse classification.

    What any learned tokenizer must beat. On a tie the lower class wins.

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
        self.register_buffer("colors", colors.clone())
        self.codebook_size, self.downsample = len(colors), downsample

    def _encode(self, picture: Tensor) -> Tensor:
        f = self.downsample
        nearest = torch.cdist(picture.movedim(1, -1).flatten(0, 2), self.colors).argmin(1)
        votes = F.one_hot(nearest.view(len(picture), *picture.shape[-2:]), self.codebook_size)
        return F.avg_pool2d(votes.movedim(-1, 1).float(), f).argmax(1)

    def _decode(self, tokens: Tensor) -> Tensor:
        cells = F.embedding(tokens, self.colors).movedim(-1, 1)
        return F.interpolate(cells, scale_factor=float(self.downsample), mode="nearest")

    def decode_soft(self, weights: Tensor) -> Tensor:
        """See the base."""
        cells = torch.einsum("bvhw,vc->bchw", weights.float(), self.colors)
        return F.interpolate(cells, scale_factor=float(self.downsample), mode="nearest")
