"""What the datamodules share that only test networks trained on Cityscapes."""

from pathlib import Path
from typing import ClassVar

from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.sets.cityscapes import Cityscapes
from lightning_genseg.data.transforms.crops import Transform


class CityscapesAnomalyDataModule(SegmentationDataModule):
    """Images with anomalies and without labels of classes, for testing networks trained on Cityscapes.

    There is only a test split; `class_names` are those of Cityscapes, so that a network trained on
    it fits.

    Args:
        root: folder of the layout described at the data set; not needed for prediction.
        eval_batch_size: see `SegmentationDataModule`, like all that follow.
        num_workers: see there.
        eval_transform: see there.
        predict_root: see there.
        cache_dir: see there.
    """

    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def __init__(
        self,
        root: Path,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        eval_transform: list[Transform] | None = None,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=Cityscapes.CLASS_NAMES,
            palette=Cityscapes.PALETTE,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            eval_transform=eval_transform,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
        self.root = root
