"""Anybody's own data: a folder of images and a folder of masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_genseg.datasets.base import (
    Color,
    MissingFiles,
    Sample,
    SegmentationDataset,
    find_images,
    readable_suffixes,
)
from lightning_genseg.transforms import Transform

__all__ = ["Folder", "match_masks", "read_names", "without_suffix"]


class Folder(SegmentationDataset):
    """Images and masks of the same names (relative path without suffix) in two folders under `root`.

    Args:
        root: folder that holds both.
        class_names: one per class.
        images: folder of the images, of any format.
        masks: folder of the masks, one class number per pixel.
        names: which samples, in this order; default: all, sorted.
        palette: see `SegmentationDataset`.
        ids: see `SegmentationDataset`.
        transform: albumentations transforms.
        need_masks: whether an image without a mask is an error; without masks labels come from elsewhere.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no image, names that do not match; on reading as in `SegmentationDataset`.
    """

    def __init__(
        self,
        root: Path | str,
        class_names: Sequence[str],
        images: str = "images",
        masks: str = "masks",
        names: Sequence[str] | None = None,
        palette: Sequence[Color] | None = None,
        ids: Mapping[int, int] | None = None,
        transform: Sequence[Transform] | None = None,
        need_masks: bool = True,
    ) -> None:
        samples, complaint = pair_files(Path(root) / images, Path(root) / masks, names, need_masks)
        super().__init__(samples, class_names, palette, ids, transform)
        if complaint:
            raise MissingFiles(complaint, self)


def match_masks(images: Path, masks: Path, names: Sequence[str] | None = None) -> list[Sample]:
    """Pair the images of a folder with the masks of another by relative path without suffix, sorted or as in `names`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no image; a name without image or mask, or with two of them; without `names` also a mask too many.
    """
    samples, complaint = pair_files(images, masks, names)
    if complaint:
        raise ValueError(complaint)
    return samples


def pair_files(
    images: Path, masks: Path, names: Sequence[str] | None = None, need_masks: bool = True
) -> tuple[list[Sample], str | None]:
    """Do as `match_masks`, but return what is wrong beside the pairs; a missing file stands where it would be."""
    image_of = files_by_name(images)
    mask_of = files_by_name(masks) if need_masks else {}
    wanted = sorted(image_of.keys() | mask_of.keys()) if names is None else list(names)
    samples = [
        Sample(
            name,
            image_of.get(name, images / f"{name}.png"),
            mask_of.get(name, masks / f"{name}.png"),
        )
        for name in wanted
    ]
    lost = [name for name in wanted if name not in image_of]
    for what, folder, wrong in (
        ("names of the list have no image", images, [n for n in lost if n not in mask_of]),
        ("masks have no image of the same name", images, [n for n in lost if n in mask_of]),
        (
            "images have no mask of the same name",
            masks,
            [n for n in wanted if need_masks and n not in mask_of],
        ),
    ):
        if wrong:
            shown = ", ".join(f"'{name}'" for name in wrong[:3])
            return samples, (
                f"{len(wrong)} {what} in '{folder}' ({shown}{' ...' if len(wrong) > 3 else ''}): images and masks must "
                "have the same path below their folder except for the suffix."
            )
    return samples, None


def files_by_name(folder: Path) -> dict[str, Path]:
    """Images of a folder by relative path without suffix; ValueError if there is none, or two of a name."""
    paths: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in paths:
            raise ValueError(
                f"'{paths[name]}' and '{path}' share the name '{name}': rename or remove one of them."
            )
        paths[name] = path
    return paths


def read_names(path: Path) -> list[str]:
    """Read a split list: one name per line, with or without the suffix of an image; blank lines are skipped.

    Raises:
        FileNotFoundError: no such list.
        ValueError: it is empty or holds a name twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"list '{path}' does not exist: check the path.")
    names = [
        without_suffix(line.strip())
        for line in path.read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    ]
    if not names:
        raise ValueError(f"list '{path}' is empty: write one image name per line.")
    twice = (
        sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    )
    if twice:
        raise ValueError(
            f"list '{path}' holds {len(twice)} names twice, for instance '{twice[0]}': remove the repetition."
        )
    return names


def without_suffix(name: str) -> str:
    """Cut the suffix of an image off; in `frame.0001` the part after the dot belongs to the name."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in readable_suffixes() else path).as_posix()
