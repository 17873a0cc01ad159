"""A small tokenizer that learns from masks."""

import math
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.methods.gss.options import VQOptions
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer


class MaskigeVQ(Tokenizer):
    """A small network with finite scalar quantisation, which `MaskigeTokenizer` trains.

    - As the authors' code, as the paper of GSS: nothing; neither has it.
    - As the paper of its quantiser, Finite Scalar Quantization, Mentzer et al., ICLR 2024, Sec. 3:
      each of d numbers is squashed and rounded to one of its levels, and the token is their
      combination. No codebook is learned, so none of it can die.
    - Ours: the network, and a squashing that reaches the ends of any number of levels. A cell's
      pixels become channels at once; residual blocks look at the neighbouring cells only, so that
      tokens stay local and can be predicted from an image. The way back is the mirror image with a
      3x3 convolution at the end.

    Args:
        sizes: of the network.

    Example:
        >>> tokenizer = MaskigeVQ(VQOptions(downsample=4, levels=(4, 3), channels=8))
        >>> tokens = tokenizer.encode(torch.rand(1, 3, 10, 20))
        >>> tokens.shape, tokenizer.codebook_size, tokenizer.decode(tokens).shape
        (torch.Size([1, 3, 5]), 12, torch.Size([1, 3, 12, 20]))
    """

    codes: Tensor
    _steps: Tensor
    _strides: Tensor

    def __init__(self, sizes: VQOptions = VQOptions()) -> None:
        super().__init__()
        self.sizes, self.downsample = sizes, sizes.downsample
        levels, channels, blocks = sizes.levels, sizes.channels, sizes.blocks
        self.codebook_size = math.prod(levels)
        pixels, dimension = sizes.downsample**2, len(levels)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(sizes.downsample),
            nn.Conv2d(3 * pixels, channels, 1),
            *(_ResidualBlock(channels) for _ in range(blocks)),
            nn.Conv2d(channels, dimension, 1),
        )
        fine = 16  # channels of a pixel before the last convolution
        self.decoder = nn.Sequential(
            nn.Conv2d(dimension, channels, 1),
            *(_ResidualBlock(channels) for _ in range(blocks)),
            nn.Conv2d(channels, fine * pixels, 1),
            nn.PixelShuffle(sizes.downsample),
            nn.ReLU(),
            nn.Conv2d(fine, 3, 3, padding=1),
        )
        strides = [math.prod(levels[:i]) for i in range(dimension)]
        self.register_buffer("_steps", torch.tensor(levels), persistent=False)
        self.register_buffer("_strides", torch.tensor(strides), persistent=False)
        digits = torch.arange(self.codebook_size)[:, None] // self._strides % self._steps
        self.register_buffer("codes", self._values(digits), persistent=False)

    def config(self) -> dict[str, Any]:
        """Kind and sizes."""
        return {"kind": "vq", **asdict(self.sizes), "levels": list(self.sizes.levels)}

    def forward(self, picture: Tensor) -> Tensor:
        """Reconstruct pictures B x 3 x (f h) x (f w), in the precision of autocast: to train by.

        Rounding passes gradients on as if it were not there.
        """
        digits = self._digits(picture)
        rounded = digits + (digits.round() - digits).detach()
        return self._paint(self._values(rounded).movedim(-1, 1))

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """Reconstruct pictures in float32; no noise, since the rounding has its own gradient."""
        with torch.autocast(picture.device.type, enabled=False):
            reconstruction: Tensor = self(picture.float())
            return reconstruction

    def _digits(self, picture: Tensor) -> Tensor:
        """Which level each number is nearest to, B x h x w x d, before rounding."""
        # The maskige's 0..1 to -1..1, of which zeros in the network are the middle.
        squashed = torch.tanh(self.encoder(2 * picture - 1).float().movedim(1, -1))
        return (squashed + 1) / 2 * (self._steps - 1)

    def _values(self, digits: Tensor) -> Tensor:
        return 2 * digits / (self._steps - 1) - 1

    def _paint(self, codes: Tensor) -> Tensor:
        picture: Tensor = self.decoder(codes).float().sigmoid()
        return picture

    def _encode(self, picture: Tensor) -> Tensor:
        return (self._digits(picture).round().long() * self._strides).sum(-1)

    def _decode(self, tokens: Tensor) -> Tensor:
        return self._paint(F.embedding(tokens, self.codes).movedim(-1, 1))

    def decode_soft(self, weights: Tensor) -> Tensor:
        """Pictures of the mean of the codes, by weights B x V x h x w that sum to 1."""
        with torch.autocast(weights.device.type, enabled=False):
            return self._paint(torch.einsum("bvhw,vd->bdhw", weights.float(), self.codes))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.mix.weight)  # the identity at first, in place of a normalisation
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.mix(F.relu(self.spatial(F.relu(x))))
        return x + change
