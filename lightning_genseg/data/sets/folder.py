"""Anybody's own data: a folder of images and a folder of masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.class_index import class_index
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import MissingFiles, SegmentationDataset
from lightning_genseg.data.labels import IGNORE, Color, color_table, label_table
from lightning_genseg.data.layout import absent_classes
from lightning_genseg.data.pairing import files_by_name, find_list, pair_files, read_names
from lightning_genseg.data.sparse.files import SparseMasks
from lightning_genseg.data.sparse.labels import SparseLabels
from lightning_genseg.errors import GenSegError


class Folder(SegmentationDataset):
    """Images and masks of the same names (path without suffix) in two folders under `root`.

    Args:
        root: folder that holds both.
        class_names: one per class.
        images: folder of the images, of any format.
        masks: folder of the masks, one class number per pixel.
        names: which samples, in this order; default: all, sorted.
        palette: one RGB colour per class; default: the colours of PASCAL VOC.
        ids: value in the mask files -> class (or 255); None: the files hold classes.
        transform: albumentations transforms.
        need_masks: whether an image without a mask is an error; without masks labels come from
            elsewhere.
        mask_suffix: what the names of masks have after those of the images.
        colors: of masks that hold colours, for each value that `ids` lists, from 0.

    Raises:
        MissingFileError: a folder does not exist.
        GenSegError: no image, names that do not match; on reading as in `SegmentationDataset`.
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
        transform: Sequence[transforms.Transform] | None = None,
        need_masks: bool = True,
        mask_suffix: str = "",
        colors: Sequence[Color] | None = None,
    ) -> None:
        samples, complaint = pair_files(
            Path(root) / images, Path(root) / masks, names, need_masks, mask_suffix
        )
        super().__init__(samples, class_names, palette, ids, transform)
        self.colors = colors
        if complaint:
            raise MissingFiles(complaint, self)


