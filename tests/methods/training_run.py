"""A small GMMSeg run that can be killed: `python -m tests.methods.training_run FOLDER STEP`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_genseg import GMMSeg
from lightning_genseg.data import SyntheticScenesDataModule
from tests.contract import in_groups

BATCHES = 5  # per epoch


class Losses(Callback):
    """Write the loss of every step; die without warning before the step `die_at`."""

    def __init__(self, path: Path, die_at: int | None = None) -> None:
        self.path, self.die_at = path, die_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        line = {
            "batch": trainer.fit_loop.total_batch_idx,
            "loss": outputs["loss"].item(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "names": batch["name"],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_losses(path: Path) -> dict[int, dict[str, Any]]:
    """Lines of `Losses` by batch; a batch that was run twice counts as it was run last."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line.pop("batch"): line for line in lines}


def run(
    folder: Path,
    die_at: int | None = None,
    resume: Path | None = None,
    every: int = 2,
    seed: int = 0,
    trainer_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> GMMSeg:
    """Three epochs of augmented scenes, a checkpoint every few steps and after every epoch."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    seed_everything(seed, verbose=False)
    model = GMMSeg(
        **in_groups(
            **{
                "num_classes": 6,
                "encoder": "tu-test_resnet",
                "decoder": "segformer",
                "dropout": 0.0,  # Lightning does not restore the random state
                "network_options": {"decoder_segmentation_channels": 16},
                "embedding_dim": 8,
                "components": 2,
                "memory_size": 60,
                "samples_per_component": 13,
                "interval": 3,
                "mean_momentum": 0.9,
                **arguments,
            }
        )
    )
    data = SyntheticScenesDataModule(
        size=(48, 64), crop_size=(32, 48), train_length=2 * BATCHES, batch_size=2, num_workers=0
    )
    checkpoints = [
        ModelCheckpoint(
            folder,
            "{step}",
            save_top_k=-1,
            every_n_train_steps=every,
            save_last=True,
            enable_version_counter=False,
        ),
        ModelCheckpoint(folder / "epochs", "{epoch}", save_top_k=-1, every_n_epochs=1),
    ]
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 3,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": [Losses(folder / "losses.jsonl", die_at), *checkpoints],
            **(trainer_arguments or {}),
        }
    )
    trainer.fit(model, data, ckpt_path=resume)
    return model


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
