"""How sparse labels spread."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_genseg.callbacks.pictures import classes_of, spread_samples, to_array, to_picture
from lightning_genseg.data.transforms.pipeline import shorter_side
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.agmm.module import AGMM
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.ops.views import evaluation_mode
from lightning_genseg.plots.pictures import (
    Palette,
    Picture,
    colorize,
    encode,
    enlarge,
    grid,
    overlay,
    void_color,
)


class LabelSpreading(Callback):
    """Draw how the sparse labels of a few training images spread, at every validation.

    Leaves ``label_spreading/step_<step>.png`` in the run's folder. A row is a training image, whole
    and without augmentation: the image; its labels, enlarged; of an `AGMM` the Gaussian map, in the
    colour of the highest class and as bright as that is high; and the prediction. The images are
    spread evenly over the training set and always the same.

    Args:
        num_images: rows.

    Raises:
        ValueError: if `num_images` is not positive; at the start, if the data have no sparse labels
            or the module is no `SegmentationModule`.
    """

    def __init__(self, num_images: int = 4) -> None:
        if num_images < 1:
            raise GenSegError(f"num_images is {num_images} but must be 1 or more.")
        self.num_images = num_images
        self._batches: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the images."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "sparse", None) is None:
            raise GenSegError(
                "LabelSpreading draws sparse labels and the data have none: set data.sparse, or "
                "take the callback away."
            )
        if not isinstance(pl_module, SegmentationModule):
            raise GenSegError(
                "LabelSpreading draws what a SegmentationModule predicts and "
                f"{type(pl_module).__name__} is none: derive it from that, or take the callback "
                "away."
            )
        if not trainer.is_global_zero:
            return
        # The scale it is trained at, or nearly.
        side = (pl_module.inference or {}).get("short_side")
        smaller = [] if side is None else shorter_side(side)
        dataset = data.split_dataset("train", [*data.eval_transform, *smaller])
        self._batches = spread_samples(dataset, self.num_images)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        log_dir = trainer.log_dir  # asks the other processes
        if trainer.sanity_checking or not self._batches or log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names, palette = classes_of(trainer, pl_module)
        rows = [self._row(pl_module, batch, palette) for batch in self._batches]
        spread = ["Gaussian map"] if isinstance(pl_module, AGMM) else []
        titles = ["image", "labels", *spread, "prediction"]
        picture = grid(rows, titles, list(zip(names, palette, strict=True)))
        path = Path(log_dir) / "label_spreading" / f"step_{trainer.global_step:06d}.png"
        replace_file(path, encode(picture, "png"))

    @staticmethod
    @torch.no_grad()
    def _row(
        pl_module: LightningModule, batch: Mapping[str, Any], palette: Palette
    ) -> list[Picture]:
        assert isinstance(pl_module, SegmentationModule)
        batch = move_data_to_device(batch, pl_module.device)
        image, mask = to_picture(batch["image"][0]), to_array(batch["mask"][0])
        void = void_color(palette)[0]
        dim = image // 2 + np.uint8(void // 2)
        row = [image, overlay(dim, enlarge(mask), palette, 1.0)]
        if isinstance(pl_module, AGMM):
            strength, likeliest = (to_array(x[0]) for x in pl_module.gaussian_map(batch).max(1))
            shown = void + (colorize(likeliest, palette) - float(void)) * strength[..., None]
            row.append(np.rint(shown).astype(np.uint8))
        with evaluation_mode(pl_module):
            scores = pl_module.maps_at_labels(batch)["scores"]
        return [*row, overlay(image, to_array(scores[0].argmax(0)), palette, 0.7)]
