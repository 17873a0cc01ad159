"""Lightning datamodules, one for each data set."""

from lightning_genseg.datamodules.base import SegmentationDataModule
from lightning_genseg.datamodules.camvid import CamVidDataModule
from lightning_genseg.datamodules.folder import FolderDataModule
from lightning_genseg.datamodules.synthetic import SyntheticScenesDataModule

__all__ = [
    "CamVidDataModule",
    "FolderDataModule",
    "SegmentationDataModule",
    "SyntheticScenesDataModule",
]
