"""Episodes of few-shot segmentation over any dense data set, and its base classes, for Lightning."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.data.class_index import class_index
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Batch
from lightning_genseg.data.episodes.dataset import (
    BaseClasses,
    EpisodeMode,
    EvalEpisodes,
    Pool,
    TrainEpisodes,
    draw_episodes,
)
from lightning_genseg.data.episodes.manifest import read_manifest, write_manifest
from lightning_genseg.data.episodes.support import SupportedImages
from lightning_genseg.data.loaders import on_first_process
from lightning_genseg.data.relabelled import LabelledImages
from lightning_genseg.data.sets.coco import COCO
from lightning_genseg.data.sets.voc import VOC
from lightning_genseg.data.transforms.crops import Letterbox, Transform
from lightning_genseg.data.transforms.pipeline import episode_train_transform
from lightning_genseg.errors import GenSegError, MissingFileError

Folds: TypeAlias = Literal["pascal5i", "coco20i"] | Path
"""Classes by folds: those of the papers, or a JSON file `{"folds": [[name, ...], ...]}`."""


class FewShotClasses(NamedTuple):
    """Numbers of the classes that training does not know, of those it does, in the order of the data set."""

    novel: list[int]
    base: list[int]


class EpisodesDataModule(SegmentationDataModule):
    """Few-shot episodes of another datamodule's images: learn on its base classes, test on novel ones.

    Training takes every image of the training split that has a base class once an epoch, validation
    and test a fixed list of episodes of the other splits. See `datasets.TrainEpisodes` and
    `datasets.EvalEpisodes` for a batch, `datasets.draw_episodes` for the modes. `num_classes` is 2
    (background, foreground), `base_classes` and `novel_classes` hold names, `data` the dense
    datamodule. Evaluation has batches of one, letterboxed to `size`, with the labels at their own
    size in `full_mask`.

    Sources: Shaban et al.: One-shot learning for semantic segmentation, BMVC 2017; Tian et al.:
        PFENet, TPAMI 2020;
    Lang et al.: BAM, CVPR 2022.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
        novel_classes: names of the classes to leave out of training and to test on; or give `folds`
            and `fold`.
        folds: `pascal5i`, `coco20i`, or a JSON file `{"folds": [[name, ...], ...]}`.
        fold: number of the fold whose classes are novel, from 0.
        background_classes: names of classes that are never the object; default: the class
            `background` if there is one.
        shots: K, annotated images per episode.
        size: side of the square images in pixels; best a multiple of the encoder's stride plus 1,
            as 473 for 8 and 321 for 16: with any other, cells and labels drift apart towards one
            side.
        min_area: pixels of a class at the image's own size from which on it counts; 2048 is meant
            for 500 x 375.
        novel_setting: what becomes of training images with a novel class: `remove` (BAM) or
            `background` (PFENet: they stay, labelled as background).
        mode: how the episodes of validation and test are drawn.
        episodes: of the test.
        val_episodes: of the validation.
        test_seed: of the test's episodes; BAM's five are 510, 365, 382, 322 and 988.
        val_seed: of the validation's.
        val_classes: `novel`, which selects checkpoints on the classes of the test, as PFENet and
            BAM do, or `base`.
        support_split: where the supports of validation and test come from: the `same` split as the
            queries (the papers) or the `train` split, which then needs no annotated test images to
            spare.
        manifest: JSON file of the test's episodes: read if it exists, otherwise written.
        scale: range of the zoom of training images, relative to their own size; 0.8 to 1.25 for
            COCO. Where images are much larger or smaller than `size`, choose it around size /
            longer side, as the test sees them.
        train_transform: albumentations transforms of image and mask (1, 0, 255) to `size` x `size`;
            default: `episode_train_transform(size, scale)`.
        batch_size: episodes of a training batch, per process.
        num_workers: see `SegmentationDataModule`.
        seed: of order, classes, supports and augmentation in training.
        support_root: for prediction: folder with `images` and `masks` of the supports, see
            `FewShotFolderDataModule`.
        support_ids: see there.
        predict_root: folder of query images, or one image.
        cache_dir: see `SegmentationDataModule`.

    Raises:
        ValueError: a wrong argument; in `setup`: too few images of a novel class, a manifest of
            other data.
        FileNotFoundError: the file of folds does not exist.
    """

    dense = False

    def __init__(
        self,
        data: SegmentationDataModule,
        novel_classes: list[str] | None = None,
        folds: Folds | None = None,
        fold: int | None = None,
        background_classes: list[str] | None = None,
        shots: int = 1,
        size: int = 473,
        min_area: int = 2048,
        novel_setting: Literal["remove", "background"] = "remove",
        mode: EpisodeMode = "bam",
        episodes: int = 1000,
        val_episodes: int = 1000,
        test_seed: int = 510,
        val_seed: int = 321,
        val_classes: Literal["novel", "base"] = "novel",
        support_split: Literal["same", "train"] = "same",
        manifest: Path | None = None,
        scale: tuple[float, float] = (0.9, 1.1),
        train_transform: list[Transform] | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        seed: int = 0,
        support_root: Path | None = None,
        support_ids: dict[int, int] | None = None,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        for name, value, least in (
            ("shots", shots, 1),
            ("size", size, 8),
            ("min_area", min_area, 1),
            ("episodes", episodes, 1),
            ("val_episodes", val_episodes, 1),
            ("test_seed", test_seed, 0),
            ("val_seed", val_seed, 0),
        ):
            if value < least:
                raise GenSegError(f"{name} is {value} but must be at least {least}.")
        if not 0 < scale[0] <= scale[1]:
            raise GenSegError(
                f"scale is {scale} but must be two factors above 0, the smaller first."
            )
        super().__init__(
            class_names=("background", "foreground"),
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=(size, size),
            train_transform=(
                episode_train_transform(size, scale) if train_transform is None else train_transform
            ),
            eval_transform=[Letterbox(size)],
            seed=seed,
            predict_root=predict_root,
            cache_dir=data.cache_dir if cache_dir is None else cache_dir,
        )
        self.data = data
        self.splits = data.splits  # type: ignore[misc]
        self.classes = few_shot_classes(
            data.class_names, novel_classes, folds, fold, background_classes
        )
        self.novel_classes = [data.class_names[c] for c in self.classes.novel]
        self.base_classes = [data.class_names[c] for c in self.classes.base]
        self.shots = shots
        self.size = size
        self.min_area = min_area
        self.novel_setting = novel_setting
        self.mode: EpisodeMode = mode
        self.episodes: dict[Split, tuple[int, int]] = {
            "val": (val_episodes, val_seed),
            "test": (episodes, test_seed),
        }
        self.val_classes = val_classes
        self.support_split = support_split
        self.manifest = manifest
        self.support_root = support_root
        self.support_ids = support_ids
        self._counts: dict[Split, NDArray[np.int64]] = {}

    @property
    def source(self) -> SegmentationDataModule:
        """The dense datamodule whose images these are."""
        return self.data

    def prepare_data(self) -> None:
        """What the dense datamodule has to do."""
        self.data.prepare_data()

    def make_predict_dataset(self) -> SupportedImages:
        """Build the images under `predict_root`, each with the supports of `support_root`."""
        folders = predict_folders(self.predict_root, self.support_root)
        return SupportedImages(*folders, self.size, self.support_ids)

    def make_dataset(
        self, split: Split, transform: Sequence[Transform]
    ) -> TrainEpisodes | EvalEpisodes:
        """Build the episodes of a split; validation and test are letterboxed whatever `transform` is."""
        images = labelled_images(self.data, split)
        base_index = {c: i for i, c in enumerate(self.classes.base, 1)}
        names = self.data.class_names
        counts = self._count(split, images)
        if split == "train":
            excluded = self.classes.novel if self.novel_setting == "remove" else []
            pool = Pool(counts, self.classes.base, self.shots, self.min_area, excluded)
            if not len(pool.queries):
                raise GenSegError(
                    f"no training image can be a query for shots={self.shots}: lower min_area "
                    f"({self.min_area}) or shots, or set novel_setting to background."
                )
            if pool.too_few:
                rank_zero_warn(
                    f"{len(pool.too_few)} base classes have too few training images for "
                    f"shots={self.shots} and are never drawn: "
                    f"{shown([names[c] for c in pool.too_few])}"
                )
            return TrainEpisodes(images, pool, base_index, names, transform)
        classes = (
            self.classes.base
            if (split, self.val_classes) == ("val", "base")
            else self.classes.novel
        )
        supports, support_counts = images, None
        if self.support_split == "train":
            supports = labelled_images(self.data, "train")
            support_counts = self._count("train", supports)
        pool = Pool(counts, classes, self.shots, self.min_area, (), support_counts)
        if pool.too_few:
            raise GenSegError(
                f"too few {split} images hold min_area={self.min_area} pixels of "
                f"{shown([names[c] for c in pool.too_few], '')} for shots={self.shots}: lower "
                "min_area or shots, set support_split to train, or leave the class out."
            )
        number, seed = self.episodes[split]
        drawn = draw_episodes(pool, number, seed, self.mode)
        if split == "test" and self.manifest is not None:
            settings = {"split": split, "shots": self.shots, "mode": self.mode, "seed": seed}
            settings |= {"min_area": self.min_area, "episodes": number}
            settings |= {"support_split": self.support_split, "classes": self.novel_classes}
            if self.manifest.is_file():
                drawn = read_manifest(self.manifest, images, supports, names, settings)
            else:
                rank_zero_only(write_manifest)(
                    self.manifest, drawn, images, supports, names, settings
                )
        return EvalEpisodes(images, supports, drawn, self.size, base_index, classes, names)

    def _count(self, split: Split, images: LabelledImages) -> NDArray[np.int64]:
        """Count pixels of classes; under DDP one process counts, the others wait."""
        if split not in self._counts:

            def build(heartbeat: Callable[[], None]) -> NDArray[np.int64]:
                return class_index(images, self.cache_dir, self.num_workers, heartbeat)

            self._counts[split] = on_first_process(build)
        return self._counts[split]


class BaseClassesDataModule(SegmentationDataModule):
    """The base classes of a fold for dense training: numbered from 1 on, everything else is background.

    All training images stay, also those with novel classes, whose pixels become background (0):
    what the base learner of BAM is trained on. `class_names` are `background` and the base classes.

    Source: Lang et al.: Learning what not to segment, CVPR 2022.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
        novel_classes: see `EpisodesDataModule`, like the next three.
        folds: see there.
        fold: see there.
        background_classes: see there.
        size: side of the square training images in pixels; see `EpisodesDataModule`.
        scale: range of their zoom.
        batch_size: see `SegmentationDataModule`, like all that follow.
        eval_batch_size: see there.
        num_workers: see there.
        class_balanced: see there.
        train_transform: default: `episode_train_transform(size, scale, min_share=0)`.
        eval_transform: see there; `Letterbox(size)` for BAM's validation.
        seed: see there.
        predict_root: see there.
        cache_dir: see there.

    Raises:
        ValueError: a wrong argument.
        FileNotFoundError: the file of folds does not exist.
    """

    def __init__(
        self,
        data: SegmentationDataModule,
        novel_classes: list[str] | None = None,
        folds: Folds | None = None,
        fold: int | None = None,
        background_classes: list[str] | None = None,
        size: int = 417,
        scale: tuple[float, float] = (0.5, 2.0),
        batch_size: int = 12,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        class_balanced: bool = False,
        train_transform: list[Transform] | None = None,
        eval_transform: list[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        classes = few_shot_classes(data.class_names, novel_classes, folds, fold, background_classes)
        super().__init__(
            class_names=["background", *(data.class_names[c] for c in classes.base)],
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop_size=(size, size),
            class_balanced=class_balanced,
            train_transform=(
                episode_train_transform(size, scale, min_share=0)
                if train_transform is None
                else train_transform
            ),
            eval_transform=eval_transform,
            seed=seed,
            predict_root=predict_root,
            cache_dir=data.cache_dir if cache_dir is None else cache_dir,
        )
        self.data = data
        self.splits = data.splits  # type: ignore[misc]
        self.classes = classes

    @property
    def source(self) -> SegmentationDataModule:
        """The dense datamodule whose images these are."""
        return self.data

    def prepare_data(self) -> None:
        """What the dense datamodule has to do."""
        self.data.prepare_data()

    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> Dataset[Batch]:
        """Build the relabelled images of a split."""
        images = labelled_images(self.data, split)
        return BaseClasses(images, self.classes.base, self.data.class_names, transform)


def few_shot_classes(
    class_names: Sequence[str],
    novel_classes: Sequence[str] | None,
    folds: Folds | None,
    fold: int | None,
    background_classes: Sequence[str] | None,
) -> FewShotClasses:
    """Part the classes of a data set as the arguments of `EpisodesDataModule` say.

    Raises:
        ValueError: neither or both of names and fold, no such fold, names that are no classes, none
            left.
        FileNotFoundError: the file of folds does not exist.
    """
    if (novel_classes is None) == (folds is None) or (folds is None) != (fold is None):
        raise GenSegError("the novel classes are not known: give novel_classes, or folds and fold.")
    if folds is not None:
        groups = read_folds(folds)
        assert fold is not None
        if not 0 <= fold < len(groups):
            raise GenSegError(f"fold is {fold} but '{folds}' has 0 to {len(groups) - 1}.")
        novel_classes = groups[fold]
    assert novel_classes is not None
    if background_classes is None:
        background_classes = [name for name in class_names if name == "background"]
    for argument, given in (
        ("novel_classes", novel_classes),
        ("background_classes", background_classes),
    ):
        wrong = [name for name in given if name not in class_names]
        if wrong:
            raise GenSegError(
                f"{argument} holds '{wrong[0]}', which is no class: choose among "
                f"{shown(class_names, most=80)}"
            )
    both = [name for name in novel_classes if name in background_classes]
    if both:
        raise GenSegError(
            f"'{both[0]}' is in novel_classes and in background_classes: take it out of one of "
            "them."
        )
    left = [name for name in class_names if name not in {*novel_classes, *background_classes}]
    if not novel_classes or not left:
        raise GenSegError(
            f"there are {len(novel_classes)} novel and {len(left)} base classes: leave at least "
            "one of each."
        )
    position = {name: index for index, name in enumerate(class_names)}
    return FewShotClasses(
        sorted({position[name] for name in novel_classes}), [position[name] for name in left]
    )


def read_folds(folds: Folds) -> list[list[str]]:
    """Names of the classes of each fold, see `Folds`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no list of lists of names.
    """
    if str(folds) == "pascal5i":  # fold i: classes 5i + 1 to 5i + 5
        return [list(VOC.CLASS_NAMES[5 * i + 1 : 5 * i + 6]) for i in range(4)]
    if str(folds) == "coco20i":  # interleaved, as in FWB, PFENet and BAM: i + 1, i + 5, i + 9 ...
        return [list(COCO.CLASS_NAMES[i + 1 :: 4]) for i in range(4)]
    path = Path(folds)
    if not path.is_file():
        raise MissingFileError(
            f"folds '{path}' does not exist: give pascal5i, coco20i or a JSON file of class names."
        )
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["folds"]
    except (ValueError, KeyError, TypeError):
        groups = None
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise GenSegError(f"folds '{path}' must hold {{\"folds\": [[class name, ...], ...]}}.")
    return groups


def labelled_images(data: SegmentationDataModule, split: Split) -> LabelledImages:
    """Images of a split of a dense datamodule; ValueError if it is sparse or they cannot be read one by one."""
    if data.sparse is not None:
        raise GenSegError(
            "data that are made of other data need whole masks: leave sparse out of data.data."
        )
    dataset: Any = data.split_dataset(split, ())
    for method in ("sample_name", "read_pixels", "read_mask_labels"):
        if not hasattr(dataset, method):
            raise GenSegError(
                f"{type(dataset).__name__} has no {method}(index), by which episodes are read: "
                "derive it from SegmentationDataset, or add that method."
            )
    images: LabelledImages = dataset
    return images


def predict_folders(predict_root: Path | None, support_root: Path | None) -> tuple[Path, Path]:
    """Both folders; ValueError if one is not given."""
    for name, folder, what in (
        ("predict_root", predict_root, "a folder of images"),
        ("support_root", support_root, "a folder with images and masks of the object"),
    ):
        if folder is None:
            raise GenSegError(f"there is nothing to predict: set {name} (--data.{name}) to {what}.")
    assert predict_root is not None
    assert support_root is not None
    return predict_root, support_root


def shown(names: Sequence[str], end: str = ".", most: int = 5) -> str:
    """Some names for a message."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else end)
