"""Getting public archives: whole or not at all, checked, never twice."""

import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pooch  # type: ignore[import-untyped]

from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.errors import DownloadError, GenSegError


class Archive(NamedTuple):
    """A public .zip, .tar or .tgz file.

    Args:
        url: its address.
        checksum: `md5:` or `sha1:` and the hexadecimal digest. None where nobody published one:
            such an archive is not downloaded, users are asked to do it.
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
        DownloadError: the address does not answer, the connection breaks, or the file is not the
            expected one.
        GenSegError: an archive without checksum, or one that cannot be unpacked.
    """
    for archive in archives:
        wanted = {
            inside: root / place
            for inside, place in archive.folders.items()
            if not (root / place).exists()
        }
        if not wanted:
            continue
        if archive.checksum is None:
            places = " and ".join(f"its '{inside}' to '{path}'" for inside, path in wanted.items())
            raise GenSegError(
                f"'{archive.url}' has no published checksum, so it is not downloaded "
                f"automatically: download it yourself and unpack {places}."
            )
        path = root / archive.url.rpartition("/")[2]
        try:
            downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 20)
            pooch.retrieve(archive.url, archive.checksum, path.name, root, downloader=downloader)
        except (OSError, ValueError) as error:  # requests' errors, another checksum
            raise DownloadError(
                f"'{archive.url}' could not be downloaded ({error}): try again, or put the file at "
                f"'{path}' yourself."
            ) from error
        _unpack(path, wanted)
        path.unlink()


def _unpack(path: Path, wanted: Mapping[str, Path]) -> None:
    """Unpack into a temporary folder, then move what is wanted to its places."""
    temporary = path.with_name(path.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    print(f"unpacking {path.name}", file=sys.stderr)
    try:
        # Neither kind writes outside of the folder: of a .zip file shutil makes sure itself, of a
        # .tar file its filter. Python before 3.11.4 has none, and can only trust the checksum.
        if path.suffix != ".zip" and hasattr(tarfile, "data_filter"):
            shutil.unpack_archive(path, temporary, filter="data")
        else:
            shutil.unpack_archive(path, temporary)
        missing = [inside for inside in wanted if not (temporary / inside).exists()]
        if missing:
            raise GenSegError(f"'{path}' holds no '{missing[0]}': remove it and download again.")
        for inside, place in wanted.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            (temporary / inside).rename(place)
    except OSError as error:
        raise GenSegError(
            f"'{path}' cannot be unpacked ({error}): make room on the disk."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class DownloadDataModule(SegmentationDataModule):
    """A public data set that downloads itself.

    Args:
        root: folder of the data set; not needed for prediction.
        download: get what is missing in `root` before the run.
        batch_size: images of a training batch, per process.
        crop_size: (height, width) of training images in pixels.
    """

    dataset: ClassVar[Any]  # its class

    def __init__(
        self,
        root: Path,
        download: bool = False,
        batch_size: int = 16,
        crop_size: tuple[int, int] = (512, 512),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            class_names=self.dataset.CLASS_NAMES,
            palette=self.dataset.PALETTE,
            batch_size=batch_size,
            crop_size=crop_size,
            **kwargs,
        )
        self.root = root
        self.download = download

    def get_files(self) -> None:
        """Download what is missing, if asked to."""
        if self.download:
            self.dataset.download(self.root)
