"""The chain of few-shot commands: base learner, CGMGM on it, test, and your own object."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_genseg import CGMGM
from lightning_genseg.callbacks import read_manifest
from lightning_genseg.data import SyntheticScenes

SCENES = {
    "class_path": "SyntheticScenesDataModule",
    "init_args": {"size": [48, 64], "train_length": 12, "val_length": 8, "test_length": 8},
}
FOLD = {"data": SCENES, "novel_classes": ["vehicle"], "size": 65, "batch_size": 2, "num_workers": 0}
EPISODES = {"novel_setting": "background", "min_area": 20, "episodes": 3, "val_episodes": 2}
OWN = {"support_root": "support", "predict_root": "queries", "size": 65, "num_workers": 0}
NETWORK = {"encoder": "tu-test_resnet"}
METHOD = {
    "base_learner": "base.ckpt",
    "mixture": {"components": 2},
    "decoder": {"width": 32, "extra_inputs": ["mask"]},
}
TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "limit_train_batches": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def configs(tmp_path):
    """Configurations by name, and two scenes to search with the largest object of a third."""
    for name, model, data, data_args, model_args in (
        ("base", "BaseLearner", "BaseClassesDataModule", FOLD, NETWORK),
        ("cgmgm", "CGMGM", "EpisodesDataModule", FOLD | EPISODES, METHOD),
        ("own", "CGMGM", "FewShotFolderDataModule", OWN, {}),
        ("untrained", "CosinePrototypes", "FewShotFolderDataModule", OWN, NETWORK),
    ):
        content = {
            "trainer": TRAINER,
            "model": {"class_path": model, "init_args": model_args},
            "data": {"class_path": data, "init_args": data_args},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    scenes = SyntheticScenes(3, (48, 64), seed=5)
    for index, name in enumerate(("queries/a", "queries/b", "support/images/one")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = scenes[index]["image"].mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path)
    (tmp_path / "support/masks").mkdir()
    draw(tmp_path, scenes[2]["mask"].numpy() == 2)


def draw(folder, mask):
    Image.fromarray(mask.astype(np.uint8)).save(folder / "support/masks/one.png")


def test_from_base_learner_to_prediction(genseg, fails, configs, tmp_path):
    genseg("fit --config base.yaml")
    (checkpoint,) = tmp_path.glob("runs/base/**/*.ckpt")
    checkpoint.rename(tmp_path / "base.ckpt")
    genseg("fit --config cgmgm.yaml --model.mixture.iterations 3 --model.posterior.form tempered")
    (trained,) = tmp_path.glob("runs/cgmgm/**/*.ckpt")
    kept = torch.load(trained, weights_only=True)["hyper_parameters"]
    assert (kept["mixture"]["components"], kept["mixture"]["iterations"]) == (2, 3)
    assert kept["posterior"]["form"] == "tempered"
    (tmp_path / "base.ckpt").unlink()  # everything is in the second checkpoint
    genseg(f"test --config cgmgm.yaml --ckpt_path {trained}")
    folder = tmp_path / "runs/cgmgm/version_0/test"
    report = json.loads((folder / "metrics.json").read_text())
    assert report["images"] == 3
    assert list(report["IoU"]) == ["vehicle"]
    assert {"mIoU", "FB_IoU", "GmIoU"} <= set(report)
    # support, image, labels, similarity, initial and refined mask, posterior, prediction
    assert np.asarray(Image.open(folder / "pictures.png")).shape[1] == 8 * 320 + 9 * 4

    genseg(f"predict --config own.yaml --ckpt_path {trained} --predictions.output_dir found")
    for line in read_manifest(tmp_path / "found/predictions.jsonl"):
        mask = np.asarray(Image.open(tmp_path / "found" / line["mask"]))
        assert mask.shape == (48, 64)
        assert set(np.unique(mask)) <= {0, 1}
        assert (tmp_path / "found" / line["overlay"]).is_file()
    with pytest.warns(UserWarning, match=r"trained in squares of 65 .* set data.size to 65"):
        genseg(
            f"predict --config own.yaml --data.size 73 --ckpt_path {trained} "
            "--predictions.output_dir other"
        )
    model = CGMGM.load_from_checkpoint(trained)
    model.set_support([torch.rand(3, 40, 50)], [torch.eye(40, 50)])
    assert model.support.images.shape[-1] == 65
    untrained = "--model.base_learner null --model.encoder tu-test_resnet --model.ensemble false"
    message = fails(f"test --config cgmgm.yaml {untrained}")
    assert "needs the trained model: give its checkpoint" in message


def test_without_any_training(genseg, fails, configs, tmp_path):
    genseg("predict --config untrained.yaml --predictions.output_dir found")
    lines = read_manifest(tmp_path / "found/predictions.jsonl")
    assert [line["name"] for line in lines] == ["a", "b"]
    assert all(set(line["classes"]) <= {"background", "foreground"} for line in lines)
    resumed = (
        "predict --config untrained.yaml --predictions.output_dir found --predictions.resume true"
    )
    (tmp_path / "found/masks/b.png").unlink()
    genseg(resumed)
    assert (tmp_path / "found/masks/b.png").is_file()
    draw(tmp_path, np.pad(np.ones((20, 20)), ((0, 28), (0, 44))))  # now another object
    assert "found holds predictions by another support" in fails(resumed)


def test_a_base_learner_that_is_not_there(fails, configs):
    message = fails("fit --config cgmgm.yaml")
    assert "base_learner 'base.ckpt' does not exist: give the checkpoint" in message
