"""Images with masks of one object, and images in which to find it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.dataset import ImageFolder, check_sizes
from lightning_genseg.data.images import read_image, read_mask
from lightning_genseg.data.labels import anomaly_table, map_labels
from lightning_genseg.data.pairing import pair_files
from lightning_genseg.errors import GenSegError

_VALUES = (
    "1 is the object, 0 is not, 255 is left out: correct it, or list its values in support_ids"
)


def need_background(masks: Sequence[torch.Tensor]) -> None:
    """Refuse supports that show nothing but the object: everything would be like it."""
    if not any(bool((mask == 0).any()) for mask in masks):
        raise GenSegError(
            "no support shows what is not the object: give an image with some of what is around "
            "it, marked with 0."
        )


class SupportFolder:
    """Annotated images of one object: `root/images` and `root/masks` with files of the same names.

    A mask holds 1 on the object, 0 elsewhere, and 255 where nothing is said.

    Args:
        root: folder that holds both.
        size: side S of the square that they are letterboxed to.
        ids: value in the mask files -> 1, 0 or 255, for other files; `{0: 0, 255: 1}` for black and
            white ones.

    Raises:
        MissingFileError: a folder does not exist.
        GenSegError: no image, names that do not match, a wrong table; on reading: an unreadable
            file, other values, no object in a mask, or none that is left at this size.
    """

    def __init__(self, root: Path | str, size: int, ids: Mapping[int, int] | None = None) -> None:
        check_arguments(SupportFolder.__init__, locals(), size="[8, inf)")
        self.samples, complaint = pair_files(Path(root) / "images", Path(root) / "masks")
        if complaint:
            raise GenSegError(complaint)
        self.size = size
        self.transform = transforms.compose([transforms.Letterbox(size)])
        values = "1 (object), 0 (background) or 255"
        self._table = anomaly_table({0: 0, 1: 1} if ids is None else ids, "support_ids", values)

    def read(self) -> dict[str, torch.Tensor]:
        """Read the examples.

        Returns:
            `support_image` float32 K x 3 x S x S in [0, 1]; `support_mask` int64 and
            `support_valid` bool (False on padding), both K x S x S.
        """
        shots = []
        for sample in self.samples:
            image, values = read_image(sample.image), read_mask(sample.mask)
            check_sizes(image.shape, values.shape, sample)
            self._check_values(values, sample.mask)
            mask = map_labels(values, self._table, sample.mask, _VALUES)
            if not (mask == 1).any():
                raise GenSegError(
                    f"mask '{sample.mask}' marks no object: draw it with the value 1, or take the "
                    "image out."
                )
            masks = {"mask": mask, "valid": np.ones_like(mask)}
            shot = transforms.apply(self.transform, image, masks, 0, sample.name)
            if not (shot["mask"] == 1).any():
                raise GenSegError(
                    f"the object in mask '{sample.mask}' is too small to be left at size "
                    f"{self.size}: set a larger size (--data.size), or cut away what is far from "
                    "it."
                )
            shots.append(shot)
        need_background([torch.where(shot["valid"] == 1, shot["mask"], 255) for shot in shots])
        return {
            "support_image": torch.stack([shot["image"] for shot in shots]),
            "support_mask": torch.stack([shot["mask"] for shot in shots]),
            "support_valid": torch.stack([shot["valid"] == 1 for shot in shots]),
        }

    def digest(self) -> str:
        """SHA-256 of what decides what `read` gives: the files, their names, size and table."""
        digest = hashlib.sha256(f"{self.size} {self._table.tolist()}".encode())
        for sample in self.samples:
            for path in (sample.image, sample.mask):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.name} {content}\n".encode())
        return digest.hexdigest()

    def _check_values(self, values: NDArray[np.integer[Any]], path: Path) -> None:
        # 255 keeps its meaning unless a table says otherwise, so a white object would be left out
        # in silence.
        if set(np.unique(values).tolist()) <= {0, 255} and self._table[255] == 255:
            raise GenSegError(
                f"mask '{path}' holds only 0 and 255, and 255 is left out: if the object is white, "
                "set support_ids to {0: 0, 255: 1} (--data.support_ids), otherwise draw it with "
                "the value 1."
            )


class SupportedImages(ImageFolder):
    """Images to predict, each with the same supports.

    A sample is that of `ImageFolder` together with what `SupportFolder.read` gives.

    Args:
        root: folder of images, searched recursively, or an image file; they keep their sizes.
        support_root: folder with `images` and `masks` of the object.
        size: side of the square supports in pixels.
        support_ids: value in their masks -> 1, 0 or 255.

    Raises:
        MissingFileError: a folder does not exist.
        GenSegError: a folder is None, or without image; supports that `SupportFolder` refuses.
    """

    def __init__(
        self,
        root: Path | str | None,
        support_root: Path | str | None,
        size: int,
        support_ids: Mapping[int, int] | None = None,
    ) -> None:
        if root is None or support_root is None:
            lacking = "predict_root" if root is None else "support_root"
            what = "images" if root is None else "images and masks of the object"
            raise GenSegError(
                f"there is nothing to predict: set {lacking} (--data.{lacking}) to a folder with "
                f"{what}."
            )
        super().__init__(root)
        folder = SupportFolder(support_root, size, support_ids)
        self.supports, self.support_digest = folder.read(), folder.digest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one image."""
        sample = super().__getitem__(index)
        return sample if "error" in sample else {**sample, **self.supports}
