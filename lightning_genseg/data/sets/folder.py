"""Anybody's own data: a folder of images and a folder of masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import (
    MissingFiles,
    Sample,
    SegmentationDataset,
    find_images,
)
from lightning_genseg.data.labels import IGNORE, Color, label_table
from lightning_genseg.data.layout import without_suffix
from lightning_genseg.data.sparse.files import SparseMasks
from lightning_genseg.data.sparse.labels import SparseLabels
from lightning_genseg.data.transforms.crops import Transform
from lightning_genseg.errors import GenSegError, MissingFileError


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
        need_masks: whether an image without a mask is an error; without masks labels come from
            elsewhere.

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
        ValueError: no image; a name without image or mask, or with two of them; without `names`
            also a mask too many.
    """
    samples, complaint = pair_files(images, masks, names)
    if complaint:
        raise GenSegError(complaint)
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
                f"{len(wrong)} {what} in '{folder}' ({shown}{' ...' if len(wrong) > 3 else ''}): "
                "images and masks must have the same path below their folder except for the suffix."
            )
    return samples, None


def files_by_name(folder: Path) -> dict[str, Path]:
    """Images of a folder by relative path without suffix; ValueError if there is none, or two of a name."""
    paths: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in paths:
            raise GenSegError(
                f"'{paths[name]}' and '{path}' share the name '{name}': rename or remove one of "
                "them."
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
        raise MissingFileError(f"list '{path}' does not exist: check the path.")
    names = [
        without_suffix(line.strip())
        for line in path.read_text(encoding="utf-8-sig").splitlines()
        if line.strip()
    ]
    if not names:
        raise GenSegError(f"list '{path}' is empty: write one image name per line.")
    twice = (
        sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    )
    if twice:
        raise GenSegError(
            f"list '{path}' holds {len(twice)} names twice, for instance '{twice[0]}': remove the "
            "repetition."
        )
    return names


class FolderDataModule(SegmentationDataModule):
    """Your own data: `root/images` and `root/masks` with files of the same names, also in sub-folders.

    A mask holds one class number per pixel (grey or palette image), 255 = ignore. Which images are
    for training, validation and test is said by lists (one name per line: the path below `images`,
    with or without suffix); without `train_list` and `val_list` a share of the images is drawn for
    validation, the same at every call. Without `test_list` the validation set is the test set. A
    folder that is only tested on needs no list but `test_list`.

    With `sparse` labels from files of their own (`PointFiles`, `ScribbleFiles`, `SparseMasks` with
    `folder`) training images need no masks: without lists the images that have one are for
    validation, and the others for training. Where validation or test images have no masks at all,
    they are scored at their sparse labels only. `sparse: SparseMasks` without `folder` says that
    the files in `masks` are sparse.

    Args:
        root: folder that holds `images` and `masks`; not needed for prediction.
        num_classes: C; may be left out when `class_names` are given.
        class_names: one per class; default: class_0, class_1 ...
        palette: one RGB colour per class; default: PASCAL VOC's.
        images: folder of the images below `root`.
        masks: folder of the masks below `root`.
        ids: value in the mask files -> class (or 255), for files that do not hold 0..C-1; other
            values are an error.
        train_list: file of names, from the working folder or below `root`.
        val_list: likewise.
        test_list: likewise.
        val_fraction: share of the images drawn for validation without lists, in (0, 1).
        split_seed: of that draw; apart from `seed`, so that runs with other seeds are scored on the
            same images.
        unknown_classes: see `SegmentationDataModule`, like all that follow.
        batch_size: see there.
        eval_batch_size: see there.
        num_workers: see there.
        crop_size: see there.
        class_balanced: see there.
        sparse: see there.
        train_transform: see there.
        eval_transform: see there.
        seed: see there.
        predict_root: see there.
        cache_dir: see there.

    Raises:
        ValueError: wrong arguments; in `setup`: names that do not match, lists that overlap.
        FileNotFoundError: in `setup`: a folder or list does not exist.
    """

    def __init__(
        self,
        root: Path,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        images: str = "images",
        masks: str = "masks",
        ids: dict[int, int] | None = None,
        train_list: Path | None = None,
        val_list: Path | None = None,
        test_list: Path | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        unknown_classes: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (256, 256),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        class_names = named_classes(num_classes, class_names)
        if (train_list is None) != (val_list is None):
            raise GenSegError(
                "train_list and val_list belong together: give both, or neither to draw a "
                "validation set."
            )
        if not 0 < val_fraction < 1:
            raise GenSegError(f"val_fraction is {val_fraction} but must lie between 0 and 1.")
        label_table(ids, len(class_names))  # a wrong table is reported before anything is read
        super().__init__(
            class_names=class_names,
            palette=palette,
            unknown_classes=unknown_classes,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            class_balanced=class_balanced,
            sparse=sparse,
            train_transform=train_transform,
            eval_transform=eval_transform,
            seed=seed,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
        self.root = Path(root)
        self.file_classes = class_names  # the unknown ones as well
        self.file_palette = palette
        self.images = images
        self.masks = masks
        self.ids = ids
        if (
            isinstance(sparse, SparseMasks) and sparse.folder is None
        ):  # validation reads such masks too
            values = {c: c for c in range(len(class_names))} if ids is None else ids
            self.ids = {sparse.unlabelled: IGNORE, **values}
        self.lists: dict[Split, Path | None] = {
            "train": train_list,
            "val": val_list,
            "test": test_list,
        }
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self._names: dict[Split, list[str]] | None = None

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> Folder:
        """Build the part of the images that belongs to a split."""
        sparse = self.sparse_labels(split)
        if sparse is not None and split != "train":
            rank_zero_warn(
                f"no {split} image has a mask: the {split} scores are of the few labelled pixels "
                "only."
            )
        elif split != "train" and isinstance(self.sparse, SparseMasks) and self.sparse.needs_masks:
            rank_zero_warn(
                f"the masks of the {split} images are sparse as well: the {split} scores are of "
                "the few labelled pixels only."
            )
        return Folder(
            self.root,
            self.file_classes,
            self.images,
            self.masks,
            self._names_of(split),
            self.file_palette,
            self.ids,
            transform,
            need_masks=sparse is None or sparse.needs_masks,
        )

    def sparse_labels(self, split: Split) -> SparseLabels | None:
        """Those of the training images, and of others where there are no masks."""
        if split == "train" or self.sparse is None or self.sparse.needs_masks:
            return super().sparse_labels(split)
        return self.sparse if self._masked().isdisjoint(self._names_of(split)) else None

    def _names_of(self, split: Split) -> list[str]:
        test = self.lists["test"]
        if split == "test" and test is not None and self.lists["train"] is None:
            return read_names(self._find(test))  # perhaps no other image is there
        self._names = self._names or self._split()
        return self._names[split]

    def _masked(self) -> set[str]:
        """Names that have a mask."""
        folder = self.root / self.masks
        # Hidden files, such as macOS writes into any folder, make no masks.
        shown = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
        return set(files_by_name(folder)) if shown else set()

    def _split(self) -> dict[Split, list[str]]:
        names = {
            split: read_names(self._find(path))
            for split, path in self.lists.items()
            if path is not None
        }
        splits = list(names)
        for index, first in enumerate(splits):
            for second in splits[index + 1 :]:
                both = sorted(set(names[first]) & set(names[second]))
                if both:
                    raise GenSegError(
                        f"{first}_list and {second}_list share {len(both)} images "
                        f"({', '.join(both[:3])}), which spoils the scores: take them out of one "
                        "list."
                    )
        if "train" not in names:
            test = set(names.get("test", []))
            # Names without image or mask stay: the data set of their split complains of them.
            need_masks = self.sparse is None or self.sparse.needs_masks
            pairs, _ = pair_files(
                self.root / self.images, self.root / self.masks, need_masks=need_masks
            )
            rest = [pair.name for pair in pairs if pair.name not in test]
            masked = set(rest) if need_masks else self._masked() & set(rest)
            if 0 < len(masked) < len(rest):
                names["train"] = [name for name in rest if name not in masked]
                names["val"] = [name for name in rest if name in masked]
                return {**names, "test": names.get("test", names["val"])}
            count = max(1, round(self.val_fraction * len(rest)))
            if len(rest) <= count:
                raise GenSegError(
                    f"'{self.root / self.images}' has {len(rest)} images for training and "
                    f"validation, too few to put {count} aside: add images or lower val_fraction."
                )
            held = set(
                np.random.default_rng(self.split_seed).permutation(len(rest))[:count].tolist()
            )
            names["train"] = [name for index, name in enumerate(rest) if index not in held]
            names["val"] = [name for index, name in enumerate(rest) if index in held]
        return {**names, "test": names.get("test", names["val"])}

    def _find(self, path: Path) -> Path:
        return path if Path(path).is_file() else self.root / path


def named_classes(num_classes: int | None, class_names: Sequence[str] | None) -> list[str]:
    """Return one name per class, by default class_0, class_1 ...; ValueError if neither is given or they differ."""
    if class_names is None:
        if num_classes is None:
            raise GenSegError(
                "the number of classes is not known: give num_classes or class_names."
            )
        return [f"class_{index}" for index in range(num_classes)]
    if num_classes is not None and num_classes != len(class_names):
        raise GenSegError(
            f"num_classes is {num_classes} but class_names has {len(class_names)} names: correct "
            "one of them."
        )
    return list(class_names)
