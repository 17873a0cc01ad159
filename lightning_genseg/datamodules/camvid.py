"""CamVid for Lightning."""

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.camvid import CamVid
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.transforms import Transform

__all__ = ["CamVidDataModule"]


class CamVidDataModule(SegmentationDataModule):
    """CamVid (`datasets.CamVid`: layout, sources, where to get it).

    Args:
        root: folder with train, trainannot, val, valannot, test, testannot; not needed for prediction.
        unknown_classes: see `SegmentationDataModule`, like all that follow.
        batch_size: see there.
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
        unknown_classes: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (256, 320),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=CamVid.CLASS_NAMES,
            palette=CamVid.PALETTE,
            unknown_classes=unknown_classes,
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

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> CamVid:
        """Build one of CamVid's three splits."""
        return CamVid(self.root, split, transform)
