"""Scores and pictures of validation and test."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from PIL import Image

from lightning_genseg.arguments import check_arguments
from lightning_genseg.callbacks.pictures import (
    classes_of,
    hand_to_loggers,
    is_shown,
    range_of,
    threshold_of,
    to_array,
    to_picture,
)
from lightning_genseg.data.labels import IGNORE
from lightning_genseg.files import replace_file, run_folder
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.evaluation import Evaluation
from lightning_genseg.methods.hub import versions
from lightning_genseg.metrics.anomaly import bin_upper_edge
from lightning_genseg.plots.diagrams import anomaly_histogram, reliability_diagram
from lightning_genseg.plots.pictures import (
    ANOMALY_PALETTE,
    Palette,
    Picture,
    class_legend,
    colorize,
    encode,
    grid,
    heat_map,
    outline,
    score_range,
)

_CLASSES = ("label", "prediction")
# K scores, and how many known and how many anomalous pixels have each of them.
ScoreCounts = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


class Report(Callback):
    """Write the scores and some pictures of validation and test into the run's folder.

    Validation leaves ``val_metrics.json`` and ``val_pictures.png``, replaced each time; test leaves
    ``metrics.json`` and ``pictures.png``. The scores are those that the module logs: what it calls
    ``test_mIoU`` is ``mIoU`` here, ``test_IoU_road`` is ``road`` under ``IoU``; NaN is written as
    null.

    The pictures are spread evenly over the data set and show the first image of a batch. They are
    image, labels, prediction and, where they are, anomaly labels, anomaly score and the anomaly
    mask of a calibrated module. Of few-shot episodes they also show the first support with its
    object outlined. A module may name maps in [0, 1] of its own, with their titles, in
    `picture_maps`.

    Test also leaves ``reliability.png`` and, if the data have anomaly labels and the module an
    anomaly score, ``anomaly_histogram.png``. In ``metrics.json`` ``anomaly`` then names the score.
    Of a calibrated module it also holds the ``threshold`` with its promise, and the shares of the
    known and the anomalous test pixels above it.

    Every logger of the Trainer that takes images gets the pictures as well (TensorBoard, W&B,
    MLflow), as ``val_pictures``, ``test_pictures``, ``test_reliability`` and
    ``test_anomaly_histogram``.

    Args:
        num_pictures: rows of the picture grid; 0 for none.

    Raises:
        GenSegError: `num_pictures` is negative.
    """

    def __init__(self, num_pictures: int = 6) -> None:
        check_arguments(Report.__init__, locals(), num_pictures="[0, inf)")
        self.num_pictures = num_pictures
        self._images = 0
        self._wanted: set[int] = set()
        self._samples: list[dict[str, NDArray[Any]]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the batches to draw."""
        self._start(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_start`."""
        self._start(trainer.num_test_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep one image of the chosen batches."""
        self._collect(*args, **kwargs)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """As `on_validation_batch_end`."""
        self._collect(*args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``val_metrics.json`` and ``val_pictures.png``."""
        if not trainer.sanity_checking:
            scores = [sample["anomaly"] for sample in self._samples if "anomaly" in sample]
            if scores and isinstance(pl_module, SegmentationModule):
                # Checkpoints are written after this, by the first process, which draws as well.
                pl_module.anomaly.ranges[str(pl_module.anomaly_score)] = score_range(*scores)
            self._write(trainer, pl_module, "val_", "val_")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``metrics.json`` and ``pictures.png``."""
        self._write(trainer, pl_module, "test_", "")

    def _start(self, num_batches: Sequence[int | float]) -> None:
        self._images, self._samples = 0, []
        total = num_batches[0] if num_batches else 0
        if math.isinf(total):  # an iterable data set: the first ones
            self._wanted = set(range(self.num_pictures))
        else:
            chosen = np.linspace(0, max(total - 1, 0), self.num_pictures)
            self._wanted = set(chosen.round().astype(int).tolist())

    def _collect(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(batch, Mapping) or not {"image", "mask"} <= batch.keys():
            return  # nobody knows what is what in it
        self._images += 0 if batch.get("repeated") else len(batch["image"])
        if dataloader_idx or batch_idx not in self._wanted:
            return
        if not isinstance(outputs, Mapping) or "mask" not in outputs:
            return  # a module that returns no prediction has scores but no pictures
        sample = {"image": to_picture(batch["image"][0]), "label": to_array(batch["mask"][0])}
        sample["prediction"] = to_array(outputs["mask"][0])
        ignored = getattr(pl_module, "ignore_index", IGNORE)
        sample["label"] = np.where(sample["label"] == ignored, IGNORE, sample["label"])
        if "support_image" in batch:
            mask = to_array(batch["support_mask"][0, 0]) == 1
            sample["support"] = outline(to_picture(batch["support_image"][0, 0]), mask)
        for name in _maps(pl_module).keys() & outputs.keys():
            sample[name] = to_array(outputs[name][0])
        if "anomaly" in outputs:
            sample["anomaly"] = to_array(outputs["anomaly"][0])
        if "anomaly_mask" in outputs:
            sample["anomaly_mask"] = to_array(outputs["anomaly_mask"][0].to(torch.uint8))
        if "anomaly" in batch:
            sample["anomaly_label"] = to_array(batch["anomaly"][0])
        self._samples.append(sample)

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, metric_prefix: str, file_prefix: str
    ) -> None:
        # What talks to other processes comes first and runs on all of them.
        folder = run_folder(trainer)
        images = trainer.strategy.reduce(
            torch.tensor(self._images, device=pl_module.device), reduce_op="sum"
        )
        reliability = counts = None
        evaluation = getattr(pl_module, "evaluation", None)
        if metric_prefix == "test_" and isinstance(evaluation, Evaluation):
            reliability, counts = _reliability(evaluation), _score_counts(evaluation)
        if not trainer.is_global_zero or not is_shown(trainer, folder):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        scores: dict[str, Any] = {}
        class_iou: dict[str, float | None] = {}
        for key, value in trainer.callback_metrics.items():
            name = key.removeprefix(metric_prefix)
            number = value.item() if math.isfinite(value) else None
            if name != key and name.startswith("IoU_"):
                class_iou[name.removeprefix("IoU_")] = number
            elif name != key:
                scores[name] = number
        report = {
            **scores,
            "IoU": class_iou,
            **_anomaly_entry(pl_module, counts),
            "images": int(images) or None,  # not known of batches of another form
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "model": type(pl_module).__name__,
            "data": None if data is None else type(data).__name__,
            "versions": versions(),
        }
        pictures: dict[str, Image.Image] = {}
        if self._samples:
            names, palette = classes_of(trainer, pl_module)
            pictures["pictures"] = draw_samples(
                self._samples, names, palette, _maps(pl_module), range_of(pl_module)
            )
        if reliability is not None and (reliability[:, 2] > 0).any():
            pictures["reliability"] = reliability_diagram(reliability)
        if counts is not None:
            threshold = threshold_of(pl_module)
            pictures["anomaly_histogram"] = anomaly_histogram(
                *counts,
                threshold=None if threshold is None else threshold.value,
                name=f"anomaly score: {pl_module.anomaly_score}",
            )
        self._samples = []
        if folder is not None:
            scratch = folder / ".partial"
            text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            replace_file(folder / f"{file_prefix}metrics.json", text.encode(), scratch)
            for name, picture in pictures.items():
                path = folder / f"{file_prefix}{name}.png"
                replace_file(path, encode(picture, "png"), scratch)
            shutil.rmtree(scratch, ignore_errors=True)
        for name, picture in pictures.items():
            hand_to_loggers(trainer, f"{metric_prefix}{name}", picture)


def draw_samples(
    samples: Sequence[Mapping[str, NDArray[Any]]],
    class_names: Sequence[str],
    palette: Palette,
    maps: Mapping[str, str] | None = None,
    anomaly_range: tuple[float, float] | None = None,
) -> Image.Image:
    """Rows of image, labels, prediction and, where all samples have them, further columns.

    Args:
        samples: ``image`` and ``support`` H x W x 3 uint8; all others H x W: ``label`` and
            ``prediction`` (255 = ignored), maps in [0, 1], ``anomaly_label`` (1, 0, 255),
            ``anomaly_mask`` (1, 0), and ``anomaly``, drawn in one range for all rows.
        class_names: C names for the legend, which shows only classes that occur.
        palette: C colours.
        maps: titles of the maps, by their keys in `samples`.
        anomaly_range: of the heat maps; default: from these samples.
    """
    maps = maps or {}
    titles = {
        "support": "support",
        "image": "image",
        "label": "labels",
        **maps,
        "prediction": "prediction",
        "anomaly_label": "anomaly labels",
        "anomaly": "anomaly score",
        "anomaly_mask": "anomaly mask",
    }
    keys = [key for key in titles if all(key in sample for sample in samples)]
    if "anomaly_label" in keys and all((sample["label"] == IGNORE).all() for sample in samples):
        keys.remove("label")  # sets of anomalies know no classes
    scores = [sample["anomaly"] for sample in samples if "anomaly" in keys]
    low, high = anomaly_range or (score_range(*scores) if scores else (0.0, 1.0))

    def draw(key: str, values: NDArray[Any]) -> Picture:
        if key in ("image", "support"):
            return values
        if key in maps:
            return heat_map(values, 0, 1)
        if key == "anomaly":
            return heat_map(values, low, high)
        return colorize(values, palette if key in _CLASSES else ANOMALY_PALETTE)

    rows = [[draw(key, sample[key]) for key in keys] for sample in samples]
    present: set[int] = set()
    for sample in samples:
        present.update(*(np.unique(sample[key]).tolist() for key in _CLASSES))
    names, colors = list(class_names), list(palette[: len(class_names)])
    if {"anomaly_label", "anomaly_mask"} & set(keys):
        present |= {len(names), len(names) + 1}
        names += ["anomalous", "not anomalous"]
        colors += reversed(ANOMALY_PALETTE)
    return grid(rows, [titles[key] for key in keys], class_legend(names, colors, present))


def _maps(pl_module: LightningModule) -> Mapping[str, str]:
    """Titles of maps that a module returns for its pictures, by their names."""
    maps: Mapping[str, str] = getattr(pl_module, "picture_maps", {})
    return maps


def _reliability(evaluation: Evaluation) -> NDArray[np.float32]:
    """Reliability table of a test, of all processes."""
    calibration = evaluation.calibration
    with calibration.sync_context():
        return to_array(calibration.reliability())


def _score_counts(evaluation: Evaluation) -> ScoreCounts | None:
    """Anomaly scores of a test, of all processes; None unless both kinds have finite ones."""
    histogram = evaluation.anomalies
    if histogram is None:
        return None
    with histogram.sync_context():
        some = (histogram.known + histogram.anomalous).nonzero().flatten()
        known, anomalous = to_array(histogram.known[some]), to_array(histogram.anomalous[some])
    scores = to_array(bin_upper_edge(some))
    finite = np.isfinite(scores)
    both = known[finite].any() and anomalous[finite].any()
    return (scores, known, anomalous) if both else None


def _anomaly_entry(pl_module: LightningModule, counts: ScoreCounts | None) -> dict[str, Any]:
    """What a report tells of the anomaly score, nothing for a module without one."""
    name = getattr(pl_module, "anomaly_score", None)
    if name is None:
        return {}
    threshold = threshold_of(pl_module)
    entry: dict[str, Any] = {"score": name, "threshold": None}
    if threshold is not None:
        value = threshold.value if math.isfinite(threshold.value) else None  # JSON has no infinity
        entry["threshold"] = {**threshold._asdict(), "value": value}
        if counts is not None:
            scores, known, anomalous = counts
            above = scores > threshold.value
            entry["known_above"] = float(known[above].sum() / known.sum())
            entry["anomalous_above"] = float(anomalous[above].sum() / anomalous.sum())
    return {"anomaly": entry}
