"""Tokenizers: pictures as grids of discrete tokens, and back (GSS)."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.inference import resize_labels, resize_maps
from lightning_genseg.networks.features import read_state_dict
from lightning_genseg.networks.maskige import Maskige, class_votes


class TokenizerConfig(TypedDict, total=False):
    """Kind and sizes of a tokenizer: what `Tokenizer.config` returns and `make_tokenizer` builds again.

    Keys:
        kind: `majority` (`CellMajority`), `vq` (`MaskigeVQ`) or `dalle` (`DalleDVAE`).
        downsample: of `majority` and `vq`.
        levels: of `vq`, like the next two.
        channels: see there.
        blocks: see there.
        vocabulary: of `dalle`, like the next.
        hidden: see there.
    """

    kind: Required[Literal["majority", "vq", "dalle"]]
    downsample: int
    levels: list[int]
    channels: int
    blocks: int
    vocabulary: int
    hidden: int


class Tokenizer(nn.Module, ABC):
    """Base of the tokenizers: a subclass writes `_encode`, `_decode` and `config`.

    Pictures are in [0, 1]; what a network makes of that range is its own affair. Computed in float32 under autocast
    too, since near-ties would otherwise become other tokens; on GPUs with TF32 they still may, unless PyTorch is told
    not to use it (`torch.backends.cudnn.allow_tf32`).

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

    @abstractmethod
    def config(self) -> TokenizerConfig:
        """Kind and sizes, from which `make_tokenizer` builds one like it, untrained."""

    def decode_soft(self, weights: Tensor) -> Tensor:
        """Pictures of mixtures of tokens, B x V x h x w that sum to 1; NotImplementedError where there is no such thing."""
        raise NotImplementedError(f"{type(self).__name__} cannot decode mixtures of tokens.")

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """What becomes of pictures B x 3 x H x W, so that gradients reach them; NotImplementedError where they cannot.

        Args:
            picture: in [0, 1]; sides are multiples of f.
            temperature: of the Gumbel noise, where there is some.
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

    def fingerprint(self) -> str:
        """Short digest of kind, sizes and weights: what was learned with another tokenizer does not fit."""
        digest = hashlib.sha256(repr(sorted(self.config().items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def pad_to_cells(picture: Tensor, downsample: int) -> Tensor:
    """Continue pictures B x 3 x H x W by their last row and column to whole cells of f x f pixels."""
    rows, columns = (-side % downsample for side in picture.shape[-2:])
    return F.pad(picture, (0, columns, 0, rows), mode="replicate") if rows or columns else picture


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
        _check_downsample(downsample)
        self.register_buffer("colors", colors.clone())
        self.codebook_size, self.downsample = len(colors), downsample

    def config(self) -> TokenizerConfig:
        """See the base."""
        return {"kind": "majority", "downsample": self.downsample}

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
        with torch.autocast(weights.device.type, enabled=False):
            cells = torch.einsum("bvhw,vc->bchw", weights.float(), self.colors)
        return F.interpolate(cells, scale_factor=float(self.downsample), mode="nearest")


class MaskigeVQ(Tokenizer):
    """A small network with finite scalar quantisation, to be trained on maskiges (`modules.MaskigeTokenizer`).

    Finite Scalar Quantization, Mentzer et al., ICLR 2024, Sec. 3: each of d numbers is squashed and rounded to one of
    its levels, and the token is their combination; no codebook is learned, so none of it can die. The network is ours:
    a cell's pixels become channels at once, residual blocks look at the neighbouring cells only, so that tokens stay
    local and can be predicted from an image, and the way back is the mirror image with a 3x3 convolution at the end.

    Args:
        downsample: f, side of a cell in pixels.
        levels: values of each of the d numbers; V is their product.
        channels: of the residual blocks.
        blocks: on either side, each of which sees one more ring of cells.

    Raises:
        ValueError: a size that makes no network.

    Example:
        >>> tokenizer = MaskigeVQ(downsample=4, levels=[4, 3], channels=8)
        >>> tokens = tokenizer.encode(torch.rand(1, 3, 10, 20))
        >>> tokens.shape, tokenizer.codebook_size, tokenizer.decode(tokens).shape
        (torch.Size([1, 3, 5]), 12, torch.Size([1, 3, 12, 20]))
    """

    codes: Tensor
    _steps: Tensor
    _strides: Tensor

    def __init__(
        self,
        downsample: int = 4,
        levels: Sequence[int] = (8, 5, 5, 5),
        channels: int = 128,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        _check_downsample(downsample)
        if not levels or min(levels) < 2:
            raise ValueError(
                f"levels is {list(levels)} but must be numbers from 2, such as 8, 5, 5, 5."
            )
        if channels < 1 or blocks < 0:
            raise ValueError(
                f"channels is {channels} and blocks {blocks}: give at least 1 and at least 0."
            )
        self.downsample, self.levels, self.channels, self.blocks = (
            downsample,
            list(levels),
            channels,
            blocks,
        )
        self.codebook_size = math.prod(levels)
        pixels, dimension = downsample**2, len(levels)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(downsample),
            nn.Conv2d(3 * pixels, channels, 1),
            *(_ResidualBlock(channels) for _ in range(blocks)),
            nn.Conv2d(channels, dimension, 1),
        )
        fine = 16  # channels of a pixel before the last convolution
        self.decoder = nn.Sequential(
            nn.Conv2d(dimension, channels, 1),
            *(_ResidualBlock(channels) for _ in range(blocks)),
            nn.Conv2d(channels, fine * pixels, 1),
            nn.PixelShuffle(downsample),
            nn.ReLU(),
            nn.Conv2d(fine, 3, 3, padding=1),
        )
        strides = [math.prod(self.levels[:i]) for i in range(dimension)]
        self.register_buffer("_steps", torch.tensor(self.levels), persistent=False)
        self.register_buffer("_strides", torch.tensor(strides), persistent=False)
        digits = torch.arange(self.codebook_size)[:, None] // self._strides % self._steps
        self.register_buffer("codes", self._values(digits), persistent=False)

    def config(self) -> TokenizerConfig:
        """See the base."""
        return {
            "kind": "vq",
            "downsample": self.downsample,
            "levels": self.levels,
            "channels": self.channels,
            "blocks": self.blocks,
        }

    def forward(self, picture: Tensor) -> Tensor:
        """Reconstruct pictures B x 3 x (f h) x (f w), in the precision of autocast: to train by.

        Rounding passes gradients on as if it were not there.
        """
        digits = self._digits(picture)
        rounded = digits + (digits.round() - digits).detach()
        return self._paint(self._values(rounded).movedim(-1, 1))

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """See the base; without noise, since the rounding has its own gradient."""
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
        """See the base: of the mean of the codes."""
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


def _check_downsample(downsample: int) -> None:
    if downsample < 1:
        raise ValueError(
            f"downsample is {downsample} but must be at least 1, the side of a cell in pixels."
        )


class DalleDVAE(Tokenizer):
    """The discrete VAE of DALL-E, which GSS uses frozen: 97.6 million weights, 8192 tokens, f = 8.

    Zero-Shot Text-to-Image Generation, Ramesh et al., ICML 2021; layers and names of parameters as in the published
    code, so that its weights fit: `encoder.blocks...` and `decoder.blocks...`. There is no download and no pickle here:
    `python -m lightning_genseg.convert_dalle` makes a file of plain tensors. The published convolutions run in half
    precision on a GPU, so that near-ties can become other tokens there.

    Args:
        vocabulary: V.
        hidden: width of the networks, a multiple of 4.
    """

    downsample = 8

    def __init__(self, vocabulary: int = 8192, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 4 or hidden % 4 or vocabulary < 2:
            raise ValueError(
                f"hidden is {hidden} and vocabulary {vocabulary}: give a multiple of 4 and at least 2."
            )
        self.codebook_size, self.hidden = vocabulary, hidden
        widths = [hidden, 2 * hidden, 4 * hidden, 8 * hidden]
        self.encoder = nn.Module()
        self.encoder.blocks = _dalle_blocks(
            _Conv(3, hidden, 7), [hidden, *widths], (3, 3, 3, 1), nn.MaxPool2d(2), vocabulary
        )
        self.decoder = nn.Module()
        self.decoder.blocks = _dalle_blocks(
            _Conv(vocabulary, hidden // 2, 1), [hidden // 2, *widths[::-1]], (1, 3, 3, 3), nn.Upsample(scale_factor=2), 6
        )  # fmt: skip

    def config(self) -> TokenizerConfig:
        """See the base."""
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
        """See the base."""
        layer: Any = self.decoder.blocks
        with torch.autocast(weights.device.type, enabled=False):
            return self._paint(layer.input(weights.float()))

    def straight_through(self, picture: Tensor, temperature: float = 1.0) -> Tensor:
        """See the base: tokens drawn with Gumbel noise, which pass on the gradient of their soft weights."""
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
        self.id_path = (
            nn.Identity() if channels == out_channels else _Conv(channels, out_channels, 1)
        )
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
    blocks = nn.Sequential()
    blocks.add_module("input", first)
    for g in range(1, 5):
        group = nn.Sequential()
        group.add_module("block_1", _DalleBlock(widths[g - 1], widths[g], kernels))
        group.add_module("block_2", _DalleBlock(widths[g], widths[g], kernels))
        if g < 4:
            group.add_module("resize", resize)
        blocks.add_module(f"group_{g}", group)
    output = nn.Sequential()
    output.add_module("relu", nn.ReLU())
    output.add_module("conv", _Conv(widths[4], out, 1))
    blocks.add_module("output", output)
    return blocks


def make_tokenizer(source: str | Path | TokenizerConfig, colors: Tensor) -> Tokenizer:
    """A frozen tokenizer in evaluation mode.

    Args:
        source: `majority-4` (`CellMajority` with cells of so many pixels); the path of the checkpoint of a
            `MaskigeTokenizer`, or of anything trained on top of one; the path of a state dict (.safetensors or
            torch.save) of DALL-E's dVAE; or a `TokenizerConfig`, for one without weights yet.
        colors: K x 3 in [0, 1], those of the classes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no tokenizer, or one that has learned other colours.
    """
    if isinstance(source, Mapping):
        tokenizer = _build(source, colors)
    elif match := re.fullmatch(r"majority-(\d+)", str(source)):
        tokenizer = CellMajority(colors, int(match[1]))
    else:
        tokenizer = _read(Path(source), colors)
    return tokenizer.eval().requires_grad_(False)


def _build(config: TokenizerConfig, colors: Tensor) -> Tokenizer:
    sizes: dict[str, Any] = {key: value for key, value in config.items() if key != "kind"}
    kinds: dict[str | None, Callable[..., Tokenizer]] = {
        "majority": partial(CellMajority, colors),
        "vq": MaskigeVQ,
        "dalle": DalleDVAE,
    }
    try:
        return kinds[config.get("kind")](**sizes)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"tokenizer is {dict(config)}: give kind (majority, vq, dalle) and its sizes, as `config()` returns them."
        ) from error


def _read(path: Path, colors: Tensor) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer '{path}' is no file: give majority-4, the checkpoint of a MaskigeTokenizer run, or the converted "
            "weights of DALL-E's dVAE."
        )
    state = read_state_dict(path)
    config = None if path.suffix == ".safetensors" else _saved_config(path)
    if config is not None:
        if config["kind"] == "majority":
            return _build(config, colors)  # nothing was learned
        trained = next(x for key, x in state.items() if key.endswith("maskige.colors"))[:-1]
        unknown = [row for row in colors.tolist() if not _is_among(row, trained)]
        if unknown:
            shown = ", ".join(str(round(255 * value)) for value in unknown[0])
            raise ValueError(
                f"tokenizer '{path}' has learned other colours, without ({shown}): set colors as in its run, or train a "
                "tokenizer on these."
            )
        tokenizer = _build(config, colors)
        tokenizer.load_state_dict(_below(state, "tokenizer."))
        return tokenizer
    parts = {
        name: {_dalle_key(key): x for key, x in _below(state, f"{name}.blocks.").items()}
        for name in ("encoder", "decoder")
    }
    if not all("input.w" in part for part in parts.values()):
        raise ValueError(
            f"tokenizer '{path}' holds none: give the checkpoint of a MaskigeTokenizer run, or the encoder and decoder of "
            "DALL-E's dVAE in one file, as `python -m lightning_genseg.convert_dalle` writes it."
        )
    hidden = len(parts["encoder"]["input.w"])
    vocabulary = parts["decoder"]["input.w"].shape[1]
    with torch.device("meta"):
        dalle = DalleDVAE(vocabulary, hidden)
    try:
        merged = {f"{n}.blocks.{key}": x for n, part in parts.items() for key, x in part.items()}
        dalle.load_state_dict({k: x.float() for k, x in merged.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"tokenizer '{path}' does not fit DALL-E's dVAE: give the complete weights of encoder and decoder."
        ) from error
    return dalle


def _saved_config(path: Path) -> TokenizerConfig | None:
    """What a checkpoint of this package says of the tokenizer in it."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (RuntimeError, pickle.UnpicklingError):  # mmap wants today's format
        return None
    config: TokenizerConfig | None = checkpoint.get("tokenizer")
    return config if isinstance(config, Mapping) else None


