"""The list of what `genseg predict` has written, a line of JSON for each image."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file

_FILES = ("mask", "overlay", "anomaly", "anomaly_scores", "anomaly_mask")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a ``predictions.jsonl``; a last line that an interruption has torn does not count.

    Raises:
        GenSegError: another line is not JSON.
    """
    *complete, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(complete, start=1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # JSON or encoding
            raise GenSegError(
                f"line {number} of {path} is not JSON: remove the line, and its image is predicted "
                "again."
            ) from error
    return lines


class Manifest:
    """``predictions.jsonl`` of a folder; of several processes each adds to a list of its own.

    Args:
        folder: of the predictions.

    Attributes:
        scratch: folder for half-written files; `join` removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "predictions.jsonl"
        self.scratch = folder / ".partial"

    def exists(self) -> bool:
        """Whether a process has written a list."""
        return any(self.folder.glob("predictions*.jsonl"))

    def read(self) -> list[dict[str, Any]]:
        """Lines of all processes."""
        paths = sorted(self.folder.glob("predictions*.jsonl"))
        return [line for path in paths for line in read_manifest(path)]

    def is_complete(self, line: Mapping[str, Any]) -> bool:
        """Whether a line is of a prediction whose files are all there."""
        return "error" not in line and all(path.is_file() for path in self._files(line))

    def append(self, line: Mapping[str, Any], rank: int) -> None:
        """Add a line to the list of a process; it is on the disk when this returns."""
        path = self.folder / f"predictions-rank{rank}.jsonl" if rank else self.path
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def join(self) -> None:
        """Bring all lists into one, without torn lines; the last of equal names counts."""
        others = sorted(self.folder.glob("predictions-rank*.jsonl"))
        existing = [self.path] if self.path.exists() else []
        lines = {line["name"]: line for path in existing + others for line in read_manifest(path)}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        if existing or others:
            replace_file(self.path, text.encode(), self.scratch)
        for path in others:
            path.unlink()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def remove(self) -> None:
        """Remove the lists and all files that they name."""
        for line in self.read():
            for path in self._files(line):
                path.unlink(missing_ok=True)
        for path in self.folder.glob("predictions*.jsonl"):
            path.unlink()

    def _files(self, line: Mapping[str, Any]) -> list[Path]:
        return [self.folder / line[key] for key in _FILES if line.get(key) is not None]
