"""Cityscapes: street scenes of fifty cities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import check_files, check_ids, check_root, check_split, list_files
from lightning_genseg.errors import GenSegError

Labels = Literal["labelIds", "labelTrainIds"]


class Cityscapes(SegmentationDataset):
    """Cityscapes with fine annotations: 19 classes, 2975 and 500 frames of 2048x1024.

    Layout: `root/leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png` and
    `root/gtFine/{train,val,test}/<city>/*_gtFine_labelIds.png`, as the archives
    `leftImg8bit_trainvaltest.zip` and `gtFine_trainvaltest.zip` unpack. Get them from
    https://www.cityscapes-dataset.com after registration (non-commercial use, no redistribution),
    therefore without download here. The labels of the 1525 test frames stay on the evaluation
    server, which asks for labelIds: `ID_OF_CLASS` turns classes back into them.

    Sparse labels: `sparse: PointFiles` with the file `cityscapes_synthetic_clicks.json` of
    github.com/LEONOB2014/GatedCRFLoss (folder datasets) in `root`, whose numbers are labelIds;
    clicks of your own by `sparse: Points` with `per: image` and a `count` of 20, 50 or 100; the
    PNGs of AGMM by `sparse: SparseMasks` with `unlabelled: 19`, their folder, the suffix
    `_gtFine_labelTrainIds.png` and `ids` of 0 to 18.

    Sources: Cordts et al.: The Cityscapes dataset for semantic urban scene understanding, CVPR
    2016, arXiv:1604.01685; names, colours and ids: github.com/mcordts/cityscapesScripts,
    helpers/labels.py.

    Args:
        root: folder that holds `leftImg8bit` and `gtFine`.
        split: which part.
        labels: the masks to read: `labelIds` as distributed, with 34 values, or `labelTrainIds`,
            which cityscapesScripts makes of them (0 to 18, 255 = ignored).
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    # fmt: off
    CLASS_NAMES = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train",
        "motorcycle", "bicycle",
    )
    PALETTE = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
        (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
        (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
        (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )
    # fmt: on
    ID_OF_CLASS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    # The other ids up to 33 are not scored: unlabelled, ego vehicle, parking, caravan ...
    IDS: ClassVar[dict[int, int]] = dict.fromkeys(range(34), IGNORE) | {
        value: c for c, value in enumerate(ID_OF_CLASS)
    }

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val"] = "train",
        labels: Labels = "labelIds",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(Cityscapes.__init__, locals())
        root = Path(root)
        check_root(root, ("leftImg8bit", "gtFine"), "Cityscapes")
        images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
        check_split(split, "Cityscapes", images, masks)
        remedy = "keep the folders of the cities and the names of leftImg8bit_trainvaltest.zip"
        found = list_files(images, "_leftImg8bit.png", levels=1, remedy=remedy)
        raw = labels == "labelIds"
        other = "labelTrainIds" if raw else "labelIds"
        if not any(masks.glob(f"*/*_gtFine_{labels}.png")) and any(masks.glob(f"*/*{other}.png")):
            raise GenSegError(
                f"no file '*/*_gtFine_{labels}.png' in '{masks}' but *_{other}.png: set labels to "
                f"{other}."
            )
        samples = [
            Sample(stem, path, masks / path.parent.name / f"{stem}_gtFine_{labels}.png")
            for stem, path in found.items()
        ]
        ids = self.IDS if raw else None
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, ids, transform)
        check_files(self)
        if raw:
            expected = (
                "labelIds are 0 to 33, which makes this a file of labelTrainIds: restore the "
                "original or set labels to labelTrainIds"
            )
            check_ids(self, range(34, 256), expected)
        else:
            expected = (
                "labelTrainIds are 0 to 18 and 255, which makes this a file of labelIds: convert "
                "it with cityscapesScripts or set labels to labelIds"
            )
            check_ids(self, range(19, 255), expected)


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes; layout, sources and where to get it: see `Cityscapes`.

    `test` is the validation split, because the labels of the test split are not published. For the
    evaluation server predict with `predict_root` = `root/leftImg8bit/test` and turn the classes
    into labelIds by `Cityscapes.ID_OF_CLASS`.

    Args:
        root: folder that holds leftImg8bit and gtFine; not needed for prediction.
        labels: the masks to read, `labelIds` as distributed or `labelTrainIds` of
            cityscapesScripts.
        crop_size: (height, width) of training images in pixels.
    """

    def __init__(
        self,
        root: Path,
        labels: Labels = "labelIds",
        crop_size: tuple[int, int] = (768, 768),
        **kwargs: Any,
    ) -> None:
        check_arguments(CityscapesDataModule.__init__, locals())
        super().__init__(
            class_names=Cityscapes.CLASS_NAMES,
            palette=Cityscapes.PALETTE,
            crop_size=crop_size,
            **kwargs,
        )
        self.root = root
        self.labels: Labels = labels

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> Cityscapes:
        """Build the training or the validation split."""
        return Cityscapes(self.root, "train" if split == "train" else "val", self.labels, transform)