def _below(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The entries whose names go on after `part`, which may itself lie deeper."""
    found = {}
    for key, value in state.items():
        _, separator, rest = f".{key}".partition(f".{part}")
        if separator:
            found[rest] = value
    return found


def _dalle_key(key: str) -> str:
    """The published name of a parameter that other libraries call otherwise."""
    key = key.replace(".group.", ".").replace(".path.", ".")  # FLAVA's
    return re.sub(r"\.(weight|bias)$", lambda match: f".{match[1][0]}", key)


def _is_among(color: Sequence[float], table: Tensor) -> bool:
    return bool((table - torch.tensor(color)).abs().amax(1).min() < 0.5 / 255)


class Reconstruction(NamedTuple):
    """What becomes of a mask: `tokens` B x h x w, `picture` B x 3 x H' x W', `scores` B x K x H x W."""

    tokens: Tensor
    picture: Tensor
    scores: Tensor


def reconstruct(
    mask: Tensor, maskige: Maskige, tokenizer: Tokenizer, inverse: nn.Module, scale: float = 1.0
) -> Reconstruction:
    """Mask to maskige to tokens to maskige to class scores: what stage two of GSS could reach at best.

    Args:
        mask: B x H x W int64.
        maskige: draws it.
        tokenizer: encodes and decodes it.
        inverse: picture in [0, 1] to class scores.
        scale: size H' x W' at which the mask is drawn, relative to its own. Stage two predicts a token for every s x s
            pixels of the image, so that its masks are drawn at f / s. Another than 1 makes votes of the scores, so that
            mixtures of two colours are not taken for a third.
    """
    size = mask.shape[-2:]
    drawn = mask
    if scale != 1:
        drawn = resize_labels(mask, [max(1, round(side * scale)) for side in size])
    tokens = tokenizer.encode(maskige(drawn))
    picture = tokenizer.decode(tokens)[..., : drawn.shape[-2], : drawn.shape[-1]]
    scores = inverse(picture)
    if drawn.shape != mask.shape:
        scores = resize_maps(class_votes(scores), size)
    return Reconstruction(tokens, picture, scores)
