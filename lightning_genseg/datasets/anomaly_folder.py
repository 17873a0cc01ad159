"""Anybody's own anomalies: a folder of images, one of anomaly masks, and perhaps one of class masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_genseg.datasets.base import (
    IGNORE,
    Color,
    MissingFiles,
    SegmentationDataset,
    anomaly_table,
    read_mask,
)
from lightning_genseg.datasets.folder import pair_files
from lightning_genseg.transforms import Transform

__all__ = ["AnomalyFolder"]


class AnomalyFolder(SegmentationDataset):
    """Images and anomaly masks (1 anomalous, 0 known, 255 not evaluated) of the same names in two folders under `root`.

    With `class_masks` also the labels of the known classes are read; `mask` is 255 where the anomaly mask is 1. Without
    them it is 255 everywhere.

    Args:
        root: folder that holds them.
        class_names: one for each class of the model.
        images: folder of the images, of any format.
        masks: folder of the anomaly masks.
        class_masks: folder of the class masks, one class number per pixel.
        names: which samples, in this order; default: all, sorted.
        palette: see `SegmentationDataset`.
        ids: of the class masks, see `SegmentationDataset`.
        anomaly_ids: value in the anomaly masks -> 1, 0 or 255; default: the files hold these. `{0: 0, 255: 1}` for
            masks that are white where something is anomalous.
        transform: albumentations transforms.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: no image, names that do not match, anomaly masks of 0 and 255 only without `anomaly_ids`; on reading
            as in `SegmentationDataset`.
    """

    def __init__(
        self,
        root: Path | str,
        class_names: Sequence[str],
        images: str = "images",
        masks: str = "masks",
        class_masks: str | None = None,
        names: Sequence[str] | None = None,
        palette: Sequence[Color] | None = None,
        ids: Mapping[int, int] | None = None,
        anomaly_ids: Mapping[int, int] | None = None,
        transform: Sequence[Transform] | None = None,
    ) -> None:
        root = Path(root)
        table = {0: 0, 1: 1} if anomaly_ids is None else dict(anomaly_ids)
        anomaly_table(table)  # a wrong one is reported before anything is made of it
        samples, complaint = pair_files(root / images, root / masks, names)
        if class_masks is None:
            ids = dict.fromkeys({0, *table}, IGNORE)
        else:
            labelled, more = pair_files(root / images, root / class_masks, names)
            mask_of = {sample.name: sample.mask for sample in labelled}
            complaint = complaint or more
            samples = [
                sample._replace(
                    mask=mask_of.get(sample.name, root / class_masks / f"{sample.name}.png"),
                    anomaly=sample.mask,
                )
                for sample in samples
            ]
        super().__init__(samples, class_names, palette, ids, transform, table)
        if complaint:
            raise MissingFiles(complaint, self)
        if anomaly_ids is None:
            self._check_white()

    def _check_white(self) -> None:
        """Complain of masks painted in black and white, in which nothing would be anomalous."""
        white = False
        for position in np.linspace(0, len(self) - 1, min(8, len(self))).astype(int).tolist():
            path = self.samples[position].anomaly or self.samples[position].mask
            try:
                values = set(np.unique(read_mask(path)).tolist())
            except (ValueError, FileNotFoundError):
                continue  # reported when the file is read, or by `genseg check` with all the others
            if not values <= {0, IGNORE}:
                return
            white = white or values == {0, IGNORE}
        if white:
            raise ValueError(
                f"the anomaly masks of '{path.parent}' hold 0 and 255 only, but 255 means not evaluated: set anomaly_ids "
                "to {0: 0, 255: 1} if they are white where something is anomalous, or {0: 0, 1: 1} if all is known."
            )
