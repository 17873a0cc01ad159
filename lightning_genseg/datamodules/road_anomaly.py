"""Road Anomaly for Lightning."""

from collections.abc import Sequence

from lightning_genseg.datamodules.base import Split
from lightning_genseg.datamodules.cityscapes_anomaly import CityscapesAnomalyDataModule
from lightning_genseg.datasets.road_anomaly import RoadAnomaly
from lightning_genseg.transforms import Transform

__all__ = ["RoadAnomalyDataModule"]


class RoadAnomalyDataModule(CityscapesAnomalyDataModule):
    """Road Anomaly (`datasets.RoadAnomaly`: layout, source, where to get it), for testing only.

    Arguments: see `CityscapesAnomalyDataModule`.
    """

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> RoadAnomaly:
        """Build the test split."""
        return RoadAnomaly(self.root, transform)
