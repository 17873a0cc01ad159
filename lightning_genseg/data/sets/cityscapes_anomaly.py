"""What anomaly data share that test networks trained on Cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import EvaluationDataModule
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import check_files, check_ids
from lightning_genseg.data.sets.cityscapes import Cityscapes


class CityscapesAnomaly(SegmentationDataset):
    """Images with anomaly masks and without labels of classes: `mask` is 255 everywhere.

    Args:
        samples: where the files lie.
        transform: albumentations transforms.
        name: of the data set, for messages.
    """

    ANOMALY_IDS: ClassVar[dict[int, int]] = {0: 0, 1: 1, IGNORE: IGNORE}

    def __init__(
        self, samples: Sequence[Sample], transform: Sequence[transforms.Transform] | None, name: str
    ) -> None:
        super().__init__(
            samples,
            Cityscapes.CLASS_NAMES,
            Cityscapes.PALETTE,
            dict.fromkeys(self.ANOMALY_IDS, IGNORE),
            transform,
            self.ANOMALY_IDS,
        )
        check_files(self)
        *most, last = self.ANOMALY_IDS
        values = f"{', '.join(map(str, most))} and {last}"
        expected = f"the labels of {name} are {values}: restore the original"
        check_ids(self, set(range(256)) - self.ANOMALY_IDS.keys(), expected)


class CityscapesAnomalyDataModule(EvaluationDataModule):
    """Images with anomalies, for testing networks trained on Cityscapes, whose classes it has.

    Args:
        root: folder of the layout described at the data set; not needed for prediction.
    """

    def __init__(self, root: Path, **kwargs: Any) -> None:
        super().__init__(class_names=Cityscapes.CLASS_NAMES, palette=Cityscapes.PALETTE, **kwargs)
        self.root = root
