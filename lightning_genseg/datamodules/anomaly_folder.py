"""Anybody's own images with anomalies for Lightning."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datamodules.folder import named_classes
from lightning_genseg.datasets.anomaly_folder import AnomalyFolder
from lightning_genseg.datasets.base import anomaly_table, label_table
from lightning_genseg.datasets.folder import read_names
from lightning_genseg.transforms import Transform

__all__ = ["AnomalyFolderDataModule"]


class AnomalyFolderDataModule(SegmentationDataModule):
    """Your own anomalies, for testing a trained network: `root/images` and `root/masks` with files of the same names.

    A mask holds 1 where something is anomalous, 0 where all is known, 255 where nothing is to be evaluated. With
    `class_masks` also mIoU of the known classes is scored. There is only a test split.

    Args:
        root: folder that holds `images` and `masks`; not needed for prediction.
        num_classes: C of the network to be tested; may be left out when `class_names` are given.
        class_names: the network's classes in its order; default: class_0, class_1 ...
        palette: one RGB colour per class; default: PASCAL VOC's.
        images: folder of the images below `root`.
        masks: folder of the anomaly masks below `root`.
        class_masks: folder of masks with the network's classes below `root`, if there are any.
        ids: value in the class masks -> class (or 255), for files that do not hold 0..C-1.
        anomaly_ids: value in the anomaly masks -> 1, 0 or 255, for instance `{0: 0, 255: 1}` for black and white ones.
        test_list: file of names, from the working folder or below `root`; default: all images.
        eval_batch_size: see `SegmentationDataModule`, like all that follow.
        num_workers: see there.
        eval_transform: see there.
        predict_root: see there.
        cache_dir: see there.

    Raises:
        ValueError: wrong arguments; in `setup`: names that do not match.
        FileNotFoundError: in `setup`: a folder or list does not exist.
    """

    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def __init__(
        self,
        root: Path,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        palette: list[tuple[int, int, int]] | None = None,
        images: str = "images",
        masks: str = "masks",
        class_masks: str | None = None,
        ids: dict[int, int] | None = None,
        anomaly_ids: dict[int, int] | None = None,
        test_list: Path | None = None,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        eval_transform: list[Transform] | None = None,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        class_names = named_classes(num_classes, class_names)
        # Wrong tables are reported before anything is read.
        label_table(ids, len(class_names))
        if anomaly_ids is not None:
            anomaly_table(anomaly_ids)
        if ids is not None and class_masks is None:
            raise ValueError(
                "ids is about class masks, of which there are none: give class_masks, or anomaly_ids for the anomaly masks."
            )
        super().__init__(
            class_names=class_names,
            palette=palette,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            eval_transform=eval_transform,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
        self.root = Path(root)
        self.images = images
        self.masks = masks
        self.class_masks = class_masks
        self.ids = ids
        self.anomaly_ids = anomaly_ids
        self.test_list = test_list

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> AnomalyFolder:
        """Build the test split."""
        names = None
        if self.test_list is not None:
            here = Path(self.test_list).is_file()
            names = read_names(self.test_list if here else self.root / self.test_list)
        return AnomalyFolder(
            self.root,
            self.class_names,
            self.images,
            self.masks,
            self.class_masks,
            names,
            self.palette,
            self.ids,
            self.anomaly_ids,
            transform,
        )
