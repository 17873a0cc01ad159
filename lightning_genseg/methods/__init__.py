"""The methods, by name."""

from lightning_genseg.methods.agmm.module import AGMM
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.fewshot.base import FewShotModule
from lightning_genseg.methods.fewshot.base_learner import BaseLearner
from lightning_genseg.methods.fewshot.cgmgm import CGMGM
from lightning_genseg.methods.fewshot.prototypes import CosinePrototypes
from lightning_genseg.methods.gmmseg.module import GMMSeg
from lightning_genseg.methods.gss.inverse import GSSInverse
from lightning_genseg.methods.gss.module import GSS
from lightning_genseg.methods.gss.training.learned_colors import LearnedColors
from lightning_genseg.methods.gss.training.tokenizer import MaskigeTokenizer
from lightning_genseg.methods.softmax import SoftmaxSegmenter
from lightning_genseg.methods.trained import TrainedModule

__all__ = [
    "AGMM",
    "CGMGM",
    "GSS",
    "BaseLearner",
    "CosinePrototypes",
    "FewShotModule",
    "GMMSeg",
    "GSSInverse",
    "LearnedColors",
    "MaskigeTokenizer",
    "SegmentationModule",
    "SoftmaxSegmenter",
    "TrainedModule",
]
