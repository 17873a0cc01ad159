"""The dVAE of DALL-E."""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.networks.weights import entries_below


class DalleDVAE(Tokenizer):
    """The discrete VAE of DALL-E, which GSS uses frozen: 97.6 million weights, 8192 tokens, f = 8.

    Zero-Shot Text-to-Image Generation, Ramesh et al., ICML 2021. `genseg convert-dalle` makes a
    file of plain tensors of its pickles.

    - As the authors' code: layers, names of parameters (`encoder.blocks...`, `decoder.blocks...`),
      values from 0.1 to 0.9, the likeliest token; of the decoder's six channels the three means.
    - As the paper: Gumbel noise passes gradients to learned colours (`straight_through`), at a
      temperature that it does not give.
    - Ours: float32 everywhere. The published convolutions run in half precision on a GPU, where
      near-ties can become other tokens; the decoder's first layer is looked up, not multiplied.

    Args:
        vocabulary: V.
        hidden: width of the networks, a multiple of 4.
    """

    downsample = 8

    def __init__(self, vocabulary: int = 8192, hidden: int = 256) -> None:
        super().__init__()
        check_arguments(DalleDVAE.__init__, locals(), vocabulary="[2, inf)", hidden="[4, inf)")
        if hidden % 4:
            raise GenSegError(f"hidden is {hidden}; it must be a multiple of 4.")
        self.codebook_size, self.hidden = vocabulary, hidden
        widths = [hidden, 2 * hidden, 4 * hidden, 8 * hidden]
        self.encoder = nn.Module()
        self.encoder.blocks = _dalle_blocks(
            _Conv(3, hidden, 7), [hidden, *widths], (3, 3, 3, 1), nn.MaxPool2d(2), vocabulary
        )
        self.decoder = nn.Module()
        self.decoder.blocks = _dalle_blocks(
            _Conv(vocabulary, hidden // 2, 1),
            [hidden // 2, *widths[::-1]],
            (1, 3, 3, 3),
            nn.Upsample(scale_factor=2),
            6,
        )

    @classmethod
    def from_weights(cls, state: Mapping[str, Tensor], path: Path) -> Self:
        """Build one from its weights, in the names of OpenAI, GSS' checkpoints or FLAVA.

        Args:
            state: what lies below `encoder.blocks.` and `decoder.blocks.` is taken.
            path: where it is from, for messages.

        Raises:
            GenSegError: encoder or decoder are missing, or something does not fit.
        """
        parts = {name: _published(state, f"{name}.blocks.") for name in ("encoder", "decoder")}
        if not all("input.w" in part for part in parts.values()):
            raise GenSegError(
                f"tokenizer '{path}' holds none: give the checkpoint of a MaskigeTokenizer run, or "
                "the encoder and decoder of DALL-E's dVAE in one file, as `genseg convert-dalle` "
                "writes it."
            )
        sizes = parts["decoder"]["input.w"].shape[1], len(parts["encoder"]["input.w"])
        with torch.device("meta"):
            dalle = cls(*sizes)
        try:
            for name, part in parts.items():
                dalle.get_submodule(f"{name}.blocks").load_state_dict(part, assign=True)
        except RuntimeError as error:
            raise GenSegError(
                f"tokenizer '{path}' does not fit DALL-E's dVAE: give the complete weights of "
                "encoder and decoder."
            ) from error
        return dalle

    def config(self) -> dict[str, Any]:
        """Kind and sizes."""
        return {"kind": "dalle", "vocabulary": self.codebook_size, "hidden": self.hidden}

    def logits(self, picture: Tensor) -> Tensor:
        """Scores of the tokens, B x V x H/8 x W/8, of pictures B x 3 x H x W in [0, 1]."""
        # 0 and 1 themselves are out of reach of the logit-Laplace distribution it was trained with.
        scores: Tensor = self.encoder.blocks(0.8 * picture + 0.1)  # type: ignore[operator]
        return scores

    def _paint(self, first: Tensor) -> Tensor:
        """Pictures of what the decoder's first layer says."""
        rest: Any = self.decoder.blocks
        means = rest[1:](first)[:, :3].sigmoid()
        picture: Tensor = ((means - 0.1) / 0.8).clamp(0, 1)
        return picture

    def _encode(self, picture: Tensor) -> Tensor:
        return self.logits(picture).argmax(1)

    def _decode(self, tokens: Tensor) -> Tensor:
        layer: Any = self.decoder.blocks
        # A 1x1 convolution of one-hot tokens, which would take V numbers for each.
        rows = F.embedding(tokens, layer.input.w[..., 0, 0].T) + layer.input.b
        return self._paint(rows.movedim(-1, 1))

    def decode_soft(self, weights: Tensor) -> Tensor:
        """Pictures of mixtures of tokens, B x V x h x w that sum to 1."""
        layer: Any = self.decoder.blocks
        with torch.autocast(weights.device.type, enabled=False):
            return self._paint(layer.input(weights.float()))

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """Tokens drawn with Gumbel noise, which pass on the gradient of their soft weights."""
        with torch.autocast(picture.device.type, enabled=False):
            scores = self.logits(picture.float())
            return self.decode_soft(F.gumbel_softmax(scores, tau=temperature, hard=True, dim=1))


class _Conv(nn.Module):
    """A convolution whose parameters have the names of the published code."""

    def __init__(self, channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, channels, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.w, std=(channels * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _DalleBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, kernels: Sequence[int]) -> None:
        super().__init__()
        hidden = out_channels // 4
        same = channels == out_channels
        self.id_path = nn.Identity() if same else _Conv(channels, out_channels, 1)
        widths = [channels, hidden, hidden, hidden, out_channels]
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", _Conv(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        # One over the square of the eight blocks.
        result: Tensor = self.id_path(x) + self.res_path(x) / 64
        return result


def _dalle_blocks(
    first: nn.Module, widths: Sequence[int], kernels: Sequence[int], resize: nn.Module, out: int
) -> nn.Sequential:
    """Input, four groups of two blocks with a change of size between them, output."""
    parts: dict[str, nn.Module] = {"input": first}
    for g in range(1, 5):
        group: dict[str, nn.Module] = {
            "block_1": _DalleBlock(widths[g - 1], widths[g], kernels),
            "block_2": _DalleBlock(widths[g], widths[g], kernels),
        }
        parts[f"group_{g}"] = _named(group if g == 4 else {**group, "resize": resize})
    parts["output"] = _named({"relu": nn.ReLU(), "conv": _Conv(widths[4], out, 1)})
    return _named(parts)


def _named(parts: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def _published(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """What lies below a part, by its published names; other libraries have others."""
    found = {}
    for key, tensor in entries_below(state, part).items():
        key = key.replace(".group.", ".").replace(".path.", ".")  # FLAVA's
        found[re.sub(r"\.(weight|bias)$", lambda match: f".{match[1][0]}", key)] = tensor.float()
    return found
