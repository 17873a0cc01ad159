"""Cityscapes for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.cityscapes import Cityscapes
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.transforms import Transform

__all__ = ["CityscapesDataModule"]


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes (`datasets.Cityscapes`: layout, sources, where to get it).

    `test` is the validation split, because the labels of the test split are not published; for the evaluation server
    predict with `predict_root` = `root/leftImg8bit/test` and turn the classes into labelIds by `Cityscapes.ID_OF_CLASS`.

    Args:
        root: folder that holds leftImg8bit and gtFine; not needed for prediction.
        labels: the masks to read, `labelIds` as distributed or `labelTrainIds` of cityscapesScripts.
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
        labels: Literal["labelIds", "labelTrainIds"] = "labelIds",
        unknown_classes: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (768, 768),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=Cityscapes.CLASS_NAMES,
            palette=Cityscapes.PALETTE,
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
        self.labels: Literal["labelIds", "labelTrainIds"] = labels

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> Cityscapes:
        """Build the training or the validation split."""
        return Cityscapes(self.root, "train" if split == "train" else "val", self.labels, transform)
