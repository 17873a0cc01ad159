"""What a run leaves behind: scores, pictures, predictions."""

import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from lightning_genseg import __version__
from lightning_genseg.anomaly import Threshold
from lightning_genseg.datamodules.base import collate
from lightning_genseg.datasets.base import voc_palette
from lightning_genseg.files import replace_file
from lightning_genseg.inference import evaluation_mode, infer, softmax
from lightning_genseg.metrics.anomaly import AnomalyMetrics, bin_upper_edge
from lightning_genseg.modules.agmm import AGMM
from lightning_genseg.modules.base import SegmentationModule
from lightning_genseg.modules.few_shot import EPISODE_MAPS
from lightning_genseg.transforms import shorter_side
from lightning_genseg.visualize import (
    ANOMALY_PALETTE,
    Palette,
    Picture,
    anomaly_histogram,
    colorize,
    enlarge,
    grid,
    heat_map,
    outline,
    overlay,
    reliability_diagram,
    score_range,
    void_color,
)

_CLASSES = ("label", "prediction")
# K scores, and how many known and how many anomalous pixels have each of them.
ScoreCounts = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


class ChannelsLast(Callback):
    """Keep the weights of 2-D convolutions channels-last, which makes them faster on most CPUs and GPUs."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the memory layout before optimisers are built and checkpoints are read."""
        # Only convolutions: a four-dimensional buffer of a mixture is no image.
        for module in pl_module.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)


