"""What `genseg predict` costs with everything written, beside a network that only predicts."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from measure import Row, compare, row
from PIL import Image

from lightning_genseg import GMMSeg
from lightning_genseg.callbacks import PredictionWriter
from lightning_genseg.data import FolderDataModule, SyntheticScenes


def predict(device: str, repeats: int, images: int = 200) -> Iterator[Row]:
    """Frames of 320 x 227 as JPEG, GMMSeg with FPN on Lite0; wall time, since writing is hidden.

    Ours loads in one process beside, and writes masks, overlays, anomalies and the list; the other
    is a plain loop that reads an image, predicts it and keeps nothing.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    network = {"encoder": "tu-tf_efficientnet_lite0", "decoder": "fpn"}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        scenes = SyntheticScenes(8, (227, 320))
        frames = root / "frames"
        frames.mkdir()
        for index in range(images):
            picture = Image.fromarray(scenes.read_pixels(index % 8))
            picture.save(frames / f"{index:03}.jpg")
        model = GMMSeg(scenes.num_classes, **network).eval()
        trainer = Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            callbacks=[PredictionWriter(root / "predictions", overwrite=True)],
        )
        data = FolderDataModule(
            root=root, num_classes=scenes.num_classes, predict_root=frames, num_workers=1
        )

        def ours() -> None:
            trainer.predict(model, data, return_predictions=False)

        def bare() -> None:
            model.to(device)
            with torch.inference_mode():
                for path in sorted(frames.iterdir()):
                    pixels = torch.from_numpy(np.array(Image.open(path))).to(device)
                    model(pixels.permute(2, 0, 1)[None].float() / 255).argmax(1).cpu()

        times = compare(ours, bare, max(2, repeats // 2), device, wall=True)
    yield row(
        f"genseg predict, all written, over reading and predicting alone, {images} frames",
        times,
        "≤ 1",
        detail=f"wall time, {os.cpu_count()} cores",
        obstacle="writing hides behind the network only where a second core is free",
    )
