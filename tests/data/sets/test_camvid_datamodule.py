"""CamVid's datamodule on the real frames."""

import torch

from lightning_genseg.data import CamVidDataModule


def test_attributes_need_no_files():
    data = CamVidDataModule("nowhere")
    assert data.num_classes == len(data.palette) == 11
    assert data.class_names[3] == "road"


def test_real_batches(shared_dir):
    data = CamVidDataModule(
        shared_dir / "data" / "camvid", batch_size=2, num_workers=0, crop_size=(96, 128)
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 96, 128)
    assert batch["mask"].dtype == torch.int64
    assert len(data.train_dataloader()) == 183
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (1, 3, 360, 480)
    assert len(data.val_dataloader()) == 101