class Report(Callback):
    """Write the scores and some pictures of validation and test into the run's folder.

    Validation leaves ``val_metrics.json`` and ``val_pictures.png``, replaced each time; test leaves
    ``metrics.json`` and ``pictures.png``. The scores are those that the module logs: what it calls
    ``test_mIoU`` is ``mIoU`` here, ``test_IoU_road`` is ``road`` under ``IoU``; NaN is written as
    null. The pictures (image, labels, prediction and, where they are, anomaly labels, anomaly score
    and the anomaly mask of a calibrated module) are spread evenly over the data set and show the
    first image of a batch. Of few-shot episodes they show the first support with its object outlined, and from a
    method that has them the similarity by which it starts, the initial mask, the refined one and the posterior.

    Test also leaves ``reliability.png`` and, if the data have anomaly labels and the module an anomaly
    score, ``anomaly_histogram.png``. In ``metrics.json`` ``anomaly`` then names the score and, of a
    calibrated module, its ``threshold`` with what was promised of it and the shares of the known and the
    anomalous test pixels above it.

    Args:
        num_pictures: rows of the picture grid; 0 for none.

    Raises:
        ValueError: if `num_pictures` is negative.
    """

    def __init__(self, num_pictures: int = 6) -> None:
        if num_pictures < 0:
            raise ValueError(f"num_pictures is {num_pictures} but must be 0 (none) or more.")
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

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one image of the chosen batches."""
        self._collect(outputs, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As `on_validation_batch_end`."""
        self._collect(outputs, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``val_metrics.json`` and ``val_pictures.png``."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val_", "val_")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``metrics.json`` and ``pictures.png``, and say where."""
        folder = self._write(trainer, pl_module, "test_", "")
        if folder is not None:
            rank_zero_info(f"Scores and pictures are in {folder}")

    def _start(self, num_batches: Sequence[int | float]) -> None:
        self._images, self._samples = 0, []
        total = min(num_batches[0], 2**31) if num_batches else 0  # an iterable data set has "inf"
        if total == 2**31:  # length unknown: the first ones
            self._wanted = set(range(self.num_pictures))
        else:
            chosen = np.linspace(0, max(total - 1, 0), self.num_pictures)
            self._wanted = set(chosen.round().astype(int).tolist())

    def _collect(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self._images += len(batch["image"])
        if dataloader_idx or batch_idx not in self._wanted:
            return
        if not isinstance(outputs, Mapping) or "mask" not in outputs:
            return  # a module that returns no prediction has scores but no pictures
        sample = {"image": _picture(batch["image"][0]), "label": _array(batch["mask"][0])}
        sample["prediction"] = _array(outputs["mask"][0])
        if "support_image" in batch:
            mask = _array(batch["support_mask"][0, 0]) == 1
            sample["support"] = outline(_picture(batch["support_image"][0, 0]), mask)
            for name in EPISODE_MAPS:
                if name in outputs:
                    sample[name] = _array(outputs[name][0].float())
        if "anomaly" in outputs:
            sample["anomaly"] = _array(outputs["anomaly"][0].float())
        if "anomaly_mask" in outputs:
            sample["anomaly_mask"] = _array(outputs["anomaly_mask"][0].to(torch.uint8))
        if "anomaly" in batch:
            sample["anomaly_label"] = _array(batch["anomaly"][0])
        self._samples.append(sample)

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, metric_prefix: str, file_prefix: str
    ) -> Path | None:
        # What talks to other processes comes first and runs on all of them.
        log_dir = trainer.log_dir
        images = trainer.strategy.reduce(
            torch.tensor(self._images, device=pl_module.device), reduce_op="sum"
        )
        reliability = counts = None
        if metric_prefix == "test_" and isinstance(pl_module, SegmentationModule):
            reliability, counts = _reliability(pl_module), _score_counts(pl_module)
        if not trainer.is_global_zero or log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        folder = Path(log_dir)
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
            "images": int(images),
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "model": type(pl_module).__name__,
            "data": None if trainer.datamodule is None else type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
            "versions": {
                "lightning_genseg": __version__,
                "lightning": lightning.__version__,
                "torch": str(torch.__version__),
            },
        }
        scratch = folder / ".partial"
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        replace_file(folder / f"{file_prefix}metrics.json", text.encode(), scratch)
        if self._samples:
            names, palette = _classes(trainer, pl_module)
            picture = draw_samples(self._samples, names, palette)
            replace_file(folder / f"{file_prefix}pictures.png", encode(picture, "png"), scratch)
        if reliability is not None and (reliability[:, 2] > 0).any():
            picture = reliability_diagram(reliability)
            replace_file(folder / "reliability.png", encode(picture, "png"), scratch)
        if counts is not None:
            threshold = _threshold(pl_module)
            picture = anomaly_histogram(
                *counts,
                threshold=None if threshold is None else threshold.value,
                name=f"anomaly score: {pl_module.anomaly_score}",
            )
            replace_file(folder / "anomaly_histogram.png", encode(picture, "png"), scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        self._samples = []
        return folder


class CompareScores(Callback):
    """Measure every anomaly score of the module in one test run, not only the one it is set to.

    Leaves ``anomaly_scores.json`` in the run's folder: by name of the score ``AUROC``, ``AP``, ``FPR95``.
    Scores that would have to be fitted first (`genseg calibrate`) are left out. Takes a second pass over
    each image and 64 MB per score. The data need anomaly labels.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, AnomalyMetrics] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty histograms."""
        assert isinstance(pl_module, SegmentationModule)
        names = pl_module.computable_scores()
        self._metrics = {name: AnomalyMetrics().to(pl_module.device) for name in names}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the pixels of a batch; ValueError if it has no anomaly labels."""
        assert isinstance(pl_module, SegmentationModule)
        if "anomaly" not in batch:
            raise ValueError(
                "CompareScores needs anomaly labels, which these data do not have: name "
                "unknown_classes, use data with anomaly masks, or take the callback away."
            )
        forward = partial(pl_module.score_maps, names=list(self._metrics))
        maps = infer(forward, batch["image"], pl_module.inference, {"scores": softmax})
        for name, metrics in self._metrics.items():
            metrics.update(maps[name][:, 0], batch["anomaly"])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        values = {
            name: {key: value.item() for key, value in metrics.compute().items()}
            for name, metrics in self._metrics.items()
        }
        self._metrics = {}
        log_dir = trainer.log_dir
        if log_dir is not None and trainer.is_global_zero:
            text = json.dumps(values, indent=2) + "\n"
            replace_file(Path(log_dir) / "anomaly_scores.json", text.encode())


