"""`genseg calibrate`: statistics of known data, and thresholds that keep a promise."""

import io
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.arguments import check_arguments
from lightning_genseg.data.datamodule import SegmentationDataModule
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import is_address, local_copy, make_folder, replace_file
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.methods.checkpoints import read_run
from lightning_genseg.metrics.anomaly import score_histogram
from lightning_genseg.ops.inference_options import InferenceOptions, input_size
from lightning_genseg.ops.resize import resize_labels
from lightning_genseg.ops.views import evaluation_mode, window_positions
from lightning_genseg.uncertainty.conformal import (
    Level,
    Threshold,
    conformal_image_threshold,
    conformal_pixel_threshold,
    conformal_rank,
    image_quantile,
)


class GenSegTrainer(Trainer):
    """Lightning's Trainer, which can also calibrate."""

    def calibrate(
        self,
        model: SegmentationModule,
        datamodule: SegmentationDataModule,
        ckpt_path: str | Path | None = None,
        output: Path | None = None,
        false_positive_rate: float = 0.05,
        level: Level = "image",
        risk: float = 0.1,
        weights_only: bool | None = None,
    ) -> None:
        """Fit what anomaly scores need after training.

        Statistics come from the training set, thresholds from the validation set; see `calibrate`
        for what is promised. One process; `limit_train_batches` and `limit_val_batches` hold.

        Args:
            model: the model to calibrate.
            datamodule: its data.
            ckpt_path: checkpoint of the trained model, or its address.
            output: checkpoint to write; default: `-calibrated` before the suffix of a path.
            false_positive_rate: promised share of known pixels above the threshold, in (0, 1).
            level: `pixel`, or `image` (the share within an image, with probability 1 - `risk`).
            risk: in (0, 1); only for `image`.
            weights_only: not used, but the configuration that `fit` leaves holds it.
        """
        if not isinstance(model, SegmentationModule):
            raise GenSegError(
                f"a {type(model).__name__} knows masks only and has no scores of images to "
                "calibrate: give a segmentation model."
            )
        if ckpt_path is None:  # of a model that is built from the files of others
            raise GenSegError(
                "genseg calibrate adds what it finds to a checkpoint: give that of the model with "
                "--ckpt_path."
            )
        if output is None:
            if is_address(ckpt_path):
                raise GenSegError(
                    f"'{ckpt_path}' is an address: give --output, the .ckpt file to write."
                )
            path = Path(local_copy(ckpt_path))  # type: ignore[arg-type]
            stem = path.stem.removesuffix("-calibrated")
            output = path.with_name(f"{stem}-calibrated{path.suffix}")
        target = Path(output)
        if target.is_dir():
            raise GenSegError(f"output '{target}' is a folder: give the path of a new .ckpt file.")
        if target.exists() and not read_run(target).get("anomaly", {}).get("thresholds"):
            raise GenSegError(
                f"output '{target}' exists and genseg calibrate has not written it: give the path "
                "of a new .ckpt file."
            )
        make_folder(target.parent, "the folder of output")
        checkpoint = read_run(ckpt_path)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
        self.datamodule, model.trainer = datamodule, self
        model.setup("validate")  # refuses devices, precisions and data as a validation would
        model.to(self.strategy.root_device)
        thresholds = calibrate(
            model,
            _first(datamodule.plain_loader("train"), self.limit_train_batches),
            _first(datamodule.plain_loader("val"), self.limit_val_batches),
            false_positive_rate,
            level,
            risk,
        )
        save_calibrated(model, ckpt_path, target)
        for name, threshold in thresholds.items():
            used = f", in use. {threshold.promise()}" if name == model.anomaly_score else ""
            print(f"{name}: threshold {threshold.value:.6g}{used}")
        print(f"The calibrated checkpoint is {target}")


