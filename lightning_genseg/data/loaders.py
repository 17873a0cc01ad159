"""Samplers and loaders: order, resuming, errors of workers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from lightning_genseg.data.checks import check_batch
from lightning_genseg.data.dataset import Batch
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.errors import GenSegError

LABELS = {"mask", "full_mask", "anomaly"}  # what scores compare with


class EpochSampler(DistributedSampler[Any]):
    """A permutation per epoch of (index, seed) pairs, split by striding over the processes.

    Order and seeds are a function of (`seed`, epoch) that all processes compute alike, so that
    batch k of W processes together holds the samples of batch k of one process with a W times
    larger batch. The rest that does not divide evenly is dropped. A `DistributedSampler`, because
    Lightning replaces any other kind under DDP.

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
        self.start = 0  # samples that the next iteration leaves out: seen before an interruption

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
    """Draws a class that occurs, then an image that holds it, as often as there are images.

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


class EvaluationSampler(DistributedSampler[Any]):
    """Every sample once, in order, split by striding over the processes.

    All processes have the same number of batches, as DDP needs them. Where one would have fewer,
    `repeats` is true: its last batch is one sample that another process counts.

    Args:
        dataset: a sized data set.
        batch_size: of the loader.
        num_replicas: number of processes.
        rank: the own one.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int, rank: int
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        size: int = len(dataset)  # type: ignore[arg-type]
        self.mine = list(range(rank, size, num_replicas))
        most, batches = -(-size // num_replicas), -(-len(self.mine) // batch_size)
        self.repeats = batches < -(-most // batch_size)
        if self.repeats:
            self.mine.append(0)

    def __iter__(self) -> Iterator[int]:
        """Indices of this process."""
        return iter(self.mine)

    def __len__(self) -> int:
        """How many they are."""
        return len(self.mine)


class CheckedLoader(DataLoader[Batch]):
    """DataLoader that checks its first batch; errors of workers arrive as they were raised.

    Unreadable images of an `ImageFolder` that skips them go to its list.

    Given a plain `DistributedSampler` without shuffling, as Lightning does under DDP, it takes an
    `EvaluationSampler`. A repeated batch has all labels 255 and the key `repeated`, so that every
    image counts once under any number of processes.
    """

    _checked = False

    def __init__(self, dataset: Dataset[Any], **kwargs: Any) -> None:
        sampler = kwargs.get("sampler")
        if type(sampler) is DistributedSampler and not sampler.shuffle:
            size: int = kwargs.get("batch_size") or 1
            kwargs["sampler"] = EvaluationSampler(dataset, size, sampler.num_replicas, sampler.rank)
        if kwargs.get("generator") is None:  # it would draw from that of the training
            kwargs["generator"] = torch.Generator()
        super().__init__(dataset, **kwargs)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches; a GenSegError of one sentence if a sample is wrong."""
        # A generator, so that nothing starts before the first batch is asked for.
        batches = super().__iter__()
        for number in count(1):
            try:
                batch: Batch = next(batches)
            except StopIteration:
                return
            except GenSegError as error:
                raise from_worker(error) from None
            unreadable = batch.pop("unreadable", ())
            if unreadable:
                self.dataset.unreadable.extend(unreadable)  # type: ignore[attr-defined]
            if not batch:
                continue
            if not self._checked:
                check_batch(batch, getattr(self.dataset, "num_classes", None))
                self._checked = True
            if getattr(self.sampler, "repeats", False) and number == len(self):
                for name in LABELS & batch.keys():
                    batch[name].fill_(IGNORE)
                batch["repeated"] = True
            yield batch


class TrainLoader(CheckedLoader):
    """Loader over an `EpochSampler` whose `state_dict` is the position of the next batch.

    After `load_state_dict` the first iteration over the stored epoch goes on with the next batch.
    Lightning saves and restores this state and sets the epoch; in a plain loop each complete
    iteration moves on to the next epoch, and one that was left begins it again.
    """

    _batch = 0  # batches of this epoch that were handed out
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Batches of the sampler's epoch, from the position that was loaded."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Trainer(overfit_batches=...) has its own
            yield from super().__iter__()
            return
        resume, self._resume = self._resume, None
        self._batch = resume[1] if resume is not None and resume[0] == sampler.epoch else 0
        sampler.start = self._batch * (self.batch_size or 1)
        self.generator.manual_seed(sampler.seed + sampler.epoch)  # of the workers
        for batch in super().__iter__():
            # Before the yield: a checkpoint is written while the consumer holds the batch.
            self._batch += 1
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


def from_worker(error: GenSegError) -> GenSegError:
    """Undo what DataLoader does to the message of an exception in its worker process."""
    # It arrives with its whole traceback as message; the last line is the sentence we wrote.
    message = str(error)
    if not message.startswith("Caught "):
        return error
    return type(error)(message.strip().splitlines()[-1].partition(": ")[2])


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack samples into a batch; a GenSegError names two files whose sizes differ.

    Samples with an `error` in place of an image are the batch's `unreadable`.
    """
    unreadable = [sample for sample in samples if "error" in sample]
    samples = [sample for sample in samples if "error" not in sample]
    if not samples:
        return {"unreadable": unreadable}
    first = samples[0]
    for sample in samples[1:]:
        size, other = (tuple(one["image"].shape[-2:]) for one in (first, sample))
        if size != other:
            raise GenSegError(
                f"images '{first['name']}' ({size[0]}x{size[1]}) and '{sample['name']}' "
                f"({other[0]}x{other[1]}) cannot share a batch: let the transforms end in a crop "
                "or resize of fixed size, or (evaluation) set eval_batch_size=1."
            )
    batch: Batch = default_collate(samples)
    return {**batch, "unreadable": unreadable} if unreadable else batch
