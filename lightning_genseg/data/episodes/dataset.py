"""Episodes of few-shot segmentation: a query and annotated images of one class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data import transforms
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.relabelled import LabelledImages, RelabelledImages, read_labelled
from lightning_genseg.errors import GenSegError

EpisodeMode = Literal["bam", "uniform", "balanced"]


class Episode(NamedTuple):
    """Positions of the images of one task, and its class."""

    query: int
    category: int
    supports: tuple[int, ...]


class Pool:
    """Which images can be a query, and which can support a class.

    An image supports a class, and is a query, where at least `min_area` pixels are of it. A class
    with fewer than `shots` supports beside a query, or without a query, is left out; these are
    `too_few`.

    Args:
        counts: N x C pixels of each class in each image, of the images that queries come from.
        classes: that episodes are about.
        shots: K.
        min_area: pixels, at the size of the file.
        excluded: classes of which no image may hold a pixel.
        support_counts: of the images that supports come from, M x C; None: the same images.
    """

    def __init__(
        self,
        counts: NDArray[np.int64],
        classes: Sequence[int],
        shots: int,
        min_area: int = 2048,
        excluded: Sequence[int] = (),
        support_counts: NDArray[np.int64] | None = None,
    ) -> None:
        check_arguments(Pool.__init__, locals(), shots="[1, inf)", min_area="[1, inf)")
        self.shots = shots
        self.same = support_counts is None
        clean = (counts[:, list(excluded)] > 0).sum(axis=1) == 0
        large = (counts >= min_area) & clean[:, None]
        supports = large if support_counts is None else support_counts >= min_area
        needed = shots + self.same  # an image does not support itself
        self.images_of = {c: np.flatnonzero(supports[:, c]) for c in classes}
        queries_of = {c: np.flatnonzero(large[:, c]) for c in classes}
        self.classes = [
            c for c in classes if len(queries_of[c]) and len(self.images_of[c]) >= needed
        ]
        self.too_few = [c for c in classes if c not in self.classes]
        self.queries_of = {c: queries_of[c] for c in self.classes}
        self.queries = np.unique(np.concatenate([[], *self.queries_of.values()]).astype(np.intp))
        self.present = counts[:, self.classes] > 0

    def draw(self, rng: np.random.Generator, query: int, category: int | None = None) -> Episode:
        """Draw an episode of a query: a class, uniform among those in it, then K other images."""
        if category is None:
            category = self.classes[int(rng.choice(np.flatnonzero(self.present[query])))]
        images = self.images_of[category]
        if self.same:
            images = images[images != query]
        chosen = rng.choice(images, self.shots, replace=False)
        return Episode(query, category, tuple(chosen.tolist()))


def draw_episodes(pool: Pool, number: int, seed: int, mode: EpisodeMode = "bam") -> list[Episode]:
    """Draw the episodes of an evaluation; the same for the same arguments.

    Modes: `bam` takes the queries in the order of the data set and starts again where they end; the
    class and the supports are drawn, and common classes come more often. `uniform` takes the
    queries in a shuffled order, `balanced` the classes in turn and their queries shuffled.

    Source: Lang et al.: Learning what not to segment, CVPR 2022, `util/dataset.py`; its random
    numbers are Python's and depend on the workers, ours are NumPy's and do not.

    Raises:
        GenSegError: no query, or an unknown mode.
    """
    check_arguments(draw_episodes, locals(), number="[1, inf)", seed="[0, inf)")
    if not len(pool.queries):
        raise GenSegError(
            "no image can be a query: lower min_area, or choose classes that occur in this split."
        )
    rng = np.random.default_rng(seed)
    if mode == "balanced":
        turns = {c: _endless(pool.queries_of[c], rng) for c in pool.classes}
        order = [pool.classes[i % len(pool.classes)] for i in range(number)]
        return [pool.draw(rng, next(turns[c]), c) for c in order]
    if mode == "uniform":
        shuffled = _endless(pool.queries, rng)
        return [pool.draw(rng, next(shuffled)) for _ in range(number)]
    return [pool.draw(rng, int(pool.queries[i % len(pool.queries)])) for i in range(number)]


def _endless(items: NDArray[np.intp], rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(items).tolist()


class Episodes(Dataset[dict[str, Any]]):
    """Reads images and supports of episodes.

    A sample holds float32 `image` 3xSxS in [0, 1], int64 `mask` SxS (1 the class, 0 not, 255
    ignore), bool `valid` SxS (False on padding), and the same with K in front as `support_image`,
    `support_mask`, `support_valid`; the names `name`, `support_name` (K of them, with commas) and
    `class_name`; int64 `class_index` (of the data set), `base_index` (of the base learner's
    outputs, 1 to n; 0 for a novel class) and `candidates` (all classes of these episodes).

    Args:
        queries: images of the queries.
        supports: images of the supports.
        candidates: classes that there are episodes of.
        base_index: class -> its number among the base learner's outputs.
        class_names: of all classes.
        transform: albumentations transforms of image and mask (1, 0, 255) to one size, drawn for
            each image on its own.
    """

    num_classes = 2

    def __init__(
        self,
        queries: LabelledImages,
        supports: LabelledImages,
        candidates: Sequence[int],
        base_index: Mapping[int, int],
        class_names: Sequence[str],
        transform: Sequence[transforms.Transform],
    ) -> None:
        self.queries = queries
        self.supports = supports
        self.candidates = torch.tensor(list(candidates))
        self.base_index = dict(base_index)
        self.class_names = list(class_names)
        self.transform = transforms.compose(transform)

    def read(
        self, episode: Episode, rng: np.random.Generator
    ) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Read a sample, and the mask of the query at its own size."""
        query, category, supports = episode
        sample, mask = self._read_object(self.queries, query, category, rng)
        shots = [self._read_object(self.supports, i, category, rng)[0] for i in supports]
        sample |= {f"support_{key}": torch.stack([s[key] for s in shots]) for key in shots[0]}
        sample |= {
            "name": self.queries.sample_name(query),
            "support_name": ", ".join(self.supports.sample_name(i) for i in supports),
            "class_index": torch.tensor(category),
            "class_name": self.class_names[category],
            "base_index": torch.tensor(self.base_index.get(category, 0)),
            "candidates": self.candidates,
        }
        return sample, mask

    def _read_object(
        self, images: LabelledImages, index: int, category: int, rng: np.random.Generator
    ) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Read and transform an image; also its mask HxW: 1 on the class, 0 elsewhere, 255 kept."""
        image, labels = read_labelled(images, index)
        mask = (labels == category).astype(np.uint8)
        mask[labels == IGNORE] = IGNORE
        masks = {"mask": mask, "valid": np.ones_like(mask)}
        seed, name = int(rng.integers(2**63 - 1)), images.sample_name(index)
        sample = transforms.apply(self.transform, image, masks, seed, name)
        return {**sample, "valid": sample["valid"] == 1}, mask


class TrainEpisodes(Episodes):
    """Every query once an epoch, with a class and supports that its seed decides.

    An index is an int, or a pair (int, seed).

    Args:
        images: that queries and supports come from.
        pool: which of them.
    """

    def __init__(self, images: LabelledImages, pool: Pool, **kwargs: Any) -> None:
        super().__init__(images, images, pool.classes, **kwargs)
        self.pool = pool

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.pool.queries)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Draw and read an episode."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        rng = np.random.default_rng(seed)
        return self.read(self.pool.draw(rng, int(self.pool.queries[position])), rng)[0]


class EvalEpisodes(Episodes):
    """Given episodes, letterboxed; `full_mask` is the mask at the query's own size, int64 HxW.

    Args:
        queries: images of the queries.
        supports: images of the supports.
        episodes: positions in both.
        size: side S of the square, see `Letterbox`.
    """

    def __init__(
        self,
        queries: LabelledImages,
        supports: LabelledImages,
        episodes: Sequence[Episode],
        size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(queries, supports, transform=[transforms.Letterbox(size)], **kwargs)
        self.episodes = list(episodes)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read an episode."""
        sample, mask = self.read(self.episodes[index], np.random.default_rng(0))
        return {**sample, "full_mask": torch.from_numpy(mask.astype(np.int64))}


class BaseClasses(RelabelledImages):
    """Some classes of a data set, numbered from 1 on; all others are background, 0, and 255 stays.

    Args:
        images: to relabel.
        classes: that remain, in this order.
        class_names: of all classes.
        transform: albumentations transforms.
    """

    def __init__(
        self,
        images: LabelledImages,
        classes: Sequence[int],
        class_names: Sequence[str],
        transform: Sequence[transforms.Transform],
    ) -> None:
        table = np.zeros(256, np.uint8)
        table[list(classes)] = np.arange(1, len(classes) + 1)
        table[IGNORE] = IGNORE
        names = ["background", *(class_names[c] for c in classes)]
        super().__init__({"": images}, {"": table}, names, transform)
