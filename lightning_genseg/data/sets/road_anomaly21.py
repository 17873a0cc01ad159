"""RoadAnomaly21, the anomaly track of SegmentMeIfYouCan, for networks trained on Cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample
from lightning_genseg.data.images import find_images
from lightning_genseg.data.layout import check_root, list_files
from lightning_genseg.data.sets.cityscapes_anomaly import (
    CityscapesAnomaly,
    CityscapesAnomalyDataModule,
)


class RoadAnomaly21(CityscapesAnomaly):
    """RoadAnomaly21 of SegmentMeIfYouCan: its 10 labelled validation images, for testing only.

    Layout: `root/images/<name>.jpg` (or `.webp`, `.png`) and
    `root/labels_masks/<name>_labels_semantic.png` (1 anomalous, 0 known, 255 not evaluated), as
    `dataset_AnomalyTrack` unpacks. Images without a file of labels are left out: those of the 100
    test images stay with the organisers, for whom `predict_root` takes `root/images`.
    RoadObstacle21 has the same layout (there 0 is the road). Get it from
    https://segmentmeifyoucan.com/datasets. There are no labels of classes: `mask` is 255
    everywhere.

    Source: Chan et al.: SegmentMeIfYouCan: a benchmark for anomaly segmentation, NeurIPS 2021
    Datasets and Benchmarks, arXiv:2104.14812.

    Args:
        root: folder that holds `images` and `labels_masks`, usually `dataset_AnomalyTrack`.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    def __init__(
        self, root: Path | str, transform: Sequence[transforms.Transform] | None = None
    ) -> None:
        root = Path(root)
        images, labels = root / "images", root / "labels_masks"
        check_root(root, (images.name, labels.name), "RoadAnomaly21")
        remedy = "unpack the masks of the validation images there"
        found = list_files(labels, "_labels_semantic.png", remedy=remedy)
        photos = {path.stem: path for path in find_images(images)}
        samples = [
            Sample(name, photos.get(name, images / f"{name}.jpg"), path)
            for name, path in found.items()
        ]
        super().__init__(samples, transform, "RoadAnomaly21")


class RoadAnomaly21DataModule(CityscapesAnomalyDataModule):
    """RoadAnomaly21 of SegmentMeIfYouCan, for testing only; see `RoadAnomaly21`."""

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> RoadAnomaly21:
        """Build the test split."""
        return RoadAnomaly21(self.root, transform)
