"""Short runs of every method, killed at random moments, or on two processes.

`python -m tests.methods.killed_run FOLDER kill METHOD SEED MOMENTS` forks a run that nothing
disturbs, and for each moment one that is killed then and another that goes on where it was.
`python -m tests.methods.killed_run FOLDER whole|rest` runs all methods on two processes, from the
start or from the checkpoint of the third step.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_genseg import (
    AGMM,
    CGMGM,
    GSS,
    BaseLearner,
    GMMSeg,
    GSSInverse,
    LearnedColors,
    MaskigeTokenizer,
    SoftmaxSegmenter,
    VQOptions,
)
from lightning_genseg.data import (
    BaseClassesDataModule,
    EpisodesDataModule,
    Points,
    SyntheticScenesDataModule,
)
from lightning_genseg.methods.fewshot.options import DecoderOptions
from tests.contract import NUM_CLASSES, TINY, in_groups, save
from tests.methods.gss.parts import SMALL

BATCHES, EPOCHS, START = 3, 3, 4  # a checkpoint of step 4 is kept


def scenes(**arguments: Any) -> SyntheticScenesDataModule:
    sizes = {"size": (48, 64), "crop_size": (48, 64), "train_length": 2 * 2 * BATCHES}
    return SyntheticScenesDataModule(
        **{**sizes, "val_length": 2, "batch_size": 2, "num_workers": 0, **arguments}
    )


def fold(kind: Any, **arguments: Any) -> Any:
    own = {"novel_classes": ["vehicle"], "size": 65, "batch_size": 2, "num_workers": 0}
    return kind(scenes(val_length=4), **own, **arguments)


def saved(model: Any, folder: Path, name: str) -> Path:
    """Another module's checkpoint, the same in all runs."""
    path = folder.parent / f"{name}.ckpt"
    return path if path.exists() else save(model, path)


def tokenizer() -> MaskigeTokenizer:
    return MaskigeTokenizer(NUM_CLASSES, VQOptions(channels=8))


METHODS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "softmax": lambda _: (SoftmaxSegmenter(**TINY, dropout=0.3), scenes()),
    "gmmseg": lambda _: (
        GMMSeg(**in_groups(**TINY, dropout=0.3, embedding_dim=8, memory_size=60, interval=2)),
        scenes(),
    ),
    "agmm": lambda _: (AGMM(**TINY, dropout=0.3), scenes(sparse=Points(3))),
    "gss": lambda _: (GSS(**SMALL), scenes()),
    "gss inverse": lambda folder: (
        GSSInverse(NUM_CLASSES, prior=saved(GSS(**SMALL), folder, "prior"), width=16),
        scenes(),
    ),
    "tokenizer": lambda _: (tokenizer(), scenes()),
    "colors": lambda folder: (
        LearnedColors(NUM_CLASSES, tokenizer=saved(tokenizer(), folder, "tokenizer"), width=8),
        scenes(),
    ),
    "base learner": lambda _: (
        BaseLearner(NUM_CLASSES, encoder="tu-test_resnet", dropout=0.3),
        fold(BaseClassesDataModule),
    ),
    "cgmgm": lambda _: (
        CGMGM(encoder="tu-test_resnet", ensemble=False, decoder=DecoderOptions(width=8)),
        fold(
            EpisodesDataModule,
            novel_setting="background",
            min_area=20,
            episodes=3,
            val_episodes=2,
        ),
    ),
}


class Seeds(Callback):
    """Other random numbers in every process, of every generator."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        seed = self.seed + trainer.global_rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002


def run(folder: Path, method: str, seed: int = 0, resume: Path | None = None, n: int = 1) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(seed, verbose=False)
    model, data = METHODS[method](folder)
    last = ModelCheckpoint(
        folder, "last", every_n_train_steps=1, enable_version_counter=False, save_top_k=1
    )
    kept = ModelCheckpoint(folder, "{step}", every_n_train_steps=START, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        devices=n,
        strategy="ddp_find_unused_parameters_true" if n > 1 else "auto",
        max_epochs=EPOCHS,
        limit_train_batches=BATCHES,
        val_check_interval=2,  # between, and on, the steps with a checkpoint
        num_sanity_val_steps=0,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Seeds(seed), last, kept],
    )
    trainer.fit(model, data, ckpt_path=resume)


def child(*arguments: Any) -> int:
    """Fork a run; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def finish(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def kill(folder: Path, method: str, seed: int, moments: int) -> None:
    """Folders `whole`, 0, 1, ... with the last checkpoints; `kills` tells the step of each."""
    METHODS[method](folder / "whole")  # what all runs read is written once
    began = time.monotonic()
    finish(child(folder / "whole", method))
    length = time.monotonic() - began
    draw = random.Random(f"{seed} {method}")
    for number in range(moments):
        mine, killed = folder / str(number), False
        last = mine / "last.ckpt"
        while not killed:  # one that had come to its end does not count
            shutil.rmtree(mine, ignore_errors=True)
            pid = child(mine, method)
            time.sleep(length * draw.uniform(0.05, 0.95))
            os.kill(pid, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        step = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        finish(child(mine, method, 1 + number, last) if step else child(mine, method))
        (mine / "kills").write_text(str(step))


if __name__ == "__main__":
    place, task = Path(sys.argv[1]), sys.argv[2]
    if task == "kill":
        kill(place, sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        for make in METHODS.values():
            make(place / task)
        for name in METHODS:
            old = place / f"whole {name}" / f"step={START}.ckpt"
            seed, resume = (0, None) if task == "whole" else (7, old)
            run(place / f"{task} {name}", name, seed, resume, 2)
