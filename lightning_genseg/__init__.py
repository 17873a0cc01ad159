"""Generative semantic segmentation with PyTorch Lightning."""

from lightning_genseg.methods import (
    AGMM,
    CGMGM,
    GSS,
    BaseLearner,
    CosinePrototypes,
    GMMSeg,
    GSSInverse,
    LearnedColors,
    MaskigeTokenizer,
    SegmentationModule,
    SoftmaxSegmenter,
)
from lightning_genseg.methods.gmmseg.head import GMMHead

__version__ = "0.1.0"

__all__ = [
    "AGMM",
    "CGMGM",
    "GSS",
    "BaseLearner",
    "CosinePrototypes",
    "GMMHead",
    "GMMSeg",
    "GSSInverse",
    "LearnedColors",
    "MaskigeTokenizer",
    "SegmentationModule",
    "SoftmaxSegmenter",
]
