"""Images a second that the loaders give on two cores, and where the time goes.

Each pipeline reads files of its data set's real size and format and cuts the paper's crop: CamVid's
real frames (`--camvid`), for the others generated street scenes in a temporary folder. `before` is
how it was done until commit 3b4c60d: images copied twice more on reading, labels looked up in
numpy, the whole image zoomed and then cropped, labels counted in numpy. Both are measured in turns,
in processor time.

    python experiments/benchmarks/loaders.py --camvid path/to/camvid
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from lightning_genseg.data import CamVid, Sample, SegmentationDataset, SyntheticScenes
from lightning_genseg.data.loaders import EpochSampler, TrainLoader, collate
from lightning_genseg.data.transforms import RandomCropLimitedClass, RandomScaledCrop
from lightning_genseg.data.transforms.pipeline import apply, compose, single_thread

# Height, width, format of the images, crop, short side at a zoom of 1 (None: as in the file).
SIZES: dict[str, tuple[int, int, str, tuple[int, int], int | None]] = {
    "Cityscapes": (1024, 2048, "png", (768, 768), None),
    "ADE20K": (512, 683, "jpg", (512, 512), 512),
    "COCO-Stuff": (480, 640, "jpg", (512, 512), 512),
    "VOC": (375, 500, "jpg", (512, 512), 512),
}
STAGES = ("read image", "read mask", "zoom and crop", "flip and jitter", "to tensor", "collate")


class OldCrop(RandomCropLimitedClass):
    def _is_mixed(self, mask: np.ndarray) -> bool:
        counts = np.bincount(mask[mask != self.ignore_index])
        return bool((counts > 0).sum() > 1 and counts.max() <= self.max_class_share * counts.sum())


class Old(SegmentationDataset):
    """Reads as before."""

    def read_pixels(self, index: int) -> np.ndarray:
        with Image.open(self.samples[index].image) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
        return np.array(image.convert("RGB"))

    def read_mask_labels(self, index: int) -> np.ndarray:
        with Image.open(self.samples[index].mask) as file:
            file.load()
            raw = np.array(file)
        classes = self.table[raw]
        if (classes == 256).any():
            raise ValueError("unknown labels")
        return classes.astype(np.uint8)


def cutting(crop: tuple[int, int], short: int | None, old: bool) -> list[Any]:
    if not old:
        return [RandomScaledCrop(*crop, short_side=short, long_side=short and 2048)]
    pad = A.PadIfNeeded(*crop, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=255)
    first = [] if short is None else [A.SmallestMaxSize(short)]
    return [*first, A.RandomScale((-0.5, 1.0), p=1.0), pad, OldCrop(*crop)]


def colouring() -> list[Any]:
    jitter = A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.06, 0.06), p=0.8)
    return [A.HorizontalFlip(p=0.5), jitter]


def stages(dataset: SegmentationDataset, cut: list[Any], batch: int, seed: int) -> list[float]:
    """Milliseconds of processor time of one image, by stage."""
    cutter, painter, plain = A.Compose(cut), A.Compose(colouring()), compose([])
    cutter.set_random_seed(seed)  # both versions draw zooms from the same distribution
    painter.set_random_seed(seed)
    spent = np.zeros(len(STAGES))
    clock = time.thread_time()

    def lap(stage: int) -> None:
        nonlocal clock
        now = time.thread_time()
        spent[stage] += now - clock
        clock = time.thread_time()

    samples = []
    for index in range(batch):
        index %= len(dataset)
        clock = time.thread_time()
        image = dataset.read_pixels(index)
        lap(0)
        mask = dataset.read_mask_labels(index)
        lap(1)
        cropped = cutter(image=image, mask=mask)
        lap(2)
        coloured = painter(image=cropped["image"], mask=cropped["mask"])
        lap(3)
        tensors = apply(plain, coloured["image"], {"mask": coloured["mask"]}, 0)
        lap(4)
        samples.append({**tensors, "name": ""})
    clock = time.thread_time()
    collate(samples)
    lap(5)
    return (spent / batch * 1000).tolist()


def throughput(dataset: SegmentationDataset) -> float:
    """Images a second of two cores that do nothing else, with two workers and batches of eight.

    From the processor time of all processes, kernel included, so that other programs disturb it
    little.
    """
    loader = TrainLoader(
        dataset,
        batch_size=8,
        sampler=EpochSampler(dataset),
        num_workers=2,
        drop_last=True,
        collate_fn=collate,
        worker_init_fn=single_thread,
    )
    began = processor_time()
    images = sum(len(batch["name"]) for batch in loader)
    gc.collect()  # the workers end, and count from then on
    return 2 * images / (processor_time() - began)


def processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write(folder: Path, name: str, count: int) -> Iterator[Sample]:
    height, width, suffix, *_ = SIZES[name]
    scenes = SyntheticScenes(count, (height, width))
    for index in range(count):
        image, mask = folder / f"{name}{index}.{suffix}", folder / f"{name}{index}_mask.png"
        options = {"quality": 90} if suffix == "jpg" else {}
        Image.fromarray(scenes.read_pixels(index)).save(image, **options)
        Image.fromarray(scenes.read_mask_labels(index)).save(mask)
        yield Sample(str(index), image, mask)


def compare(
    name: str, samples: list[Sample], names: list[str], ids: dict[int, int] | None,
    crop: tuple[int, int], short: int | None, repeats: int, batches: int,
) -> list[str]:  # fmt: skip
    def build(old: bool, count: int) -> SegmentationDataset:
        kind = Old if old else SegmentationDataset
        transforms = [*cutting(crop, short, old), *colouring()]
        many = [sample._replace(name=f"{i}") for i, sample in enumerate(samples * count)]
        return kind(many[: max(count, len(samples))], names, ids=ids, transform=transforms)

    spent: dict[bool, list[list[float]]] = {True: [], False: []}
    speed: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats):
        for old in (True, False):
            spent[old].append(stages(build(old, 1), cutting(crop, short, old), 32, repeat))
            speed[old].append(throughput(build(old, 8 * batches)))
    before, after = (np.median(spent[old], 0) for old in (True, False))
    size = SIZES[name][:2] if name in SIZES else (360, 480)
    rows = [
        f"{name} {size[0]}x{size[1]} to {crop[0]}x{crop[1]}",
        "images/s: "
        + " -> ".join(f"{np.median(speed[old]):.1f}" for old in (True, False))
        + f" ({np.median(speed[False]) / np.median(speed[True]):.2f}x)",
        f"ms an image: {before.sum():.1f} -> {after.sum():.1f} ({before.sum() / after.sum():.2f}x)",
    ]
    rows += [
        f"  {stage:16}{a:7.1f} -> {b:5.1f}  ({b / after.sum():.0%} of what is left)"
        for stage, a, b in zip(STAGES, before, after, strict=True)
    ]
    return rows


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, help="CamVid in SegNet's layout")
    parser.add_argument("--images", type=int, default=16, help="generated images a data set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24, help="of eight, each repeat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    single_thread(0)
    if options.camvid is not None:
        frames = CamVid(options.camvid)
        crop = (360, 480)
        for row in compare("CamVid", frames.samples[::8], frames.class_names, frames.label_values(),
                           crop, None, options.repeats, options.batches):  # fmt: skip
            say(row)
    with tempfile.TemporaryDirectory() as folder:
        for name, (*_, crop, short) in SIZES.items():
            samples = list(write(Path(folder), name, options.images))
            for row in compare(name, samples, list(SyntheticScenes.CLASS_NAMES), None, crop, short,
                               options.repeats, options.batches):  # fmt: skip
                say(row)


if __name__ == "__main__":
    main()
