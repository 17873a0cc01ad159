"""RoadAnomaly21 of SegmentMeIfYouCan for Lightning."""

from collections.abc import Sequence

from lightning_genseg.datamodules.base import Split
from lightning_genseg.datamodules.cityscapes_anomaly import CityscapesAnomalyDataModule
from lightning_genseg.datasets.road_anomaly21 import RoadAnomaly21
from lightning_genseg.transforms import Transform

__all__ = ["RoadAnomaly21DataModule"]


class RoadAnomaly21DataModule(CityscapesAnomalyDataModule):
    """RoadAnomaly21 of SegmentMeIfYouCan (`datasets.RoadAnomaly21`: layout, source, where to get it), for testing only.

    Arguments: see `CityscapesAnomalyDataModule`.
    """

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> RoadAnomaly21:
        """Build the test split."""
        return RoadAnomaly21(self.root, transform)
