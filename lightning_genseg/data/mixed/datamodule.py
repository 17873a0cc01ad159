"""Several data sets in one taxonomy to train on, and a test set with classes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.derived import DerivedDataModule, labelled_images
from lightning_genseg.data.loaders import EpochSampler
from lightning_genseg.data.mixed.taxonomy import Decision, Taxonomy, WithoutUniversal
from lightning_genseg.data.relabelled import RelabelledImages
from lightning_genseg.errors import GenSegError


class MixedDataModule(SegmentationDataModule):
    """Data sets of other datamodules together, their classes made universal ones by a `Taxonomy`.

    `num_classes` and `class_names` are those of the taxonomy. Validation and test are in the
    universal classes as well, over the images of all data sets that have the split; for a test
    set's own classes see `CrossDomainDataModule`.

    Source: Lambert et al.: MSeg: A composite dataset for multi-domain semantic segmentation, CVPR
    2020.

    Args:
        data: dense datamodules by the name that their data set has in the table; their transforms,
            batch sizes and workers are not used.
        taxonomy: the table; it must have every class of every data set.
        repeats: how often an epoch takes each image of a data set, unless `class_balanced` draws
            them; default: as often as makes the data set about as large as the largest, so that
            all are seen equally often.

    Raises:
        GenSegError: a wrong argument; a table that does not fit the classes.
        MissingFileError: no such table.
    """

    def __init__(
        self,
        data: dict[str, SegmentationDataModule],
        taxonomy: Path,
        repeats: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if not data:
            raise GenSegError(
                "data is empty: give at least one datamodule, by its name in taxonomy."
            )
        if repeats is not None and (repeats.keys() != data.keys() or min(repeats.values()) < 1):
            raise GenSegError(
                f"repeats is {repeats} but must hold a number from 1 for each of {', '.join(data)}."
            )
        table = Taxonomy(taxonomy)
        super().__init__(class_names=table.class_names, unknown_classes=None, sparse=None, **kwargs)
        if self.class_balanced and repeats is not None:
            raise GenSegError(
                "repeats and class_balanced both say how often an image is drawn: leave one of "
                "them out."
            )
        self.data = data
        if self.on_error == "skip":  # it is these that read files; the user's may still stop
            self.data = {key: copy(one) for key, one in data.items()}
            for one in self.data.values():
                one.on_error = "skip"
        self.tables = {key: table.universal_labels(key, d.class_names) for key, d in data.items()}
        self.repeats = repeats
        found = {split for d in data.values() for split in d.splits}
        every = SegmentationDataModule.splits
        self.splits = tuple(s for s in every if s in found)  # type: ignore[misc]

    def get_files(self) -> None:
        """Get the files of all datamodules."""
        for data in self.data.values():
            data.get_files()

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> RelabelledImages:
        """Build the relabelled images of a split, each once."""
        parts: dict[str, Any] = {}
        complaints = []
        for key, data in self.data.items():
            if split in data.splits:
                try:
                    parts[key] = labelled_images(data, split)
                except MissingFiles as error:
                    parts[key] = error.dataset
                    complaints.append(str(error))
        images = RelabelledImages(parts, self.tables, self.class_names, transform)
        if complaints:
            raise MissingFiles(" ".join(complaints), images)
        return images

    def train_sampler(self) -> EpochSampler:
        """Each image as often as `repeats` says, or drawn by `class_balanced`."""
        if self.class_balanced:
            return super().train_sampler()
        assert isinstance(self.train_dataset, RelabelledImages)
        sizes = {key: len(part) for key, part in self.train_dataset.parts.items()}
        repeats = self.repeats or balancing_repeats(sizes)
        return RepeatSampler(list(sizes.values()), [repeats[key] for key in sizes], self.seed)


class CrossDomainDataModule(DerivedDataModule):
    """The test set of another datamodule in its own classes, for a model of universal classes.

    `num_classes` and `class_names` are the model's, those of the taxonomy; `target_classes` holds
    the test set's, by which `SegmentationModule` turns scores before it decides. `test_mIoU` and
    all other scores are of the test set's classes; predictions are of universal ones.

    Source: zero-shot evaluation of MSeg (CVPR 2020, Sec. 5); GSS, Table 6.

    Args:
        data: dense datamodule of the test set; its transforms, batch size and workers are not used.
        taxonomy: the table, whose universal classes are those the model was trained on, in this
            order.
        dataset: name of the test set in the table.
        decision: `soft` adds up the universal probabilities of each class of the test set (MSeg),
            `hard` takes the most probable universal class first (GSS); one that leads to no class
            of the test set then becomes its first, and `test_ECE` is only the share of the wrong
            pixels.
        without_universal: what becomes of classes of the test set that the table does not have:
            `refuse` stops, `wrong` leaves their pixels in, where every prediction is wrong (MSeg
            does so with two classes of PASCAL-Context).

    Raises:
        GenSegError: a table that does not fit the classes.
        MissingFileError: no such table.
    """

    splits = ("test",)

    def __init__(
        self,
        data: SegmentationDataModule,
        taxonomy: Path,
        dataset: str,
        decision: Decision = "soft",
        without_universal: WithoutUniversal = "refuse",
        **kwargs: Any,
    ) -> None:
        check_arguments(CrossDomainDataModule.__init__, locals())
        table = Taxonomy(taxonomy)
        super().__init__(
            data,
            class_names=table.class_names,
            palette=None,
            batch_size=1,
            crop_size=(1, 1),
            short_side=None,
            class_balanced=False,
            train_transform=None,
            seed=0,
            **kwargs,
        )
        self.dataset = dataset
        self.target_classes, self.table = table.target_classes(
            dataset, data.class_names, data.palette, decision, without_universal
        )

    def make_dataset(
        self, split: Split, transform: Sequence[transforms.Transform]
    ) -> RelabelledImages:
        """Build the test images, with labels of the classes of `target_classes`."""
        return RelabelledImages(
            {self.dataset: labelled_images(self.data, split)},
            {self.dataset: self.table},
            self.target_classes.class_names,
            transform,
        )


class RepeatSampler(EpochSampler):
    """An `EpochSampler` of data sets one after another, each image several times an epoch.

    Args:
        sizes: numbers of images.
        repeats: of each data set, how often its images come.
        seed: not negative.
    """

    def __init__(self, sizes: Sequence[int], repeats: Sequence[int], seed: int = 0) -> None:
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        self.images = np.concatenate(
            [np.tile(part, n) for part, n in zip(parts, repeats, strict=True)]
        )
        super().__init__(self.images, seed)  # type: ignore[arg-type]

    def draw(self, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As in `EpochSampler`; an image that comes several times has as many seeds."""
        order, seeds = super().draw(generator)
        return self.images[order], seeds


def balancing_repeats(sizes: Mapping[str, int]) -> dict[str, int]:
    """How often to take each data set so that all are about as large as the largest."""
    return {key: round(max(sizes.values()) / size) for key, size in sizes.items()}
