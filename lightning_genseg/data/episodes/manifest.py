"""Episodes in a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_genseg.data.episodes.dataset import Episode
from lightning_genseg.data.relabelled import LabelledImages
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import read_json, replace_file


def write_episodes(
    path: Path,
    episodes: Sequence[Episode],
    queries: LabelledImages,
    supports: LabelledImages,
    class_names: Sequence[str],
    drawn_by: Mapping[str, Any],
) -> None:
    """Keep episodes as JSON, by the names of images and classes, with a checksum.

    `drawn_by` is what decided them (seed, mode ...), to be compared by `read_episodes`.
    """
    rows = [
        {
            "query": queries.sample_name(e.query),
            "class": class_names[e.category],
            "supports": [supports.sample_name(i) for i in e.supports],
        }
        for e in episodes
    ]
    content = {"drawn_by": dict(drawn_by), "sha256": _checksum(drawn_by, rows), "episodes": rows}
    replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_episodes(
    path: Path,
    queries: LabelledImages,
    supports: LabelledImages,
    class_names: Sequence[str],
    drawn_by: Mapping[str, Any],
) -> list[Episode]:
    """Read what `write_episodes` has kept.

    Raises:
        GenSegError: no list of episodes, a changed one, one of other settings (`drawn_by`), or of
            images or classes that the data do not have.
    """
    try:
        content = read_json(path, "manifest")
        theirs, rows, checksum = content["drawn_by"], content["episodes"], content["sha256"]
    except (KeyError, TypeError) as error:
        raise GenSegError(
            f"manifest '{path}' is no list of episodes ({error}): delete it, and it is drawn anew."
        ) from error
    if checksum != _checksum(theirs, rows):
        raise GenSegError(
            f"manifest '{path}' was changed after it was written (checksum): restore it, or delete "
            "it to draw anew."
        )
    for key, value in drawn_by.items():
        if theirs.get(key) != value:
            raise GenSegError(
                f"manifest '{path}' was drawn with {key} {theirs.get(key)}, not {value}: use the "
                "same setting, or another file."
            )
    category = {name: index for index, name in enumerate(class_names)}
    query_of, support_of = (
        {images.sample_name(i): i for i in range(len(images))} for images in (queries, supports)
    )

    def episode(row: Mapping[str, Any]) -> Episode:
        chosen = tuple(support_of[name] for name in row["supports"])
        return Episode(query_of[row["query"]], category[row["class"]], chosen)

    try:
        return [episode(row) for row in rows]
    except KeyError as error:
        raise GenSegError(
            f"manifest '{path}' holds {error}, which the data do not have: use the data that it "
            "was written for."
        ) from error


def _checksum(drawn_by: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps([drawn_by, rows], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