@torch.no_grad()
def calibrate(
    model: SegmentationModule,
    train: Iterable[dict[str, Any]],
    held_out: Iterable[dict[str, Any]],
    false_positive_rate: float = 0.05,
    level: Level = "image",
    risk: float = 0.1,
    progress: bool = True,
) -> dict[str, Threshold]:
    """Fit the scores' statistics on training data, and all thresholds on held-out data.

    The model then predicts with `anomaly_mask`. A threshold is a split-conformal quantile of the
    scores of known pixels. `level="pixel"` promises that a new known pixel exceeds it with at most
    `false_positive_rate`. `level="image"` promises that in a new image, with probability 1 -
    `risk`, at most that share of the known pixels does; this holds although the pixels of an image
    depend on each other. Scores are those of the precision of the Trainer that the model is
    attached to, if it is to one; predict in the same.

    Args:
        model: trained; its `inference` is used as for prediction.
        train: batches of `image` and `mask`, without augmentation; one process.
        held_out: likewise, of images that the model was not trained on.
        false_positive_rate: in (0, 1).
        level: `pixel` or `image`.
        risk: in (0, 1); only for `image`.
        progress: show progress bars.

    Returns:
        the thresholds by name of the score; they are in `model.anomaly` as well.

    Raises:
        GenSegError: no labelled pixel, too few images or pixels for the promise, or a model
            without scores.
    """
    check_arguments(calibrate, locals(), false_positive_rate="(0, 1)", risk="(0, 1)")
    if not model.computable_scores():
        raise GenSegError(f"{type(model).__name__} has no anomaly scores to calibrate.")
    if level == "image" and isinstance(held_out, DataLoader):  # not after two passes over the data
        count = len(held_out.dataset)  # type: ignore[arg-type]
        conformal_rank(count, risk, "risk", "held-out images")
    model.anomaly.thresholds = {}
    trainer = model._trainer
    precision = trainer.precision_plugin.forward_context() if trainer else nullcontext()
    with evaluation_mode(model), precision:
        _fit_statistics(model, tqdm(train, "training data", disable=not progress))
        names = model.computable_scores()
        bar = tqdm(held_out, "held-out data", disable=not progress)
        thresholds = _thresholds(model, names, bar, false_positive_rate, level, risk)
    model.anomaly.thresholds = thresholds
    model.anomaly.inference = model.prediction_options()
    return thresholds


def _first(loader: DataLoader[Any], limit: float | None) -> Iterable[dict[str, Any]]:
    """A Trainer's `limit_*_batches`: so many batches, or such a share of them (1.0 is all)."""
    if limit is None or (isinstance(limit, float) and limit >= 1):
        return loader
    return islice(loader, limit if isinstance(limit, int) else int(limit * len(loader)))


def _fit_statistics(model: SegmentationModule, batches: Iterable[dict[str, Any]]) -> None:
    model.anomaly.sml.reset()  # an interrupted call has left its sums
    model.anomaly.mahalanobis.reset()
    for batch in batches:
        image, mask = batch["image"].to(model.device), batch["mask"].to(model.device)
        for view, labels in _views(image, mask, model.inference or {}):
            outputs = model.outputs(view)
            features = outputs["features"]
            small = resize_labels(model.cover(labels, features), features.shape[-2:])
            model.anomaly.mahalanobis.observe(features, small, model.num_classes)
            model.anomaly.sml.observe(model.to_image(outputs["logits"], view))
    model.anomaly.sml.finish()
    model.anomaly.mahalanobis.finish()


def _views(
    image: Tensor, mask: Tensor, options: InferenceOptions
) -> Iterable[tuple[Tensor, Tensor]]:
    """What the network sees of an image when it predicts, but for mirror images, with labels."""
    for scale in options.get("scales") or [1.0]:
        size = input_size((image.shape[-2], image.shape[-1]), options, scale)
        scaled, labels = image, mask
        if size != tuple(image.shape[-2:]):
            scaled = F.interpolate(image, size, mode="bilinear")
            labels = resize_labels(mask, size)
        window = options.get("window")
        if window is None:
            yield scaled, labels
            continue
        for rows, columns in window_positions(size, window, options["stride"]):
            yield scaled[..., rows, columns], labels[..., rows, columns]


def _thresholds(
    model: SegmentationModule,
    names: Sequence[str],
    batches: Iterable[dict[str, Any]],
    false_positive_rate: float,
    level: Level,
    risk: float,
) -> dict[str, Threshold]:
    quantiles: dict[str, list[float]] = {name: [] for name in names}
    histograms: dict[str, Tensor] = {}
    for batch in batches:
        image, masks = batch["image"].to(model.device), batch["mask"].to(model.device)
        maps = model.anomaly_maps(image, names, masks.shape[-2:])
        for index, mask in enumerate(masks):
            known = mask != model.ignore_index
            if not bool(known.any()):
                continue
            for name in names:
                scores = maps[name][index][known]
                if level == "image":
                    quantiles[name].append(image_quantile(scores, false_positive_rate))
                else:
                    histograms[name] = histograms.get(name, 0) + score_histogram(scores)
    if not histograms and not any(quantiles.values()):
        raise GenSegError(
            "no labelled pixel in the held-out data: there is nothing to calibrate on."
        )
    return {
        name: conformal_image_threshold(quantiles[name], false_positive_rate, risk)
        if level == "image"
        else conformal_pixel_threshold(histograms[name], false_positive_rate)
        for name in names
    }


def save_calibrated(model: SegmentationModule, source: str | Path, target: Path) -> None:
    """Write `source` with what `calibrate` has fitted, as a whole or not at all."""
    checkpoint = read_run(source)
    checkpoint["anomaly"] = model.anomaly.fitted_state()
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    replace_file(target, buffer.getvalue())
