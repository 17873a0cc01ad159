"""StreetHazards: simulated streets with objects that do not belong there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import MissingFiles, SegmentationDataset
from lightning_genseg.data.labels import IGNORE, Color
from lightning_genseg.data.layout import check_ids, check_split
from lightning_genseg.data.pairing import pair_files
from lightning_genseg.errors import MissingFileError


class StreetHazards(SegmentationDataset):
    """StreetHazards: 12 classes, 5125, 1031 and 1500 frames of 1280x720 from a simulator.

    Layout: `root/train/images/{training,validation}/<town>/*.png`,
    `root/test/images/test/<town>/*.png` and the masks of the same names in `annotations` instead of
    `images` (1 unlabelled, 2 to 13 classes, 14 anomaly, in the test split only), as
    `streethazards_train.tar` and `streethazards_test.tar` unpack, in `root` or each in a folder of
    its name. Get them from https://github.com/hendrycks/anomaly-seg.

    What is unlabelled (sky and what is far away) is ignored: 255 in `mask` and in `anomaly`. The
    authors train it as a class and count it as known; `unlabelled_class` does the same.

    Source: Hendrycks et al.: Scaling out-of-distribution detection for real-world settings, ICML
    2022, arXiv:1911.11132; numbers and colours: github.com/hendrycks/anomaly-seg,
    create_dataset.py.

    Args:
        root: folder that holds `train` and `test`, or `streethazards_train` and
            `streethazards_test`.
        split: which part.
        unlabelled_class: whether `unlabelled` is a class, the first of 13.
        transform: albumentations transforms.

    Raises:
        MissingFileError: a folder is missing.
        GenSegError: no image, an image without mask or the reverse; on reading as in
            `SegmentationDataset`.
    """

    # fmt: off
    CLASS_NAMES = (
        "building", "fence", "other", "pedestrian", "pole", "road line", "road", "sidewalk",
        "vegetation", "car", "wall", "traffic sign",
    )
    PALETTE = (
        (70, 70, 70), (190, 153, 153), (250, 170, 160), (220, 20, 60), (153, 153, 153),
        (157, 234, 50), (128, 64, 128), (244, 35, 232), (107, 142, 35), (0, 0, 142),
        (102, 102, 156), (220, 220, 0),
    )
    # fmt: on

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val", "test"] = "train",
        unlabelled_class: bool = False,
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(StreetHazards.__init__, locals())
        root = Path(root)
        part = "test" if split == "test" else "train"
        places = (root / part, root / f"streethazards_{part}" / part)
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise MissingFileError(
                f"root '{root}' of StreetHazards holds neither '{part}' nor "
                f"'streethazards_{part}/{part}': give the folder in which streethazards_{part}.tar "
                "was unpacked."
            )
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        images, masks = folder / "images" / name, folder / "annotations" / name
        check_split(split, "StreetHazards", images, masks)
        samples, complaint = pair_files(images, masks)
        names, palette = self.classes(unlabelled_class)
        first = 1 if unlabelled_class else 2
        # 0 is what the authors' loader ignores as well.
        ids = {0: IGNORE, 1: IGNORE, 14: IGNORE} | {first + c: c for c in range(len(names))}
        anomaly_ids = {value: IGNORE if c == IGNORE else 0 for value, c in ids.items()} | {14: 1}
        super().__init__(samples, names, palette, ids, transform, anomaly_ids)
        if complaint:
            raise MissingFiles(complaint, self)
        expected = "the masks of StreetHazards hold 1 to 14: restore the originals"
        check_ids(self, range(15, 255), expected)

    @classmethod
    def classes(cls, unlabelled_class: bool) -> tuple[list[str], list[Color]]:
        """Names and colours of the classes, with or without `unlabelled` as the first."""
        if not unlabelled_class:
            return list(cls.CLASS_NAMES), list(cls.PALETTE)
        # Cityscapes' sky: the authors' black is what ignored pixels are drawn in.
        return ["unlabelled", *cls.CLASS_NAMES], [(70, 130, 180), *cls.PALETTE]


class StreetHazardsDataModule(SegmentationDataModule):
    """StreetHazards; layout, source and where to get it: see `StreetHazards`.

    Anomalies are in the test split only; `anomaly` is there in all of them.

    Args:
        root: folder that holds train and test; not needed for prediction.
        unlabelled_class: train `unlabelled` (mostly sky) as a class, the first of 13, and count it
            as known.
        crop_size: (height, width) of training images in pixels.
    """

    def __init__(
        self,
        root: Path,
        unlabelled_class: bool = False,
        crop_size: tuple[int, int] = (512, 512),
        **kwargs: Any,
    ) -> None:
        names, palette = StreetHazards.classes(unlabelled_class)
        super().__init__(
            class_names=names,
            palette=palette,
            unknown_classes=None,  # there are anomalies already
            crop_size=crop_size,
            **kwargs,
        )
        self.root = root
        self.unlabelled_class = unlabelled_class

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> StreetHazards:
        """Build one of the three splits."""
        return StreetHazards(self.root, split, self.unlabelled_class, transform)