class LabelSpreading(Callback):
    """Draw how the sparse labels of a few training images spread, at every validation.

    Leaves ``label_spreading/step_<step>.png`` in the run's folder. A row is a training image, whole and
    without augmentation: the image; its labels, enlarged; of an `AGMM` the Gaussian map, in the colour of
    the highest class and as bright as that is high; and the prediction. The images are spread evenly over
    the training set and always the same.

    Args:
        num_images: rows.

    Raises:
        ValueError: if `num_images` is not positive; at the start, if the data have no sparse labels or the module
            is no `SegmentationModule`.
    """

    def __init__(self, num_images: int = 4) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images} but must be 1 or more.")
        self.num_images = num_images
        self._batches: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the images."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "sparse", None) is None:
            raise ValueError(
                "LabelSpreading draws sparse labels and the data have none: set data.sparse, or take "
                "the callback away."
            )
        if not isinstance(pl_module, SegmentationModule):
            raise ValueError(
                f"LabelSpreading draws what a SegmentationModule predicts and {type(pl_module).__name__} is none: derive "
                "it from that, or take the callback away."
            )
        if not trainer.is_global_zero:
            return
        # The scale it is trained at, or nearly.
        side = (pl_module.inference or {}).get("short_side")
        smaller = [] if side is None else shorter_side(side)
        dataset = data.split_dataset("train", [*data.eval_transform, *smaller])
        chosen = np.linspace(0, len(dataset) - 1, min(self.num_images, len(dataset)))
        self._batches = [collate([dataset[i]]) for i in chosen.round().astype(int).tolist()]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        log_dir = trainer.log_dir  # asks the other processes
        if trainer.sanity_checking or not self._batches or log_dir is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names, palette = _classes(trainer, pl_module)
        rows = [self._row(pl_module, batch, palette) for batch in self._batches]
        spread = ["Gaussian map"] if isinstance(pl_module, AGMM) else []
        titles = ["image", "labels", *spread, "prediction"]
        picture = grid(rows, titles, list(zip(names, palette, strict=True)))
        path = Path(log_dir) / "label_spreading" / f"step_{trainer.global_step:06d}.png"
        replace_file(path, encode(picture, "png"))

    @staticmethod
    @torch.no_grad()
    def _row(
        pl_module: LightningModule, batch: Mapping[str, Any], palette: Palette
    ) -> list[Picture]:
        assert isinstance(pl_module, SegmentationModule)
        batch = move_data_to_device(batch, pl_module.device)
        image, mask = _picture(batch["image"][0]), _array(batch["mask"][0])
        void = void_color(palette)[0]
        dim = image // 2 + np.uint8(void // 2)
        row = [image, overlay(dim, enlarge(mask), palette, 1.0)]
        if isinstance(pl_module, AGMM):
            strength, likeliest = (_array(x[0]) for x in pl_module.gaussian_map(batch).max(1))
            shown = void + (colorize(likeliest, palette) - float(void)) * strength[..., None]
            row.append(np.rint(shown).astype(np.uint8))
        with evaluation_mode(pl_module):
            scores = pl_module.maps_at_labels(batch)["scores"]
        return [*row, overlay(image, _array(scores[0].argmax(0)), palette, 0.7)]


