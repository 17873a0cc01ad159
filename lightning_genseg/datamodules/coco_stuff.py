"""COCO-Stuff 10k and 164k for Lightning."""

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.coco_stuff import COCOStuff10k, COCOStuff164k
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.transforms import Transform

__all__ = ["COCOStuff10kDataModule", "COCOStuff164kDataModule"]


class COCOStuff10kDataModule(SegmentationDataModule):
    """COCO-Stuff 10k (`datasets.COCOStuff10k`: layout, sources, where to get it).

    The official test images serve for validation and test: the data set has no third part.

    Args:
        root: folder that holds images, annotations and imageLists; not needed for prediction.
        download: get what is missing in `root` before the run (2 GB).
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
            class_names=COCOStuff10k.CLASS_NAMES,
            palette=COCOStuff10k.PALETTE,
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
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls it in one process per machine."""
        if self.download and not (self.trainer and self.trainer.predicting):
            COCOStuff10k.download(self.root)

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> COCOStuff10k:
        """Build the training or the test split."""
        self.prepare_data()  # does nothing when the files are there; a loop without a Trainer needs it
        return COCOStuff10k(self.root, "train" if split == "train" else "test", transform)


class COCOStuff164kDataModule(SegmentationDataModule):
    """COCO-Stuff on COCO 2017 (`datasets.COCOStuff164k`: layout, sources, where to get it).

    `test` is the validation split, because the labels of the test images are not published.

    Args:
        root: folder that holds images and annotations; not needed for prediction.
        download: get what is missing in `root` before the run (20 GB).
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
            class_names=COCOStuff164k.CLASS_NAMES,
            palette=COCOStuff164k.PALETTE,
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
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls it in one process per machine."""
        if self.download and not (self.trainer and self.trainer.predicting):
            COCOStuff164k.download(self.root)

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> COCOStuff164k:
        """Build the training or the validation split."""
        self.prepare_data()  # does nothing when the files are there; a loop without a Trainer needs it
        return COCOStuff164k(self.root, "train" if split == "train" else "val", transform)
