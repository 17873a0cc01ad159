"""The state that a run has reached."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keep the last state in ``checkpoints/last.ckpt``: after each validation, and at the end.

    Lightning's own `save_last` keeps it only when another checkpoint is kept at the same step, and
    with `save_top_k: 0` only at the end, which an interrupted run never reaches.
    """

    def __init__(self) -> None:
        # The newest replaces the one before, also that of the run that is resumed.
        super().__init__(filename="last", enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was trained after the last validation."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.dirpath or trainer.default_root_dir)
            path = self.best_model_path or folder / "last.ckpt"
            trainer.save_checkpoint(path, weights_only=False)  # unset: a line that puzzles