class PredictionWriter(Callback):
    """Write what ``predict`` finds, image by image.

    Below the output folder, for the image ``<name>``:
    ``masks/<name>.png`` (8-bit class indices), ``overlays/<name>.jpg`` (class colours over the
    image) and, where the module gives it, ``anomaly/<name>.png`` (heat map, each image from its own
    1st to its 99th percentile, both written down). A calibrated module (`genseg calibrate`) also gives
    ``anomaly_masks/<name>.png`` (8-bit palette: 1 anomalous, 0 known), outlined in the overlay. Then one
    line of JSON is added to ``predictions.jsonl``: ``name``, ``image`` and ``checkpoint`` (absolute
    paths), ``mask``, ``overlay``, ``anomaly``, ``anomaly_mask`` (paths below the folder, or null),
    ``anomaly_range``, ``anomaly_threshold``, ``anomalous`` (share of the pixels), ``classes`` (share of
    the pixels of each class that occurs), ``support`` (digest of the examples of a few-shot method, or null) and
    ``seconds``.

    Every file appears complete or not at all, and its line only after it: an interrupted run leaves
    no half file, and goes on with `resume`. Of several processes each writes its own
    ``predictions-rank<k>.jsonl``, joined at the end.

    Args:
        output_dir: folder to write to; default: ``predictions`` in the run's folder.
        overlays: whether to write overlays.
        anomaly_scores: whether to write the anomaly scores as well, ``anomaly/<name>.npy``, float32.
        resume: leave out the images that `output_dir` already lists.
        overwrite: remove what `output_dir` lists and start anew.
        alpha: opacity of the colours in overlays.

    Raises:
        ValueError: for arguments that exclude each other; for an output folder that already holds
            predictions, unless `resume` or `overwrite` is set; for resuming with another
            checkpoint, another anomaly threshold, another support or other images of the same name.
    """

    def __init__(
        self,
        output_dir: Path | None = None,
        overlays: bool = True,
        anomaly_scores: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        alpha: float = 0.5,
    ) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other: set one of them.")
        if resume and output_dir is None:
            raise ValueError(
                "resume needs output_dir: name the folder with the earlier predictions."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha} but must be from 0 (image) to 1 (colours).")
        self.output_dir = output_dir
        self.overlays = overlays
        self.anomaly_scores = anomaly_scores
        self.resume = resume
        self.overwrite = overwrite
        self.alpha = alpha
        self._folder = Path()
        self._written = 0
        # Of the predictions that are there already:
        self._checkpoints: set[str | None] = set()
        self._thresholds: set[tuple[str | None, float | None]] = set()
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at what is there already; Lightning has set up the datamodule before."""
        if stage != "predict":
            return
        folder = self.output_dir
        if folder is None:
            log_dir = trainer.log_dir
            folder = Path(trainer.default_root_dir if log_dir is None else log_dir) / "predictions"
        self._folder = folder
        self._written = 0
        self._checkpoints, self._thresholds = set(), set()
        manifests = sorted(folder.glob("predictions*.jsonl"))
        if manifests and not self.resume and not self.overwrite:
            raise ValueError(
                f"{folder} already holds predictions: set --predictions.resume true to go on, "
                "--predictions.overwrite true to start anew, or another --predictions.output_dir."
            )
        lines = [line for manifest in manifests for line in read_manifest(manifest)]
        if self.resume:
            self._leave_out(trainer, lines)
        # Every process has to have read the lists before one of them changes something.
        trainer.strategy.barrier("predictions read")
        if trainer.is_global_zero:
            if self.overwrite:
                for line in lines:
                    for path in _files(line):
                        (folder / path).unlink(missing_ok=True)
                for manifest in manifests:
                    manifest.unlink()
            folder.mkdir(parents=True, exist_ok=True)
            self._join()
        trainer.strategy.barrier("predictions ready")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to mix the predictions of two checkpoints or thresholds; `setup` does not know them yet."""
        others = self._checkpoints - {_checkpoint(trainer)}
        if others:
            raise ValueError(
                f"{self._folder} holds predictions of the checkpoint {others.pop()}, not of "
                f"{_checkpoint(trainer)}: use that checkpoint, or another output_dir."
            )
        threshold = _threshold(pl_module)
        score = getattr(pl_module, "anomaly_score", None)
        mine = (score, None if threshold is None else threshold.value)
        if self._thresholds - {mine}:
            theirs = (self._thresholds - {mine}).pop()
            raise ValueError(
                f"{self._folder} holds predictions with the anomaly score {theirs[0]} and threshold {theirs[1]}, "
                f"and this model has {mine[0]} and {mine[1]}: use these, or another output_dir."
            )

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the files of each image, then its line."""
        masks = _array(
            outputs["mask"].to(torch.uint8)
        )  # waits for the device: the time is the whole time
        seconds = (time.perf_counter() - self._began) / len(masks)
        names, palette = _classes(trainer, pl_module)
        threshold = _threshold(pl_module)
        paths = batch.get("path", [None] * len(masks))
        rank = trainer.global_rank
        manifest = self._folder / (f"predictions-rank{rank}.jsonl" if rank else "predictions.jsonl")
        for index, (name, path, mask) in enumerate(zip(batch["name"], paths, masks, strict=True)):
            anomaly = _array(outputs["anomaly"][index].float()) if "anomaly" in outputs else None
            flagged = _array(outputs["anomaly_mask"][index]) if "anomaly_mask" in outputs else None
            line = {
                "name": name,
                "image": None if path is None else str(Path(path).absolute()),
                "checkpoint": _checkpoint(trainer),
                **self._write(name, batch["image"][index], mask, anomaly, flagged, palette),
                "anomaly_score": getattr(pl_module, "anomaly_score", None),
                "anomaly_threshold": None if threshold is None else threshold.value,
                "classes": _shares(mask, names),
                "support": _support(trainer),
                "seconds": round(seconds, 4),
            }
            _append(manifest, line)
            self._written += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the lists of all processes."""
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self._join()
            rank_zero_info(f"Predictions are in {self._folder}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say how to go on."""
        if self._written and trainer.predicting and trainer.is_global_zero:
            sys.stderr.write(
                f"genseg: {self._written} images were predicted; go on with the same command and "
                f"--predictions.output_dir {self._folder} --predictions.resume true\n"
            )

    def _leave_out(self, trainer: Trainer, lines: Sequence[Mapping[str, Any]]) -> None:
        dataset = getattr(trainer.datamodule, "predict_dataset", None)  # type: ignore[attr-defined]
        if dataset is None:
            raise ValueError(
                "resume needs a datamodule whose predict_dataset can skip images: "
                "pass datamodule= to Trainer.predict, or leave resume out."
            )
        paths = {name: str(Path(path).absolute()) for name, path in dataset.samples}
        done = set()
        for line in lines:
            self._checkpoints.add(line["checkpoint"])
            self._thresholds.add((line.get("anomaly_score"), line.get("anomaly_threshold")))
            if line.get("support") != _support(trainer):
                raise ValueError(
                    f"{self._folder} holds predictions by another support (or size of it): use that one, or another "
                    "output_dir."
                )
            if line["image"] != paths.get(line["name"], line["image"]):
                raise ValueError(
                    f"{self._folder} holds a prediction named {line['name']} of {line['image']}, not of "
                    f"{paths[line['name']]}: give these images another output_dir."
                )
            if all((self._folder / path).is_file() for path in _files(line)):
                done.add(line["name"])
        dataset.skip(done)
        rank_zero_info(f"{len(done)} images are already predicted, {len(dataset)} are left.")

    def _write(
        self,
        name: str,
        image: Tensor,
        mask: NDArray[np.uint8],
        anomaly: NDArray[np.float32] | None,
        flagged: NDArray[np.bool_] | None,
        palette: Sequence[tuple[int, int, int]],
    ) -> dict[str, Any]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(
                f"the image name '{name}' leads out of the output folder: let the data set give "
                "names relative to its own folder."
            )
        files: dict[str, bytes] = {f"masks/{name}.png": encode(Image.fromarray(mask), "png")}
        entry: dict[str, Any] = {"mask": f"masks/{name}.png"}
        entry |= dict.fromkeys(("overlay", "anomaly", "anomaly_mask"))
        if self.overlays:
            entry["overlay"] = f"overlays/{name}.jpg"
            picture = overlay(_picture(image), mask, palette, self.alpha)
            if flagged is not None:
                picture = outline(picture, flagged)
            files[entry["overlay"]] = encode(Image.fromarray(picture), "jpeg")
        if anomaly is not None:
            low, high = score_range(anomaly)
            entry["anomaly"], entry["anomaly_range"] = f"anomaly/{name}.png", [low, high]
            heat = Image.fromarray(heat_map(anomaly, low, high))
            files[entry["anomaly"]] = encode(heat, "png")
            if self.anomaly_scores:
                entry["anomaly_scores"] = f"anomaly/{name}.npy"
                buffer = io.BytesIO()
                np.save(buffer, anomaly)
                files[entry["anomaly_scores"]] = buffer.getvalue()
        if flagged is not None:
            entry["anomaly_mask"] = f"anomaly_masks/{name}.png"
            entry["anomalous"] = round(float(flagged.mean()), 6)
            indexed = Image.fromarray(flagged.astype(np.uint8))
            indexed.putpalette(bytes(value for color in ANOMALY_PALETTE for value in color))
            files[entry["anomaly_mask"]] = encode(indexed, "png")
        for file, content in files.items():
            replace_file(self._folder / file, content, self._folder / ".partial")
        return entry

    def _join(self) -> None:
        """Bring the lists into ``predictions.jsonl``, without torn lines; the last of equal names counts."""
        main = self._folder / "predictions.jsonl"
        others = sorted(self._folder.glob("predictions-rank*.jsonl"))
        existing = [main] if main.exists() else []
        lines = {line["name"]: line for file in existing + others for line in read_manifest(file)}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
        if existing or others:
            replace_file(main, text.encode(), self._folder / ".partial")
        for file in others:
            file.unlink()
        shutil.rmtree(self._folder / ".partial", ignore_errors=True)


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a ``predictions.jsonl``; a last line that an interruption has torn does not count.

    Raises:
        ValueError: if another line is not JSON.
    """
    *complete, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(complete, start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"line {number} of {path} is not JSON: remove the line, and its image is predicted again."
            ) from error
    return lines


def draw_samples(
    samples: Sequence[Mapping[str, NDArray[Any]]],
    class_names: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> Image.Image:
    """Rows of image, labels, prediction and, where all samples have them, columns on episodes and anomalies.

    Args:
        samples: ``image`` H x W x 3 uint8, ``label`` and ``prediction`` H x W (255 = ignored),
            ``support`` H x W x 3 uint8 and, H x W each in [0, 1], ``initial``, ``coarse``, ``refined``, ``posterior``, and
            H x W each ``anomaly_label`` (1, 0, 255), ``anomaly`` (scores, drawn in one range for all
            rows) and ``anomaly_mask`` (1, 0).
        class_names: C names for the legend, which shows only classes that occur.
        palette: C colours.
    """
    columns = {
        key: title
        for key, title in (
            ("support", "support"),
            ("image", "image"),
            ("label", "labels"),
            ("initial", "similarity"),
            ("coarse", "initial mask"),
            ("refined", "refined mask"),
            ("posterior", "posterior"),
            ("prediction", "prediction"),
            ("anomaly_label", "anomaly labels"),
            ("anomaly", "anomaly score"),
            ("anomaly_mask", "anomaly mask"),
        )
        if all(key in sample for sample in samples)
    }
    scores = [sample["anomaly"] for sample in samples if "anomaly" in columns]
    low, high = score_range(*scores) if scores else (0.0, 1.0)

    def draw(key: str, values: NDArray[Any]) -> Picture:
        if key in ("image", "support"):
            return values
        if key in EPISODE_MAPS:
            return heat_map(values, 0, 1)
        if key == "anomaly":
            return heat_map(values, low, high)
        return colorize(values, palette if key in _CLASSES else ANOMALY_PALETTE)

    rows = [[draw(key, sample[key]) for key in columns] for sample in samples]
    present: set[int] = set()
    for sample in samples:
        present.update(*(np.unique(sample[key]).tolist() for key in _CLASSES))
    legend = [(name, palette[c]) for c, name in enumerate(class_names) if c in present]
    if columns.keys() & {"anomaly_label", "anomaly_mask"}:
        legend += [("anomalous", ANOMALY_PALETTE[1]), ("not anomalous", ANOMALY_PALETTE[0])]
    if 255 in present:
        legend.append(("ignored", (0, 0, 0)))
    return grid(rows, list(columns.values()), legend)


def _classes(
    trainer: Trainer, pl_module: LightningModule
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours: the data's if they have any, else the module's names and VOC's colours."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    num_classes = int(pl_module.num_classes)  # type: ignore[arg-type]
    names = getattr(data, "class_names", None) or getattr(pl_module, "class_names", None)
    return (
        list(names or map(str, range(num_classes))),
        getattr(data, "palette", None) or voc_palette(num_classes),
    )


def _threshold(pl_module: LightningModule) -> Threshold | None:
    """Threshold of a calibrated module's anomaly score."""
    if not isinstance(pl_module, SegmentationModule):
        return None
    return pl_module.anomaly.thresholds.get(str(pl_module.anomaly_score))


def _reliability(module: SegmentationModule) -> NDArray[np.float32]:
    """Reliability table of a test, of all processes."""
    with module.test_calibration.sync_context():
        return _array(module.test_calibration.reliability())


def _score_counts(module: SegmentationModule) -> ScoreCounts | None:
    """Anomaly scores of a test, of all processes; None unless both kinds of pixels have finite ones."""
    histogram = module.test_anomaly_metrics
    if histogram is None:
        return None
    with histogram.sync_context():
        some = (histogram.known + histogram.anomalous).nonzero().flatten()
        known, anomalous = _array(histogram.known[some]), _array(histogram.anomalous[some])
    scores = _array(bin_upper_edge(some))
    finite = np.isfinite(scores)
    both = known[finite].any() and anomalous[finite].any()
    return (scores, known, anomalous) if both else None


def _anomaly_entry(pl_module: LightningModule, counts: ScoreCounts | None) -> dict[str, Any]:
    """What a report says of the anomaly score, nothing for a module without one."""
    name = getattr(pl_module, "anomaly_score", None)
    if name is None:
        return {}
    threshold = _threshold(pl_module)
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


def _checkpoint(trainer: Trainer) -> str | None:
    return None if trainer.ckpt_path is None else str(Path(trainer.ckpt_path).absolute())


def _support(trainer: Trainer) -> str | None:
    """Digest of the examples that come with images to predict, if any do."""
    dataset = getattr(trainer.datamodule, "predict_dataset", None)  # type: ignore[attr-defined]
    digest: str | None = getattr(dataset, "support_digest", None)
    return digest


def _files(line: Mapping[str, Any]) -> list[str]:
    keys = ("mask", "overlay", "anomaly", "anomaly_scores", "anomaly_mask")
    return [line[key] for key in keys if line.get(key) is not None]


def _shares(mask: NDArray[np.uint8], names: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(mask.ravel(), minlength=len(names))
    return {
        names[c]: round(float(counts[c]) / mask.size, 6) for c in np.flatnonzero(counts).tolist()
    }


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _picture(image: Tensor) -> Picture:
    """Image 3 x H x W in [0, 1] to H x W x 3 uint8."""
    return _array((image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0))


def encode(image: Image.Image, format: str) -> bytes:
    """Return the content of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 90} if format == "jpeg" else {}))
    return buffer.getvalue()


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
