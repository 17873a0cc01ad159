"""Data sets and datamodules, by name."""

from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.data.dataset import ImageFolder, Sample, SegmentationDataset
from lightning_genseg.data.episodes.coco20i import COCO20iDataModule
from lightning_genseg.data.episodes.datamodule import BaseClassesDataModule, EpisodesDataModule
from lightning_genseg.data.episodes.dataset import BaseClasses, EvalEpisodes, TrainEpisodes
from lightning_genseg.data.episodes.folder import FewShotFolderDataModule
from lightning_genseg.data.episodes.pascal5i import Pascal5iDataModule
from lightning_genseg.data.episodes.support import SupportedImages, SupportFolder
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.mixed.datamodule import CrossDomainDataModule, MixedDataModule
from lightning_genseg.data.mixed.taxonomy import TargetClasses, Taxonomy
from lightning_genseg.data.relabelled import RelabelledImages
from lightning_genseg.data.sets.ade20k import ADE20K, ADE20KDataModule
from lightning_genseg.data.sets.anomaly_folder import AnomalyFolder, AnomalyFolderDataModule
from lightning_genseg.data.sets.camvid import CamVid, CamVidDataModule
from lightning_genseg.data.sets.cityscapes import Cityscapes, CityscapesDataModule
from lightning_genseg.data.sets.coco import COCO, COCODataModule
from lightning_genseg.data.sets.coco_stuff import (
    COCOStuff10k,
    COCOStuff10kDataModule,
    COCOStuff164k,
    COCOStuff164kDataModule,
)
from lightning_genseg.data.sets.fishyscapes import FishyscapesDataModule, FishyscapesLostAndFound
from lightning_genseg.data.sets.folder import Folder, FolderDataModule
from lightning_genseg.data.sets.road_anomaly import RoadAnomaly, RoadAnomalyDataModule
from lightning_genseg.data.sets.road_anomaly21 import RoadAnomaly21, RoadAnomaly21DataModule
from lightning_genseg.data.sets.street_hazards import StreetHazards, StreetHazardsDataModule
from lightning_genseg.data.sets.synthetic import SyntheticScenes, SyntheticScenesDataModule
from lightning_genseg.data.sets.voc import VOC, VOCDataModule
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.data.sparse.drawn import Blocks, Points, Scribbles
from lightning_genseg.data.sparse.files import PointFiles, ScribbleFiles, SparseMasks
from lightning_genseg.data.sparse.labels import SparseLabels

__all__ = [
    "ADE20K",
    "COCO",
    "IGNORE",
    "VOC",
    "ADE20KDataModule",
    "AnomalyFolder",
    "AnomalyFolderDataModule",
    "BaseClasses",
    "BaseClassesDataModule",
    "Blocks",
    "COCO20iDataModule",
    "COCODataModule",
    "COCOStuff10k",
    "COCOStuff10kDataModule",
    "COCOStuff164k",
    "COCOStuff164kDataModule",
    "CamVid",
    "CamVidDataModule",
    "Cityscapes",
    "CityscapesDataModule",
    "CrossDomainDataModule",
    "EpisodesDataModule",
    "EvalEpisodes",
    "FewShotFolderDataModule",
    "FishyscapesDataModule",
    "FishyscapesLostAndFound",
    "Folder",
    "FolderDataModule",
    "ImageFolder",
    "MixedDataModule",
    "Pascal5iDataModule",
    "PointFiles",
    "Points",
    "RelabelledImages",
    "RoadAnomaly",
    "RoadAnomaly21",
    "RoadAnomaly21DataModule",
    "RoadAnomalyDataModule",
    "Sample",
    "ScribbleFiles",
    "Scribbles",
    "SegmentationDataModule",
    "SegmentationDataset",
    "SparseDataset",
    "SparseLabels",
    "SparseMasks",
    "StreetHazards",
    "StreetHazardsDataModule",
    "SupportFolder",
    "SupportedImages",
    "SyntheticScenes",
    "SyntheticScenesDataModule",
    "TargetClasses",
    "Taxonomy",
    "TrainEpisodes",
    "VOCDataModule",
]
