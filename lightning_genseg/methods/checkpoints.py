"""Checkpoints of one module that another one builds on."""

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
        kind: name of the module that wrote it, likewise.
        fits: whether a content is of that kind; look-ups in it may fail.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: it is no checkpoint, or not of that kind.
    """
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise MissingFileError(
            f"{argument} '{path}' {problem}: give the checkpoint of a {kind} run."
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
