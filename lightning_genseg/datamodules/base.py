"""What every datamodule shares: stages, loaders, the check of the first batch, a loader that resumes mid-epoch."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from lightning_genseg.datasets.base import (
    IGNORE,
    Color,
    ImageFolder,
    MissingFiles,
    SegmentationDataset,
    check_palette,
    from_worker,
    known_classes,
)
from lightning_genseg.datasets.class_index import Labelled, class_index
from lightning_genseg.datasets.sparse import SparseDataset, SparseLabels
from lightning_genseg.transforms import (
    Transform,
    default_eval_transform,
    default_train_transform,
    single_thread,
)

__all__ = [
    "Batch",
    "CheckedLoader",
    "ClassSampler",
    "EpochSampler",
    "SegmentationDataModule",
    "TrainLoader",
    "check_batch",
    "collate",
    "on_first_process",
]

Batch = dict[str, Any]
Split = Literal["train", "val", "test"]
T = TypeVar("T")


class SegmentationDataModule(LightningDataModule, ABC):
    """Datamodule of images with masks; a subclass says in `make_dataset` what a split consists of.

    `num_classes`, `ignore_index` (255), `class_names` and `palette` are there at once, `train_dataset`, `val_dataset`,
    `test_dataset` and `predict_dataset` after `setup`. A batch is a dict: `image` float32 Bx3xHxW in [0, 1],
    `mask` int64 BxHxW (not when predicting), `name` list of str, and where the data have unknown objects `anomaly`
    int64 BxHxW: 1 anomalous, 0 known, 255 not evaluated; `mask` is 255 where it is 1. With `sparse` a training batch
    also has `unlabelled` and `image_classes`, see `datasets.SparseDataset`. Works without a Trainer.

    Args:
        class_names: one per class.
        palette: one RGB colour per class; default: PASCAL VOC's.
        unknown_classes: classes to leave out: 255 in `mask` and 1 in `anomaly`, in all splits. The others keep their
            order and are numbered anew; `class_names`, `palette` and `num_classes` are theirs.
        batch_size: of training, per process.
        eval_batch_size: of validation, test and prediction; more than 1 needs images of one size.
        num_workers: processes that load data.
        crop_size: (height, width) of training images; not used when `train_transform` is given.
        class_balanced: draw a class uniformly among those that occur, then an image that holds it, instead of every
            image once an epoch; needs the `class_index` of the training set, built at the first use.
        sparse: label only these few pixels of the training images (`Points`, `Scribbles`, `Blocks`, `PointFiles`,
            `ScribbleFiles`, `SparseMasks`); validation and test keep their masks.
        train_transform: albumentations transforms; default: `default_train_transform(crop_size)`.
        eval_transform: likewise for validation, test and prediction; default: none, every image at its own size.
        seed: of order and augmentation, which depend on it, the epoch and the sample, not on `num_workers`.
        predict_root: folder of images (searched recursively), or one image, for prediction.
        cache_dir: folder that keeps class indices; default: `lightning_genseg` in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: a wrong argument.
    """

    splits: ClassVar[tuple[Split, ...]] = ("train", "val", "test")  # those that there are

    def __init__(
        self,
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        unknown_classes: Sequence[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        crop_size: tuple[int, int] = (256, 256),
        class_balanced: bool = False,
        sparse: SparseLabels | None = None,
        train_transform: Sequence[Transform] | None = None,
        eval_transform: Sequence[Transform] | None = None,
        seed: int = 0,
        predict_root: Path | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("crop_size", min(crop_size), 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value} but must be at least {least}.")
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
            default_train_transform(crop_size) if train_transform is None else list(train_transform)
        )
        self.eval_transform = (
            default_eval_transform() if eval_transform is None else list(eval_transform)
        )
        self.seed = seed
        self.predict_root = predict_root
        self.cache_dir = cache_dir
        self.train_dataset: Dataset[Batch] | None = None
        self.val_dataset: Dataset[Batch] | None = None
        self.test_dataset: Dataset[Batch] | None = None
        self.predict_dataset: ImageFolder | None = None
        self._images_of: list[NDArray[np.intp]] | None = None

    @abstractmethod
    def make_dataset(self, split: Split, transform: Sequence[Transform]) -> Dataset[Batch]:
        """Build the data set of one split, with all classes; called by `split_dataset`."""

    def split_dataset(self, split: Split, transform: Sequence[Transform]) -> Dataset[Batch]:
        """Build the data set of one split: without the unknown classes, that for training with its `sparse` labels.

        ValueError if there is no such split.
        """
        if split not in self.splits:
            raise ValueError(
                f"{type(self).__name__} has no {split} split, only {', '.join(self.splits)}: train and validate on data with "
                "the same classes."
            )
        sparse = self.sparse_labels(split)
        missing: MissingFiles | None = None
        try:
            dataset = self.make_dataset(split, transform if sparse is None else ())
        except MissingFiles as error:
            missing, dataset = error, error.dataset
        if self.unknown_classes:
            if not isinstance(dataset, SegmentationDataset):
                raise ValueError(
                    f"{type(dataset).__name__} cannot leave out unknown_classes: derive it from SegmentationDataset."
                )
            dataset.hold_out(self.unknown_classes)
        if sparse is not None:
            dataset = SparseDataset(dataset, sparse, transform, getattr(self, "root", None))
        if missing is not None:
            missing.dataset = dataset
            raise missing
        return dataset

    def sparse_labels(self, split: Split) -> SparseLabels | None:
        """Which sparse labels a split has in place of its masks."""
        return self.sparse if split == "train" else None

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that a stage (fit, validate, test, predict; None: all) needs."""
        if stage == "fit" or (stage is None and "train" in self.splits):
            self.train_dataset = self.split_dataset("train", self.train_transform)
            self._images_of = None
            self._warn_of_unlabelled_classes()
        if stage in ("fit", "validate") or (stage is None and "val" in self.splits):
            self.val_dataset = self.split_dataset("val", self.eval_transform)
        if stage == "test" or (stage is None and "test" in self.splits):
            self.test_dataset = self.split_dataset("test", self.eval_transform)
        if stage == "predict" or (stage is None and self.predict_root is not None):
            self.predict_dataset = self.make_predict_dataset()

    def _warn_of_unlabelled_classes(self) -> None:
        if self.sparse is None or not isinstance(self.train_dataset, SparseDataset):
            return
        if self.class_balanced:  # says it itself, of all labels
            return
        labelled = self.sparse.labelled_classes(self.train_dataset.dataset)
        if labelled is None:
            return
        absent = [name for c, name in enumerate(self.class_names) if c not in labelled]
        if absent:
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            rank_zero_warn(
                f"{len(absent)} classes are labelled in no training image and cannot be learned ({shown}): label them, or "
                "leave them out."
            )

    def make_predict_dataset(self) -> ImageFolder:
        """Build the images under `predict_root`; ValueError if it is not set."""
        if self.predict_root is None:
            raise ValueError(
                "there is nothing to predict: set predict_root (--data.predict_root) to a folder of images."
            )
        return ImageFolder(self.predict_root, self.eval_transform)

    def train_dataloader(self) -> "TrainLoader":
        """Shuffled batches; ValueError if the training set is smaller than one batch."""
        if self.train_dataset is None:
            self.setup("fit")
        assert self.train_dataset is not None
        sampler = self.train_sampler()
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"the training set has {sampler.size} images, fewer than one batch of {self.batch_size} for "
                f"each of {sampler.num_replicas} processes: lower batch_size."
            )
        return TrainLoader(
            dataset=self.train_dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            **self._loader_options(),
        )

    def train_sampler(self) -> "EpochSampler":
        """What draws an epoch from `train_dataset`."""
        assert self.train_dataset is not None
        if self.class_balanced:
            return ClassSampler(self.train_dataset, self._class_images(), self.seed)
        return EpochSampler(self.train_dataset, self.seed)

    def val_dataloader(self) -> "CheckedLoader":
        """Batches of the validation set in its order."""
        if self.val_dataset is None:
            self.setup("validate")
        assert self.val_dataset is not None
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> "CheckedLoader":
        """Batches of the test set in its order."""
        if self.test_dataset is None:
            self.setup("test")
        assert self.test_dataset is not None
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> "CheckedLoader":
        """Batches without masks of the images under `predict_root`."""
        if self.predict_dataset is None:
            self.setup("predict")
        assert self.predict_dataset is not None
        return self._eval_loader(self.predict_dataset)

    def plain_loader(self, split: Split) -> "CheckedLoader":
        """Batches of all images of a split in its order, with `eval_transform`, without augmentation."""
        return self._eval_loader(self.split_dataset(split, self.eval_transform))

    def class_index(self, split: Split = "train") -> NDArray[np.int64]:
        """Count pixels of each class in each image of a split, N x C; see `datasets.class_index`."""
        dataset = self.split_dataset(split, ())
        return class_index(_labelled(dataset), self.cache_dir, self.num_workers)

    def _class_images(self) -> list[NDArray[np.intp]]:
        """For each class the training images that hold it; under DDP one process counts, the others wait."""
        if self._images_of is None:
            dataset = _labelled(self.train_dataset)

            def build(heartbeat: Callable[[], None]) -> list[NDArray[np.intp]]:
                counts = class_index(dataset, self.cache_dir, self.num_workers, heartbeat)
                return [np.flatnonzero(column) for column in counts.T]

            images = on_first_process(build)
            absent = [self.class_names[c] for c, held in enumerate(images) if not held.size]
            if len(absent) == len(images):
                raise ValueError(
                    "class_balanced finds no labelled pixel in the training set: check the masks and the table of labels."
                )
            if absent:
                shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else ".")
                rank_zero_warn(
                    f"{len(absent)} classes occur in no training image and are never drawn: {shown}"
                )
            self._images_of = images
        return self._images_of

    def _eval_loader(self, dataset: Dataset[Batch]) -> "CheckedLoader":
        return CheckedLoader(
            dataset=dataset, batch_size=self.eval_batch_size, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate,
            "worker_init_fn": single_thread,
        }


