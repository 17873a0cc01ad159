"""Episodes of few-shot segmentation over any dense data set, and its base classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.class_index import class_index
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import Batch
from lightning_genseg.data.derived import DerivedDataModule, labelled_images
from lightning_genseg.data.episodes.dataset import (
    BaseClasses,
    EpisodeMode,
    EvalEpisodes,
    Pool,
    TrainEpisodes,
    draw_episodes,
)
from lightning_genseg.data.episodes.folds import Folds, few_shot_classes
from lightning_genseg.data.episodes.manifest import read_episodes, write_episodes
from lightning_genseg.data.episodes.support import SupportedImages
from lightning_genseg.data.relabelled import LabelledImages
from lightning_genseg.errors import GenSegError, listed


class FoldDataModule(DerivedDataModule):
    """Data of which some classes are novel; `classes` holds the numbers of these and of the others.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
        size: side of the square training images in pixels.
        scale: range of their zoom.
        min_share: of an object's pixels that a training crop must hold, if possible.
        novel_classes: names of the classes to leave out of training and to test on; or give `folds`
            and `fold`.
        folds: `pascal5i`, `coco20i`, or a JSON file `{"folds": [[name, ...], ...]}`.
        fold: number of the fold whose classes are novel, from 0.
        background_classes: names of classes that are never the object; default: the class
            `background` if there is one.
        train_transform: albumentations transforms of image and mask to `size` x `size`; default:
            zoom, rotation, blur, flip and a crop, as PFENet and BAM have them.
    """

    def __init__(
        self,
        data: SegmentationDataModule,
        size: int,
        scale: tuple[float, float],
        min_share: float,
        novel_classes: list[str] | None = None,
        folds: Folds | None = None,
        fold: int | None = None,
        background_classes: list[str] | None = None,
        train_transform: list[transforms.Transform] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(FoldDataModule.__init__, locals(), size="[8, inf)", scale="(0, inf)")
        if scale[0] > scale[1]:
            raise GenSegError(f"scale is {scale} but must be two factors, the smaller first.")
        names = data.class_names
        self.classes = few_shot_classes(names, novel_classes, folds, fold, background_classes)
        self.novel_classes = [names[c] for c in self.classes.novel]
        self.base_classes = [names[c] for c in self.classes.base]
        if train_transform is None:
            train_transform = transforms.episode_train_transform(size, scale, min_share)
        super().__init__(
            data,
            class_names=["background", *(self.base_classes if self.dense else ["foreground"])],
            crop_size=(size, size),
            short_side=None,
            train_transform=train_transform,
            **kwargs,
        )
        self.splits = data.splits  # type: ignore[misc]
        self.size = size


class EpisodesDataModule(FoldDataModule):
    """Few-shot episodes of another datamodule's images: learn on base classes, test on novel ones.

    Training takes every image of the training split that has a base class once an epoch, validation
    and test a fixed list of episodes of the other splits. `TrainEpisodes` and `EvalEpisodes`
    describe a batch. `num_classes` is 2 (background, foreground), `base_classes` and
    `novel_classes` hold names, `data` the dense datamodule. Evaluation has batches of one,
    letterboxed to `size`, with the labels at their own size in `full_mask`.

    Sources: Shaban et al.: One-shot learning for semantic segmentation, BMVC 2017; Tian et al.:
    PFENet, TPAMI 2020; Lang et al.: BAM, CVPR 2022.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
        shots: K, annotated images per episode.
        size: side of the square images in pixels; best a multiple of the encoder's stride plus 1,
            as 473 for 8 and 321 for 16: with any other, cells and labels drift apart towards one
            side.
        min_area: pixels of a class at the image's own size from which on it counts; 2048 is meant
            for 500 x 375.
        novel_setting: what becomes of training images with a novel class: `remove` (BAM) or
            `background` (PFENet: they stay, labelled as background).
        mode: how the episodes of validation and test are drawn: queries in the order of the data
            set (`bam`), shuffled (`uniform`), or class by class in turn (`balanced`).
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
        support_root: for prediction: folder with `images` and `masks` of the supports; a mask is 1
            on the object, 0 elsewhere, 255 where nothing is said.
        support_ids: value in these masks -> 1, 0 or 255; `{0: 0, 255: 1}` for black and white ones.

    Raises:
        GenSegError: a wrong argument; in `setup`: too few images of a novel class, a manifest of
            other data.
        MissingFileError: the file of folds does not exist.
    """

    dense = False

    def __init__(
        self,
        data: SegmentationDataModule,
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
        support_root: Path | None = None,
        support_ids: dict[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        counts = dict.fromkeys(("shots", "min_area", "episodes", "val_episodes"), "[1, inf)")
        seeds = dict.fromkeys(("test_seed", "val_seed"), "[0, inf)")
        check_arguments(EpisodesDataModule.__init__, locals(), **counts, **seeds)
        super().__init__(
            data,
            size=size,
            scale=scale,
            min_share=0.85,
            palette=None,
            eval_batch_size=1,
            class_balanced=False,
            eval_transform=[transforms.Letterbox(size)],
            **kwargs,
        )
        self.shots, self.min_area, self.novel_setting = shots, min_area, novel_setting
        self.mode: EpisodeMode = mode
        self.episodes = {"val": (val_episodes, val_seed), "test": (episodes, test_seed)}
        self.val_classes, self.support_split = val_classes, support_split
        self.manifest = None if manifest is None else Path(manifest)
        self.support_root, self.support_ids = support_root, support_ids
        self._counts: dict[Split, NDArray[np.int64]] = {}

    def count_classes(self) -> None:
        """Build the data once in one process: the others find counts and manifest."""
        if self.trainer is not None and not self.trainer.predicting:
            self.setup(self.trainer.state.fn)

    def make_predict_dataset(self) -> SupportedImages:
        """Build the images under `predict_root`, each with the supports of `support_root`."""
        return SupportedImages(self.predict_root, self.support_root, self.size, self.support_ids)

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> TrainEpisodes | EvalEpisodes:
        """Build the episodes of a split; those of validation and test are always letterboxed."""
        images = labelled_images(self.data, split)
        names, counts = self.data.class_names, self._count(split, images)
        base_index = {c: i for i, c in enumerate(self.classes.base, 1)}
        shared = {"base_index": base_index, "class_names": names}
        if split == "train":
            return TrainEpisodes(images, self._train_pool(counts), transform=transform, **shared)
        base = split == "val" and self.val_classes == "base"
        classes = self.classes.base if base else self.classes.novel
        supports, support_counts = images, None
        if self.support_split == "train":
            supports = labelled_images(self.data, "train")
            support_counts = self._count("train", supports)
        pool = Pool(counts, classes, self.shots, self.min_area, (), support_counts)
        if pool.too_few:
            raise GenSegError(
                f"too few {split} images hold min_area={self.min_area} pixels of "
                f"{listed(names[c] for c in pool.too_few)} for shots={self.shots}: lower "
                "min_area or shots, set support_split to train, or leave the class out."
            )
        number, seed = self.episodes[split]
        drawn = draw_episodes(pool, number, seed, self.mode)
        if split == "test" and self.manifest is not None:
            settings = {"split": split, "shots": self.shots, "mode": self.mode, "seed": seed}
            settings |= {"min_area": self.min_area, "episodes": number}
            settings |= {"support_split": self.support_split, "classes": self.novel_classes}
            of = (images, supports, names, settings)
            if self.manifest.is_file():
                drawn = read_episodes(self.manifest, *of)
            else:
                rank_zero_only(write_episodes)(self.manifest, drawn, *of)
        return EvalEpisodes(images, supports, drawn, self.size, candidates=classes, **shared)

    def _train_pool(self, counts: NDArray[np.int64]) -> Pool:
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
                f"{listed(self.data.class_names[c] for c in pool.too_few)}"
            )
        return pool

    def _count(self, split: Split, images: LabelledImages) -> NDArray[np.int64]:
        if split not in self._counts:
            self._counts[split] = class_index(images, self.cache_dir, self.num_workers)
        return self._counts[split]


class BaseClassesDataModule(FoldDataModule):
    """The base classes of a fold for dense training: numbered from 1 on, all else is background.

    All training images stay, also those with novel classes, whose pixels become background (0):
    what the base learner of BAM is trained on. `class_names` are `background` and the base classes.
    For BAM's validation set `eval_transform` to `Letterbox(size)`.

    Source: Lang et al.: Learning what not to segment, CVPR 2022.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
        size: side of the square training images in pixels; best a multiple of the encoder's stride
            plus 1.
        scale: range of their zoom.
        batch_size: of training, per process; BAM's.
    """

    def __init__(
        self,
        data: SegmentationDataModule,
        size: int = 417,
        scale: tuple[float, float] = (0.5, 2.0),
        batch_size: int = 12,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data, size=size, scale=scale, min_share=0.0, batch_size=batch_size, **kwargs
        )

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> Dataset[Batch]:
        """Build the relabelled images of a split."""
        images = labelled_images(self.data, split)
        return BaseClasses(images, self.classes.base, self.data.class_names, transform)
