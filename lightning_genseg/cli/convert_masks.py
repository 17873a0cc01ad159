"""`genseg convert-masks`: masks as people have them become the layout of `FolderDataModule`."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from filecmp import cmp
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.cli.parser import FunctionCommand
from lightning_genseg.data.annotations import Annotated, has_labelme, read_coco, read_labelme
from lightning_genseg.data.images import read_mask
from lightning_genseg.data.labels import IGNORE, Color, color_table, voc_palette
from lightning_genseg.data.pairing import files_by_name
from lightning_genseg.errors import GenSegError, MissingFileError, listed
from lightning_genseg.files import make_folder, replace_file
from lightning_genseg.plots.pictures import class_table, indexed

Painter = Callable[[], NDArray[np.integer[Any]]]
_UNFINISHED = "masks.unfinished"  # while they are written
_BACKGROUND = ("background", "_background_")
_HELP = """Make masks of class numbers from what annotation tools and data sets give.

SOURCE is a COCO file (.json), a folder of labelme's files, or a folder of masks: coloured ones,
.npy arrays, three equal channels, names that end in _mask. Below ROOT, `masks` then holds a palette
image for each, `images` the images of the same names (hard links where the disk allows), and
`classes.json` the classes: what FolderDataModule reads."""


def convert_masks(
    source: Path,
    root: Path,
    images: Path | None = None,
    classes: Sequence[str] = (),
    colors: list[Color] | Path | None = None,
    mask_suffix: str = "",
    uncovered: Literal["background", "ignore"] = "background",
) -> str:
    """Write masks, images and classes below `root`; return what to say about it.

    Args:
        source: COCO file, or folder of files or masks.
        root: folder that gets masks and images.
        images: folder of the images.
        classes: names in the order of their numbers.
        colors: colours of the classes, or a table: a name and red, green, blue on each line.
        mask_suffix: end of the masks' names, such as _mask.
        uncovered: what pixels are that no outline covers: class 0, or 255.

    Raises:
        GenSegError: a source that cannot be read, an image that is missing, masks that are there.
    """
    for name in ("masks", _UNFINISHED, "classes.json"):
        if (root / name).exists():
            own = source.absolute().is_relative_to((root / name).absolute())
            remedy = "give another ROOT" if own else "remove it, or give another ROOT"
            raise GenSegError(f"'{root / name}' is there already: {remedy}.")
    if not source.exists():
        raise MissingFileError(f"source '{source}' does not exist: check the path.")
    is_json = source.is_file()
    is_annotated = is_json or has_labelme(source)
    unused = {"uncovered": uncovered != "background"}
    if is_annotated:
        unused = {"colors": colors is not None}
    if is_json:
        unused |= {"classes": bool(classes), "mask_suffix": bool(mask_suffix)}
    for name in (name for name, given in unused.items() if given):
        kind = "a COCO file" if is_json else "labelme's files" if is_annotated else "masks"
        raise GenSegError(f"{name} does nothing where SOURCE is {kind}: leave it out.")
    if is_annotated:
        annotated = read_coco(source) if is_json else read_labelme(source, classes)
        names, painters = _numbered(annotated, uncovered)
        if images is None and not is_json and _has_images(source):
            images = source
        palette: list[Color] | None = None
        notes = _notes(annotated, uncovered)
    else:
        names, painters, palette = _masks(source, classes, colors, mask_suffix)
        notes = []
    image_of = {} if images is None else _images(images, painters, mask_suffix, source)
    palette = palette or voc_palette(256)
    counts = _write(root, painters, image_of, palette)
    last = int(np.flatnonzero(counts[:IGNORE]).max(initial=0))
    names = names or [f"class_{c}" for c in range(last + 1)]
    replace_file(root / "classes.json", class_table(names, palette))
    return _summary(root, names, counts, len(painters), notes, bool(image_of))


def _numbered(
    annotated: Annotated, uncovered: Literal["background", "ignore"]
) -> tuple[list[str], dict[str, Painter]]:
    """Names of the classes in the order of their numbers; what is not covered is the first one."""
    names = list(annotated.classes)
    own = next((name for name in names if name.lower() in _BACKGROUND), None)
    if uncovered == "background" and own is None:
        names = ["background", *names]
    if len(names) > IGNORE:
        raise GenSegError(f"there are {len(names)} classes, but a mask has room for 255.")
    numbers = [names.index(name) for name in annotated.classes]
    rest = IGNORE if uncovered == "ignore" else names.index(own or "background")
    return names, {name: partial(paint, numbers, rest) for name, paint in annotated.masks.items()}


def _notes(annotated: Annotated, uncovered: Literal["background", "ignore"]) -> list[str]:
    """What the annotations hold that the masks show nothing of."""
    notes = []
    if annotated.left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in annotated.left_out.items())
        notes.append(f"left out, since they have no area: {kinds}")
    if annotated.bare:
        rest = "background" if uncovered == "background" else "ignored"
        notes.append(
            f"without any outline, and therefore {rest} as a whole: {len(annotated.bare)} images "
            f"({listed(annotated.bare, 3)}); remove these if nobody has labelled them"
        )
    return notes


def _masks(
    source: Path, classes: Sequence[str], colors: list[Color] | Path | None, mask_suffix: str
) -> tuple[list[str], dict[str, Painter], list[Color] | None]:
    names = list(classes)
    palette = None
    if colors is not None:
        palette, found = color_table(colors, classes or None)
        names = found or [f"class_{c}" for c in range(len(palette))]

    def read(path: Path) -> NDArray[np.integer[Any]]:
        mask = read_mask(path, palette)
        if palette is None:
            return mask
        return np.where(mask < len(names), mask, IGNORE).astype(np.uint8)

    files = _files(source, arrays=True, suffix=mask_suffix)
    return names, {name: partial(read, path) for name, path in files.items()}, palette


def _files(folder: Path, **options: Any) -> dict[str, Path]:
    """As `files_by_name`, which must be one for each name."""
    files, twice = files_by_name(folder, **options)
    for first, second in twice.values():
        raise GenSegError(f"'{first}' and '{second}' share a name: rename or remove one of them.")
    return files


def _has_images(folder: Path) -> bool:
    try:
        return bool(files_by_name(folder)[0])
    except GenSegError:
        return False


def _images(
    folder: Path, painters: dict[str, Painter], mask_suffix: str, source: Path
) -> dict[str, Path]:
    """Image of each mask; a mask gets the name of its image, which may lie in a folder of its own.

    Changes the names in `painters`.
    """
    known = _files(folder, without=mask_suffix if folder == source else "")
    by_stem: dict[str, list[str]] = {}
    for name in known:
        by_stem.setdefault(Path(name).name, []).append(name)
    found, missing = {}, []
    for name in list(painters):
        others = by_stem.get(Path(name).name, [])
        match = name if name in known else others[0] if len(others) == 1 else None
        if match is None:
            missing.append(name)
            continue
        if match in found:
            raise GenSegError(
                f"two masks are of the image '{known[match]}', one of them '{name}': let masks and "
                "images have the same folders, or remove one."
            )
        painters[match] = painters.pop(name)
        found[match] = known[match]
    if missing:
        raise GenSegError(
            f"{len(missing)} masks have no image in '{folder}' ({listed(missing, 3)}): give the "
            "folder that holds them as --images."
        )
    return found


def _write(
    root: Path,
    painters: Mapping[str, Painter],
    image_of: Mapping[str, Path],
    palette: Sequence[Color],
) -> NDArray[np.int64]:
    """Write all masks or none, then the images; pixels of each number from 0 to 255."""
    counts = np.zeros(IGNORE + 1, np.int64)
    folder = root / "images"
    targets = {f"{folder / name}{image.suffix}": image for name, image in image_of.items()}
    for path, image in targets.items():
        if Path(path).exists() and not cmp(image, path):
            raise GenSegError(
                f"'{path}' is there already and is not '{image}': remove it, or give another ROOT."
            )
    unfinished = root / _UNFINISHED
    make_folder(unfinished, "ROOT")
    try:
        for name, paint in _progress(painters, "masks"):
            mask = paint()
            if mask.size and not 0 <= mask.min() <= mask.max() <= IGNORE:
                raise GenSegError(
                    f"mask '{name}' holds numbers from {mask.min()} to {mask.max()}, and one of 8 "
                    "bits 0 to 255: FolderDataModule reads it as it is, with ids."
                )
            target = unfinished / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            indexed(mask.astype(np.uint8), palette).save(target)
            counts += np.bincount(mask.ravel(), minlength=IGNORE + 1)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    for path, image in _progress(targets, "images"):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                os.link(image.resolve(), target)  # of a link, what it leads to
            except OSError:  # another disk, or one without links
                shutil.copy2(image, target)
    unfinished.rename(root / "masks")
    return counts


def _progress(items: Mapping[str, Any], unit: str) -> Iterator[tuple[str, Any]]:
    bar: Iterator[tuple[str, Any]] = tqdm(items.items(), desc=unit, unit=unit[:-1], disable=None)
    return bar


def _summary(
    root: Path,
    names: Sequence[str],
    counts: NDArray[np.int64],
    masks: int,
    notes: Sequence[str],
    images: bool,
) -> str:
    total = max(1, int(counts.sum()))
    shares = [f"{name} {count / total:.1%}" for name, count in zip(names, counts, strict=False)]
    shares += [f"ignored {counts[IGNORE] / total:.1%}"] if counts[IGNORE] else []
    lines = [f"{masks} masks are in {root / 'masks'}: {', '.join(shares)}"]
    lines += notes
    if not images and not (root / "images").is_dir():
        lines.append(f"put the images of the same names into {root / 'images'}")
    quoted = shlex.quote(json.dumps(list(names), ensure_ascii=False))
    lines.append(
        "look at them: genseg check --data FolderDataModule "
        f"--data.root {shlex.quote(str(root))} --data.class_names {quoted}"
    )
    return "\n".join(lines)


COMMAND = FunctionCommand(
    "convert-masks", convert_masks, _HELP, lambda _, summary: print(summary), positional=True
)
