"""Predictions, written as they come."""

import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from lightning_genseg.arguments import check_arguments
from lightning_genseg.callbacks.earlier import TABLE, EarlierPredictions
from lightning_genseg.callbacks.manifest import Manifest, place
from lightning_genseg.callbacks.pictures import (
    classes_of,
    range_of,
    threshold_of,
    to_array,
    to_picture,
)
from lightning_genseg.data.dataset import ImageFolder
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import is_address, make_folder, replace_file
from lightning_genseg.plots.pictures import (
    ANOMALY_PALETTE,
    Palette,
    Picture,
    class_legend,
    class_table,
    encode,
    heat_map,
    indexed,
    outline,
    overlay,
    score_range,
    with_legend,
    with_scale,
)

_SHOWN = 20  # images on the screen that were not predicted


class PredictionWriter(Callback):
    """Write what ``predict`` finds, image by image.

    Below the output folder, for the image ``<name>``:

    - ``masks/<name>.png``: class indices as a palette image, which Pillow reads as numbers.
    - ``overlays/<name>.jpg``: class colours over the image, and beside it what they mean.
    - ``anomaly/<name>.png``, where the module has a score: a heat map with its scale, all in
      ``anomaly_range``.
    - ``anomaly_masks/<name>.png``, of a calibrated module (`genseg calibrate`): 8-bit palette, 1
      anomalous, 0 known; outlined in the overlay.
    - an image that cannot be read has a line with its name, path and ``error``, and no files.
    - ``classes.json``: number, name and colour of each class.
    - a line of JSON in ``predictions.jsonl``: ``name``, the absolute paths ``image`` and
      ``checkpoint``; the files (below the folder, or null); ``anomaly_score``,
      ``anomaly_threshold``; ``anomalous`` and ``classes``, shares of the pixels; ``support``, a
      digest of a few-shot method's examples, or null; and ``seconds``.

    Every file appears complete or not at all, and its line only after it: an interrupted run leaves
    no half file, and goes on with `resume`. Of several processes each writes its own
    ``predictions-rank<k>.jsonl``, joined at the end.

    Args:
        output_dir: folder to write to; default: ``predictions`` in the run's folder.
        overlays: whether to write overlays.
        anomaly_scores: whether to write the anomaly scores as well, ``anomaly/<name>.npy``,
            float32.
        resume: leave out the images that `output_dir` already lists.
        overwrite: start anew. What `output_dir` lists stays until new files have taken its place,
            and the rest of it is removed at the end; other files are never touched.
        alpha: opacity of the colours in overlays.
        on_error: of an image that cannot be read: `skip` it, name it at the end and exit with
            status 1, or `stop`.
        anomaly_range: scores of the darkest and the brightest colour; default: what the checkpoint
            keeps of its validation, or, without that, from the first image (of several processes
            each its own).

    Raises:
        UnwritableError: a full disk, or a folder that may only be read.
        GenSegError: arguments that exclude each other; a file in its way that no earlier run of
            `genseg predict` has written; an output folder that already holds
            predictions, unless `resume` or `overwrite` is set; resuming with another checkpoint,
            another anomaly threshold, another support or other images of the same name.
    """

    def __init__(
        self,
        output_dir: Path | None = None,
        overlays: bool = True,
        anomaly_scores: bool = False,
        resume: bool = False,
        overwrite: bool = False,
        alpha: float = 0.5,
        on_error: Literal["skip", "stop"] = "skip",
        anomaly_range: tuple[float, float] | None = None,
    ) -> None:
        check_arguments(PredictionWriter.__init__, locals(), alpha="[0, 1]")
        if resume and overwrite:
            raise GenSegError("resume and overwrite exclude each other: set one of them.")
        if resume and output_dir is None:
            raise GenSegError(
                "resume needs output_dir: name the folder with the earlier predictions."
            )
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.resume, self.overwrite = resume, overwrite
        self.overlays, self.anomaly_scores, self.alpha = overlays, anomaly_scores, alpha
        self.on_error = on_error
        self.unreadable: list[dict[str, Any]] = []  # lines of images without a prediction
        self.anomaly_range = anomaly_range
        self._range: tuple[float, float] | None = None
        self._manifest = Manifest(Path())
        self._earlier: EarlierPredictions  # what `setup` finds
        self._written = 0
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at what is there already; Lightning has set up the datamodule before."""
        if stage != "predict":
            return
        if int(getattr(pl_module, "num_classes", 0)) > 256:
            raise GenSegError(
                f"{type(pl_module).__name__} has {pl_module.num_classes} classes, and masks of 8 "
                "bits hold 256: call predict_image, or Trainer.predict without this callback."
            )
        folder = self.output_dir
        if folder is None:
            folder = Path(trainer.log_dir or trainer.default_root_dir) / "predictions"
        self._manifest, self._written = Manifest(folder), 0
        self.unreadable = []
        dataset = _images(trainer)
        if dataset is not None:
            dataset.skips_unreadable = self.on_error == "skip"
            dataset.as_bytes = getattr(pl_module, "takes_bytes", False)
        self._earlier = EarlierPredictions(self._manifest, self.resume, self.overwrite)
        self._earlier.leave_out(dataset, _support(trainer))
        self._earlier.refuse_foreign(dataset, self._kinds(pl_module))
        # Every process reads the lists before one of them changes something.
        trainer.strategy.barrier("predictions read")
        if trainer.is_global_zero:
            make_folder(folder, "predictions.output_dir")
            self._manifest.join()
        trainer.strategy.barrier("predictions ready")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to mix predictions of two checkpoints or thresholds, unknown in `setup`."""
        lines = self._earlier.lines
        theirs = [line["anomaly_range"] for line in lines if line.get("anomaly_range")]
        self._range = self.anomaly_range or next(map(tuple, theirs), range_of(pl_module))
        self._earlier.check_model(_checkpoint(trainer), *_anomaly(pl_module))
        if self.overwrite:
            if trainer.is_global_zero:
                self._manifest.overwrite()
            trainer.strategy.barrier("predictions stale")
        if trainer.is_global_zero:
            table = class_table(*classes_of(trainer, pl_module))
            # The folder of half-written files tells from now on that the rest is ours as well.
            replace_file(self._manifest.folder / TABLE, table, self._manifest.scratch)

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write the files of each image, then its line."""
        _need(batch, "image", "name", by="the data set")
        _need(outputs, "mask", by="predict_step")
        masks = to_array(outputs["mask"].to(torch.uint8))  # waits for the device
        seconds = (time.perf_counter() - self._began) / len(masks)
        names, palette = classes_of(trainer, pl_module)
        score, threshold = _anomaly(pl_module)
        paths = batch.get("path", [None] * len(masks))
        for index, (name, path, mask) in enumerate(zip(batch["name"], paths, masks, strict=True)):
            anomaly, flagged = (
                to_array(outputs[key][index]) if key in outputs else None
                for key in ("anomaly", "anomaly_mask")
            )
            line = {
                "name": name,
                "image": None if path is None else str(Path(path).absolute()),
                "checkpoint": _checkpoint(trainer),
                **self._write(
                    name,
                    to_picture(batch["image"][index]),
                    mask,
                    anomaly,
                    flagged,
                    (names, palette),
                    trainer.global_rank,
                    threshold,
                ),
                "anomaly_score": score,
                "anomaly_threshold": threshold,
                "classes": _shares(mask, names),
                "support": _support(trainer),
                "seconds": round(seconds, 4),
            }
            self._manifest.append(line, trainer.global_rank)
            self._written += 1
        self._list_unreadable(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the lists of all processes, and name what was not predicted.

        What `overwrite` has replaced is removed.
        """
        self._list_unreadable(trainer, pl_module)
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            dataset = _images(trainer)
            for path in getattr(dataset, "unsupported", ()):
                name = path.relative_to(dataset.root).as_posix()
                error = f"image '{path}' is of a type that cannot be read: save it as PNG or JPEG."
                self._append_error(trainer, pl_module, name, path, error)
            self._manifest.join(last=True)
            self.unreadable = [line for line in self._manifest.read() if "error" in line]
            if self.unreadable:
                sys.stderr.write(
                    f"genseg: {len(self.unreadable)} images were not predicted:\n"
                    + "".join(f"  {line['error']}\n" for line in self.unreadable[:_SHOWN])
                    + (
                        f"  and more, all in {self._manifest.path}\n"
                        * (len(self.unreadable) > _SHOWN)
                    )
                )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell how to go on."""
        if self._written and trainer.predicting and trainer.is_global_zero:
            sys.stderr.write(
                f"genseg: {self._written} images were predicted; go on with the same command and "
                f"--predictions.output_dir {self._manifest.folder} --predictions.resume true\n"
            )

    def _list_unreadable(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lost = getattr(_images(trainer), "unreadable", [])
        while lost:
            one = lost.pop(0)
            self._append_error(trainer, pl_module, one["name"], Path(one["path"]), one["error"])

    def _append_error(
        self, trainer: Trainer, pl_module: LightningModule, name: str, path: Path, error: str
    ) -> None:
        score, threshold = _anomaly(pl_module)
        line: dict[str, Any] = {"name": name, "image": str(path.absolute())}
        line["checkpoint"] = _checkpoint(trainer)
        line |= dict.fromkeys(("mask", "overlay", "anomaly", "anomaly_mask"))
        line |= {"anomaly_score": score, "anomaly_threshold": threshold, "error": error}
        self._manifest.append({**line, "support": _support(trainer)}, trainer.global_rank)

    def _kinds(self, pl_module: LightningModule) -> list[str]:
        """Kinds of files that every image gets."""
        kinds = ["mask", *(["overlay"] if self.overlays else [])]
        if _anomaly(pl_module)[0] is not None:
            kinds += ["anomaly", *(["anomaly_scores"] if self.anomaly_scores else [])]
        return kinds

    def _write(
        self,
        name: str,
        image: Picture,
        mask: NDArray[np.uint8],
        anomaly: NDArray[np.float32] | None,
        flagged: NDArray[np.bool_] | None,
        classes: tuple[Sequence[str], Palette],
        rank: int,
        threshold: float | None,
    ) -> dict[str, Any]:
        """Write the files of an image; what its line tells of them."""
        entry: dict[str, Any] = {"mask": place("mask", name)}
        files: dict[str, bytes] = {entry["mask"]: encode(indexed(mask, classes[1]), "png")}
        entry |= dict.fromkeys(("overlay", "anomaly", "anomaly_mask"))
        if self.overlays:
            entry["overlay"] = place("overlay", name)
            picture = overlay(image, mask, classes[1], self.alpha)
            legend = class_legend(*classes, set(np.unique(mask).tolist()))
            if flagged is not None:
                picture = outline(picture, flagged)
                legend += [("anomalous", ANOMALY_PALETTE[1])] if flagged.any() else []
            files[entry["overlay"]] = encode(with_legend(picture, legend), "jpeg")
        if anomaly is not None:
            self._range = low, high = self._range or score_range(anomaly)
            entry["anomaly"], entry["anomaly_range"] = place("anomaly", name), [low, high]
            heat = with_scale(heat_map(anomaly, low, high), low, high, threshold)
            files[entry["anomaly"]] = encode(heat, "png")
            if self.anomaly_scores:
                entry["anomaly_scores"] = place("anomaly_scores", name)
                buffer = io.BytesIO()
                np.save(buffer, anomaly)
                files[entry["anomaly_scores"]] = buffer.getvalue()
        if flagged is not None:
            entry["anomaly_mask"] = place("anomaly_mask", name)
            entry["anomalous"] = round(float(flagged.mean()), 6)
            marked = indexed(flagged.astype(np.uint8), ANOMALY_PALETTE)
            files[entry["anomaly_mask"]] = encode(marked, "png")
        self._earlier.refuse(files)
        self._manifest.claim(name, rank)
        for file, content in files.items():
            replace_file(self._manifest.folder / file, content, self._manifest.scratch)
        return entry


def _need(given: Any, *keys: str, by: str) -> None:
    if not isinstance(given, Mapping) or not set(keys) <= given.keys():
        raise GenSegError(
            f"PredictionWriter needs a dictionary with {' and '.join(keys)} from {by}: let it give "
            "one, or take the callback away."
        )


def _checkpoint(trainer: Trainer) -> str | None:
    path = trainer.ckpt_path
    if path is None or is_address(path):
        return None if path is None else str(path)
    return str(Path(path).absolute())


def _anomaly(pl_module: LightningModule) -> tuple[str | None, float | None]:
    """Name and threshold of the anomaly score."""
    threshold = threshold_of(pl_module)
    name: str | None = getattr(pl_module, "anomaly_score", None)
    return name, None if threshold is None else threshold.value


def _images(trainer: Trainer) -> Any:
    """The datamodule's images to predict, where they are files."""
    dataset = getattr(trainer.datamodule, "predict_dataset", None)  # type: ignore[attr-defined]
    return dataset if isinstance(dataset, ImageFolder) else None


def _support(trainer: Trainer) -> str | None:
    """Digest of the examples that come with images to predict, if any do."""
    digest: str | None = getattr(_images(trainer), "support_digest", None)
    return digest


def _shares(mask: NDArray[np.uint8], names: Sequence[str]) -> Mapping[str, float]:
    counts = np.zeros(256, np.int64)
    for row in mask:  # bincount copies what it counts
        counts += np.bincount(row, minlength=256)
    return {
        names[c]: round(float(counts[c]) / mask.size, 6) for c in np.flatnonzero(counts).tolist()
    }
