"""Generative semantic segmentation with PyTorch Lightning."""

from lightning_genseg.errors import GenSegError
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
from lightning_genseg.methods.agmm.options import GaussianOptions
from lightning_genseg.methods.fewshot.options import (
    DecoderOptions,
    EpisodicMixtureOptions,
    MatchingOptions,
    PosteriorOptions,
)
from lightning_genseg.methods.gmmseg.head import GMMHead
from lightning_genseg.methods.gmmseg.options import EMOptions, MixtureOptions
from lightning_genseg.methods.gss.options import TokenDecoderOptions, VariationOptions, VQOptions
from lightning_genseg.ops.inference_options import InferenceOptions
from lightning_genseg.uncertainty import AnomalyScores, Mahalanobis, StandardizedMaxLogit

__version__ = "0.2.0"

__all__ = [
    "AGMM",
    "CGMGM",
    "GSS",
    "AnomalyScores",
    "BaseLearner",
    "CosinePrototypes",
    "DecoderOptions",
    "EMOptions",
    "EpisodicMixtureOptions",
    "GMMHead",
    "GMMSeg",
    "GSSInverse",
    "GaussianOptions",
    "GenSegError",
    "InferenceOptions",
    "LearnedColors",
    "Mahalanobis",
    "MaskigeTokenizer",
    "MatchingOptions",
    "MixtureOptions",
    "PosteriorOptions",
    "SegmentationModule",
    "SoftmaxSegmenter",
    "StandardizedMaxLogit",
    "TokenDecoderOptions",
    "VQOptions",
    "VariationOptions",
]
