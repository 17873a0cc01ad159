"""What the callbacks share."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from lightning_genseg.data.labels import voc_palette
from lightning_genseg.data.loaders import collate
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.plots.pictures import Picture
from lightning_genseg.uncertainty.conformal import Threshold


def classes_of(
    trainer: Trainer, pl_module: LightningModule
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours: the data's if they have any, else the module's names and VOC's colours.

    Of a test in other classes than the module's, those.
    """
    target = getattr(pl_module, "target_classes", None)
    if target is not None and trainer.testing:
        return target.class_names, target.palette
    data = trainer.datamodule  # type: ignore[attr-defined]
    num_classes = int(pl_module.num_classes)  # type: ignore[arg-type]
    names = getattr(data, "class_names", None) or getattr(pl_module, "class_names", None)
    return (
        list(names or map(str, range(num_classes))),
        getattr(data, "palette", None) or voc_palette(num_classes),
    )


def spread_samples(dataset: Any, count: int) -> list[dict[str, Any]]:
    """So many samples, each as a batch, spread evenly over a data set from its first to its last."""
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    return [collate([dataset[i]]) for i in chosen.round().astype(int).tolist()]


def threshold_of(pl_module: LightningModule) -> Threshold | None:
    """Threshold of a calibrated module's anomaly score."""
    if not isinstance(pl_module, SegmentationModule):
        return None
    return pl_module.anomaly.thresholds.get(str(pl_module.anomaly_score))


def to_array(tensor: Tensor) -> NDArray[Any]:
    """Values of a tensor, on the CPU."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def to_picture(image: Tensor) -> Picture:
    """Image 3 x H x W in [0, 1] to H x W x 3 uint8."""
    return to_array((image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0))
