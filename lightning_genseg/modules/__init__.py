"""LightningModules: one paper, one file."""

from lightning_genseg.modules.agmm import AGMM
from lightning_genseg.modules.base import SegmentationModule
from lightning_genseg.modules.gmmseg import GMMSeg
from lightning_genseg.modules.softmax import SoftmaxSegmenter

__all__ = ["AGMM", "GMMSeg", "SegmentationModule", "SoftmaxSegmenter"]
