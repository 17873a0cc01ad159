"""Decoded images and masks on the disk, mapped into memory where they are needed again."""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.errors import reason
from lightning_genseg.files import replace_file

_FORMAT = 1  # another number where files are read differently


class DecodedFiles:
    """Arrays of files as they were once decoded; a file that has changed is decoded again.

    One that changes has another size or time of change, by which the arrays are named. All
    processes share the pages of the memory that holds them; what one writes into its array stays
    its own. Arrays that cannot be kept are decoded every time, with a warning.

    Args:
        folder: where the arrays lie, uncompressed: 6 MB for an image of 1024 x 2048 pixels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._writes = folder, True

    def read(
        self, path: Path, decode: Callable[[], NDArray[Any]], options: object = None
    ) -> NDArray[Any]:
        """What `decode` makes of a file.

        Args:
            path: of the file.
            decode: reads it; called where it has not been, or the file is a new one.
            options: whatever else decides what is read.
        """
        try:
            status = path.stat()
        except OSError:  # decoding says so in a sentence
            return decode()
        name = hashlib.sha256(repr((_FORMAT, str(path.absolute()), options)).encode()).hexdigest()
        folder = self.folder / name[:2]
        file = folder / f"{name[:32]}_{status.st_size}_{status.st_mtime_ns}.npy"
        try:
            mapped: NDArray[Any] = np.load(file, mmap_mode="c", allow_pickle=False)
            return mapped
        except (OSError, ValueError, EOFError):  # not there, or not whole
            array = decode()
        if self._writes:
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            try:
                replace_file(file, content.getbuffer())
                for other in set(folder.glob(f"{name[:32]}_*")) - {file}:
                    other.unlink(missing_ok=True)  # of the file before it changed
            except OSError as error:
                self._writes = False
                warnings.warn(
                    f"decoded images cannot be kept in '{self.folder}' ({reason(error)}): set "
                    "cache_dir to a folder with enough space, or cache to none.",
                    stacklevel=2,
                )
        return array