class EpochSampler(DistributedSampler[Any]):
    """A permutation per epoch that yields (index, seed) pairs, split by striding over the processes.

    Order and seeds are a function of (`seed`, epoch) that all processes compute alike, so that batch k of W processes
    together holds the samples of batch k of one process with a W times larger batch. The rest that does not divide
    evenly is dropped. A `DistributedSampler`, because Lightning replaces any other kind under DDP.

    Args:
        dataset: a sized data set.
        seed: not negative.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if parallel else 1,
            rank=torch.distributed.get_rank() if parallel else 0,
            seed=seed,
            drop_last=True,
        )
        self.size = len(dataset)  # type: ignore[arg-type]
        self.start = 0  # samples that the next iteration leaves out, because they were seen before an interruption

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of this process in this epoch."""
        start, self.start = self.start, 0
        order, seeds = self.draw(np.random.default_rng([self.seed, self.epoch]))
        mine = slice(self.rank, self.total_size, self.num_replicas)
        yield from zip(order[mine][start:].tolist(), seeds[mine][start:].tolist(), strict=True)

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Index and seed of every sample of an epoch, of all processes."""
        order = generator.permutation(self.size)
        return order, generator.integers(2**63 - 1, size=self.size)[order]


class ClassSampler(EpochSampler):
    """Draws a class uniformly among those that occur, then an image that holds it, as often as there are images.

    Args:
        dataset: a sized data set.
        images_of: for each class the indices of the images that hold it.
        seed: not negative.
    """

    def __init__(
        self, dataset: Dataset[Any], images_of: Sequence[NDArray[np.intp]], seed: int = 0
    ) -> None:
        super().__init__(dataset, seed)
        present = [images for images in images_of if images.size]
        self.images = np.concatenate(present)  # class after class
        self.lengths = np.array([len(images) for images in present])
        self.starts = np.cumsum(self.lengths) - self.lengths

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As in `EpochSampler`; an image that comes twice has two seeds."""
        classes = generator.integers(len(self.lengths), size=self.size)
        order = self.images[self.starts[classes] + generator.integers(self.lengths[classes])]
        return order, generator.integers(2**63 - 1, size=self.size)


