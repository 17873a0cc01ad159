"""Anybody's own images and masks for Lightning."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.base import IGNORE, label_table
from lightning_genseg.datasets.folder import Folder, files_by_name, pair_files, read_names
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.datasets.sparse_files import SparseMasks
from lightning_genseg.transforms import Transform

__all__ = ["FolderDataModule"]


class FolderDataModule(SegmentationDataModule):
    """Your own data: `root/images` and `root/masks` with files of the same names, also in sub-folders.

    A mask holds one class number per pixel (grey or palette image), 255 = ignore. Which images are for training,
    validation and test is said by lists (one name per line: the path below `images`, with or without suffix); without
    `train_list` and `val_list` a share of the images is drawn for validation, the same at every call. Without
    `test_list` the validation set is the test set. A folder that is only tested on needs no list but `test_list`.

    With `sparse` labels from files of their own (`PointFiles`, `ScribbleFiles`, `SparseMasks` with `folder`) training
    images need no masks: without lists the images that have one are for validation, and the others for training. Where
    validation or test images have no masks at all, they are scored at their sparse labels only. `sparse: SparseMasks`
    without `folder` says that the files in `masks` are sparse.

    Args:
        root: folder that holds `images` and `masks`; not needed for prediction.
        num_classes: C; may be left out when `class_names` are given.
        class_names: one per class; default: class_0, class_1 ...
        palette: one RGB colour per class; default: PASCAL VOC's.
        images: folder of the images below `root`.
        masks: folder of the masks below `root`.
        ids: value in the mask files -> class (or 255), for files that do not hold 0..C-1; other values are an error.
        train_list: file of names, from the working folder or below `root`.
        val_list: likewise.
        test_list: likewise.
        val_fraction: share of the images drawn for validation without lists, in (0, 1).
        split_seed: of that draw; apart from `seed`, so that runs with other seeds are scored on the same images.
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
            raise ValueError(
                "train_list and val_list belong together: give both, or neither to draw a validation set."
            )
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction} but must lie between 0 and 1.")
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
                f"no {split} image has a mask: the {split} scores are of the few labelled pixels only."
            )
        elif split != "train" and isinstance(self.sparse, SparseMasks) and self.sparse.needs_masks:
            rank_zero_warn(
                f"the masks of the {split} images are sparse as well: the {split} scores are of the few labelled pixels only."
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
                    raise ValueError(
                        f"{first}_list and {second}_list share {len(both)} images ({', '.join(both[:3])}), which spoils the "
                        "scores: take them out of one list."
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
                raise ValueError(
                    f"'{self.root / self.images}' has {len(rest)} images for training and validation, too few to put "
                    f"{count} aside: add images or lower val_fraction."
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
            raise ValueError("the number of classes is not known: give num_classes or class_names.")
        return [f"class_{index}" for index in range(num_classes)]
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(
            f"num_classes is {num_classes} but class_names has {len(class_names)} names: correct one of them."
        )
    return list(class_names)
