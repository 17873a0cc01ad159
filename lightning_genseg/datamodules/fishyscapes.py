"""Fishyscapes Lost & Found for Lightning."""

from collections.abc import Sequence

from lightning_genseg.datamodules.base import Split
from lightning_genseg.datamodules.cityscapes_anomaly import CityscapesAnomalyDataModule
from lightning_genseg.datasets.fishyscapes import FishyscapesLostAndFound
from lightning_genseg.transforms import Transform

__all__ = ["FishyscapesDataModule"]


class FishyscapesDataModule(CityscapesAnomalyDataModule):
    """Fishyscapes Lost & Found (`datasets.FishyscapesLostAndFound`: layout, source, where to get it), for testing only.

    Arguments: see `CityscapesAnomalyDataModule`.
    """

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> FishyscapesLostAndFound:
        """Build the test split."""
        return FishyscapesLostAndFound(self.root, transform)
