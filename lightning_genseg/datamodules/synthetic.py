"""Toy street scenes for Lightning."""

from collections.abc import Sequence
from pathlib import Path

from lightning_genseg.datamodules.base import SegmentationDataModule, Split
from lightning_genseg.datasets.sparse import SparseLabels
from lightning_genseg.datasets.synthetic import SyntheticScenes
from lightning_genseg.transforms import Transform

__all__ = ["SyntheticScenesDataModule"]


class SyntheticScenesDataModule(SegmentationDataModule):
    """`SyntheticScenes`: six classes, drawn on the fly; training, validation and test scenes never coincide.

    Args:
        size: (height, width) of the scenes in pixels.
        train_length: number of training scenes.
        val_length: number of validation scenes.
        test_length: number of test scenes.
        held_out: put objects of an unknown kind into the test scenes (`anomaly` in the batch).
        scene_seed: other seeds give other scenes; apart from `seed`, so that runs are scored on the same ones.
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
        size: tuple[int, int] = (128, 160),
        train_length: int = 512,
        val_length: int = 64,
        test_length: int = 64,
        held_out: bool = False,
        scene_seed: int = 0,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (128, 160),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=SyntheticScenes.CLASS_NAMES,
            palette=SyntheticScenes.PALETTE,
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
        self.size = size
        self.lengths: dict[Split, int] = {
            "train": train_length,
            "val": val_length,
            "test": test_length,
        }
        self.held_out = held_out
        self.scene_seed = scene_seed

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> SyntheticScenes:
        """Build the scenes of a split."""
        seed = 3 * self.scene_seed + ("train", "val", "test").index(split)
        return SyntheticScenes(
            self.lengths[split],
            self.size,
            seed,
            held_out=self.held_out and split == "test",
            transform=transform,
        )
