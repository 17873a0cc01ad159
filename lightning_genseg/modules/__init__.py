"""LightningModules: one paper, one file."""

from lightning_genseg.modules.agmm import AGMM
from lightning_genseg.modules.base import SegmentationModule
from lightning_genseg.modules.base_learner import BaseLearner
from lightning_genseg.modules.cgmgm import CGMGM
from lightning_genseg.modules.few_shot import CosinePrototypes, FewShotModule
from lightning_genseg.modules.gmmseg import GMMSeg
from lightning_genseg.modules.gss import GSS
from lightning_genseg.modules.gss_inverse import GSSInverse
from lightning_genseg.modules.learned_colors import LearnedColors
from lightning_genseg.modules.maskige_tokenizer import MaskigeTokenizer
from lightning_genseg.modules.softmax import SoftmaxSegmenter

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
]
