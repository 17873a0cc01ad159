"""PASCAL VOC 2012: photographs of twenty kinds of objects."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.download import Archive, DownloadDataModule, fetch
from lightning_genseg.data.labels import voc_palette
from lightning_genseg.data.layout import check_files, check_ids, check_root, read_list
from lightning_genseg.errors import MissingFileError

TrainSplit = Literal["trainaug", "train", "pascal5i"]


class VOC(SegmentationDataset):
    """PASCAL VOC 2012: background and 20 classes; 1464 or 10 582 and 1449 images.

    Layout: `root/JPEGImages/*.jpg`, `root/SegmentationClass/*.png` (palette images, 255 = boundary,
    ignored) and `root/ImageSets/Segmentation/{train,val}.txt`, as `VOCdevkit/VOC2012` unpacks. Get
    it from http://host.robots.ox.ac.uk/pascal/VOC/voc2012 and
    http://home.bharathh.info/pubs/codes/SBD (the images are from Flickr, whose terms of use apply;
    research use), or with `download`. The test labels stay on the evaluation server.

    The split `trainaug` adds the masks of the Semantic Boundaries Dataset as commonly distributed:
    `root/SegmentationClassAug/*.png` and `root/ImageSets/Segmentation/trainaug.txt`; where VOC has
    its own mask, that one is read. `pascal5i` are the 5953 training images of few-shot
    segmentation: `root/ImageSets/Segmentation/voc_sbd_merge_noduplicate.txt` of PFENet and BAM,
    which is `train.txt` and SBD's `train_noval.txt` without repetition.

    Sparse labels, both from github.com/LEONOB2014/GatedCRFLoss (folder datasets), unpacked in
    `root`: points, `sparse: PointFiles` with the files `voc_whats_the_point.json` and
    `voc_whats_the_point_bg_from_scribbles.json`; scribbles, `sparse: ScribbleFiles` with the folder
    of XML files that `voc_scribbles.zip` holds. Relative paths are looked for in the working folder
    and in `root`.

    Sources: Everingham et al.: The PASCAL visual object classes challenge: a retrospective, IJCV
    111, 2015; Hariharan et al.: Semantic contours from inverse detectors, ICCV 2011.

    Args:
        root: folder that holds `JPEGImages`, usually `VOCdevkit/VOC2012`.
        split: which part.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    # fmt: off
    CLASS_NAMES = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat",
        "chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant",
        "sheep", "sofa", "train", "tvmonitor",
    )
    # fmt: on
    PALETTE = tuple(voc_palette(21))
    ARCHIVES = (
        Archive(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
            {
                f"VOCdevkit/VOC2012/{name}": name
                for name in ("JPEGImages", "SegmentationClass", "ImageSets")
            },
        ),
    )
    AUGMENTATION = (
        Archive(
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
            "benchmark.tgz",
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            {
                f"benchmark_RELEASE/dataset/{name}": f"SBD/{name}"
                for name in ("cls", "train.txt", "val.txt")
            },
        ),
    )

    def __init__(
        self,
        root: Path | str,
        split: Literal["trainaug", "train", "pascal5i", "val"] = "trainaug",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(VOC.__init__, locals())
        root = Path(root)
        images, masks = root / "JPEGImages", root / "SegmentationClass"
        added = root / "SegmentationClassAug"
        folders = [images.name, masks.name, "ImageSets"]
        check_root(root, folders, "PASCAL VOC 2012", downloads=True)
        augmented = split in ("trainaug", "pascal5i")
        if augmented and not added.is_dir():
            raise MissingFileError(
                f"'{added}' does not exist: unpack SegmentationClassAug there, set download to "
                "true, or train on the 1464 images of the split train."
            )
        lists = root / "ImageSets" / "Segmentation"
        file = "voc_sbd_merge_noduplicate" if split == "pascal5i" else split
        names = read_list(lists / f"{file}.txt", "PASCAL VOC 2012")
        own = set(read_list(lists / "train.txt", "PASCAL VOC 2012") if augmented else names)
        samples = [
            Sample(name, images / f"{name}.jpg", (masks if name in own else added) / f"{name}.png")
            for name in names
        ]
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, None, transform)
        check_files(self)
        expected = "masks of PASCAL VOC hold 0 to 20 and 255: restore the original palette files"
        check_ids(self, range(21, 255), expected)

    @classmethod
    def download(cls, root: Path | str, augmented: bool = True) -> None:
        """Download what is missing in `root` (2 GB, and 1.4 GB for the augmentation)."""
        root = Path(root)
        fetch(root, cls.ARCHIVES)
        if augmented and not (root / "SegmentationClassAug").is_dir():
            fetch(root, cls.AUGMENTATION)
            _write_masks(root / "SBD" / "cls", root / "SegmentationClassAug")
        lists = root / "ImageSets" / "Segmentation"
        if augmented and not (lists / "trainaug.txt").is_file():
            added = [root / "SBD" / "train.txt", root / "SBD" / "val.txt", lists / "train.txt"]
            names = {name for path in added for name in read_list(path, "SBD")}
            names -= set(read_list(lists / "val.txt", "PASCAL VOC 2012"))
            (lists / "trainaug.txt").write_text("\n".join(sorted(names)) + "\n")


def _write_masks(source: Path, target: Path) -> None:
    """Turn SBD's .mat files into PNG files, all or none."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    temporary = target.with_name(target.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for path in tqdm(sorted(source.glob("*.mat")), desc="converting masks", unit=" files"):
            mask = loadmat(path)["GTcls"]["Segmentation"][0, 0]
            Image.fromarray(mask).save(temporary / f"{path.stem}.png")
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class VOCDataModule(DownloadDataModule):
    """PASCAL VOC 2012; layout, sources and where to get it: see `VOC`.

    `test` is the validation split, because the labels of the test split are not published.

    Args:
        root: folder that holds JPEGImages, usually VOCdevkit/VOC2012; not needed for prediction.
        train_split: `trainaug` (10 582 images with the masks of SBD), `train` (VOC's own 1464) or
            `pascal5i` (the 5953 of few-shot segmentation, see `VOC`).
        download: get what is missing in `root` before the run (2 GB, and 1.4 GB for trainaug).
    """

    dataset = VOC

    def __init__(self, root: Path, train_split: TrainSplit = "trainaug", **kwargs: Any) -> None:
        check_arguments(VOCDataModule.__init__, locals())
        super().__init__(root=root, **kwargs)
        self.train_split: TrainSplit = train_split

    def get_files(self) -> None:
        """Download what is missing, if asked to."""
        if self.download:
            VOC.download(self.root, augmented=self.train_split != "train")

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> VOC:
        """Build the training or the validation split."""
        return VOC(self.root, self.train_split if split == "train" else "val", transform)
