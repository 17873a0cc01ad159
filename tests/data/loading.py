"""What tests of loaders share: a module that notes what it sees, scenes, skewed classes."""

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_genseg.data import FolderDataModule, SyntheticScenesDataModule

SKEWED = ["road", "car", "horse"]


def synthetic(**arguments):
    """Thirteen training scenes: four batches of three."""
    lengths = {"train_length": 13, "val_length": 3, "test_length": 2}
    words = {"size": (32, 40), "crop_size": (24, 24), "batch_size": 3, "num_workers": 0}
    return SyntheticScenesDataModule(**{**lengths, **words, **arguments})


def write_skewed(root, count=40):
    """Road is everywhere, a car in every fifth image, the horse in two."""
    for index in range(count):
        mask = np.zeros((8, 8), np.uint8)
        mask[0, 0] = 255
        if index % 5 == 0:
            mask[4:6] = 1
        if index in (3, 17):
            mask[7, 7] = 2
        for folder, array in (("images", np.full((8, 8, 3), index, np.uint8)), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{index:02}.png")
    return root


def skewed(root, **arguments):
    """The whole folder is for training: what is tested is the order."""
    words = {"class_names": SKEWED, "batch_size": 4, "num_workers": 0, "train_transform": []}
    data = FolderDataModule(root, **{**words, "class_balanced": True, **arguments})
    names = [f"{index:02}" for index in range(40)]
    data._names = {"train": names, "val": names[:1], "test": names[:1]}
    data.cache_dir = data.cache_dir or root / "cache"
    return data


def digest(batch):
    return batch["name"], round(batch["image"].double().sum().item(), 6), batch["mask"].sum().item()


class Recorder(LightningModule):
    """A module that learns something and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 6, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, *digest(batch)))
        logits = self.net(batch["image"])
        return torch.nn.functional.cross_entropy(logits, batch["mask"], ignore_index=255)

    def validation_step(self, batch, batch_idx):
        assert batch["mask"].shape[1:] == batch["image"].shape[2:]

    def test_step(self, batch, batch_idx):
        self.seen.append(batch["name"])

    def predict_step(self, batch, batch_idx):
        return batch["name"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAfter(Callback):
    """Leave training as an interruption would, after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            raise RuntimeError("killed")


def every_step(path):
    return ModelCheckpoint(path, "step", every_n_train_steps=1, enable_version_counter=False)
