"""COCO 2014 with its objects as classes for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.coco import COCO, convert_instances
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.transforms import Transform

__all__ = ["COCODataModule"]


class COCODataModule(SegmentationDataModule):
    """COCO 2014, background and 80 kinds of objects (`datasets.COCO`: layout, sources, where to get it).

    `test` is the validation split.

    Args:
        root: folder that holds train2014, val2014 and annotations; not needed for prediction.
        train_list: file of the training images in their order; default: all that have a mask, sorted.
        val_list: likewise of the validation images.
        convert: make the masks from COCO's instances before the run, where there are none.
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
    """

    def __init__(
        self,
        root: Path,
        train_list: Path | None = None,
        val_list: Path | None = None,
        convert: bool = False,
        unknown_classes: list[str] | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (512, 512),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=COCO.CLASS_NAMES,
            palette=COCO.PALETTE,
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
        self.root = root
        self.train_list = train_list
        self.val_list = val_list
        self.convert = convert

    def prepare_data(self) -> None:
        """Make the masks that are missing, if asked to; Lightning calls it in one process per machine."""
        if not self.convert or (self.trainer and self.trainer.predicting):
            return
        splits: tuple[Literal["train", "val"], ...] = ("train", "val")
        for split in splits:
            if not (Path(self.root) / "annotations" / f"{split}2014").is_dir():
                convert_instances(self.root, split)

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> COCO:
        """Build the training or the validation split."""
        self.prepare_data()  # does nothing when the masks are there; a loop without a Trainer needs it
        if split == "train":
            return COCO(self.root, "train", self.train_list, transform)
        return COCO(self.root, "val", self.val_list, transform)
