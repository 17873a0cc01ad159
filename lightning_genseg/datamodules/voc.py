"""PASCAL VOC 2012 for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.datasets.voc import VOC
from lightning_genseg.transforms import Transform

__all__ = ["VOCDataModule"]


class VOCDataModule(SegmentationDataModule):
    """PASCAL VOC 2012 (`datasets.VOC`: layout, sources, where to get it).

    `test` is the validation split, because the labels of the test split are not published.

    Args:
        root: folder that holds JPEGImages, usually VOCdevkit/VOC2012; not needed for prediction.
        train_split: `trainaug` (10 582 images with the masks of SBD), `train` (VOC's own 1464) or `pascal5i` (the 5953 of
            few-shot segmentation, see `datasets.VOC`).
        download: get what is missing in `root` before the run (2 GB, and 1.4 GB for trainaug).
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
        train_split: Literal["trainaug", "train", "pascal5i"] = "trainaug",
        download: bool = False,
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
            class_names=VOC.CLASS_NAMES,
            palette=VOC.PALETTE,
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
        self.train_split: Literal["trainaug", "train", "pascal5i"] = train_split
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls it in one process per machine."""
        if self.download and not (self.trainer and self.trainer.predicting):
            VOC.download(self.root, augmented=self.train_split != "train")

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> VOC:
        """Build the training or the validation split."""
        self.prepare_data()  # does nothing when the files are there; a loop without a Trainer needs it
        return VOC(self.root, self.train_split if split == "train" else "val", transform)
