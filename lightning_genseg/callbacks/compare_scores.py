"""All anomaly scores of one test."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file
from lightning_genseg.methods.base import SegmentationModule
from lightning_genseg.metrics.anomaly import AnomalyMetrics


class CompareScores(Callback):
    """Measure every anomaly score of the module in one test run, not only the one it is set to.

    Leaves ``anomaly_scores.json`` in the run's folder: by name of the score ``AUROC``, ``AP``,
    ``FPR95``, null where no pixel is anomalous. Scores that are not fitted yet (`genseg calibrate`)
    are left out. Predicts each image once more and takes 64 MB per score. The data need anomaly
    labels, or it raises a `GenSegError`.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, AnomalyMetrics] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty histograms."""
        if not isinstance(pl_module, SegmentationModule):
            raise GenSegError(
                f"CompareScores takes the scores of a SegmentationModule, and "
                f"{type(pl_module).__name__} is none: leave the callback out."
            )
        names = pl_module.computable_scores()
        if not names:
            raise GenSegError(
                f"{type(pl_module).__name__} has no anomaly scores: leave CompareScores out."
            )
        self._metrics = {name: AnomalyMetrics().to(pl_module.device) for name in names}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the pixels of a batch."""
        assert isinstance(pl_module, SegmentationModule)
        if "anomaly" not in batch:
            raise GenSegError(
                "CompareScores needs anomaly labels, which these data do not have: name "
                "unknown_classes, use data with anomaly masks, or take the callback away."
            )
        labels = batch["anomaly"]
        with trainer.precision_plugin.forward_context():  # that of the test itself
            maps = pl_module.anomaly_maps(batch["image"], list(self._metrics), labels.shape[-2:])
        for name, metrics in self._metrics.items():
            metrics.update(maps[name], labels)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        values = {
            name: {
                key: value.item() if value.isfinite() else None  # JSON has no NaN
                for key, value in metrics.compute().items()
            }
            for name, metrics in self._metrics.items()
        }
        self._metrics = {}
        log_dir = trainer.log_dir
        if log_dir is not None and trainer.is_global_zero:
            text = json.dumps(values, indent=2, allow_nan=False) + "\n"
            replace_file(Path(log_dir) / "anomaly_scores.json", text.encode())
