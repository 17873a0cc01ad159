"""Every configuration that ships: the smoke ones learn, the others run two steps as they are."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.cli import main
from lightning_genseg.datasets import CamVid

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMOKE = sorted((EXPERIMENTS / "smoke").glob("*.yaml"))
CAMVID = sorted((EXPERIMENTS / "camvid").glob("*.yaml"))
TWO_STEPS = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.num_workers=0"]


def name(path):
    return str(path.relative_to(EXPERIMENTS))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genseg"])


def write_images(folder, masks, count, size, classes):
    """Random images and masks with the same names."""
    rng = np.random.default_rng(0)
    for target in (folder, masks):
        target.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        labels = rng.integers(classes, size=size, dtype=np.uint8)
        Image.fromarray(labels).save(masks / f"{i}.png")


@pytest.mark.parametrize("path", SMOKE, ids=name)
def test_smoke(path, tmp_path):
    main(["fit", "--config", str(path)])
    (run,) = (tmp_path / "runs").glob("*/version_0")
    scores = json.loads((run / "val_metrics.json").read_text())
    assert scores["mIoU"] > 0.3  # guessing gives about 0.1, the most frequent class 0.07

    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    after = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    main(["test", *after])
    tested = json.loads(next((tmp_path / "runs").glob("*/*/metrics.json")).read_text())
    assert tested["mIoU"] > 0.25

    write_images(tmp_path / "photos", tmp_path / "unused", 2, (50, 70), 2)
    main(["predict", *after, "--data.predict_root=photos", "--predictions.output_dir=out"])
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize("path", CAMVID, ids=name)
def test_camvid(path, tmp_path):
    for split in ("train", "val", "test"):
        write_images(
            tmp_path / split, tmp_path / f"{split}annot", 8, (72, 96), len(CamVid.CLASS_NAMES)
        )
    main(
        [
            "fit",
            "--config",
            str(path),
            "--data.root=.",
            "--trainer.val_check_interval=1",
            *TWO_STEPS,
        ]
    )
    assert list((tmp_path / "runs").glob("*/*/*/checkpoints/last.ckpt"))


def test_quickstart():
    main(["fit", "--config", str(EXPERIMENTS / "quickstart.yaml"), *TWO_STEPS])


def test_own_images(tmp_path):
    write_images(tmp_path / "mine" / "images", tmp_path / "mine" / "masks", 10, (80, 90), 3)
    options = "--data.num_classes=3 --data.crop_size=[64,64] --data.batch_size=4 --data.root=mine"
    options += " --trainer.accelerator=cpu --trainer.val_check_interval=1"
    options += " --model.encoder_weights=null"
    config = str(EXPERIMENTS / "own_images.yaml")
    main(["fit", "--config", config, *options.split(), *TWO_STEPS])
