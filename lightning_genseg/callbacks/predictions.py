"""Predictions, written as they come."""

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_genseg.callbacks.pictures import classes_of, threshold_of, to_array, to_picture
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file
from lightning_genseg.plots.pictures import (
    ANOMALY_PALETTE,
    encode,
    heat_map,
    outline,
    overlay,
    score_range,
)


class PredictionWriter(Callback):
    """Write what ``predict`` finds, image by image.

    Below the output folder, for the image ``<name>``:
    ``masks/<name>.png`` (8-bit class indices), ``overlays/<name>.jpg`` (class colours over the
    image) and, where the module gives it, ``anomaly/<name>.png`` (heat map, each image from its own
    1st to its 99th percentile, both written down). A calibrated module (`genseg calibrate`) also
    gives ``anomaly_masks/<name>.png`` (8-bit palette: 1 anomalous, 0 known), outlined in the
    overlay. Then one line of JSON is added to ``predictions.jsonl``: ``name``, ``image`` and
    ``checkpoint`` (absolute paths), ``mask``, ``overlay``, ``anomaly``, ``anomaly_mask`` (paths
    below the folder, or null), ``anomaly_range``, ``anomaly_threshold``, ``anomalous`` (share of
    the pixels), ``classes`` (share of the pixels of each class that occurs), ``support`` (digest of
    the examples of a few-shot method, or null) and ``seconds``.

    Every file appears complete or not at all, and its line only after it: an interrupted run leaves
    no half file, and goes on with `resume`. Of several processes each writes its own
    ``predictions-rank<k>.jsonl``, joined at the end.

    Args:
        output_dir: folder to write to; default: ``predictions`` in the run's folder.
        overlays: whether to write overlays.
        anomaly_scores: whether to write the anomaly scores as well, ``anomaly/<name>.npy``,
            float32.
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
            raise GenSegError("resume and overwrite exclude each other: set one of them.")
        if resume and output_dir is None:
            raise GenSegError(
                "resume needs output_dir: name the folder with the earlier predictions."
            )
        if not 0 <= alpha <= 1:
            raise GenSegError(f"alpha is {alpha} but must be from 0 (image) to 1 (colours).")
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
            raise GenSegError(
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
            raise GenSegError(
                f"{self._folder} holds predictions of the checkpoint {others.pop()}, not of "
                f"{_checkpoint(trainer)}: use that checkpoint, or another output_dir."
            )
        threshold = threshold_of(pl_module)
        score = getattr(pl_module, "anomaly_score", None)
        mine = (score, None if threshold is None else threshold.value)
        if self._thresholds - {mine}:
            theirs = (self._thresholds - {mine}).pop()
            raise GenSegError(
                f"{self._folder} holds predictions with the anomaly score {theirs[0]} and "
                f"threshold {theirs[1]}, and this model has {mine[0]} and {mine[1]}: use these, or "
                "another output_dir."
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
        masks = to_array(
            outputs["mask"].to(torch.uint8)
        )  # waits for the device: the time is the whole time
        seconds = (time.perf_counter() - self._began) / len(masks)
        names, palette = classes_of(trainer, pl_module)
        threshold = threshold_of(pl_module)
        paths = batch.get("path", [None] * len(masks))
        rank = trainer.global_rank
        manifest = self._folder / (f"predictions-rank{rank}.jsonl" if rank else "predictions.jsonl")
        for index, (name, path, mask) in enumerate(zip(batch["name"], paths, masks, strict=True)):
            anomaly = to_array(outputs["anomaly"][index].float()) if "anomaly" in outputs else None
            flagged = (
                to_array(outputs["anomaly_mask"][index]) if "anomaly_mask" in outputs else None
            )
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
            raise GenSegError(
                "resume needs a datamodule whose predict_dataset can skip images: "
                "pass datamodule= to Trainer.predict, or leave resume out."
            )
        paths = {name: str(Path(path).absolute()) for name, path in dataset.samples}
        done = set()
        for line in lines:
            self._checkpoints.add(line["checkpoint"])
            self._thresholds.add((line.get("anomaly_score"), line.get("anomaly_threshold")))
            if line.get("support") != _support(trainer):
                raise GenSegError(
                    f"{self._folder} holds predictions by another support (or size of it): use "
                    "that one, or another output_dir."
                )
            if line["image"] != paths.get(line["name"], line["image"]):
                raise GenSegError(
                    f"{self._folder} holds a prediction named {line['name']} of {line['image']}, "
                    f"not of {paths[line['name']]}: give these images another output_dir."
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
            raise GenSegError(
                f"the image name '{name}' leads out of the output folder: let the data set give "
                "names relative to its own folder."
            )
        files: dict[str, bytes] = {f"masks/{name}.png": encode(Image.fromarray(mask), "png")}
        entry: dict[str, Any] = {"mask": f"masks/{name}.png"}
        entry |= dict.fromkeys(("overlay", "anomaly", "anomaly_mask"))
        if self.overlays:
            entry["overlay"] = f"overlays/{name}.jpg"
            picture = overlay(to_picture(image), mask, palette, self.alpha)
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
            raise GenSegError(
                f"line {number} of {path} is not JSON: remove the line, and its image is predicted "
                "again."
            ) from error
    return lines


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


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
