"""Somebody's own examples of an object, and images to find it in, for Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch.utils.data import Dataset

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Batch
from lightning_genseg.data.episodes.support import SupportedImages
from lightning_genseg.errors import GenSegError


class FewShotFolderDataModule(SegmentationDataModule):
    """Your own object, for prediction: a few images of it with masks, and images to find it in.

    `support_root/images` and `support_root/masks` hold files of the same names; a mask is 1 on the
    object, 0 elsewhere, 255 where nothing is said. A batch is one image of `predict_root` at its
    own size with all supports (`support_image`, `support_mask`, `support_valid`, letterboxed to
    `size`).

    Args:
        support_root: folder that holds `images` and `masks`.
        predict_root: folder of images (searched recursively), or one image.
        size: side of the square supports in pixels; that of the training.
        support_ids: value in the masks -> 1, 0 or 255; `{0: 0, 255: 1}` for black and white ones.
        num_workers: processes that load data.

    Raises:
        GenSegError: in `setup`: a folder is not given; masks without object or with other values.
        MissingFileError: in `setup`: a folder does not exist.
    """

    splits: ClassVar[tuple[Split, ...]] = ()
    dense = False

    def __init__(
        self,
        support_root: Path | None = None,
        predict_root: Path | None = None,
        size: int = 473,
        support_ids: dict[int, int] | None = None,
        num_workers: int = 2,
    ) -> None:
        check_arguments(FewShotFolderDataModule.__init__, locals(), size="[8, inf)")
        super().__init__(
            class_names=("background", "foreground"),
            num_workers=num_workers,
            predict_root=predict_root,
        )
        self.support_root = support_root
        self.size = size
        self.support_ids = support_ids

    def make_predict_dataset(self) -> SupportedImages:
        """Build the images under `predict_root`, each with the supports."""
        return SupportedImages(self.predict_root, self.support_root, self.size, self.support_ids)

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> Dataset[Batch]:
        """There are no splits: GenSegError."""
        raise GenSegError(
            "FewShotFolderDataModule has images to predict only: train and test with "
            "EpisodesDataModule."
        )

    split_dataset = make_dataset
