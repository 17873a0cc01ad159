"""Where a run writes; files that appear complete or not at all; files of tensors, read safely."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file

from lightning_genseg.errors import (
    DownloadError,
    GenSegError,
    MissingFileError,
    UnwritableError,
    first_line,
)

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path | None:
    """Folder of a run's log; None without one, and in a trial (`fast_dev_run`).

    It asks the other processes: all must call it together.
    """
    folder = trainer.log_dir
    trial: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return None if folder is None or trial else Path(folder)


def leads_out(name: str) -> bool:
    """Whether a name below a folder leads out of it, here or on Windows."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.anchor or ".." in path.parts for path in paths)


def make_folder(path: Path, argument: str) -> None:
    """Make a folder and those above it; a GenSegError names the argument if nobody may write there.

    Called before long work, whose result would be lost.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenSegError(
            f"{argument} '{path}' cannot be made ({error.strerror}): choose another folder."
        ) from error
    if not os.access(path, os.W_OK):
        raise GenSegError(f"nothing may be written to {argument} '{path}': choose another folder.")


def read_text(path: Path | str, what: str) -> str:
    """Text of a file that a user wrote, in UTF-8; a GenSegError if it is in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise GenSegError(
            f"{what} '{path}' is not in UTF-8 (byte {error.start}): save it in that encoding."
        ) from error
    except OSError as error:
        raise GenSegError(
            f"{what} '{path}' cannot be read ({error.strerror}): give another file."
        ) from error


def read_json(path: Path | str, what: str, **options: Any) -> Any:
    """Content of a JSON file that a user wrote; a GenSegError if it is none."""
    try:
        return json.loads(read_text(path, what), **options)
    except GenSegError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise GenSegError(
            f"{what} '{path}' is no JSON that can be read ({first_line(error)}): correct or "
            "restore it."
        ) from error


def replace_file(path: Path, content: bytes | memoryview, scratch: Path | None = None) -> None:
    """Write a file so that it appears complete or not at all, also if power fails.

    Args:
        path: of the file; its folder is made.
        content: the whole of it.
        scratch: folder for the half-written file, on the same disk; default: the file's own.

    Raises:
        UnwritableError: it cannot be written; what was there before is unchanged.
    """
    scratch = path.parent if scratch is None else scratch
    name = f".{uuid4().hex[:12]}"  # also other hosts may write here; the name may be at its limit
    partial = scratch / name
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(path, error, len(content)) from error
        raise


def replace_written(path: Path, write: Callable[[Path], object]) -> None:
    """As `replace_file`, for a function that writes a file itself, and may write others beside it.

    Args:
        path: of the file; its folder exists. It appears after the others.
        write: takes another path of the same name, in a folder of its own.

    Raises:
        UnwritableError: it cannot be written; what was there before is unchanged.
    """
    try:
        with TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            write(Path(folder, path.name))
            for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name):
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(path.with_name(part.name))
    except OSError as error:
        raise _unwritable(path, error) from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; it is on the disk when this returns.

    Raises:
        UnwritableError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error, len(line)) from error


def _unwritable(path: Path, error: OSError, size: int | None = None) -> UnwritableError:
    needed = "" if size is None else f", which takes {size / 1e6:.1f} MB"
    return UnwritableError(
        f"'{path}' cannot be written ({error.strerror}){needed}: make room, or choose another "
        "folder. What was there before is unchanged."
    )


def is_address(path: str | Path) -> bool:
    """Whether it is of another machine or archive (`https://`, `s3://`), in fsspec's words."""
    protocol = re.match(r"(\w[\w+.-]*):(//|:)", str(path))
    return protocol is not None and protocol[1] not in ("file", "local") and not _is_file(path)


def local_copy(path: str | Path) -> Path | io.BytesIO:
    """A path as it is; of an address, what lies there.

    Raises:
        DownloadError: nothing could be got from the address.
    """
    if not is_address(path):
        return Path(re.sub(r"^(file|local)://", "", str(path)))
    try:
        system, inside = fsspec.core.url_to_fs(str(path))
        return io.BytesIO(system.cat_file(inside))
    except Exception as error:  # clients of a dozen protocols, each with errors of its own
        raise DownloadError(
            f"'{path}' could not be fetched ({first_line(error)}): check the address, or download "
            "the file and give its path."
        ) from error


def load_tensors(source: str | Path | io.BytesIO, name: str = "", mmap: bool = True) -> Any:
    """Content of a file of tensors on the CPU. No code in it is run, wherever it comes from.

    Args:
        source: a checkpoint or state dict of torch.save or safetensors, its address, or its bytes.
        name: what messages call it; its path when left out.
        mmap: read tensors when they are used; the file must not change until then.

    Raises:
        MissingFileError: there is no such file.
        DownloadError: nothing could be got from the address.
        GenSegError: it is cut off, holds objects other than tensors and plain values, or is
            something else.
    """
    name = name or f"'{source}'"
    file = source if isinstance(source, io.BytesIO) else local_copy(source)
    if isinstance(file, Path) and not _is_file(file):
        what = "is a folder" if os.path.isdir(file) else "does not exist"  # noqa: PTH112
        raise MissingFileError(f"{name} {what}: give the path of a file of weights.")
    try:
        if str(source).endswith(".safetensors"):
            return load_file(file) if isinstance(file, Path) else load_safetensors(file.getvalue())
        mapped = mmap and isinstance(file, Path) and zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of torch, pickle, zipfile and safetensors: a dozen types
        raise GenSegError(f"{name} {_why_unreadable(file, error)}") from error


def _why_unreadable(file: Path | io.BytesIO, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "may not be read: check its permissions."
    if isinstance(file, Path):
        with file.open("rb") as content:
            start, cut = content.read(4), not zipfile.is_zipfile(file)
    else:
        start, cut = file.getvalue()[:4], not zipfile.is_zipfile(file)
    if not start or (start[:2] == b"PK" and cut) or re.search("truncated|incomplete", str(error)):
        return f"is truncated, as after a full disk or a broken download: {_beside(file)}."
    if named := re.search(r"GLOBAL ([\w.]+)|[Cc]lass ([\w.]+)", str(error)):
        return (
            f"holds objects ({named[1] or named[2]}), not only tensors: reading them would run "
            "code that the file names, so it is not read."
        )
    return "is not a checkpoint that can be read safely: give a file of torch.save or safetensors."


def _beside(file: Path | io.BytesIO) -> str:
    if isinstance(file, Path):
        others = [p for p in file.parent.glob(f"*{file.suffix}") if zipfile.is_zipfile(p)]
        if others:
            newest = max(others, key=lambda path: path.stat().st_mtime)
            return f"the newest whole one beside it is '{newest}'"
    return "write or download it again"


def _is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # pathlib's raises where no file can have the name