class CheckedLoader(DataLoader[Batch]):
    """DataLoader that checks its first batch and reports errors of worker processes as they were raised."""

    _checked = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches; ValueError or FileNotFoundError with one sentence if a sample is wrong."""
        # A generator, so that nothing starts before the first batch is asked for.
        batches = super().__iter__()
        while True:
            try:
                batch: Batch = next(batches)
            except StopIteration:
                return
            except (ValueError, FileNotFoundError) as error:
                raise from_worker(error) from None
            if not self._checked:
                check_batch(batch, getattr(self.dataset, "num_classes", None))
                self._checked = True
            yield batch


class TrainLoader(CheckedLoader):
    """Loader over an `EpochSampler` whose `state_dict` is the position of the next batch.

    After `load_state_dict` the first iteration over the stored epoch goes on with the next batch. Lightning saves and
    restores this state and sets the epoch; in a plain loop each complete iteration moves on to the next epoch.
    """

    _batch = 0  # batches of this epoch that were handed out
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of the sampler's epoch, from the position that was loaded."""
        sampler = self.sampler
        if not isinstance(
            sampler, EpochSampler
        ):  # Trainer(overfit_batches=...) puts its own one here
            yield from super().__iter__()
            return
        resume, self._resume = self._resume, None
        self._batch = resume[1] if resume is not None and resume[0] == sampler.epoch else 0
        sampler.start = self._batch * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batch += (
                1  # before the yield: a checkpoint is written while the consumer holds the batch
            )
            yield batch
        sampler.set_epoch(sampler.epoch + 1)
        self._batch = 0

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches were handed out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        if not isinstance(self.sampler, EpochSampler):
            return
        epoch, batch = state["epoch"], state["batch"]
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        self.sampler.set_epoch(epoch)
        self._resume = (epoch, batch)


