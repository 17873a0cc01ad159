"""Where a run writes, and files that appear complete or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from lightning_genseg.errors import GenSegError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path | None:
    """Folder of a run's log; None without one, and in a trial (`fast_dev_run`).

    It asks the other processes: all must call it together.
    """
    folder = trainer.log_dir
    trial: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return None if folder is None or trial else Path(folder)


def make_folder(path: Path, argument: str) -> None:
    """Make a folder and those above it; if that fails, a GenSegError names the argument."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenSegError(
            f"{argument} '{path}' cannot be made ({error.strerror}): choose another folder."
        ) from error


def replace_file(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """Write a file so that it appears complete or not at all, also if power fails.

    Args:
        path: of the file; its folder is made.
        content: the whole of it.
        scratch: folder for the half-written file, on the same disk; default: the file's own.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.parent if scratch is None else scratch
    scratch.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = scratch / f".{uuid4().hex[:12]}-{path.name}"  # also other hosts may write here
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
