"""COCO 2014 with its 80 kinds of objects as classes: what COCO-20i is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.annotations import paint_polygon, read_instances
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.labels import voc_palette
from lightning_genseg.data.layout import check_files, check_root, list_files, read_list
from lightning_genseg.data.sets.coco_stuff import COCOStuff164k
from lightning_genseg.errors import MissingFileError

# Numbers that COCO reserved between 1 and 90 but has no objects of.
_UNUSED = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
_CLASS_OF_CATEGORY = {
    category: c for c, category in enumerate((i for i in range(1, 91) if i not in _UNUSED), 1)
}


class COCO(SegmentationDataset):
    """COCO 2014: background and 80 kinds of objects, 82 081 and 40 137 images with objects.

    Layout: `root/{train2014,val2014}/*.jpg` and `root/annotations/{train2014,val2014}/*.png` of the
    same names: 0 background, 1 to 80 the categories in ascending order of COCO's numbers without
    their gaps, as PFENet and BAM hand them out. `convert_instances` makes these files from
    `root/annotations/instances_{train,val}2014.json`. Get it from https://cocodataset.org
    (annotations CC BY 4.0; the images are from Flickr, whose terms of use apply).

    Source: Lin et al.: Microsoft COCO, ECCV 2014.

    Args:
        root: folder that holds `train2014`, `val2014` and `annotations`.
        split: which part.
        names: text file with the images of the split in their order (stems, or "image mask" as in
            BAM's lists); default: all masks, sorted.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ("background", *COCOStuff164k.CLASS_NAMES[:80])
    PALETTE = tuple(voc_palette(81))

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val"] = "train",
        names: Path | None = None,
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(COCO.__init__, locals())
        root = Path(root)
        folder = f"{split}2014"
        check_root(root, (folder, "annotations"), "COCO 2014")
        masks = root / "annotations" / folder
        if not masks.is_dir():
            raise MissingFileError(
                f"'{masks}' does not exist: unpack the masks (0 to 80) there, or make them from "
                f"instances_{folder}.json with convert (--data.convert true)."
            )
        stems = list_files(masks, ".png") if names is None else read_list(Path(names), "COCO 2014")
        samples = [
            Sample(stem, root / folder / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems
        ]
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, None, transform)
        check_files(self)


def convert_instances(root: Path | str, split: Literal["train", "val"]) -> int:
    """Write masks of classes for the images in COCO's file of instances, all or none.

    Larger objects are painted first, so that smaller ones stay visible; groups (`iscrowd`) are left
    out. The papers do not say how they did it. An image without annotations has no mask.

    Returns:
        Number of masks.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: it is none of COCO's.
    """
    root = Path(root)
    path = root / "annotations" / f"instances_{split}2014.json"
    if not path.is_file():
        raise MissingFileError(
            f"'{path}' does not exist: unpack annotations_trainval2014.zip into '{root}'."
        )
    content = read_instances(path)
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    target = root / "annotations" / f"{split}2014"
    partial = target.with_name(target.name + ".unpacking")
    partial.mkdir(exist_ok=True)
    images = [image for image in content["images"] if image["id"] in annotations]
    for image in tqdm(images, desc=f"painting masks of {split}2014", unit="mask", disable=None):
        mask = paint_instances(annotations[image["id"]], image["height"], image["width"])
        Image.fromarray(mask).save(partial / f"{Path(image['file_name']).stem}.png")
    partial.rename(target)
    return len(images)


def paint_instances(
    annotations: Sequence[dict[str, Any]], height: int, width: int
) -> NDArray[np.uint8]:
    """Paint COCO's polygons, large objects first, as classes 1 to 80 on 0, HxW; without groups."""
    mask = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda a: -float(a["area"])):
        if annotation.get("iscrowd"):
            continue
        for polygon in annotation["segmentation"]:
            points = np.asarray(polygon, np.float64).reshape(-1, 2)
            paint_polygon(mask, points, _CLASS_OF_CATEGORY[annotation["category_id"]])
    return mask


class COCODataModule(SegmentationDataModule):
    """COCO 2014, background and 80 kinds of objects; layout and where to get it: see `COCO`.

    `test` is the validation split.

    Args:
        root: folder that holds train2014, val2014 and annotations; not needed for prediction.
        train_list: file of the training images in their order; default: all that have a mask,
            sorted.
        val_list: likewise of the validation images.
        convert: make the masks from COCO's instances before the run, where there are none.
        batch_size: images of a training batch, per process.
        crop_size: (height, width) of training images in pixels.
    """

    def __init__(
        self,
        root: Path,
        train_list: Path | None = None,
        val_list: Path | None = None,
        convert: bool = False,
        batch_size: int = 16,
        crop_size: tuple[int, int] = (512, 512),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            class_names=COCO.CLASS_NAMES,
            palette=COCO.PALETTE,
            batch_size=batch_size,
            crop_size=crop_size,
            **kwargs,
        )
        self.root = root
        self.train_list = train_list
        self.val_list = val_list
        self.convert = convert

    def get_files(self) -> None:
        """Make the masks that are missing, if asked to."""
        splits: tuple[Literal["train", "val"], ...] = ("train", "val")
        for split in splits if self.convert else ():
            if not (Path(self.root) / "annotations" / f"{split}2014").is_dir():
                convert_instances(self.root, split)

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> COCO:
        """Build the training or the validation split."""
        if split == "train":
            return COCO(self.root, "train", self.train_list, transform)
        return COCO(self.root, "val", self.val_list, transform)
