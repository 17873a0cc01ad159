"""COCO-20i for Lightning."""

from pathlib import Path
from typing import Any

from lightning_genseg.data.episodes.datamodule import EpisodesDataModule
from lightning_genseg.data.sets.coco import COCODataModule


class COCO20iDataModule(EpisodesDataModule):
    """COCO-20i: four interleaved folds of twenty classes, as BAM has it.

    `EpisodesDataModule` over `COCODataModule`. 21 917, 41 809, 43 045 and 44 614 of the 82 081
    training images remain in folds 0 to 3, and 26 052, 15 305, 13 138 and 12 640 of the 40 137
    validation images. BAM's first thousand queries need the order of its `val_list`.

    Source: Nguyen, Todorovic: Feature weighting and boosting for few-shot segmentation, ICCV 2019.

    Args:
        root: folder that holds train2014, val2014 and annotations; not needed for prediction.
        fold: whose classes are novel: fold + 1, fold + 5, fold + 9 ...
        train_list: file of the training images in their order; default: all that have a mask,
            sorted.
        val_list: file of the validation images in their order; default: likewise.
        convert: make the masks from COCO's instances before the run, where there are none.
        size: side of the square images in pixels; best a multiple of the encoder's stride plus 1.
        scale: range of the zoom of training images, relative to their own size.
    """

    def __init__(
        self,
        root: Path,
        fold: int,
        train_list: Path | None = None,
        val_list: Path | None = None,
        convert: bool = False,
        size: int = 641,
        scale: tuple[float, float] = (0.8, 1.25),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            COCODataModule(root, train_list, val_list, convert),
            novel_classes=None,
            folds="coco20i",
            fold=fold,
            size=size,
            scale=scale,
            **kwargs,
        )
