"""Episodes of toy scenes, and a base learner that has hardly been trained, for the few-shot tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_genseg import BaseLearner
from lightning_genseg.data import (
    BaseClassesDataModule,
    EpisodesDataModule,
    SyntheticScenesDataModule,
)
from tests.contract import trainer

SIZE = 65
FOLD = {"novel_classes": ["vehicle", "person"], "min_area": 20, "num_workers": 0}


def scenes(cache_dir: Path) -> SyntheticScenesDataModule:
    return SyntheticScenesDataModule(
        size=(48, 64), train_length=12, val_length=8, test_length=8, cache_dir=cache_dir
    )


def episodes(cache_dir: Path, shots: int = 1, **arguments: Any) -> EpisodesDataModule:
    options = {"novel_setting": "background", "mode": "balanced", "episodes": 6, "val_episodes": 4}
    return EpisodesDataModule(
        scenes(cache_dir),
        size=SIZE,
        shots=shots,
        batch_size=2,
        **{**FOLD, **options, **arguments},
    )


def base_learner(folder: Path) -> Path:
    """Checkpoint after one epoch of six steps."""
    data = BaseClassesDataModule(
        scenes(folder), size=SIZE, batch_size=2, **{k: FOLD[k] for k in FOLD if k != "min_area"}
    )
    model = BaseLearner(
        data.num_classes, encoder="tu-test_resnet", class_names=list(data.class_names)
    )
    run = trainer(folder, limit_val_batches=2)
    run.fit(model, datamodule=data)
    run.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


@cache
def _noise(count: int, shots: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, shots + 1, 3, SIZE, SIZE, generator=generator) / 2
    masks = torch.zeros(count, shots + 1, SIZE, SIZE, dtype=torch.long)
    for episode in range(count):
        for image in range(shots + 1):
            top, left = torch.randint(4, 30, (2,), generator=generator).tolist()
            rows, columns = slice(top, top + 24), slice(left, left + 28)
            masks[episode, image, rows, columns] = 1
            colour = torch.tensor([0.5, 0.1 * episode, 0.3])[:, None, None]
            images[episode, image, :, rows, columns] += colour * 0.9
    valid = torch.ones_like(masks, dtype=torch.bool)
    valid[..., 56:] = False
    masks[..., 56:] = 255
    images[..., 56:] = 0
    return images.clamp(0, 1), masks, valid


def batch_of(count: int = 2, shots: int = 1) -> dict[str, Any]:
    """Episodes of a coloured rectangle on noise, with a strip of padding at the right."""
    images, masks, valid = _noise(count, shots)
    return {
        "image": images[:, 0],
        "mask": masks[:, 0],
        "valid": valid[:, 0],
        "support_image": images[:, 1:],
        "support_mask": masks[:, 1:],
        "support_valid": valid[:, 1:],
        "class_index": torch.arange(count),
        "base_index": torch.ones(count, dtype=torch.long),
        "name": [str(i) for i in range(count)],
    }
