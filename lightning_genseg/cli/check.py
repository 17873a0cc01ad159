"""Whether a copy of a data set is right: counts, sizes, class frequencies, files that cannot be read, a picture."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.cli.parser import Parser, data_arguments, data_parser
from lightning_genseg.data.class_index import Cache, count_labels
from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.data.dataset import MissingFiles, Sample, check_sizes
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.data.sparse.labels import Raster
from lightning_genseg.data.transforms.pipeline import single_thread
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import make_folder, replace_file
from lightning_genseg.plots.pictures import (
    Picture,
    colorize,
    encode,
    enlarge,
    grid,
    overlay,
    void_color,
)

_HELP = (
    "Read every file of the data: counts, class frequencies, missing and broken files, a picture. "
    "Takes the configuration files of the other commands."
)
_SHOWN = 20  # problems on the screen; the report has all


def check_data(
    data: SegmentationDataModule, output_dir: Path = Path("data_check"), num_pictures: int = 3
) -> dict[str, Any]:
    """Read every image and mask of all splits; go on past whatever is missing or broken.

    Writes `data_check.json`, which is what is returned, and `data_check.png`: images, labels, and
    both. The counts go into the class index of `data.cache_dir`.

    Args:
        data: what to check; of episodes, base classes and another domain's test set, the dense data
            that they are made of.
        output_dir: folder to write to.
        num_pictures: images shown of each split.

    Returns:
        `splits`: by name `images`, `sizes` (height x width: count), `ignored` (share of the pixels)
            and `classes`: by
        name `pixels`, `share` of the labelled pixels and `images` that hold the class; where there
        are anomalies
        `anomalies`: `share` of the evaluated pixels, `images` that hold some and `not_evaluated`
            (share of the pixels);
        where the labels are sparse `sparse`: `labelled` and `unlabelled` (shares of the pixels,
        `ignored` is the rest), `marks` (points or scribbles, null for areas) and `empty` (images
        without any label); or `same_as` another split.
        `shared`: for two splits the number of images in both. `problems`: `splits`, `name`, `file`
            (both null where a
        split as a whole is wrong) and `problem`, a sentence.

    Raises:
        ValueError: `num_pictures` is negative, or the folder cannot be written.
    """
    if num_pictures < 0:
        raise GenSegError(f"num_pictures is {num_pictures} but must be 0 (none) or more.")
    make_folder(output_dir, "output_dir")
    data = data.source
    data.prepare_data()
    report: dict[str, Any] = {
        "data": type(data).__name__,
        "class_names": data.class_names,
        "splits": {},
        "shared": {},
        "problems": [],
    }
    wrong: dict[str, list[str]] = {}  # sentence -> splits
    rows: list[list[Picture]] = []
    captions: list[str] = []
    shown: set[int] = set()
    files: dict[str, list[Path]] = {}
    # In the pictures: what the labels of classes do not say, where there are anomalies or few
    # labels.
    anomalous, known, blank = range(data.num_classes, data.num_classes + 3)
    names = [
        *data.class_names,
        "anomalous",
        "known, without class",
        "unlabelled (labels are enlarged)",
    ]
    palette = [*data.palette, (255, 0, 255), (110, 110, 110), (200, 200, 200)]
    void = void_color(data.palette)
    for split in data.splits:
        dataset: Any
        try:
            dataset = data.split_dataset(split, ())
        except MissingFiles as error:
            dataset = error.dataset
            wrong.setdefault(str(error), []).append(split)
        except (ValueError, FileNotFoundError) as error:
            wrong.setdefault(str(error), []).append(split)
            continue
        if hasattr(dataset, "samples"):
            files[split] = [sample.image for sample in dataset.samples]
            same = next((s for s in files if s != split and files[s] == files[split]), None)
            if same is not None:
                report["splits"][split] = {"images": len(dataset), "same_as": same}
                continue
        found = _examine(dataset, split, data.num_workers)
        report["splits"][split] = _statistics(found, data.class_names)
        report["problems"] += [
            {"splits": [split], "name": problem.name, "file": problem.file, "problem": problem.text}
            for one in found
            for problem in one.problems
        ]
        Cache(dataset, data.cache_dir).save(
            np.array([np.zeros(data.num_classes) if f.counts is None else f.counts for f in found], np.int64),
            np.array([f.counts is not None for f in found]),
        )  # fmt: skip
        good = [index for index, one in enumerate(found) if not one.problems]
        spread = np.linspace(0, max(len(good) - 1, 0), num_pictures).round().astype(int)
        for index in [good[pick] for pick in sorted(set(spread.tolist())) if good]:
            image, (labels, anomaly, raster) = (
                dataset.read_pixels(index),
                read_labels(dataset, index),
            )
            if anomaly is not None:
                labels[(anomaly == 0) & (labels == IGNORE)] = known
                labels[anomaly == 1] = anomalous
            drawn: NDArray[np.integer[Any]] = labels
            opacity = 0.5
            if raster is not None:
                labels, opacity = enlarge(labels), 1.0
                unlabelled = (labels == IGNORE) & raster.unlabelled
                drawn = np.where(unlabelled, blank, labels.astype(np.int64))
            colors = colorize(drawn, palette)
            colors[drawn == IGNORE] = void
            rows.append([image, colors, overlay(image, labels, palette, opacity)])
            captions.append(f"{split}: {found[index].name}")
            shown.update(np.unique(drawn).tolist())
    report["problems"][:0] = [
        {"splits": splits, "name": None, "file": None, "problem": text}
        for text, splits in wrong.items()
    ]
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if "same_as" not in report["splits"].get(second, {}):
            both = len(set(files.get(first, ())) & set(files.get(second, ())))
            if both:
                report["shared"][f"{first}, {second}"] = both
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    replace_file(output_dir / "data_check.json", text.encode())
    (output_dir / "data_check.png").unlink(missing_ok=True)  # an earlier check's
    if rows:
        legend = [(n, c) for i, (n, c) in enumerate(zip(names, palette, strict=True)) if i in shown]
        legend += [("ignored", void)] if IGNORE in shown else []
        picture = grid(rows, ["image", "labels", "both"], legend, captions=captions)
        replace_file(output_dir / "data_check.png", encode(picture, "png"))
    return report


def summary(report: dict[str, Any]) -> str:
    """Say on a screen what `check_data` has found."""
    splits = report["splits"]
    lines = [f"{report['data']}, {len(report['class_names'])} classes", ""]
    without = [s for s, f in splits.items() if "anomalies" in f and f["ignored"] == 1]
    for split, found in splits.items():
        if "same_as" in found:
            lines.append(f"{split:6}{found['images']:7} images, those of {found['same_as']}")
            continue
        sizes = sorted(found["sizes"], key=lambda size: -found["sizes"][size])
        more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
        ignored = "" if split in without else f", {found['ignored']:.1%} of the pixels ignored"
        lines.append(
            f"{split:6}{found['images']:7} images, "
            f"{', '.join(sizes[:3]) or 'none readable'}{more}{ignored}"
        )
        if "sparse" in found:
            sparse = found["sparse"]
            count = found["images"] - sparse["empty"]
            marks = "" if sparse["marks"] is None else f", {sparse['marks']} points or scribbles"
            lines.append(
                f"{'':6}sparse labels: {sparse['labelled']:.3%} of the pixels in {count} "
                f"images{marks}; {sparse['empty']} images without any"
            )
        if "anomalies" in found:
            strange = found["anomalies"]
            lines.append(
                f"{'':6}anomalies in {strange['images']} images, {strange['share']:.2%} of the "
                "pixels that are evaluated"
            )
    lines += [
        f"WARNING: {count} images are in {names}" for names, count in report["shared"].items()
    ]
    read = {split: found["classes"] for split, found in splits.items() if "classes" in found}
    if without:
        lines += ["", f"no labels of classes in {', '.join(without)}, only of anomalies"]
        read = {split: classes for split, classes in read.items() if split not in without}
    if read:
        width = max(len(name) for name in ["class", *report["class_names"]])
        lines += ["", "share of the labelled pixels, images with the class"]
        lines.append(f"{'class':{width}}" + "".join(f"{split:>18}" for split in read))
        for name in report["class_names"]:
            cells = [classes[name] for classes in read.values()]
            cell = "".join(f"{c['share']:10.3%}{c['images']:8}" for c in cells)
            absent = "   never" if not any(c["images"] for c in cells) else ""
            lines.append(f"{name:{width}}{cell}{absent}")
    problems = report["problems"]
    if problems:
        lines += ["", f"{len(problems)} problems:"]
        lines += [f"- {', '.join(p['splits'])}: {p['problem']}" for p in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"- and {len(problems) - _SHOWN} more, all in data_check.json")
    return "\n".join(lines)


def make_parser() -> Parser:
    """Parser of `genseg check`."""
    return data_parser("check", check_data, _HELP)


def run(words: list[str]) -> None:
    """Run `genseg check` with these words of the command line; GenSegError if there are problems."""
    parser = make_parser()
    arguments = data_arguments(parser, parser.parse_args(words))
    report, folder = check_data(**arguments), arguments["output_dir"]
    print(f"{summary(report)}\n\nthe report is in {folder}")
    if report["problems"]:
        raise GenSegError(
            f"{len(report['problems'])} problems with the data, all listed in "
            f"{folder / 'data_check.json'}."
        )


class _Problem(NamedTuple):
    name: str
    file: str | None
    text: str


class _Found(NamedTuple):
    """What one sample consists of; None where it could not be read."""

    name: str
    size: tuple[int, int] | None
    counts: NDArray[np.int64] | None
    pixels: int
    anomaly: NDArray[np.int64] | None  # pixels that are known, anomalous, not evaluated
    unlabelled: int | None  # pixels, where labels are sparse
    marks: int | None  # points or scribbles
    problems: list[_Problem]


class _Samples(Dataset[_Found]):
    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset = dataset
        self.split = split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Found:
        sample: Sample | None = None
        if hasattr(self.dataset, "samples"):
            sample = self.dataset.samples[index]
        name = sample.name if sample else f"{self.split} {index}"
        problems: list[_Problem] = []

        def complain(error: Exception, *files: Path | None) -> None:
            known = isinstance(error, ValueError | FileNotFoundError)
            named = [file for file in files if file is not None and f"'{file}'" in str(error)]
            file = next(iter([*named, *files]))
            text = str(error) if known else f"'{file}': {type(error).__name__}: {error}"
            problems.append(_Problem(name, str(file) if file else None, text))

        image = labels = anomaly = unlabelled = marks = None
        try:
            image = self.dataset.read_pixels(index)
        except Exception as error:  # whatever it is, the other files are still to be read
            complain(error, sample.image if sample else None)
        try:
            labels, anomaly, raster = read_labels(self.dataset, index)
            if raster is not None:
                unlabelled = int(raster.unlabelled.sum())
                found = self.dataset.read_marks(index)
                marks = None if found is None else len(found.classes)
        except Exception as error:
            complain(error, *((sample.mask, sample.anomaly) if sample else (None,)))
        if image is not None and labels is not None and sample is not None:
            try:
                check_sizes(image.shape, labels.shape, sample)
            except ValueError as error:
                problems.append(_Problem(name, str(sample.mask), str(error)))
        return _Found(
            name,
            None if image is None else (image.shape[0], image.shape[1]),
            None if labels is None else count_labels(labels, self.dataset.num_classes),
            0 if labels is None else labels.size,
            None
            if anomaly is None
            else np.bincount(anomaly.ravel(), minlength=256)[[0, 1, IGNORE]],
            unlabelled,
            marks,
            problems,
        )


def read_labels(
    dataset: Any, index: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, Raster | None]:
    """Labels of a sample and, where the data set has them, anomalies and sparse labels, without transforms."""
    if isinstance(dataset, SparseDataset):
        raster = dataset.read_raster(index)
        return raster.labels, None, raster
    if hasattr(dataset, "read_labels"):
        return *dataset.read_labels(index), None
    return dataset.read_mask_labels(index), None, None


def _examine(dataset: Any, split: str, num_workers: int) -> list[_Found]:
    if not hasattr(dataset, "read_pixels"):
        raise GenSegError(
            f"{type(dataset).__name__} has no read_pixels(index) and read_mask_labels(index), by "
            "which data are checked: derive it from SegmentationDataset, or add these methods."
        )
    loader: DataLoader[_Found] = DataLoader(
        _Samples(dataset, split),
        batch_size=4,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=single_thread,
    )
    found: list[_Found] = []
    with tqdm(total=len(dataset), desc=f"reading {split}", unit="image", disable=None) as bar:
        for part in loader:
            found += part
            bar.update(len(part))
    return found


def _statistics(found: Sequence[_Found], class_names: Sequence[str]) -> dict[str, Any]:
    counts = np.array([f.counts for f in found if f.counts is not None], np.int64)
    counts = counts.reshape(-1, len(class_names))
    pixels, images = counts.sum(0), (counts > 0).sum(0)
    total, labelled = sum(f.pixels for f in found), int(pixels.sum())
    sizes = Counter(f"{f.size[0]}x{f.size[1]}" for f in found if f.size is not None)
    strange = [f.anomaly for f in found if f.anomaly is not None]
    anomalies = {}
    if strange:
        fine, odd, rest = np.sum(strange, 0).tolist()
        anomalies["anomalies"] = {
            "share": odd / max(fine + odd, 1),
            "images": sum(int(one[1] > 0) for one in strange),
            "not_evaluated": rest / max(fine + odd + rest, 1),
        }
    blank = [f.unlabelled for f in found if f.unlabelled is not None]
    sparse = {}
    if blank:
        marks = [f.marks for f in found if f.marks is not None]
        sparse["sparse"] = {
            "labelled": labelled / max(total, 1),
            "unlabelled": sum(blank) / max(total, 1),
            "marks": sum(marks) if marks else None,
            "empty": int((counts.sum(1) == 0).sum()),
        }
    return {
        "images": len(found),
        "sizes": dict(sizes.most_common()),
        "ignored": (total - labelled - sum(blank)) / max(total, 1),
        "classes": {
            name: {
                "pixels": int(pixels[c]),
                "share": float(pixels[c] / max(labelled, 1)),
                "images": int(images[c]),
            }
            for c, name in enumerate(class_names)
        },
        **anomalies,
        **sparse,
    }
