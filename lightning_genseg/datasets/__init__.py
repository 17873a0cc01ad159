"""Data sets in plain torch: read one sample, return `image`, `mask`, `name`."""

from lightning_genseg.datasets.ade20k import ADE20K
from lightning_genseg.datasets.anomaly_folder import AnomalyFolder
from lightning_genseg.datasets.base import IGNORE, ImageFolder, Sample, SegmentationDataset
from lightning_genseg.datasets.camvid import CamVid
from lightning_genseg.datasets.cityscapes import Cityscapes
from lightning_genseg.datasets.coco import COCO
from lightning_genseg.datasets.coco_stuff import COCOStuff10k, COCOStuff164k
from lightning_genseg.datasets.episodes import BaseClasses, EvalEpisodes, TrainEpisodes
from lightning_genseg.datasets.fishyscapes import FishyscapesLostAndFound
from lightning_genseg.datasets.folder import Folder
from lightning_genseg.datasets.road_anomaly import RoadAnomaly
from lightning_genseg.datasets.road_anomaly21 import RoadAnomaly21
from lightning_genseg.datasets.sparse import (
    Blocks,
    Points,
    Scribbles,
    SparseDataset,
    SparseLabels,
)
from lightning_genseg.datasets.sparse_files import PointFiles, ScribbleFiles, SparseMasks
from lightning_genseg.datasets.street_hazards import StreetHazards
from lightning_genseg.datasets.support import SupportedImages, SupportFolder
from lightning_genseg.datasets.synthetic import SyntheticScenes
from lightning_genseg.datasets.taxonomy import MixedImages, TargetClasses, Taxonomy
from lightning_genseg.datasets.voc import VOC

__all__ = [
    "ADE20K",
    "COCO",
    "IGNORE",
    "VOC",
    "AnomalyFolder",
    "BaseClasses",
    "Blocks",
    "COCOStuff10k",
    "COCOStuff164k",
    "CamVid",
    "Cityscapes",
    "EvalEpisodes",
    "FishyscapesLostAndFound",
    "Folder",
    "ImageFolder",
    "MixedImages",
    "PointFiles",
    "Points",
    "RoadAnomaly",
    "RoadAnomaly21",
    "Sample",
    "ScribbleFiles",
    "Scribbles",
    "SegmentationDataset",
    "SparseDataset",
    "SparseLabels",
    "SparseMasks",
    "StreetHazards",
    "SupportFolder",
    "SupportedImages",
    "SyntheticScenes",
    "TargetClasses",
    "Taxonomy",
    "TrainEpisodes",
]
