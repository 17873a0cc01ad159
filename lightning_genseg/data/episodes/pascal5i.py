"""PASCAL-5i for Lightning."""

from pathlib import Path
from typing import Any

from lightning_genseg.data.episodes.datamodule import EpisodesDataModule
from lightning_genseg.data.sets.voc import VOCDataModule


class Pascal5iDataModule(EpisodesDataModule):
    """PASCAL-5i: four folds of five of VOC's classes, as BAM has it.

    `EpisodesDataModule` over `VOCDataModule`. Training: `VOC`'s split `pascal5i` (5953 images), of
    which 4208, 3726, 2752 and 4510 remain in folds 0 to 3 (`novel_setting` background: 4760, 4588,
    4097, 5108). Validation and test: 364, 445, 592 and 336 of the 1449 validation images.

    Source: Shaban et al.: One-shot learning for semantic segmentation, BMVC 2017; the lists are
    PFENet's.

    Args:
        root: folder that holds JPEGImages, usually VOCdevkit/VOC2012; not needed for prediction.
        fold: whose classes are novel: 5 fold + 1 to 5 fold + 5.
    """

    def __init__(self, root: Path, fold: int, **kwargs: Any) -> None:
        super().__init__(
            VOCDataModule(root, "pascal5i"),
            novel_classes=None,
            folds="pascal5i",
            fold=fold,
            **kwargs,
        )
