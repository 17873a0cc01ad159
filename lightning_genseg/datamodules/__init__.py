"""Lightning datamodules, one for each data set."""

from lightning_genseg.datamodules.ade20k import ADE20KDataModule
from lightning_genseg.datamodules.base import SegmentationDataModule
from lightning_genseg.datamodules.camvid import CamVidDataModule
from lightning_genseg.datamodules.cityscapes import CityscapesDataModule
from lightning_genseg.datamodules.coco_stuff import COCOStuff10kDataModule, COCOStuff164kDataModule
from lightning_genseg.datamodules.folder import FolderDataModule
from lightning_genseg.datamodules.synthetic import SyntheticScenesDataModule
from lightning_genseg.datamodules.voc import VOCDataModule

__all__ = [
    "ADE20KDataModule",
    "COCOStuff10kDataModule",
    "COCOStuff164kDataModule",
    "CamVidDataModule",
    "CityscapesDataModule",
    "FolderDataModule",
    "SegmentationDataModule",
    "SyntheticScenesDataModule",
    "VOCDataModule",
]
