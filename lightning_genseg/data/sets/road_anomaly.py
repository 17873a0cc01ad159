"""Road Anomaly: animals, rocks and other unusual things on roads, for networks trained on Cityscapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset, find_images
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import check_files, check_ids, check_root
from lightning_genseg.data.sets.cityscapes import Cityscapes
from lightning_genseg.data.sets.cityscapes_anomaly import CityscapesAnomalyDataModule
from lightning_genseg.data.transforms.crops import Transform


class RoadAnomaly(SegmentationDataset):
    """Road Anomaly: 60 photographs of 1280x720 from the web, for testing only.

    Layout: `root/frames/<name>.jpg` or `.webp` and `root/frames/<name>.labels/labels_semantic.png`
        (2 anomalous, 0
    and 1 known), as `RoadAnomaly_jpg.zip` unpacks. Get it from
    https://www.epfl.ch/labs/cvlab/data/road-anomaly (research use). There are no labels of classes:
    `mask` is 255 everywhere.

    Source: Lis, Nakka, Fua, Salzmann: Detecting the unexpected via image resynthesis, ICCV 2019,
        arXiv:1904.07595.

    Args:
        root: folder that holds `frames`.
        transform: albumentations transforms.

    Raises:
        FileNotFoundError: a folder is missing, or `root` lies a level too high or too low.
        ValueError: no image, an image without labels, or other values; on reading as in
            `SegmentationDataset`.
    """

    ANOMALY_IDS: ClassVar[dict[int, int]] = {0: 0, 1: 0, 2: 1}

    def __init__(self, root: Path | str, transform: Sequence[Transform] | None = None) -> None:
        root = Path(root)
        check_root(root, ("frames",), "Road Anomaly")
        frames = root / "frames"
        images = {path.stem: path for path in find_images(frames) if path.parent == frames}
        samples = [
            Sample(name, path, frames / f"{name}.labels" / "labels_semantic.png")
            for name, path in images.items()
        ]
        super().__init__(
            samples,
            Cityscapes.CLASS_NAMES,
            Cityscapes.PALETTE,
            dict.fromkeys(self.ANOMALY_IDS, IGNORE),
            transform,
            self.ANOMALY_IDS,
        )
        check_files(self)
        expected = "the labels of Road Anomaly are 0, 1 and 2: restore the original"
        check_ids(self, range(3, 256), expected)


class RoadAnomalyDataModule(CityscapesAnomalyDataModule):
    """Road Anomaly (`datasets.RoadAnomaly`: layout, source, where to get it), for testing only.

    Arguments: see `CityscapesAnomalyDataModule`.
    """

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> RoadAnomaly:
        """Build the test split."""
        return RoadAnomaly(self.root, transform)
