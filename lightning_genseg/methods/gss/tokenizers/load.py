"""Tokenizers by name or file."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE, _dalle_key
from lightning_genseg.methods.gss.tokenizers.majority import CellMajority
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer, TokenizerConfig
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from lightning_genseg.networks.weights import read_state_dict


def make_tokenizer(source: str | Path | TokenizerConfig, colors: Tensor) -> Tokenizer:
    """A frozen tokenizer in evaluation mode.

    Args:
        source: `majority-4` (`CellMajority` with cells of so many pixels); the path of the
            checkpoint of a `MaskigeTokenizer`, or of anything trained on top of one; the path of a
            state dict (.safetensors or torch.save) of DALL-E's dVAE; or a `TokenizerConfig`, for
            one without weights yet.
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
        raise GenSegError(
            f"tokenizer is {dict(config)}: give kind (majority, vq, dalle) and its sizes, as "
            "`config()` returns them."
        ) from error


def _read(path: Path, colors: Tensor) -> Tokenizer:
    if not path.is_file():
        raise MissingFileError(
            f"tokenizer '{path}' is no file: give majority-4, the checkpoint of a MaskigeTokenizer "
            "run, or the converted weights of DALL-E's dVAE."
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
            raise GenSegError(
                f"tokenizer '{path}' has learned other colours, without ({shown}): set colors as "
                "in its run, or train a tokenizer on these."
            )
        tokenizer = _build(config, colors)
        tokenizer.load_state_dict(_below(state, "tokenizer."))
        return tokenizer
    parts = {
        name: {_dalle_key(key): x for key, x in _below(state, f"{name}.blocks.").items()}
        for name in ("encoder", "decoder")
    }
    if not all("input.w" in part for part in parts.values()):
        raise GenSegError(
            f"tokenizer '{path}' holds none: give the checkpoint of a MaskigeTokenizer run, or the "
            "encoder and decoder of DALL-E's dVAE in one file, as `genseg convert-dalle` writes it."
        )
    hidden = len(parts["encoder"]["input.w"])
    vocabulary = parts["decoder"]["input.w"].shape[1]
    with torch.device("meta"):
        dalle = DalleDVAE(vocabulary, hidden)
    try:
        merged = {f"{n}.blocks.{key}": x for n, part in parts.items() for key, x in part.items()}
        dalle.load_state_dict({k: x.float() for k, x in merged.items()}, assign=True)
    except RuntimeError as error:
        raise GenSegError(
            f"tokenizer '{path}' does not fit DALL-E's dVAE: give the complete weights of encoder "
            "and decoder."
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


def _is_among(color: Sequence[float], table: Tensor) -> bool:
    return bool((table - torch.tensor(color)).abs().amax(1).min() < 0.5 / 255)
