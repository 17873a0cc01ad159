"""Fishyscapes Lost & Found: small lost cargo on the road, for networks trained on Cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample
from lightning_genseg.data.layout import check_root, list_files
from lightning_genseg.data.sets.cityscapes_anomaly import (
    CityscapesAnomaly,
    CityscapesAnomalyDataModule,
)
from lightning_genseg.errors import GenSegError


class FishyscapesLostAndFound(CityscapesAnomaly):
    """Fishyscapes Lost & Found: the 100 public validation frames of 2048x1024, for testing only.

    Layout: `root/fishyscapes_lostandfound/<number>_<frame>_labels.png` (1 anomalous, 0 known, 255
    not evaluated), what `fishyscapes_lostandfound.zip` holds, and the images of Lost and Found,
    `root/leftImg8bit/{train,test}/<street>/<frame>_leftImg8bit.png`, as its `leftImg8bit.zip`
    unpacks. Get the labels from https://fishyscapes.com (CC BY 4.0), the images from the Lost and
    Found page of http://www.6d-vision.com (non-commercial use). The 275 test frames stay on the
    evaluation server. There are no labels of classes: `mask` is 255 everywhere.

    Sources: Blum et al.: The Fishyscapes benchmark, IJCV 129, 2021, arXiv:1904.03215; Pinggera et
    al.: Lost and Found, IROS 2016, arXiv:1609.04653.

    Args:
        root: folder that holds `fishyscapes_lostandfound` and `leftImg8bit`.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    def __init__(
        self, root: Path | str, transform: Sequence[transforms.Transform] | None = None
    ) -> None:
        root = Path(root)
        labels, images = root / "fishyscapes_lostandfound", root / "leftImg8bit"
        check_root(root, (labels.name, images.name), "Fishyscapes Lost & Found")
        remedy = "unpack fishyscapes_lostandfound.zip there"
        found = list_files(labels, "_labels.png", remedy=remedy)
        photos = list_files(images, "_leftImg8bit.png", levels=2)
        samples = []
        for stem, path in found.items():
            frame = stem.partition("_")[2]
            street = frame.rsplit("_", 2)[0]
            expected = images / "train" / street / f"{frame}_leftImg8bit.png"
            samples.append(Sample(frame, photos.get(frame, expected), path))
        if not any(sample.name in photos for sample in samples):
            raise GenSegError(
                f"'{images}' holds none of the {len(samples)} frames of '{labels}', for instance "
                f"'{samples[0].image}': put leftImg8bit of Lost and Found there, which is not that "
                "of Cityscapes."
            )
        super().__init__(samples, transform, "Fishyscapes")


class FishyscapesDataModule(CityscapesAnomalyDataModule):
    """Fishyscapes Lost & Found, for testing only; see `FishyscapesLostAndFound`."""

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> FishyscapesLostAndFound:
        """Build the test split."""
        return FishyscapesLostAndFound(self.root, transform)
