"""StreetHazards for Lightning."""

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.datasets.street_hazards import StreetHazards
from lightning_genseg.transforms import Transform

__all__ = ["StreetHazardsDataModule"]


class StreetHazardsDataModule(SegmentationDataModule):
    """StreetHazards (`datasets.StreetHazards`: layout, source, where to get it).

    Anomalies are in the test split only; `anomaly` is there in all of them.

    Args:
        root: folder that holds train and test; not needed for prediction.
        unlabelled_class: train `unlabelled` (mostly sky) as a class, the first of 13, and count it as known.
        batch_size: see `SegmentationDataModule`, like all that follow.
        eval_batch_size: see there.
        num_workers: see there.
        crop_size: see there.
        class_balanced: see there.
        sparse: see there.
        train_transform: see there.
        eval_transform: see there.
        seed: see there.
        predict_root: see there.
        cache_dir: see there.
    """

    def __init__(
        self,
        root: Path,
        unlabelled_class: bool = False,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (512, 512),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        names, palette = StreetHazards.classes(unlabelled_class)
        super().__init__(
            class_names=names,
            palette=palette,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
            class_balanced=class_balanced,
            sparse=sparse,
            train_transform=train_transform,
            eval_transform=eval_transform,
            seed=seed,
            predict_root=predict_root,
            cache_dir=cache_dir,
        )
        self.root = root
        self.unlabelled_class = unlabelled_class

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> StreetHazards:
        """Build one of the three splits."""
        return StreetHazards(self.root, split, self.unlabelled_class, transform)