class FolderDataModule(SegmentationDataModule):
    """Your own data: `root/images` and `root/masks` with files of the same names.

    Images may lie in sub-folders. A mask holds one class number per pixel (grey or palette image),
    255 = ignore. Lists choose the images for training, validation and test; they hold one name per
    line, the path below `images` with or without suffix. Without `train_list` and `val_list` a
    share of the images is drawn for validation, the same at every call. Without `test_list` the
    validation set is the test set. A folder that is only tested on needs no list but `test_list`.

    With `sparse` labels from files of their own (`PointFiles`, `ScribbleFiles`, `SparseMasks` with
    `folder`) training images need no masks: without lists the images that have one are for
    validation, and the others for training. Where validation or test images have no masks at all,
    they are scored at their sparse labels only. `sparse: SparseMasks` without `folder` means that
    the files in `masks` are sparse.

    Args:
        root: folder that holds `images` and `masks`, which prediction does not read.
        num_classes: C; may be left out when `class_names` are given.
        class_names: one per class; default: class_0, class_1 ...
        palette: one RGB colour per class; default: PASCAL VOC's.
        images: folder of the images below `root`.
        masks: folder of the masks below `root`.
        mask_suffix: what the names of masks have after those of the images, such as `_mask`.
        ids: value in the mask files -> class (or 255), for files that do not hold 0..C-1; other
            values are an error.
        colors: of masks that hold colours: one for each class, then those that mean ignore; or a
            table, a name and red, green, blue on each line, of which `class_names` may choose some.
            They are the default of `palette`. `ids` then lists positions among them.
        train_list: file of names, from the working folder or below `root`.
        val_list: likewise.
        test_list: likewise.
        val_fraction: share of the images drawn for validation without lists, in (0, 1).
        absent_classes: what to do about a class that no training mask holds: `refuse`, or `warn`.
            Masks are read for it before training until every class has been seen.
        split_seed: of that draw; apart from `seed`, so that runs with other seeds are scored on the
            same images.

    Raises:
        GenSegError: wrong arguments; in `setup`: names that do not match, lists that overlap.
        MissingFileError: in `setup`: a folder or list does not exist.
    """

    def __init__(
        self,
        root: Path,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        ids: dict[int, int] | None = None,
        colors: list[tuple[int, int, int]] | Path | None = None,
        train_list: Path | None = None,
        val_list: Path | None = None,
        test_list: Path | None = None,
        val_fraction: float = 0.2,
        absent_classes: Literal["refuse", "warn"] = "refuse",
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_arguments(
            FolderDataModule.__init__,
            locals(),
            val_fraction="(0, 1)",
            split_seed="[0, inf)",
        )
        self.colors: list[Color] | None = None
        if colors is not None:
            self.colors, class_names = color_table(colors, class_names)
            if class_names is None and num_classes is None:
                num_classes = len(self.colors)
        class_names = named_classes(num_classes, class_names)
        if self.colors is not None:
            count = len(class_names)
            palette = self.colors[:count] if palette is None and ids is None else palette
            others = dict.fromkeys(range(count, len(self.colors)), IGNORE)
            ids = {c: c for c in range(count)} | others if ids is None else ids
        if (train_list is None) != (val_list is None):
            raise GenSegError(
                "train_list and val_list belong together: give both, or neither to draw a "
                "validation set."
            )
        label_table(ids, len(class_names))  # a wrong table is reported before anything is read
        super().__init__(class_names=class_names, palette=palette, **kwargs)
        self.root = Path(root)
        self.file_classes = class_names  # the unknown ones as well
        self.file_palette = palette
        self.images = images
        self.masks = masks
        self.mask_suffix = mask_suffix
        self.ids = ids
        sparse = self.sparse
        if isinstance(sparse, SparseMasks) and sparse.needs_masks:  # validation reads them too
            values = {c: c for c in range(len(class_names))} if ids is None else ids
            self.ids = {sparse.unlabelled: IGNORE, **values}
        self.lists: dict[Split, Path | None] = {
            "train": train_list,
            "val": val_list,
            "test": test_list,
        }
        self.val_fraction = val_fraction
        self.absent_classes = absent_classes
        self.split_seed = split_seed
        self._names: dict[Split, list[str]] | None = None

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> Folder:
        """Build the part of the images that belongs to a split."""
        sparse = self.sparse_labels(split)
        if split != "train":
            problem = None if sparse is None else f"no {split} image has a mask"
            if isinstance(self.sparse, SparseMasks) and self.sparse.needs_masks:
                problem = f"the masks of the {split} images are sparse as well"
            if problem:
                rank_zero_warn(
                    f"{problem}: the {split} scores are of the few labelled pixels only."
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
            mask_suffix=self.mask_suffix,
            colors=self.colors,
        )

    def check_classes(self) -> None:
        """Refuse or warn of classes that no training mask holds; they cannot be learned."""
        super().check_classes()
        dataset: Any = self.train_dataset
        if self.sparse is not None and self.sparse.from_files and self.sparse.has_marks:
            return  # these are no masks
        if self.sparse is not None and not self.sparse.from_files:
            dataset = dataset.dataset
        problem = self.absent(dataset)
        if problem and self.absent_classes == "refuse":
            raise GenSegError(problem)
        if problem and not self.class_balanced:  # which warns itself
            rank_zero_warn(problem)

    def absent(self, dataset: Any) -> str | None:
        """Sentence on the classes that no mask of a data set holds, if there are any."""
        counts = class_index(dataset, self.cache_dir, self.num_workers, until_all_seen=True)
        absent = np.flatnonzero(~counts.any(0)).tolist()
        return absent_classes(dataset, [self.class_names[c] for c in absent]) if absent else None

    def sparse_labels(self, split: Split) -> SparseLabels | None:
        """Those of the training images, and of others where there are no masks."""
        if split == "train" or self.sparse is None or self.sparse.needs_masks:
            return super().sparse_labels(split)
        return self.sparse if self._masked().isdisjoint(self._names_of(split)) else None

    def _names_of(self, split: Split) -> list[str]:
        test = self.lists["test"]
        if split == "test" and test is not None and self.lists["train"] is None:
            return read_names(find_list(test, self.root))  # perhaps no other image is there
        self._names = self._names or self._split()
        return self._names[split]

    def _split(self) -> dict[Split, list[str]]:
        """Names of each split: listed, drawn, or parted by whether there is a mask."""
        names = {
            split: read_names(find_list(path, self.root))
            for split, path in self.lists.items()
            if path is not None
        }
        for first, second in combinations(names, 2):
            both = sorted(set(names[first]) & set(names[second]))
            if both:
                raise GenSegError(
                    f"{first}_list and {second}_list share {len(both)} images "
                    f"({', '.join(both[:3])}), which spoils the scores: take them out of one list."
                )
        if "train" not in names:
            names |= self._draw(set(names.get("test", [])))
        return {**names, "test": names.get("test", names["val"])}

    def _draw(self, test: set[str]) -> dict[Split, list[str]]:
        """Names for training and validation among the images that are not for the test."""
        # Names without image or mask stay: the data set of their split complains of them.
        need_masks = self.sparse is None or self.sparse.needs_masks
        images, masks = self.root / self.images, self.root / self.masks
        pairs, _ = pair_files(images, masks, None, need_masks, self.mask_suffix)
        rest = [pair.name for pair in pairs if pair.name not in test]
        held = set() if need_masks else self._masked().intersection(rest)
        if not 0 < len(held) < len(rest):
            count = max(1, round(self.val_fraction * len(rest)))
            if len(rest) <= count:
                raise GenSegError(
                    f"'{images}' has {len(rest)} images for training and validation, too few to "
                    f"put {count} aside: add images or lower val_fraction."
                )
            order = np.random.default_rng(self.split_seed).permutation(len(rest))
            held = {rest[index] for index in order[:count]}
        return {
            "train": [name for name in rest if name not in held],
            "val": [name for name in rest if name in held],
        }

    def _masked(self) -> set[str]:
        """Names that have a mask."""
        folder = self.root / self.masks
        # Hidden files, such as macOS writes into any folder, make no masks.
        shown = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
        if not shown:
            return set()
        return set(files_by_name(folder, arrays=True, suffix=self.mask_suffix)[0])


def named_classes(num_classes: int | None, class_names: Sequence[str] | None) -> list[str]:
    """Return one name per class, by default class_0, class_1 ...

    Raises:
        GenSegError: neither is given, or they differ.
    """
    check_arguments(named_classes, locals(), num_classes="[1, 255]")
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