def on_first_process(build: Callable[[Callable[[], None]], T], every: float = 5.0) -> T:
    """Let the first process of a process group build something for all; alone it just builds it.

    `build` gets a function to call now and then while it works: through it the others, who wait in a collective
    operation, hear every `every` seconds that it goes on, so that their timeout says nothing about how long the work
    may take. What `build` raises is raised in all processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return build(lambda: None)
    said = time.monotonic()

    def say(word: str, value: Any = None) -> tuple[str, Any]:
        message = [(word, value)]
        torch.distributed.broadcast_object_list(message, src=0)
        return message[0]

    def heartbeat() -> None:
        nonlocal said
        if time.monotonic() - said > every:
            say("wait")
            said = time.monotonic()

    if torch.distributed.get_rank() == 0:
        try:
            result = build(heartbeat)
        except (ValueError, FileNotFoundError) as error:
            missing = isinstance(error, FileNotFoundError)
            say("error", (FileNotFoundError if missing else ValueError)(str(error)))
            raise
        except BaseException as error:
            say("error", RuntimeError(f"the first process stopped: {error!r}"))
            raise
        say("result", result)
        return result
    word, value = say("")
    while word == "wait":
        word, value = say("")
    if word == "error":
        raise value
    shared: T = value
    return shared


def _labelled(dataset: object) -> Labelled:
    if not hasattr(dataset, "read_mask_labels"):
        raise ValueError(
            f"{type(dataset).__name__} has no read_mask_labels(index), by which classes are counted: derive it from "
            "SegmentationDataset, or add that method, or set class_balanced to false."
        )
    labelled: Labelled = dataset  # type: ignore[assignment]
    return labelled


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack samples into a batch; ValueError naming two files whose sizes differ."""
    first = samples[0]
    for sample in samples[1:]:
        if sample["image"].shape != first["image"].shape:
            raise ValueError(
                f"images '{first['name']}' {_size(first['image'])} and '{sample['name']}' {_size(sample['image'])} cannot "
                "share a batch: let the transforms end in a crop or resize of fixed size, or (evaluation) set eval_batch_size=1."
            )
    batch: Batch = default_collate(samples)
    return batch


def check_batch(batch: Batch, num_classes: int | None = None) -> None:
    """Check that a batch is what the modules expect, and warn if all its pixels are ignored.

    Args:
        batch: see `SegmentationDataModule`; without `mask` only the images are checked, `anomaly` may be absent.
        num_classes: C; None: labels are not compared with it.

    Raises:
        ValueError: wrong type, shape or range, naming the file.
    """
    names = batch.get("name", [])
    image = batch["image"]
    if (
        not isinstance(image, Tensor)
        or image.dtype != torch.float32
        or image.ndim != 4
        or image.shape[1] != 3
    ):
        raise ValueError(
            f"the images of the batch with {_name(names, 0)} are {_kind(image)} but must be float32 Bx3xHxW: return "
            "an image as float32 3xHxW in [0, 1] from the data set."
        )
    low, high = image.amin((1, 2, 3)), image.amax((1, 2, 3))
    for index in range(len(image)):
        if not (low[index] >= 0 and high[index] <= 1):  # also catches NaN
            raise ValueError(
                f"image {_name(names, index)} holds values from {low[index]:.4g} to {high[index]:.4g} but must lie in [0, 1]: "
                "divide by 255, and leave out Normalize, which the module does itself."
            )
    if "mask" not in batch:
        return
    mask = batch["mask"]
    if (
        not isinstance(mask, Tensor)
        or mask.dtype != torch.int64
        or mask.shape != image.shape[:1] + image.shape[2:]
    ):
        raise ValueError(
            f"the masks of the batch with {_name(names, 0)} are {_kind(mask)} but must be int64 of shape "
            f"{_shape(image.shape[:1] + image.shape[2:])}, like the images: return a mask as int64 HxW from the data set."
        )
    if num_classes is not None:
        wrong = ((mask < 0) | (mask >= num_classes)) & (mask != IGNORE)
        for index in torch.nonzero(wrong.flatten(1).any(1)).flatten().tolist():
            values = sorted(set(mask[index][wrong[index]].tolist()))
            raise ValueError(
                f"mask {_name(names, index)} holds the labels {', '.join(map(str, values[:8]))} but there are {num_classes} "
                f"classes: use 0 to {num_classes - 1} and 255 for ignore, or raise num_classes."
            )
    anomaly = batch.get("anomaly")
    if anomaly is not None:
        _check_anomaly(anomaly, mask, names)
    if "unlabelled" in batch:
        _check_unlabelled(batch["unlabelled"], mask, names)
        _check_image_classes(batch.get("image_classes"), mask, num_classes, names)
        return  # a few crops without a single point are to be expected
    if bool((mask == IGNORE).all()) and (anomaly is None or bool((anomaly == IGNORE).all())):
        rank_zero_warn(
            f"every pixel of the first batch ({', '.join(names)}) is ignored (255), nothing is learned from it: "
            "check the masks, the ids table and the size of the crop."
        )


