"""`genseg check`: what a copy of a data set holds, and which of its files cannot be read."""

import copy
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.cli.parser import DataCommand
from lightning_genseg.data.class_index import Cache
from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.data.dataset import MissingFiles
from lightning_genseg.data.examination import Found, examine, read_labels
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.data.layout import absent_classes
from lightning_genseg.data.sparse.dataset import SparseDataset
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import make_folder, replace_file
from lightning_genseg.plots.pictures import Sheet, colorize, enlarge, overlay

_HELP = (
    "Read every file of the data: counts, class frequencies, missing and broken files, a picture. "
    "Takes the configuration files of the other commands."
)
_SHOWN = 20  # problems on the screen; the report has all


def check_data(
    data: SegmentationDataModule, output_dir: Path = Path("data_check"), num_pictures: int = 3
) -> dict[str, Any]:
    """Read every image and mask of all splits, also after a missing or broken one.

    Writes `data_check.json`, which is what is returned, and `data_check.png`: images, labels, and
    both. The counts go into the class index of `data.cache_dir`.

    Args:
        data: what to check; of episodes, base classes and another domain's test set, the dense data
            that they are made of.
        output_dir: folder to write to.
        num_pictures: images shown of each split.

    Returns:
        A dict with the keys

        - `splits`: by name `images`, `sizes` (by height x width), `ignored` (share of the pixels)
          and, by class, `pixels`, `share` of the labelled pixels, and `images` with the class. Or
          `same_as`, another split with the same images.
        - `splits` of data with anomalies: `anomalies` with `share` of the evaluated pixels,
          `images` that hold some, and `not_evaluated` (share of the pixels).
        - `splits` with sparse labels: `sparse` with the shares `labelled` and `unlabelled`
          (`ignored` is the rest), `marks` (points or scribbles, null for areas), and `empty`
          (images without a label).
        - `shared`: for two splits the number of images in both.
        - `problems`: `splits`, `name` and `file` (null where a split as a whole is wrong), and
          `problem`, a sentence.

    Raises:
        GenSegError: `num_pictures` is negative, the folder cannot be written, or the data have no
            labelled images.
    """
    check_arguments(check_data, locals(), num_pictures="[0, inf)")
    if not data.splits:
        raise GenSegError(
            f"{type(data).__name__} has only images to predict, and nothing to check: genseg "
            "predict reads its supports first and says what is wrong with them."
        )
    output_dir = Path(output_dir)
    make_folder(output_dir, "output_dir")
    data = copy.copy(data.source)
    data.on_error = "stop"  # what is wrong is to be found, not left out
    data.prepare_data()
    splits: dict[str, dict[str, Any]] = {}
    single: list[dict[str, Any]] = []  # problems of one image
    whole: dict[str, list[str]] = {}  # problems of splits: sentence -> names
    files: dict[str, list[Path]] = {}
    sheet = _Sheet(data)
    for split in data.splits:
        dataset: Any
        try:
            dataset = data.split_dataset(split, ())
        except MissingFiles as error:
            dataset = error.dataset
            whole.setdefault(str(error), []).append(split)
        except GenSegError as error:
            whole.setdefault(str(error), []).append(split)
            continue
        if hasattr(dataset, "samples"):
            files[split] = [sample.image for sample in dataset.samples]
            same = next((s for s in files if s != split and files[s] == files[split]), None)
            if same is not None:
                splits[split] = {"images": len(dataset), "same_as": same}
                continue
        found = examine(dataset, split, data.num_workers)
        splits[split] = _statistics(found, data.class_names)
        classes = splits[split]["classes"]
        absent = [name for name, count in classes.items() if not count["images"]]
        refuses = getattr(data, "absent_classes", "warn") == "refuse"
        refuses &= all(one.counts is not None for one in found)
        if split == "train" and absent and refuses and not isinstance(dataset, SparseDataset):
            whole.setdefault(absent_classes(dataset, absent), []).append(split)
        single += [
            {"splits": [split], "name": problem.name, "file": problem.file, "problem": problem.text}
            for one in found
            for problem in one.problems
        ]
        none = np.zeros(data.num_classes, np.int64)
        Cache(dataset, data.cache_dir).save(
            np.array([none if one.counts is None else one.counts for one in found], np.int64),
            np.array([one.counts is not None for one in found]),
        )
        good = [index for index, one in enumerate(found) if not one.problems]
        chosen = np.linspace(0, max(len(good) - 1, 0), num_pictures).round().astype(int)
        for index in [good[pick] for pick in sorted(set(chosen.tolist())) if good]:
            sheet.add_sample(dataset, index, f"{split}: {found[index].name}")
    shared = {
        f"{first}, {second}": len(both)
        for first, second in (("train", "val"), ("train", "test"), ("val", "test"))
        if "same_as" not in splits.get(second, {})
        and (both := set(files.get(first, ())) & set(files.get(second, ())))
    }
    report = {
        "data": type(data).__name__,
        "class_names": data.class_names,
        "splits": splits,
        "shared": shared,
        "problems": [
            {"splits": names, "name": None, "file": None, "problem": text}
            for text, names in whole.items()
        ]
        + single,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    replace_file(output_dir / "data_check.json", text.encode())
    sheet.write(output_dir / "data_check.png", ["image", "labels", "both"])
    return report


def summary(report: dict[str, Any]) -> str:
    """Text for a screen of what `check_data` has found."""
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


COMMAND = DataCommand("check", check_data, summary, _HELP)


class _Sheet(Sheet):
    """Images, their labels, and both: also what the labels of classes do not show."""

    def __init__(self, data: SegmentationDataModule) -> None:
        extra = ("anomalous", "known, without class", "unlabelled (labels are enlarged)")
        colors = ((255, 0, 255), (110, 110, 110), (200, 200, 200))
        super().__init__([*data.class_names, *extra], [*data.palette, *colors])
        self.anomalous, self.known, self.blank = range(data.num_classes, data.num_classes + 3)

    def add_sample(self, dataset: Any, index: int, caption: str) -> None:
        image, (labels, anomaly, raster) = dataset.read_pixels(index), read_labels(dataset, index)
        if anomaly is not None:
            labels[(anomaly == 0) & (labels == IGNORE)] = self.known
            labels[anomaly == 1] = self.anomalous
        drawn: NDArray[np.integer[Any]] = labels
        opacity = 0.5
        if raster is not None:
            labels, opacity = enlarge(labels), 1.0
            unlabelled = (labels == IGNORE) & raster.unlabelled
            drawn = np.where(unlabelled, self.blank, labels.astype(np.int64))
        colors = colorize(drawn, self.palette, void=self.void)
        self.add(caption, [image, colors, overlay(image, labels, self.palette, opacity)], drawn)


def _statistics(found: Sequence[Found], class_names: Sequence[str]) -> dict[str, Any]:
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
