"""Data sets in plain torch: read one sample, return `image`, `mask`, `name`."""

from lightning_genseg.datasets.base import IGNORE, ImageFolder, Sample, SegmentationDataset
from lightning_genseg.datasets.camvid import CamVid
from lightning_genseg.datasets.folder import Folder
from lightning_genseg.datasets.synthetic import SyntheticScenes

__all__ = [
    "IGNORE",
    "CamVid",
    "Folder",
    "ImageFolder",
    "Sample",
    "SegmentationDataset",
    "SyntheticScenes",
]
