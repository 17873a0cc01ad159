"""Lightning datamodules, one for each data set."""

from lightning_genseg.datamodules.ade20k import ADE20KDataModule
from lightning_genseg.datamodules.anomaly_folder import AnomalyFolderDataModule
from lightning_genseg.datamodules.base import SegmentationDataModule
from lightning_genseg.datamodules.camvid import CamVidDataModule
from lightning_genseg.datamodules.cityscapes import CityscapesDataModule
from lightning_genseg.datamodules.coco import COCODataModule
from lightning_genseg.datamodules.coco20i import COCO20iDataModule
from lightning_genseg.datamodules.coco_stuff import COCOStuff10kDataModule, COCOStuff164kDataModule
from lightning_genseg.datamodules.episodes import BaseClassesDataModule, EpisodesDataModule
from lightning_genseg.datamodules.few_shot_folder import FewShotFolderDataModule
from lightning_genseg.datamodules.fishyscapes import FishyscapesDataModule
from lightning_genseg.datamodules.folder import FolderDataModule
from lightning_genseg.datamodules.mixed import CrossDomainDataModule, MixedDataModule
from lightning_genseg.datamodules.pascal5i import Pascal5iDataModule
from lightning_genseg.datamodules.road_anomaly import RoadAnomalyDataModule
from lightning_genseg.datamodules.road_anomaly21 import RoadAnomaly21DataModule
from lightning_genseg.datamodules.street_hazards import StreetHazardsDataModule
from lightning_genseg.datamodules.synthetic import SyntheticScenesDataModule
from lightning_genseg.datamodules.voc import VOCDataModule

__all__ = [
    "ADE20KDataModule",
    "AnomalyFolderDataModule",
    "BaseClassesDataModule",
    "COCO20iDataModule",
    "COCODataModule",
    "COCOStuff10kDataModule",
    "COCOStuff164kDataModule",
    "CamVidDataModule",
    "CityscapesDataModule",
    "CrossDomainDataModule",
    "EpisodesDataModule",
    "FewShotFolderDataModule",
    "FishyscapesDataModule",
    "FolderDataModule",
    "MixedDataModule",
    "Pascal5iDataModule",
    "RoadAnomaly21DataModule",
    "RoadAnomalyDataModule",
    "SegmentationDataModule",
    "StreetHazardsDataModule",
    "SyntheticScenesDataModule",
    "VOCDataModule",
]
