"""Anybody's own anomalies: folders of images, of anomaly masks, and perhaps of class masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import EvaluationDataModule, Split
from lightning_genseg.data.dataset import MissingFiles, SegmentationDataset
from lightning_genseg.data.images import read_mask
from lightning_genseg.data.labels import IGNORE, Color, anomaly_table, label_table
from lightning_genseg.data.layout import some_values
from lightning_genseg.data.pairing import find_list, pair_files, read_names
from lightning_genseg.data.sets.folder import named_classes
from lightning_genseg.errors import GenSegError


class AnomalyFolder(SegmentationDataset):
    """Images and anomaly masks (1 anomalous, 0 known, 255 not evaluated) of the same names.

    With `class_masks` also the labels of the known classes are read; `mask` is 255 where the
    anomaly mask is 1. Without them it is 255 everywhere.

    Args:
        root: folder that holds the others.
        class_names: one for each class of the model.
        images: folder of the images, of any format.
        masks: folder of the anomaly masks.
        class_masks: folder of the class masks, one class number per pixel.
        names: which samples, in this order; default: all, sorted.
        palette: one RGB colour per class; default: the colours of PASCAL VOC.
        ids: value in the class masks -> class (or 255); None: the files hold classes.
        anomaly_ids: value in the anomaly masks -> 1, 0 or 255; default: the files hold these. `{0:
            0, 255: 1}` for masks that are white where something is anomalous.
        transform: albumentations transforms.

    Raises:
        MissingFileError: a folder does not exist.
        GenSegError: no image, names that do not match, anomaly masks of 0 and 255 only without
            `anomaly_ids`; on reading as in `SegmentationDataset`.
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
        transform: Sequence[transforms.Transform] | None = None,
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
        paths = [sample.anomaly or sample.mask for sample in self.samples]
        found = [values for _, values in some_values(len(self), lambda i: read_mask(paths[i]))]
        if {0, IGNORE} in found and all(values <= {0, IGNORE} for values in found):
            raise GenSegError(
                f"the anomaly masks of '{paths[-1].parent}' hold 0 and 255 only, but 255 means not "
                "evaluated: set anomaly_ids to {0: 0, 255: 1} if they are white where something is "
                "anomalous, or {0: 0, 1: 1} if all is known."
            )


class AnomalyFolderDataModule(EvaluationDataModule):
    """Your own anomalies, for testing a trained network: `root/images` and `root/masks`.

    Images and masks have the same names. A mask holds 1 where something is anomalous, 0 where all
    is known, 255 where nothing is to be evaluated. With `class_masks` also mIoU of the known
    classes is scored. There is only a test split.

    Args:
        root: folder that holds `images` and `masks`; not needed for prediction.
        num_classes: C of the network to be tested; may be left out when `class_names` are given.
        class_names: the network's classes in its order; default: class_0, class_1 ...
        images: folder of the images below `root`.
        masks: folder of the anomaly masks below `root`.
        class_masks: folder of masks with the network's classes below `root`, if there are any.
        ids: value in the class masks -> class (or 255), for files that do not hold 0..C-1.
        anomaly_ids: value in the anomaly masks -> 1, 0 or 255, for instance `{0: 0, 255: 1}` for
            black and white ones.
        test_list: file of names, from the working folder or below `root`; default: all images.

    Raises:
        GenSegError: wrong arguments; in `setup`: names that do not match.
        MissingFileError: in `setup`: a folder or list does not exist.
    """

    def __init__(
        self,
        root: Path,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        images: str = "images",
        masks: str = "masks",
        class_masks: str | None = None,
        ids: dict[int, int] | None = None,
        anomaly_ids: dict[int, int] | None = None,
        test_list: Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(AnomalyFolderDataModule.__init__, locals())
        class_names = named_classes(num_classes, class_names)
        # Wrong tables are reported before anything is read.
        label_table(ids, len(class_names))
        if anomaly_ids is not None:
            anomaly_table(anomaly_ids)
        if ids is not None and class_masks is None:
            raise GenSegError(
                "ids is about class masks, of which there are none: give class_masks, or "
                "anomaly_ids for the anomaly masks."
            )
        super().__init__(class_names=class_names, **kwargs)
        self.root = Path(root)
        self.images = images
        self.masks = masks
        self.class_masks = class_masks
        self.ids = ids
        self.anomaly_ids = anomaly_ids
        self.test_list = test_list

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> AnomalyFolder:
        """Build the test split."""
        return AnomalyFolder(
            self.root,
            self.class_names,
            self.images,
            self.masks,
            self.class_masks,
            None if self.test_list is None else read_names(find_list(self.test_list, self.root)),
            self.palette,
            self.ids,
            self.anomaly_ids,
            transform,
        )
