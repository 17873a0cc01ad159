"""Road Anomaly: unusual things on roads, for networks trained on Cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample
from lightning_genseg.data.images import find_images
from lightning_genseg.data.layout import check_root
from lightning_genseg.data.sets.cityscapes_anomaly import (
    CityscapesAnomaly,
    CityscapesAnomalyDataModule,
)


class RoadAnomaly(CityscapesAnomaly):
    """Road Anomaly: 60 photographs of 1280x720 from the web, for testing only.

    Layout: `root/frames/<name>.jpg` or `.webp` and `root/frames/<name>.labels/labels_semantic.png`
    (2 anomalous, 0 and 1 known), as `RoadAnomaly_jpg.zip` unpacks. Get it from
    https://www.epfl.ch/labs/cvlab/data/road-anomaly (research use). There are no labels of classes:
    `mask` is 255 everywhere.

    Source: Lis, Nakka, Fua, Salzmann: Detecting the unexpected via image resynthesis, ICCV 2019,
    arXiv:1904.07595.

    Args:
        root: folder that holds `frames`.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    ANOMALY_IDS: ClassVar[dict[int, int]] = {0: 0, 1: 0, 2: 1}

    def __init__(
        self, root: Path | str, transform: Sequence[transforms.Transform] | None = None
    ) -> None:
        root = Path(root)
        check_root(root, ("frames",), "Road Anomaly")
        frames = root / "frames"
        images = {path.stem: path for path in find_images(frames) if path.parent == frames}
        samples = [
            Sample(name, path, frames / f"{name}.labels" / "labels_semantic.png")
            for name, path in images.items()
        ]
        super().__init__(samples, transform, "Road Anomaly")


class RoadAnomalyDataModule(CityscapesAnomalyDataModule):
    """Road Anomaly, for testing only; layout, source and where to get it: see `RoadAnomaly`."""

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> RoadAnomaly:
        """Build the test split."""
        return RoadAnomaly(self.root, transform)
