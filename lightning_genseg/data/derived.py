"""Data that are made of the images of other datamodules."""

from copy import copy
from typing import Any

from lightning_genseg.data.datamodule import SegmentationDataModule, Split
from lightning_genseg.data.relabelled import LabelledImages, check_readable
from lightning_genseg.errors import GenSegError


class DerivedDataModule(SegmentationDataModule):
    """Images of another datamodule with other labels, or as episodes.

    Args:
        data: dense datamodule; its transforms, batch size and workers are not used.
    """

    def __init__(self, data: SegmentationDataModule, **kwargs: Any) -> None:
        super().__init__(unknown_classes=None, sparse=None, **kwargs)
        self.data = data
        if self.on_error == "skip":  # it is this one that reads files; the user's may still stop
            self.data = copy(data)
            self.data.on_error = "skip"
        self.cache_dir = data.cache_dir if self.cache_dir is None else self.cache_dir

    @property
    def source(self) -> SegmentationDataModule:
        """The datamodule whose images these are."""
        return self.data

    def get_files(self) -> None:
        """Get the files of the data that these are made of."""
        self.data.get_files()


def labelled_images(data: SegmentationDataModule, split: Split) -> LabelledImages:
    """Images of a split of a dense datamodule.

    Raises:
        GenSegError: its labels are sparse, or its images cannot be read one by one.
    """
    if data.sparse is not None:
        raise GenSegError(
            "data that are made of other data need whole masks: leave sparse out of data.data."
        )
    return check_readable(data.split_dataset(split, ()), "episodes and mixtures are read")
