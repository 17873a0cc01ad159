"""Which files belong together: images and masks by their names, and lists of names."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_genseg.data.dataset import Sample
from lightning_genseg.data.images import find_images, without_suffix
from lightning_genseg.errors import GenSegError, MissingFileError, listed
from lightning_genseg.files import read_text


def pair_files(
    images: Path,
    masks: Path,
    names: Sequence[str] | None = None,
    need_masks: bool = True,
    mask_suffix: str = "",
) -> tuple[list[Sample], str | None]:
    """Pair images and masks of two folders by path without suffix, sorted or as in `names`.

    With `mask_suffix` a mask has it at the end of its name, and others are no masks; both may then
    be in one folder.

    Returns:
        Pairs, in which a missing file stands where it would be, and a sentence if one is missing:
        also a mask too many, without `names`; names that several files share are left out.

    Raises:
        GenSegError: a folder does not exist or is empty.
    """
    image_of, twice = files_by_name(images, without=mask_suffix if images == masks else "")
    mask_of: dict[str, Path] = {}
    if need_masks:
        mask_of, more = files_by_name(masks, arrays=True, suffix=mask_suffix)
        twice |= more
    wanted = sorted(image_of.keys() | mask_of.keys()) if names is None else list(names)
    wanted = [name for name in wanted if name not in twice]
    samples = [
        Sample(
            name,
            image_of.get(name, images / f"{name}.png"),
            mask_of.get(name, masks / f"{name}{mask_suffix}.png"),
        )
        for name in wanted
    ]
    lost = [name for name in wanted if name not in image_of]
    bare = [name for name in wanted if need_masks and name not in mask_of]
    complaints = []
    if twice:
        shown = listed((f"'{a}' and '{b}'" for a, b in twice.values()), 20)
        complaints = [
            f"{len(twice)} names are those of two files ({shown}): rename or remove one of each."
        ]
    for what, folder, wrong in (
        ("names of the list have no image", images, [n for n in lost if n not in mask_of]),
        ("masks have no image of the same name", images, [n for n in lost if n in mask_of]),
        ("images have no mask of the same name", masks, bare),
    ):
        if wrong:
            shown = listed((f"'{name}'" for name in wrong), 3)
            ending = _common_ending(image_of, mask_of)
            remedy = "images and masks must have the same path below their folder except for the"
            remedy = f"set mask_suffix to {ending}" if ending else f"{remedy} suffix"
            complaints.append(f"{len(wrong)} {what} in '{folder}' ({shown}): {remedy}.")
    return samples, " ".join(complaints) or None


def _common_ending(images: Iterable[str], masks: Iterable[str]) -> str:
    """What all masks have after the name of their image, where there is such an ending."""
    names = set(images)
    endings = {
        next((mask[end:] for end in range(len(mask) - 1, 0, -1) if mask[:end] in names), "")
        for mask in masks
    }
    return endings.pop() if len(endings) == 1 else ""


def files_by_name(
    folder: Path, arrays: bool = False, suffix: str = "", without: str = ""
) -> tuple[dict[str, Path], dict[str, tuple[Path, Path]]]:
    """Images of a folder by path without suffix, and names of two; a GenSegError if none.

    Args:
        folder: searched recursively.
        arrays: whether ``.npy`` files count as well.
        suffix: only names that end in it, which is cut off.
        without: leave out names that end in it.
    """
    paths: dict[str, Path] = {}
    twice: dict[str, tuple[Path, Path]] = {}
    for path in find_images(folder, arrays):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(suffix) or (without and name.endswith(without)):
            continue
        name = name.removesuffix(suffix)
        if name in paths:
            twice.setdefault(name, (paths[name], path))
        paths.setdefault(name, path)
    return paths, twice


def find_list(path: Path | str, root: Path) -> Path:
    """A list in the working folder, or else below `root`."""
    return Path(path) if Path(path).is_file() else root / path


def read_names(path: Path) -> list[str]:
    """Read a list: one name per line, with or without the suffix of an image.

    Raises:
        MissingFileError: no such list.
        GenSegError: it is empty or holds a name twice.
    """
    if not path.is_file():
        raise MissingFileError(f"list '{path}' does not exist: check the path.")
    lines = map(str.strip, read_text(path, "list").splitlines())
    names = [without_suffix(line) for line in lines if line]
    if not names:
        raise GenSegError(f"list '{path}' is empty: write one image name per line.")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise GenSegError(
            f"list '{path}' holds {len(twice)} names twice, for instance '{twice[0]}': remove the "
            "repetition."
        )
    return names
