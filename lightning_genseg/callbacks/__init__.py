"""What a run leaves behind: scores, pictures, predictions."""

from lightning_genseg.callbacks.channels_last import ChannelsLast
from lightning_genseg.callbacks.compare_scores import CompareScores
from lightning_genseg.callbacks.label_spreading import LabelSpreading
from lightning_genseg.callbacks.last_checkpoint import LastCheckpoint
from lightning_genseg.callbacks.manifest import read_manifest
from lightning_genseg.callbacks.maskiges import MaskigePictures
from lightning_genseg.callbacks.predictions import PredictionWriter
from lightning_genseg.callbacks.report import Report, draw_samples
from lightning_genseg.callbacks.update_mixtures import UpdateMixtures
from lightning_genseg.methods.random_states import RandomStates

__all__ = [
    "ChannelsLast",
    "CompareScores",
    "LabelSpreading",
    "LastCheckpoint",
    "MaskigePictures",
    "PredictionWriter",
    "RandomStates",
    "Report",
    "UpdateMixtures",
    "draw_samples",
    "read_manifest",
]
