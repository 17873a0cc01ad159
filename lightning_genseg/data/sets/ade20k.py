"""ADE20K: scenes indoors and outdoors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import Split
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.data.download import Archive, DownloadDataModule, fetch
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import check_files, check_ids, check_root, check_split, list_files


class ADE20K(SegmentationDataset):
    """ADE20K of the SceneParsing challenge 2016: 150 classes, 20 210 and 2000 images.

    Layout: `root/images/{training,validation}/*.jpg` and
    `root/annotations/{training,validation}/*.png` (0 = other objects, ignored; 1 to 150), as
    `ADEChallengeData2016.zip` unpacks. The test labels were never published. Get it from
    http://sceneparsing.csail.mit.edu (non-commercial research and education), or with `download`.

    Sources: Zhou et al.: Scene parsing through ADE20K dataset, CVPR 2017, and Semantic
    understanding of scenes through the ADE20K dataset, IJCV 127, 2019, arXiv:1608.05442. Names (the
    first synonym of each) and colours: github.com/CSAILVision/sceneparsing, objectInfo150.txt and
    color150.mat. Road and skyscraper share a colour there.

    Args:
        root: folder that holds `images` and `annotations`, usually `ADEChallengeData2016`.
        split: which part.
        transform: albumentations transforms.

    Raises:
        GenSegError: `root` lies a level too high or too low, files are missing, or masks hold
            something else; on reading as in `SegmentationDataset`.
    """

    # fmt: off
    CLASS_NAMES = (
        "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass",
        "cabinet", "sidewalk", "person", "earth", "door", "table", "mountain", "plant", "curtain",
        "chair", "car", "water", "painting", "sofa", "shelf", "house", "sea", "mirror", "rug",
        "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub",
        "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter",
        "sand", "sink", "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs",
        "runway", "case", "pool table", "pillow", "screen door", "stairway", "river", "bridge",
        "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench",
        "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar",
        "arcade machine", "hovel", "bus", "towel", "light", "truck", "tower", "chandelier",
        "awning", "streetlight", "booth", "television", "airplane", "dirt track", "apparel", "pole",
        "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster", "stage", "van",
        "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool",
        "stool", "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven",
        "ball", "food", "step", "tank", "trade name", "microwave", "pot", "animal", "bicycle",
        "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase",
        "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor",
        "bulletin board", "shower", "radiator", "glass", "clock", "flag",
    )
    PALETTE = (
        (120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50), (4, 200, 3), (120, 120, 80),
        (140, 140, 140), (204, 5, 255), (230, 230, 230), (4, 250, 7), (224, 5, 255), (235, 255, 7),
        (150, 5, 61), (120, 120, 70), (8, 255, 51), (255, 6, 82), (143, 255, 140), (204, 255, 4),
        (255, 51, 7), (204, 70, 3), (0, 102, 200), (61, 230, 250), (255, 6, 51), (11, 102, 255),
        (255, 7, 71), (255, 9, 224), (9, 7, 230), (220, 220, 220), (255, 9, 92), (112, 9, 255),
        (8, 255, 214), (7, 255, 224), (255, 184, 6), (10, 255, 71), (255, 41, 10), (7, 255, 255),
        (224, 255, 8), (102, 8, 255), (255, 61, 6), (255, 194, 7), (255, 122, 8), (0, 255, 20),
        (255, 8, 41), (255, 5, 153), (6, 51, 255), (235, 12, 255), (160, 150, 20), (0, 163, 255),
        (140, 140, 140), (250, 10, 15), (20, 255, 0), (31, 255, 0), (255, 31, 0), (255, 224, 0),
        (153, 255, 0), (0, 0, 255), (255, 71, 0), (0, 235, 255), (0, 173, 255), (31, 0, 255),
        (11, 200, 200), (255, 82, 0), (0, 255, 245), (0, 61, 255), (0, 255, 112), (0, 255, 133),
        (255, 0, 0), (255, 163, 0), (255, 102, 0), (194, 255, 0), (0, 143, 255), (51, 255, 0),
        (0, 82, 255), (0, 255, 41), (0, 255, 173), (10, 0, 255), (173, 255, 0), (0, 255, 153),
        (255, 92, 0), (255, 0, 255), (255, 0, 245), (255, 0, 102), (255, 173, 0), (255, 0, 20),
        (255, 184, 184), (0, 31, 255), (0, 255, 61), (0, 71, 255), (255, 0, 204), (0, 255, 194),
        (0, 255, 82), (0, 10, 255), (0, 112, 255), (51, 0, 255), (0, 194, 255), (0, 122, 255),
        (0, 255, 163), (255, 153, 0), (0, 255, 10), (255, 112, 0), (143, 255, 0), (82, 0, 255),
        (163, 255, 0), (255, 235, 0), (8, 184, 170), (133, 0, 255), (0, 255, 92), (184, 0, 255),
        (255, 0, 31), (0, 184, 255), (0, 214, 255), (255, 0, 112), (92, 255, 0), (0, 224, 255),
        (112, 224, 255), (70, 184, 160), (163, 0, 255), (153, 0, 255), (71, 255, 0), (255, 0, 163),
        (255, 204, 0), (255, 0, 143), (0, 255, 235), (133, 255, 0), (255, 0, 235), (245, 0, 255),
        (255, 0, 122), (255, 245, 0), (10, 190, 212), (214, 255, 0), (0, 204, 255), (20, 0, 255),
        (255, 255, 0), (0, 153, 255), (0, 41, 255), (0, 255, 204), (41, 0, 255), (41, 255, 0),
        (173, 0, 255), (0, 245, 255), (71, 0, 255), (122, 0, 255), (0, 255, 184), (0, 92, 255),
        (184, 255, 0), (0, 133, 255), (255, 214, 0), (25, 194, 194), (102, 255, 0), (92, 0, 255),
    )
    # fmt: on
    IDS: ClassVar[dict[int, int]] = {0: IGNORE} | {c + 1: c for c in range(150)}
    ARCHIVES = (
        Archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            {f"ADEChallengeData2016/{name}": name for name in ("images", "annotations")},
        ),
    )

    def __init__(
        self,
        root: Path | str,
        split: Literal["train", "val"] = "train",
        transform: Sequence[transforms.Transform] | None = None,
    ) -> None:
        check_arguments(ADE20K.__init__, locals())
        root = Path(root)
        check_root(root, ("images", "annotations"), "ADE20K", downloads=True)
        folder = {"train": "training", "val": "validation"}[split]
        images, masks = root / "images" / folder, root / "annotations" / folder
        check_split(split, "ADE20K", images, masks)
        remedy = (
            "root must be ADEChallengeData2016 as its .zip file unpacks, not the full ADE20K with "
            "a folder per scene"
        )
        found = list_files(images, ".jpg", remedy=remedy)
        samples = [Sample(stem, path, masks / f"{stem}.png") for stem, path in found.items()]
        super().__init__(samples, self.CLASS_NAMES, self.PALETTE, self.IDS, transform)
        check_files(self)
        expected = (
            "official masks are 0 to 150, which makes this a file with ids shifted by one already: "
            "restore ADEChallengeData2016/annotations"
        )
        check_ids(self, range(151, 256), expected)

    @classmethod
    def download(cls, root: Path | str) -> None:
        """Download what is missing in `root` (1 GB)."""
        fetch(Path(root), cls.ARCHIVES)


class ADE20KDataModule(DownloadDataModule):
    """ADE20K SceneParsing 150; layout, sources and where to get it: see `ADE20K`.

    `test` is the validation split, because the labels of the test images are not published.

    Args:
        root: folder that holds images and annotations, usually ADEChallengeData2016; not needed for
            prediction.
        download: get what is missing in `root` before the run (1 GB).
    """

    dataset = ADE20K

    def make_dataset(self, split: Split, transform: Sequence[transforms.Transform]) -> ADE20K:
        """Build the training or the validation split."""
        return ADE20K(self.root, "train" if split == "train" else "val", transform)
