"""Checkpoints of one module that another one is built on."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_genseg.errors import GenSegError, MissingFileError


def read_checkpoint(
    path: Path, argument: str, kind: str, fits: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Content of a checkpoint, tensors on the CPU; no foreign code is run.

    Args:
        path: of the file.
        argument: that it was given as, for messages.
        kind: name of the module that has to have written it, likewise.
        fits: whether a content is of that kind; may fail as a look-up does where it is of none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or not of that kind.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{argument} '{path}' is no file: give the checkpoint of a {kind} run."
            if path.exists()
            else f"{argument} '{path}' does not exist: give the checkpoint of a {kind} run."
        )
    cause: Exception | None = None
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        if isinstance(content, dict) and fits(content):
            return content
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        cause = error
    raise GenSegError(
        f"{argument} '{path}' is no checkpoint of a {kind}: give the .ckpt file that `genseg fit "
        f"--model {kind}` has written."
    ) from cause
