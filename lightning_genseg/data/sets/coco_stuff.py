"""COCO-Stuff: photographs of everyday scenes with things and stuff, every pixel labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.download import Archive, DownloadDataModule, fetch
from lightning_genseg.data.images import check_exists, read_mask
from lightning_genseg.data.labels import IGNORE, voc_palette
from lightning_genseg.data.layout import (
    check_files,
    check_ids,
    check_root,
    check_split,
    list_files,
    read_list,
)
from lightning_genseg.errors import GenSegError

# fmt: off
_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush", "banner", "blanket", "branch", "bridge",
    "building-other", "bush", "cabinet", "cage", "cardboard", "carpet", "ceiling-other",
    "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile",
    "floor-wood", "flower", "fog", "food-other", "fruit", "furniture-other", "grass", "gravel",
    "ground-other", "hill", "house", "leaves", "light", "mat", "metal", "mirror-stuff", "moss",
    "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow", "plant-other", "plastic",
    "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs",
    "stone", "straw", "structural-other", "table", "tent", "textile-other", "towel", "tree",
    "vegetable", "wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone",
    "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind", "window-other", "wood",
)
# fmt: on
# COCO reserved numbers for these things (street sign, hat, shoe ...) but never labelled them.
_UNUSED = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91))
_CLASS_OF_ID = {
    value: c for c, value in enumerate(value for value in range(1, 183) if value not in _UNUSED)
}
_PALETTE = tuple(voc_palette(len(_NAMES) + 1)[1:])  # black is for what is not labelled


class COCOStuff10k(SegmentationDataset):
    """COCO-Stuff 10k v1.1: 80 things and 91 stuff classes, 9000 and 1000 images of COCO.

    Layout: `root/images/*.jpg`, `root/annotations/*.mat` (`S`: 0 = unlabelled, ignored; 1 to 182)
    and `root/imageLists/{train,test}.txt`, as `cocostuff-10k-v1.1.zip` unpacks. What
    mmsegmentation's converter makes of it is read as well:
    `root/annotations/{train,test}2014/*_labelTrainIds.png` (0 = unlabelled, 1 to 171). Get it from
    https://github.com/nightrome/cocostuff10k (annotations CC BY 4.0; the images are from Flickr,
    whose terms of use apply). The authors publish no table of colours; the palette is PASCAL VOC's
    after its black.

    Source: Caesar, Uijlings, Ferrari: COCO-Stuff: thing and stuff classes in context, CVPR 2018,
    arXiv:1612.03716.

    Args:
        root: folder that holds `images`, `annotations` and `imageLists`.
        split: which part.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    CLASS_NAMES = _NAMES
    PALETTE = _PALETTE
    IDS: ClassVar[dict[int, int]] = _CLASS_OF_ID | {0: IGNORE}
    ARCHIVES = (
        Archive(
            "https://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
            "cocostuff-10k-v1.1.zip",
            None,
            {name: name for name in ("images", "annotations", "imageLists")},
        ),
    )

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "test"] = "train",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(COCOStuff10k.__init__, locals())
        root = Path(root)
        images, masks = root / "images", root / "annotations"
        folders = (images.name, masks.name, "imageLists")
        check_root(root, folders, "COCO-Stuff 10k", downloads=True)
        names = read_list(root / "imageLists" / f"{split}.txt", "COCO-Stuff 10k")
        converted = masks / f"{split}2014"
        official = any(masks.glob("*.mat")) or not converted.is_dir()
        suffix = ".mat" if official else "_labelTrainIds.png"
        if not official:
            masks = converted
            # The converter copies the images; the originals may be gone.
            if not (images / f"{names[0]}.jpg").is_file():
                images /= f"{split}2014"
        samples = [
            Sample(name, images / f"{name}.jpg", masks / f"{name}{suffix}") for name in names
        ]
        shifted = {0: IGNORE} | {c + 1: c for c in range(len(_NAMES))}
        super().__init__(samples, _NAMES, _PALETTE, self.IDS if official else shifted, transform)
        check_files(self)
        if official:
            expected = (
                "version 1.1 holds 0 to 182 without the unused ids of COCO: get "
                "cocostuff-10k-v1.1.zip"
            )
            check_ids(self, {*_UNUSED, *range(183, 256)}, expected)
        else:
            expected = "labelTrainIds are 0 to 171: convert the .mat files again"
            check_ids(self, range(172, 256), expected)

    def decode_mask(self, path: Path) -> NDArray[np.integer[Any]]:
        """Read the file of a mask, HxW: a .mat file, or a PNG of the converter."""
        return _read_mat(path) if path.suffix == ".mat" else read_mask(path)

    @classmethod
    def download(cls, root: Path | str) -> None:
        """Ask for the archive, whose checksum is not published, if anything is missing (2 GB)."""
        fetch(Path(root), cls.ARCHIVES)