def _check_anomaly(anomaly: object, mask: Tensor, names: Sequence[str]) -> None:
    if (
        not isinstance(anomaly, Tensor)
        or anomaly.dtype != torch.int64
        or anomaly.shape != mask.shape
    ):
        raise ValueError(
            f"the anomaly masks of the batch with {_name(names, 0)} are {_kind(anomaly)} but must be int64 of shape "
            f"{_shape(mask.shape)}, like the masks: return anomaly as int64 HxW from the data set."
        )
    odd = (anomaly != 0) & (anomaly != 1) & (anomaly != IGNORE)
    both = (anomaly == 1) & (mask != IGNORE)
    for index in torch.nonzero((odd | both).flatten(1).any(1)).flatten().tolist():
        if odd[index].any():
            values = sorted(set(anomaly[index][odd[index]].tolist()))
            raise ValueError(
                f"anomaly mask {_name(names, index)} holds {', '.join(map(str, values[:8]))}: use 1 for anomalous, 0 for "
                "known and 255 for not evaluated."
            )
        raise ValueError(
            f"mask {_name(names, index)} names a class where the anomaly mask says 1: make it 255 (ignore) there, or "
            "the unknown is learned."
        )


def _check_unlabelled(unlabelled: object, mask: Tensor, names: Sequence[str]) -> None:
    if (
        not isinstance(unlabelled, Tensor)
        or unlabelled.dtype != torch.bool
        or unlabelled.shape != mask.shape
    ):
        raise ValueError(
            f"unlabelled of the batch with {_name(names, 0)} is {_kind(unlabelled)} but must be bool of shape "
            f"{_shape(mask.shape)}, like the masks: return it as bool HxW from the data set."
        )
    both = unlabelled & (mask != IGNORE)
    for index in torch.nonzero(both.flatten(1).any(1)).flatten().tolist():
        raise ValueError(
            f"mask {_name(names, index)} names a class at {int(both[index].sum())} pixels where unlabelled is true: make "
            "the mask 255 there, or unlabelled false."
        )


def _check_image_classes(
    classes: object, mask: Tensor, num_classes: int | None, names: Sequence[str]
) -> None:
    width = num_classes if num_classes is not None else "C"
    if (
        not isinstance(classes, Tensor)
        or classes.dtype != torch.bool
        or classes.ndim != 2
        or len(classes) != len(mask)
        or (num_classes is not None and classes.shape[1] != num_classes)
    ):
        raise ValueError(
            f"image_classes of the batch with {_name(names, 0)} is {_kind(classes)} but must be bool of shape "
            f"{len(mask)}x{width}: return it as bool {width} from the data set, the classes labelled in the image."
        )
    for index in range(len(mask)):
        held = mask[index][mask[index] != IGNORE].unique()
        absent = held[~classes[index][held]].tolist()
        if absent:
            raise ValueError(
                f"mask {_name(names, index)} holds class {absent[0]}, which image_classes says is not in the image: make it "
                "true there."
            )


def _name(names: Sequence[str], index: int) -> str:
    return f"'{names[index]}'" if index < len(names) else f"number {index} of the batch"


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {_shape(value.shape)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _size(image: Tensor) -> str:
    return f"({image.shape[-2]}x{image.shape[-1]})"
