"""What callbacks that draw share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.data.labels import voc_palette
from lightning_genseg.data.loaders import collate
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file, run_folder
from lightning_genseg.plots.pictures import Color, Palette, Picture, encode, grid
from lightning_genseg.uncertainty.conformal import Threshold


class SamplePictures(Callback, ABC):
    """Base of callbacks that draw a few samples, a row each, at every validation of a fit.

    The samples are spread evenly over their data set and always the same. The pictures are
    ``<folder>/step_<step>.png`` in the run's folder, and ``<folder>`` in loggers: see `Report`.

    Args:
        num_images: rows.
    """

    folder: ClassVar[str]

    def __init__(self, num_images: int = 4) -> None:
        check_arguments(SamplePictures.__init__, locals(), num_images="[1, inf)")
        self.num_images = num_images
        self.batches: list[dict[str, Any]] = []

    @abstractmethod
    def dataset(self, data: Any, pl_module: LightningModule) -> Any:
        """Data set of a datamodule that is drawn; refuses what cannot be."""

    @abstractmethod
    def row(self, pl_module: Any, batch: Mapping[str, Any], palette: Palette) -> dict[str, Picture]:
        """Pictures of a sample, a batch of one, by their titles."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the samples."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SegmentationDataModule):
            raise GenSegError(
                f"{type(self).__name__} draws samples of a datamodule: pass a "
                "SegmentationDataModule to Trainer.fit, or take the callback away."
            )
        dataset = self.dataset(data, pl_module)
        if trainer.is_global_zero:
            chosen = np.linspace(0, len(dataset) - 1, min(self.num_images, len(dataset)))
            self.batches = [collate([dataset[i]]) for i in chosen.round().astype(int).tolist()]

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        folder = run_folder(trainer)
        if trainer.sanity_checking or not self.batches or not is_shown(trainer, folder):
            return
        names, palette = classes_of(trainer, pl_module)
        batches = move_data_to_device(self.batches, pl_module.device)
        with trainer.precision_plugin.forward_context():
            rows = [self.row(pl_module, batch, palette) for batch in batches]
        legend = list(zip(names, palette, strict=True))
        picture = grid([list(row.values()) for row in rows], list(rows[0]), legend)
        if folder is not None:
            path = folder / self.folder / f"step_{trainer.global_step:06d}.png"
            replace_file(path, encode(picture, "png"))
        hand_to_loggers(trainer, self.folder, picture)


def is_shown(trainer: Trainer, folder: Path | None) -> bool:
    """Whether somebody gets to see what is drawn: in the run's folder, or in a logger."""
    trial: int = trainer.fast_dev_run  # type: ignore[attr-defined]
    return folder is not None or (not trial and bool(trainer.loggers))


def hand_to_loggers(trainer: Trainer, name: str, picture: Image.Image) -> None:
    """Give a picture to every logger that takes images: TensorBoard, W&B, MLflow and their like.

    They are known by what they offer, so that none of them has to be installed.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        own: Any = logger
        if hasattr(own, "log_image"):  # W&B
            own.log_image(name, [picture], step=step)
        elif hasattr(own.experiment, "add_image"):  # TensorBoard, and what takes after it
            own.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif hasattr(own.experiment, "log_image") and hasattr(own, "run_id"):  # MLflow
            own.experiment.log_image(own.run_id, picture, key=name, step=step, synchronous=True)


def classes_of(trainer: Trainer, pl_module: LightningModule) -> tuple[list[str], list[Color]]:
    """Names and colours: the data's if they have any, else the module's names and VOC's colours.

    Of a test in other classes than the module's, those.
    """
    target = getattr(pl_module, "target_classes", None)
    if target is not None and trainer.testing:
        return target.class_names, target.palette
    data = trainer.datamodule  # type: ignore[attr-defined]
    names = getattr(data, "class_names", None) or getattr(pl_module, "class_names", None)
    known = getattr(pl_module, "num_classes", None) or getattr(data, "num_classes", None)
    if not known and not names:
        raise GenSegError(
            f"nobody says which classes there are: give {type(pl_module).__name__} the attribute "
            "num_classes or class_names."
        )
    num_classes = int(known or len(names or ()))
    return (
        list(names or map(str, range(num_classes))),
        getattr(data, "palette", None) or voc_palette(num_classes),
    )


def range_of(pl_module: LightningModule) -> tuple[float, float] | None:
    """Range in which heat maps of a module's anomaly score are drawn, where it is known.

    Scores that are probabilities have one of their own. Others get that of validation images,
    wider by a quarter: what is bright is stranger than nearly all that was seen there.
    """
    name = getattr(pl_module, "anomaly_score", None)
    if name == "msp":
        return 0.0, 1.0
    if name == "entropy":
        return 0.0, math.log(max(2, int(pl_module.num_classes)))  # type: ignore[arg-type]
    found = getattr(getattr(pl_module, "anomaly", None), "ranges", {}).get(name)
    return None if found is None else (found[0], found[1] + (found[1] - found[0]) / 4)


def threshold_of(pl_module: LightningModule) -> Threshold | None:
    """Threshold of a calibrated module's anomaly score."""
    thresholds = getattr(getattr(pl_module, "anomaly", None), "thresholds", {})
    threshold: Threshold | None = thresholds.get(getattr(pl_module, "anomaly_score", None))
    return threshold


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Values of a tensor, on the CPU; numbers of any precision as float32."""
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def to_picture(image: Tensor) -> Picture:
    """Image 3 x H x W in [0, 1], or uint8, to H x W x 3 uint8."""
    if not image.is_floating_point():
        return to_array(image.permute(1, 2, 0))
    return to_array((image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0))
