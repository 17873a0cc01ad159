"""Tokenizers by name or file."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import load_tensors
from lightning_genseg.methods.gss.options import VQOptions
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.majority import CellMajority
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from lightning_genseg.networks.weights import entries_below, state_dict_of


def make_tokenizer(source: str | Path | dict[str, Any], colors: Tensor) -> Tokenizer:
    """A frozen tokenizer in evaluation mode.

    Args:
        source: `majority-4` (`CellMajority` with cells of so many pixels); the path of the
            checkpoint of a `MaskigeTokenizer`, or of anything trained on top of one; the path of a
            state dict (.safetensors or torch.save) of DALL-E's dVAE; or, for one without weights
            yet, what `Tokenizer.config` returns.
        colors: K x 3 in [0, 1], those of the classes.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: the file holds no tokenizer, or one that has learned other colours.
    """
    if isinstance(source, Mapping):
        tokenizer = _build(source, colors)
        tokenizer.lacks_weights = not isinstance(tokenizer, CellMajority)
    elif match := re.fullmatch(r"majority-(\d+)", str(source)):
        tokenizer = CellMajority(colors, int(match[1]))
    else:
        tokenizer = _read(Path(source), colors)
    return tokenizer.eval().requires_grad_(False)


def lasting_source(tokenizer: Tokenizer) -> str | dict[str, Any]:
    """What `make_tokenizer` needs to build it again once its file is gone: name, or sizes."""
    config = tokenizer.config()
    return f"majority-{config['downsample']}" if config["kind"] == "majority" else config


def _build(config: Mapping[str, Any], colors: Tensor) -> Tokenizer:
    kinds: dict[Any, Callable[..., Tokenizer]] = {
        "majority": partial(CellMajority, colors),
        "vq": lambda **sizes: MaskigeVQ(VQOptions(**sizes)),
        "dalle": DalleDVAE,
    }
    try:
        return kinds[config.get("kind")](**{k: v for k, v in config.items() if k != "kind"})
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
    content = load_tensors(path)
    state = state_dict_of(content, path)
    config = content.get("tokenizer")
    if not isinstance(config, Mapping):
        return DalleDVAE.from_weights(state, path)
    if config["kind"] == "majority":
        return _build(config, colors)  # nothing was learned
    trained = next(x for key, x in state.items() if key.endswith("maskige.colors"))[:-1]
    unknown = [row for row in colors.tolist() if not _is_among(row, trained)]
    if unknown:
        shown = ", ".join(str(round(255 * value)) for value in unknown[0])
        raise GenSegError(
            f"tokenizer '{path}' has learned other colours, without ({shown}): set colors as in "
            "its run, or train a tokenizer on these."
        )
    tokenizer = _build(config, colors)
    tokenizer.load_state_dict(entries_below(state, "tokenizer."))
    return tokenizer


def _is_among(color: Sequence[float], table: Tensor) -> bool:
    return bool((table - torch.tensor(color)).abs().amax(1).min() < 0.5 / 255)
