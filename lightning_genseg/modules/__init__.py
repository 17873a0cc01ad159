"""LightningModules: one paper, one file."""

from lightning_genseg.modules.agmm import AGMM
from lightning_genseg.modules.base import SegmentationModule
from lightning_genseg.modules.base_learner import BaseLearner
from lightning_genseg.modules.cgmgm import CGMGM
from lightning_genseg.modules.few_shot import CosinePrototypes, FewShotModule
from lightning_genseg.modules.gmmseg import GMMSeg
from lightning_genseg.modules.softmax import SoftmaxSegmenter

__all__ = [
    "AGMM",
    "CGMGM",
    "BaseLearner",
    "CosinePrototypes",
    "FewShotModule",
    "GMMSeg",
    "SegmentationModule",
    "SoftmaxSegmenter",
]
