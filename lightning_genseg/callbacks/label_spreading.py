"""How sparse labels spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule

from lightning_genseg.callbacks.pictures import SamplePictures, to_array, to_picture
from lightning_genseg.data import transforms
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.ops.views import evaluation_mode
from lightning_genseg.plots.pictures import Palette, Picture, colorize, enlarge, overlay, void_color


class LabelSpreading(SamplePictures):
    """Draw how the sparse labels of a few training images spread, at every validation.

    Leaves ``label_spreading/step_<step>.png`` in the run's folder. A row is a training image, whole
    and without augmentation: the image; its labels, enlarged; of an `AGMM` the Gaussian map, in the
    colour of the highest class and as bright as that is high; and the prediction. The images are
    spread evenly over the training set and always the same.

    Raises:
        GenSegError: at the start, if the data have no sparse labels or the module is no
            `SegmentationModule`.
    """

    folder = "label_spreading"

    def dataset(self, data: Any, pl_module: LightningModule) -> Any:
        """The training set, at the scale of `inference`, which is nearly that of training."""
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
        side = (pl_module.inference or {}).get("short_side")
        smaller = [] if side is None else transforms.shorter_side(side)
        return data.split_dataset("train", [*data.eval_transform, *smaller])

    def row(
        self, pl_module: SegmentationModule, batch: Mapping[str, Any], palette: Palette
    ) -> dict[str, Picture]:
        """Image, labels, Gaussian map if the module has one, and prediction."""
        image, mask = to_picture(batch["image"][0]), to_array(batch["mask"][0])
        void = void_color(palette)[0]
        dim = image // 2 + np.uint8(void // 2)
        row = {"image": image, "labels": overlay(dim, enlarge(mask), palette, 1.0)}
        gaussian_map = getattr(pl_module, "gaussian_map", None)
        if gaussian_map is not None:
            strength, likeliest = (to_array(x[0]) for x in gaussian_map(batch).max(1))
            shown = void + (colorize(likeliest, palette) - float(void)) * strength[..., None]
            row["Gaussian map"] = np.rint(shown).astype(np.uint8)
        with evaluation_mode(pl_module):
            scores = pl_module.maps_at_labels(batch)["scores"]
        row["prediction"] = overlay(image, to_array(scores[0].argmax(0)), palette, 0.7)
        return row
