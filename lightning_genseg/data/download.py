"""Getting public archives: whole or not at all, checked, with a progress bar, never twice."""

import hashlib
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.errors import DownloadError, GenSegError

_CHUNK = 1 << 20  # bytes


class Archive(NamedTuple):
    """A public .zip, .tar or .tgz file.

    Args:
        url: its address.
        checksum: `md5:` or `sha1:` and the hexadecimal digest; `None` where nobody published one
            (the length and the archive's own checksums are checked all the same).
        folders: folder or file in the archive -> where it goes below the root.
    """

    url: str
    checksum: str | None
    folders: Mapping[str, str]


def fetch(root: Path, archives: Sequence[Archive]) -> None:
    """Download and unpack archives, except those whose folders are all in `root` already.

    An archive that lies in `root` under its own name (because its download took another way) is
    used instead of the network. A folder appears only when it is complete; archives are removed
    when they are unpacked.

    Args:
        root: created if needed.
        archives: see `Archive`.

    Raises:
        ConnectionError: the address does not answer or the connection breaks.
        ValueError: the file is not the expected one or not a readable archive.
    """
    root.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        wanted = {
            inside: root / place
            for inside, place in archive.folders.items()
            if not (root / place).exists()
        }
        if wanted:
            path = root / archive.url.rpartition("/")[2]
            if path.is_file():
                _check(path, archive.checksum, f"remove '{path}' and start again")
            else:
                _download(archive, path)
            _unpack(path, wanted)
            path.unlink()


def _download(archive: Archive, path: Path) -> None:
    url, checksum, _ = archive
    part = path.with_name(path.name + ".part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "lightning-genseg"})
        with urllib.request.urlopen(request, timeout=60) as answer, part.open("wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            if length and file.tell() != length:
                raise OSError(f"it ended after {file.tell()} of {length} bytes")
        _check(part, checksum, f"try again, or put the right file at '{path}' yourself")
        part.rename(path)
    except (OSError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise DownloadError(
            f"'{url}' could not be downloaded ({error}): try again, or put the file at '{path}' "
            "yourself."
        ) from error
    finally:
        part.unlink(missing_ok=True)  # also when the user interrupts


def _check(path: Path, checksum: str | None, remedy: str) -> None:
    if checksum is None:
        return
    kind, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected:
        raise GenSegError(
            f"'{path.name}' is not the expected file (its {kind} is {found} instead of "
            f"{expected}): {remedy}."
        )


def _unpack(path: Path, wanted: Mapping[str, Path]) -> None:
    """Write the wanted members below a temporary folder, then move them to their places."""
    temporary = path.with_name(path.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        found: dict[str, Path] = {}
        with tqdm(unit=" files", desc=f"unpacking {path.name}") as bar:
            for name, content in _members(path):
                member = PurePosixPath(name)
                for number, inside in enumerate(wanted):
                    if ".." not in member.parts and member.is_relative_to(inside):
                        target = temporary / str(number) / member.relative_to(inside)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with target.open("wb") as file:
                            shutil.copyfileobj(content, file, _CHUNK)
                        found[inside] = temporary / str(number)
                        bar.update()
        missing = [inside for inside in wanted if inside not in found]
        if missing:
            raise GenSegError(f"it holds no '{missing[0]}'")
        for inside, place in wanted.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            found[inside].rename(place)
    except (
        ValueError,
        EOFError,
        OSError,
        zlib.error,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:
        raise GenSegError(
            f"'{path}' cannot be unpacked ({error}): make room on the disk, or remove it and "
            "download again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    with archive.open(name) as content:
                        yield name, content
    else:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name.removeprefix("./"), file
