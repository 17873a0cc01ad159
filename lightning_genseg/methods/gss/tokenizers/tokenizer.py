"""What a tokenizer is."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError


class Tokenizer(nn.Module, ABC):
    """Base of the tokenizers: a subclass writes `_encode`, `_decode`, `decode_soft` and `config`.

    - As the authors' code: `DalleDVAE`, frozen, with the likeliest token of each cell.
    - As the paper: the same. VQGAN and UViM, with which its Table 2 compares, are not here.
    - Ours: `MaskigeVQ` and `CellMajority`, which need no download; mixtures of tokens
      (`decode_soft`); pictures whose sides are no multiples of a cell, which are continued.

    Pictures are in [0, 1]; what a network makes of that range is its own affair. Computed in
    float32 under autocast too, since near-ties would otherwise become other tokens; on GPUs with
    TF32 they still may, unless PyTorch is told not to use it (`torch.backends.cudnn.allow_tf32`).

    Attributes:
        codebook_size: V, how many tokens there are.
        downsample: f, pixels a token covers in each direction.
        lacks_weights: whether it was built from a description, and no weights have been loaded yet.
    """

    codebook_size: int
    downsample: int
    lacks_weights: bool = False
    _alone: Tensor | None = None

    @abstractmethod
    def _encode(self, picture: Tensor) -> Tensor:
        """Tokens B x h x w of pictures B x 3 x (f h) x (f w)."""

    @abstractmethod
    def _decode(self, tokens: Tensor) -> Tensor:
        """Pictures B x 3 x (f h) x (f w) in [0, 1] of tokens B x h x w."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """`kind` and sizes, from which `make_tokenizer` builds one like it, untrained."""

    @abstractmethod
    def decode_soft(self, weights: Tensor) -> Tensor:
        """Pictures of mixtures of tokens, B x V x h x w that sum to 1."""

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """Reconstruct pictures B x 3 x H x W so that gradients reach them.

        Args:
            picture: in [0, 1]; sides are multiples of f.
            temperature: of the Gumbel noise, where there is some.

        Raises:
            NotImplementedError: no gradient passes.
        """
        raise NotImplementedError(f"{type(self).__name__} lets no gradient through.")

    @torch.no_grad()
    def encode(self, picture: Tensor) -> Tensor:
        """Tokens B x ceil(H/f) x ceil(W/f) int64 of pictures B x 3 x H x W in [0, 1].

        Sides that are no multiples of f are continued by their last pixels.
        """
        with torch.autocast(picture.device.type, enabled=False):
            return self._encode(pad_to_cells(picture.float(), self.downsample))

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures B x 3 x (f h) x (f w) float32 in [0, 1] of tokens B x h x w."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self._decode(tokens)

    @torch.no_grad()
    def token_pictures(self) -> Tensor:
        """What each token draws among cells of its own kind, V x 3 x f x f; kept once made."""
        device = next(self.buffers(), next(self.parameters(), torch.empty(0))).device
        if self._alone is None or self._alone.device != device:
            fields = torch.arange(self.codebook_size, device=device)[:, None, None].expand(-1, 5, 5)
            middle = slice(2 * self.downsample, 3 * self.downsample)
            parts = [self.decode(part)[..., middle, middle] for part in fields.split(256)]
            self._alone = torch.cat(parts)
        return self._alone

    def fingerprint(self) -> str:
        """Short digest of kind, sizes and weights: what belongs to another one does not fit."""
        digest = hashlib.sha256(repr(sorted(self.config().items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def need_weights(self) -> None:
        """Refuse to train on a tokenizer that was described and never loaded."""
        if self.lacks_weights:
            raise GenSegError(
                "tokenizer is a mere description, without weights: give the .ckpt of a "
                "MaskigeTokenizer run, or the converted file of DALL-E's dVAE."
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.lacks_weights = False
        self._alone = None


def pad_to_cells(picture: Tensor, downsample: int) -> Tensor:
    """Continue pictures B x 3 x H x W by their last row and column to whole cells of f x f."""
    rows, columns = (-side % downsample for side in picture.shape[-2:])
    return F.pad(picture, (0, columns, 0, rows), mode="replicate") if rows or columns else picture