class COCOStuff164k(SegmentationDataset):
    """COCO-Stuff on COCO 2017: 80 things and 91 stuff classes, 118 287 and 5000 images.

    Layout: `root/images/{train,val}2017/*.jpg` and `root/annotations/{train,val}2017/*.png` (0 to
    181, 255 = unlabelled, ignored), as `train2017.zip`, `val2017.zip` and
    `stuffthingmaps_trainval2017.zip` unpack. Where those masks are gone, mmsegmentation's
    `*_labelTrainIds.png` beside them (0 to 170, 255) are read. Get it from
    https://github.com/nightrome/cocostuff (annotations CC BY 4.0; the images are from Flickr, whose
    terms of use apply), the images also with `download`. The authors publish no table of colours;
    the palette is PASCAL VOC's after its black.

    Source: Caesar, Uijlings, Ferrari: COCO-Stuff: thing and stuff classes in context, CVPR 2018,
    arXiv:1612.03716.

    Args:
        root: folder that holds `images` and `annotations`.
        split: which part.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    CLASS_NAMES = _NAMES
    PALETTE = _PALETTE
    IDS: ClassVar[dict[int, int]] = {value - 1: c for value, c in _CLASS_OF_ID.items()}
    ARCHIVES = (
        Archive(
            "https://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
            "stuffthingmaps_trainval2017.zip",
            None,
            {name: f"annotations/{name}" for name in ("train2017", "val2017")},
        ),
        Archive(
            "http://images.cocodataset.org/zips/val2017.zip",
            "md5:442b8da7639aecaf257c1dceb8ba8c80",
            {"val2017": "images/val2017"},
        ),
        Archive(
            "http://images.cocodataset.org/zips/train2017.zip",
            "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
            {"train2017": "images/train2017"},
        ),
    )

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val"] = "train",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(COCOStuff164k.__init__, locals())
        root = Path(root)
        check_root(root, ("images", "annotations"), "COCO-Stuff 164k", downloads=True)
        images, masks = root / "images" / f"{split}2017", root / "annotations" / f"{split}2017"
        check_split(split, "COCO-Stuff 164k", images, masks)
        found = list_files(images, ".jpg", remedy=f"unpack {split}2017.zip there")
        first = next(iter(found))
        converted = (
            not (masks / f"{first}.png").exists()
            and (masks / f"{first}_labelTrainIds.png").exists()
        )
        suffix = "_labelTrainIds.png" if converted else ".png"
        samples = [Sample(stem, path, masks / f"{stem}{suffix}") for stem, path in found.items()]
        super().__init__(samples, _NAMES, _PALETTE, None if converted else self.IDS, transform)
        check_files(self)
        if converted:
            expected = "labelTrainIds are 0 to 170 and 255: convert the official masks again"
            check_ids(self, range(171, 255), expected)
        else:
            expected = (
                "official masks hold 0 to 181 without COCO's unused ids, and 255, which makes this "
                "a converted file: restore stuffthingmaps_trainval2017.zip"
            )
            check_ids(self, {value - 1 for value in _UNUSED} | {*range(182, 255)}, expected)

    @classmethod
    def download(cls, root: Path | str) -> None:
        """Download the images if they are missing in `root` (20 GB); ask for the masks."""
        fetch(Path(root), cls.ARCHIVES)


def _read_mat(path: Path) -> NDArray[np.integer[Any]]:
    """Read `S` of a .mat file as HxW integers.

    Raises:
        MissingFileError: no such file.
        GenSegError: unreadable or without a map `S`.
    """
    from scipy.io import loadmat  # type: ignore[import-untyped]

    check_exists(path, "mask")
    try:
        labels: NDArray[Any] = loadmat(path, variable_names=["S"])["S"]
    except Exception as error:  # a broken file can raise anything from struct.error to zlib.error
        raise GenSegError(
            f"mask '{path}' cannot be read as a .mat file with a label map S "
            f"({type(error).__name__}: {' '.join(str(error).split())}): replace it, or get "
            "cocostuff-10k-v1.1.zip."
        ) from error
    return labels.astype(np.int64)  # MATLAB writes whole numbers as doubles unless told otherwise


class COCOStuff10kDataModule(DownloadDataModule):
    """COCO-Stuff 10k; layout, source and where to get it: see `COCOStuff10k`.

    The official test images serve for validation and test: the data set has no third part.

    Args:
        root: folder that holds images, annotations and imageLists; not needed for prediction.
        download: say where to get what is missing (2 GB): the archive has no published checksum.
    """

    dataset = COCOStuff10k

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> COCOStuff10k:
        """Build the training or the test split."""
        return COCOStuff10k(self.root, "train" if split == "train" else "test", transform)


class COCOStuff164kDataModule(DownloadDataModule):
    """COCO-Stuff on COCO 2017; layout, source and where to get it: see `COCOStuff164k`.

    `test` is the validation split, because the labels of the test images are not published.

    Args:
        root: folder that holds images and annotations; not needed for prediction.
        download: get the images that are missing in `root` before the run (20 GB), and say where to
            get the masks.
    """

    dataset = COCOStuff164k

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> COCOStuff164k:
        """Build the training or the validation split."""
        return COCOStuff164k(self.root, "train" if split == "train" else "val", transform)
