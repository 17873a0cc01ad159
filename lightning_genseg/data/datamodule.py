"""What every datamodule shares: stages, data sets, loaders."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.class_index import class_index, default_cache_dir
from lightning_genseg.data.dataset import Batch, ImageFolder, MissingFiles, SegmentationDataset
from lightning_genseg.data.decoded import DecodedFiles
from lightning_genseg.data.examination import Problem, examine
from lightning_genseg.data.images import image_size
from lightning_genseg.data.labels import IGNORE, Color, check_palette, known_classes
from lightning_genseg.data.loaders import (
    CheckedLoader,
    ClassSampler,
    EpochSampler,
    TrainLoader,
    collate,
)
from lightning_genseg.data.relabelled import check_readable
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.data.sparse.labels import SparseLabels
from lightning_genseg.errors import GenSegError, listed

Split = Literal["train", "val", "test"]


class SegmentationDataModule(LightningDataModule, ABC):
    """Datamodule of images with masks; a subclass makes the data set of a split.

    `num_classes`, `ignore_index` (255), `class_names` and `palette` are there at once,
    `train_dataset`, `val_dataset`, `test_dataset` and `predict_dataset` after `setup`. Works
    without a Trainer.

    A batch is a dict: `image` float32 Bx3xHxW in [0, 1], `mask` int64 BxHxW (not when predicting),
    `name` list of str. Where the data have unknown objects it has `anomaly` int64 BxHxW: 1
    anomalous, 0 known, 255 not evaluated; `mask` is 255 where it is 1. With `sparse` a training
    batch also has `unlabelled` and `image_classes`, see `SparseDataset`.

    Args:
        class_names: one per class.
        palette: one RGB colour per class; default: PASCAL VOC's.
        unknown_classes: classes to leave out: 255 in `mask` and 1 in `anomaly`, in all splits. The
            others keep their order and are numbered anew; `class_names`, `palette` and
            `num_classes` are theirs.
        batch_size: images of a training batch, per process.
        eval_batch_size: images of a batch in validation, test and prediction; more than 1 needs
            images of one size.
        num_workers: processes that load data.
        crop_size: (height, width) of training images in pixels; not used when `train_transform` is
            given.
        short_side: pixels to which the shorter side of training images is brought before the random
            zoom; default: as in the file. Give the model's `inference` the same.
        class_balanced: draw a class uniformly among those that occur, then an image that holds it,
            instead of every image once an epoch. Pixels of the training set are counted for it at
            the first use.
        sparse: label only these few pixels of the training images (`Points`, `Scribbles`, `Blocks`,
            `PointFiles`, `ScribbleFiles`, `SparseMasks`); validation and test keep their masks.
        train_transform: albumentations transforms of training images, in place of random scale,
            crop, flip and colours (`default_train_transform(crop_size)`).
        eval_transform: albumentations transforms of all other images; without any they keep their
            own size.
        seed: of order and augmentation, which depend on it, the epoch and the sample, not on
            `num_workers`.
        on_error: what to do about a sample that is broken (an unreadable image or mask, sizes that
            differ, a wrong label, no mask): `stop` when it is read, or `skip`: read everything
            once before, and leave such samples out, and single points and scribbles that are
            wrong, counted and named. `genseg check` lists them as well.
        predict_root: folder of images (searched recursively), or one image, for prediction.
        cache: `memmap` keeps decoded images and masks in `cache_dir`, uncompressed (25 GB for
            Cityscapes' training set), from which later epochs read no more than a crop.
        cache_dir: folder that keeps counts of pixels and decoded images; default:
            `lightning_genseg` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        GenSegError: a wrong argument.
    """

    splits: ClassVar[tuple[Split, ...]] = ("train", "val", "test")  # those that there are
    dense: ClassVar[bool] = True  # images with masks, not episodes or images with supports

    def __init__(
        self,
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        unknown_classes: Sequence[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (256, 256),
        short_side: int | None = None,
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: Sequence[transforms.Transform] | None = None,
        eval_transform: Sequence[transforms.Transform] | None = None,
        seed: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
        predict_root: Path | None = None,
        cache: Literal["none", "memmap"] = "none",
        cache_dir: Path | None = None,
    ) -> None:
        check_arguments(
            SegmentationDataModule.__init__,
            locals(),
            batch_size="[1, inf)",
            eval_batch_size="[1, inf)",
            num_workers="[0, inf)",
            crop_size="[1, inf)",
            short_side="[1, inf)",
            seed="[0, inf)",
        )
        super().__init__()
        twice = [name for name, count in Counter(class_names).items() if count > 1]
        if twice:
            raise GenSegError(
                f"class_names holds '{twice[0]}' twice: give every class a name of its own."
            )
        colors = check_palette(palette, len(class_names))
        self.unknown_classes = list(unknown_classes or ())
        known = known_classes(class_names, self.unknown_classes)
        self.num_classes = len(known)
        self.ignore_index = IGNORE
        self.class_names = [class_names[c] for c in known]
        self.palette = [colors[c] for c in known]
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.class_balanced = class_balanced
        self.sparse = sparse
        self.train_transform = (
            transforms.default_train_transform(crop_size, short_side=short_side)
            if train_transform is None
            else transforms.as_chain(train_transform)
        )
        self.eval_transform = transforms.as_chain(eval_transform)
        self.seed = seed
        self.on_error = on_error
        self._examined: dict[Any, list[Problem]] = {}  # by sample
        self.predict_root = predict_root
        self.cache = cache
        self.cache_dir = cache_dir
        self.train_dataset: Dataset[Batch] | None = None
        self.val_dataset: Dataset[Batch] | None = None
        self.test_dataset: Dataset[Batch] | None = None
        self.predict_dataset: ImageFolder | None = None
        self._images_of: list[NDArray[np.intp]] | None = None
        self._own_loader: TrainLoader | None = None

    @classmethod
    def load_from_checkpoint(cls, *_: Any, **__: Any) -> NoReturn:
        """Refuse: no checkpoint holds our data, and Lightning would run what the file names."""
        raise GenSegError(
            f"a checkpoint holds no {cls.__name__}: build it from its arguments, which config.yaml "
            "of the run lists."
        )

    @property
    def source(self) -> SegmentationDataModule:
        """The dense datamodule that these data are made of; itself if it reads files."""
        return self

    def get_files(self) -> None:
        """Download or make files that are missing, if asked to; quick when they are there."""

    def count_classes(self) -> None:
        """Fill the cache of `class_index` with what the other processes will look up in it."""
        if self.class_balanced and self.trainer and self.trainer.state.fn == TrainerFn.FITTING:
            self.class_index()

    def prepare_data(self) -> None:
        """Get files and counts; Lightning calls it in one process per machine, the others wait."""
        if self.trainer is None or not self.trainer.predicting:
            self.get_files()
        if self.trainer is not None and self.trainer.world_size > 1:
            self.count_classes()

    @abstractmethod
    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> Dataset[Batch]:
        """Build the data set of one split, with all classes; called by `split_dataset`."""

    def split_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> Dataset[Batch]:
        """Build the data set of one split, without unknown classes and with its sparse labels.

        Raises:
            GenSegError: there is no such split.
        """
        if split not in self.splits:
            raise GenSegError(
                f"{type(self).__name__} has no {split} split, only {', '.join(self.splits)}: train "
                "and validate on data with the same classes."
            )
        self.get_files()  # a loop without a Trainer needs it
        sparse = self.sparse_labels(split)
        if sparse is not None and self.on_error == "skip":
            sparse = copy(sparse)  # it may serve other data that do not skip
            sparse.leave_out = True
        missing: MissingFiles | None = None
        try:
            dataset = self.make_dataset(split, transform if sparse is None else ())
        except MissingFiles as error:
            missing, dataset = error, error.dataset
        if self.unknown_classes:
            if not isinstance(dataset, SegmentationDataset):
                raise GenSegError(
                    f"{type(dataset).__name__} cannot leave out unknown_classes: derive it from "
                    "SegmentationDataset."
                )
            dataset.hold_out(self.unknown_classes)
        if self.cache == "memmap":
            if not isinstance(dataset, SegmentationDataset):
                raise GenSegError(
                    f"{type(dataset).__name__} reads no files of its own that cache could keep: "
                    "set cache to none, or, of data that are made of others, in these (data.cache)."
                )
            folder = default_cache_dir() if self.cache_dir is None else Path(self.cache_dir)
            dataset.decoded = DecodedFiles(folder / "decoded")
        if sparse is not None:
            root = getattr(self, "root", None)
            try:
                dataset = SparseDataset(dataset, sparse, transform, root)
            except MissingFiles as error:
                dataset = error.dataset
                also = "" if missing is None else f"{missing} "
                missing = MissingFiles(f"{also}{error}", dataset)
        if missing is not None:
            missing.dataset = dataset
            if self.on_error == "stop":
                raise missing
            rank_zero_warn(str(missing))
        # Of data without files nothing can be unreadable.
        if self.on_error == "skip" and hasattr(dataset, "keep") and hasattr(dataset, "samples"):
            self._leave_out(dataset, split)
        return dataset

    def _leave_out(self, dataset: Any, split: Split) -> None:
        """Keep those samples of a data set that can be read."""
        if not all(sample in self._examined for sample in dataset.samples):
            found = examine(dataset, split, self.num_workers)
            self._examined |= dict(zip(dataset.samples, (f.problems for f in found), strict=True))
        good = [i for i, one in enumerate(dataset.samples) if not self._examined[one]]
        bad = [one for one in dataset.samples if self._examined[one]]
        if not good:
            raise GenSegError(
                f"no {split} sample can be read; the first: {self._examined[bad[0]][0].text}"
            )
        if bad:
            first = listed((self._examined[one][0].text for one in bad), 3)
            rank_zero_warn(
                f"{len(bad)} of {len(dataset)} {split} samples are left out "
                f"({listed((one.name for one in bad), 50)}): {first}"
            )
            dataset.keep(good)

    def sparse_labels(self, split: Split) -> SparseLabels | None:
        """Which sparse labels a split has in place of its masks."""
        return self.sparse if split == "train" else None

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that a stage (fit, validate, test, predict; None: all) needs."""
        # Lightning's sampler repeats images, which `CheckedLoader` does not let count.
        warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
        if stage == "fit" or (stage is None and "train" in self.splits):
            self.train_dataset = self.split_dataset("train", self.train_transform)
            self._images_of = None
            self._check_marks()
            self.check_classes()
        if stage in ("fit", "validate") or (stage is None and "val" in self.splits):
            self.val_dataset = self.split_dataset("val", self.eval_transform)
        if stage == "test" or (stage is None and "test" in self.splits):
            self.test_dataset = self.split_dataset("test", self.eval_transform)
        if stage == "predict" or (stage is None and self.predict_root is not None):
            self.predict_dataset = self.make_predict_dataset()

    def make_predict_dataset(self) -> ImageFolder:
        """Build the images under `predict_root`; a GenSegError if it is not set."""
        if self.predict_root is None:
            raise GenSegError(
                "there is nothing to predict: set predict_root (--data.predict_root) to a folder "
                "of images."
            )
        return ImageFolder(self.predict_root, self.eval_transform)

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches; a GenSegError if the training set is smaller than one batch.

        Without a Trainer always the same loader, which knows the epoch.
        """
        if self.train_dataset is None:
            self.setup("fit")
        assert self.train_dataset is not None
        earlier = self._own_loader
        if self.trainer is None and earlier is not None and earlier.dataset is self.train_dataset:
            return earlier
        sampler = self.train_sampler()
        if len(sampler) < self.batch_size:
            raise GenSegError(
                f"the training set has {sampler.size} images, fewer than one batch of "
                f"{self.batch_size} for each of {sampler.num_replicas} processes: lower batch_size."
            )
        self._own_loader = TrainLoader(
            dataset=self.train_dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            **self._loader_options(),
        )
        return self._own_loader

    def train_sampler(self) -> EpochSampler:
        """What draws an epoch from `train_dataset`."""
        assert self.train_dataset is not None
        if self.class_balanced:
            return ClassSampler(self.train_dataset, self._class_images(), self.seed)
        return EpochSampler(self.train_dataset, self.seed)

    def val_dataloader(self) -> CheckedLoader:
        """Batches of the validation set in its order."""
        if self.val_dataset is None:
            self.setup("validate")
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> CheckedLoader:
        """Batches of the test set in its order."""
        if self.test_dataset is None:
            self.setup("test")
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> CheckedLoader:
        """Batches without masks of the images under `predict_root`."""
        if self.predict_dataset is None:
            self.setup("predict")
        return self._eval_loader(self.predict_dataset)

    def plain_loader(self, split: Split) -> CheckedLoader:
        """Batches of all images of a split in its order, with `eval_transform`."""
        return self._eval_loader(self.split_dataset(split, self.eval_transform))

    def class_index(self, split: Split = "train") -> NDArray[np.int64]:
        """Count the pixels of each class in each image of a split, N x C; see `class_index`."""
        return self._pixel_counts(self.split_dataset(split, ()))

    def _pixel_counts(self, dataset: object) -> NDArray[np.int64]:
        labelled = check_readable(dataset, "class_balanced counts classes", ("read_mask_labels",))
        return class_index(labelled, self.cache_dir, self.num_workers)

    def _class_images(self) -> list[NDArray[np.intp]]:
        """For each class the training images that hold it."""
        if self._images_of is None:
            images = [np.flatnonzero(column) for column in self._pixel_counts(self.train_dataset).T]
            absent = [self.class_names[c] for c, held in enumerate(images) if not held.size]
            if len(absent) == len(images):
                raise GenSegError(
                    "class_balanced finds no labelled pixel in the training set: check the masks "
                    "and the table of labels."
                )
            if absent:
                rank_zero_warn(
                    f"{len(absent)} classes occur in no training image and are never drawn "
                    f"({listed(absent)}): label them, or leave them out."
                )
            self._images_of = images
        return self._images_of

    def _check_marks(self) -> None:
        """Refuse or name points and scribbles of files that are wrong, before the first step."""
        dataset = self.train_dataset
        if not isinstance(dataset, SparseDataset) or not dataset.sparse.from_files:
            return
        problems = []
        for index, sample in enumerate(dataset.samples):
            try:
                problems += dataset.mark_problems(index, image_size(sample.image))
            except GenSegError as error:
                problems.append(error)
        if not problems:
            return
        if self.on_error == "stop":
            more = f"; it is one of {len(problems)}" if len(problems) > 1 else ""
            raise GenSegError(
                f"{str(problems[0]).rstrip('.')}{more} (genseg check lists all, --data.on_error "
                "skip leaves them out)."
            )
        rank_zero_warn(f"{len(problems)} points or scribbles are left out: {listed(problems, 50)}")
        marks = map(dataset.read_marks, range(len(dataset)))
        if not any(one is None or len(one.classes) for one in marks):
            raise GenSegError(f"no training image has a right point or scribble: {problems[0]}")

    def check_classes(self) -> None:
        """Warn of classes without a label in `train_dataset`, as far as files of labels tell."""
        dataset = self.train_dataset
        if not isinstance(dataset, SparseDataset):
            return
        if self.class_balanced:  # warns itself, of all labels
            return
        labelled = dataset.sparse.labelled_classes(dataset.dataset)  # only these know the files
        if labelled is None:
            return
        absent = [name for c, name in enumerate(self.class_names) if c not in labelled]
        if absent:
            rank_zero_warn(
                f"{len(absent)} classes are labelled in no training image and cannot be learned "
                f"({listed(absent)}): label them, or leave them out."
            )

    def _eval_loader(self, dataset: Dataset[Batch] | None) -> CheckedLoader:
        assert dataset is not None
        return CheckedLoader(
            dataset=dataset, batch_size=self.eval_batch_size, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate,
            "worker_init_fn": transforms.single_thread,
        }


class EvaluationDataModule(SegmentationDataModule):
    """Data for testing a trained network: there is only a test split."""

    splits: ClassVar[tuple[Split, ...]] = ("test",)

    def __init__(self, **kwargs: Any) -> None:
        # Named here, these are no arguments of data that are not trained on.
        super().__init__(
            unknown_classes=None,
            batch_size=1,
            crop_size=(1, 1),
            short_side=None,
            class_balanced=False,
            sparse=None,
            train_transform=None,
            seed=0,
            **kwargs,
        )
