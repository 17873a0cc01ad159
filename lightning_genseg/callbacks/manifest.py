"""The list of what `genseg predict` has written, a line of JSON for each image."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_genseg.errors import GenSegError
from lightning_genseg.files import append_line, leads_out, replace_file

_PLACES = {
    "mask": "masks/{}.png",
    "overlay": "overlays/{}.jpg",
    "anomaly": "anomaly/{}.png",
    "anomaly_scores": "anomaly/{}.npy",
    "anomaly_mask": "anomaly_masks/{}.png",
}


def place(kind: str, name: str) -> str:
    """Path of a file of an image, relative to the folder of the predictions.

    Raises:
        GenSegError: the name leads out of the folder, here or on Windows.
    """
    if leads_out(name):
        raise GenSegError(
            f"the image name '{name}' leads out of the output folder: let the data set give names "
            "relative to its own folder."
        )
    return _PLACES[kind].format(name)


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
        return bool(self._lists())

    def is_begun(self) -> bool:
        """Whether a run has begun to write, which may have ended before its first line."""
        return self.exists() or self.scratch.is_dir()

    def read(self) -> list[dict[str, Any]]:
        """Lines of all processes.

        Raises:
            GenSegError: a list that `genseg predict` has not written so.
        """
        lines = [line for path in self._lists() for line in read_manifest(path)]
        for line in lines:
            name = line.get("name") if isinstance(line, dict) else None
            files = {key: line[key] for key in _PLACES if line.get(key) is not None} if name else {}
            if not isinstance(name, str) or any(place(k, name) != v for k, v in files.items()):
                raise GenSegError(
                    f"the lists of '{self.folder}' were not written by genseg predict, which would "
                    f"not list {json.dumps(line)[:100]}: give another --predictions.output_dir."
                )
        return lines

    def is_complete(self, line: Mapping[str, Any]) -> bool:
        """Whether a line is of a prediction whose files are all there, and is not overwritten."""
        return (
            "error" not in line
            and not line.get("stale")
            and all((self.folder / file).is_file() for file in self._files(line))
        )

    def own(self) -> set[str]:
        """Files that earlier runs have written, also one that was killed before it listed them."""
        names = [path.read_text(encoding="utf-8") for path in self.scratch.glob("image-rank*")]
        claimed = {place(kind, name) for name in names if name for kind in _PLACES}
        listed = claimed.union(*(self._files(line) for line in self.read()))
        return {file for file in listed if self._is_inside(self.folder / file)}

    def foreign(self) -> set[str]:
        """Files where predictions go that no earlier run has written."""
        folders = {self.folder / path.partition("/")[0] for path in _PLACES.values()}
        found = {
            path.relative_to(self.folder).as_posix()
            for folder in folders
            for path in folder.rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        return found - self.own()

    def claim(self, name: str, rank: int) -> None:
        """Note the image whose files are going to be written."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / f"image-rank{rank}").write_text(name, encoding="utf-8")

    def append(self, line: Mapping[str, Any], rank: int) -> None:
        """Add a line to the list of a process; it is on the disk when this returns.

        Raises:
            UnwritableError: a full disk.
        """
        path = self.folder / f"predictions-rank{rank}.jsonl" if rank else self.path
        append_line(path, json.dumps(line, ensure_ascii=False) + "\n")

    def join(self, last: bool = False) -> None:
        """Bring all lists into one, without torn lines; the last of equal names counts.

        Args:
            last: nothing is going to be added: remove what an overwritten run has left.
        """
        paths = self._lists()
        everything = self.read()
        lines = {line["name"]: line for line in everything}
        if last:
            lines = {name: line for name, line in lines.items() if not line.get("stale")}
        self._write(paths, lines.values())
        if last:
            kept = {file for line in lines.values() for file in self._files(line)}
            for file in {file for line in everything for file in self._files(line)} - kept:
                path = self.folder / file
                if self._is_inside(path):
                    path.unlink(missing_ok=True)
            for path in self.scratch.glob("*"):
                if re.fullmatch(r"\.[0-9a-f]{12}|image-rank\d+", path.name):
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # not there, or something of others is in it
                self.scratch.rmdir()

    def overwrite(self) -> None:
        """Mark all lines as stale: their files stay until others have taken their places."""
        self._write(self._lists(), [{**line, "stale": True} for line in self.read()])

    def _write(self, paths: Iterable[Path], lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if paths:
            replace_file(self.path, text.encode(), self.scratch)
        for path in paths:
            if path != self.path:
                path.unlink()

    def _lists(self) -> list[Path]:
        found = self.folder.glob("predictions*.jsonl")
        return sorted(p for p in found if re.fullmatch(r"predictions(-rank\d+)?\.jsonl", p.name))

    def _is_inside(self, path: Path) -> bool:
        """Whether no link on the way leads out of the folder, wherever the list comes from."""
        return path.parent.resolve().is_relative_to(self.folder.resolve())

    def _files(self, line: Mapping[str, Any]) -> set[str]:
        return {line[key] for key in _PLACES if line.get(key) is not None}
