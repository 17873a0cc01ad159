"""What the tests of callbacks share; one runs `python -m tests.callbacks.runs`."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import nn

from lightning_genseg import SegmentationModule
from lightning_genseg.callbacks import Report
from lightning_genseg.data import SyntheticScenesDataModule
from lightning_genseg.uncertainty.conformal import Threshold

SIZE = (32, 48)


class PixelSegmenter(SegmentationModule):
    """One linear map of the colour of a pixel; how little any class likes it is its anomaly."""

    def __init__(self, num_classes=6, anomaly=True, **arguments):
        score = "energy" if anomaly else None
        super().__init__(num_classes, anomaly_score=score, **arguments)
        self.features = nn.Conv2d(3, num_classes, 1)

    def outputs(self, image):
        scores = self.features(self.normalize(image))
        return {"logits": scores, "features": scores}

    def compute_loss(self, batch):
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["mask"], ignore_index=255)
        return {"loss": loss}


def calibrated(value):
    """Module with a threshold; -2.1 is about the median of its scores: both sides occur."""
    torch.manual_seed(0)
    module = PixelSegmenter()
    module.anomaly.thresholds["energy"] = Threshold(value, 0.1, "image", 0.2, 9)
    return module


def trainer(folder, *callbacks, **options):
    options = {"logger": False, "max_epochs": 1, "enable_checkpointing": False} | options
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def scenes(**options):
    options = {"train_length": 4, "val_length": 5, "test_length": 7, "num_workers": 0} | options
    return SyntheticScenesDataModule(
        SIZE, crop_size=SIZE, batch_size=2, eval_batch_size=2, **options
    )


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def column(picture, index, rows=2):
    """Middle of each cell of a column of 320 pixels, images of `SIZE` below a line of titles."""
    height, width = SIZE
    x = 4 + 324 * index + ((np.arange(width) + 0.5) * 320 / width).astype(int)
    y = ((np.arange(height) + 0.5) * 213 / height).astype(int)
    return [picture[27 + row * 217 + y][:, x] for row in range(rows)]


def report(folder, processes):
    """A test of a calibrated module with unknown objects."""
    torch.set_num_threads(1)
    data = scenes(test_length=8, held_out=True)
    strategy = "ddp" if processes > 1 else "auto"
    run = trainer(folder, Report(0), devices=processes, strategy=strategy)
    run.test(calibrated(-2.0), data, verbose=False)


if __name__ == "__main__":
    report(Path(sys.argv[1]), int(sys.argv[2]))
