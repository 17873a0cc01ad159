"""A test with `Report` on gloo processes: `python -m tests.report_run FOLDER PROCESSES`."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lightning_genseg import SegmentationModule
from lightning_genseg.callbacks import Report
from lightning_genseg.data import SyntheticScenesDataModule
from lightning_genseg.uncertainty.conformal import Threshold


class ColourSegmenter(SegmentationModule):
    """One linear map of the colour of a pixel."""

    def __init__(self) -> None:
        super().__init__(6, anomaly_score="energy")
        self.features = nn.Conv2d(3, 6, 1)
        self.anomaly.thresholds["energy"] = Threshold(-2.0, 0.1, "image", 0.1, 9)

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        scores = self.features(self.normalize(image))
        return {"logits": scores, "features": scores}

    def compute_loss(self, batch):
        raise NotImplementedError


def run(folder: Path, processes: int) -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    size = (32, 48)
    data = SyntheticScenesDataModule(
        size, test_length=8, held_out=True, crop_size=size, eval_batch_size=2, num_workers=0
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        callbacks=[Report(0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.test(ColourSegmenter(), data, verbose=False)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
