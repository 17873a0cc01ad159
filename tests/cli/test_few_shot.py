"""The chain of few-shot commands: base learner, CGMGM on it, test, and your own object."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_genseg.callbacks import read_manifest
from lightning_genseg.cli.main import main
from lightning_genseg.data import SyntheticScenes

SCENES = {
    "class_path": "SyntheticScenesDataModule",
    "init_args": {"size": [48, 64], "train_length": 12, "val_length": 8, "test_length": 8},
}
FOLD = {"data": SCENES, "novel_classes": ["vehicle"], "size": 65, "batch_size": 2, "num_workers": 0}
EPISODES = {"novel_setting": "background", "min_area": 20, "episodes": 3, "val_episodes": 2}


def config(name, model, data, data_args, **model_args):
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": name,
    }
    content = {
        "trainer": trainer,
        "model": {"class_path": model, "init_args": model_args},
        "data": {"class_path": data, "init_args": data_args},
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    return ["--config", f"{name}.yaml"]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["genseg"])


@pytest.fixture
def photos(tmp_path):
    """Two scenes to search, and one with the mask of its largest object."""
    scenes = SyntheticScenes(3, (48, 64), seed=5)
    for index, name in enumerate(("queries/a", "queries/b", "support/images/one")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = scenes[index]["image"].mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(path)
    mask = scenes[2]["mask"].numpy()
    (tmp_path / "support/masks").mkdir()
    Image.fromarray((mask == 2).astype(np.uint8)).save(tmp_path / "support/masks/one.png")
    return {"support_root": "support", "predict_root": "queries", "size": 65, "num_workers": 0}


def test_from_base_learner_to_prediction(tmp_path, photos, capsys):
    base = config("base", "BaseLearner", "BaseClassesDataModule", FOLD, encoder="tu-test_resnet")
    main(["fit", *base])
    (checkpoint,) = tmp_path.glob("base/**/*.ckpt")

    method = config(
        "cgmgm", "CGMGM", "EpisodesDataModule", {**FOLD, **EPISODES}, base_learner=str(checkpoint)
    )
    main(["fit", *method])
    (trained,) = tmp_path.glob("cgmgm/**/*.ckpt")
    checkpoint.unlink()  # everything is in the second checkpoint
    main(["test", *method, "--ckpt_path", str(trained)])
    folder = tmp_path / "cgmgm/runs/cgmgm/version_1"
    report = json.loads((folder / "metrics.json").read_text())
    assert report["images"] == 3
    assert list(report["IoU"]) == ["vehicle"]
    assert {"mIoU", "FB_IoU", "GmIoU"} <= set(report)
    # support, image, labels, similarity, initial and refined mask, posterior, prediction
    with Image.open(folder / "pictures.png") as picture:
        assert picture.width == 8 * 320 + 9 * 4

    own = config("own", "CGMGM", "FewShotFolderDataModule", photos)
    main(["predict", *own, "--ckpt_path", str(trained), "--predictions.output_dir", "found"])
    for line in read_manifest(tmp_path / "found/predictions.jsonl"):
        with Image.open(tmp_path / "found" / line["mask"]) as image:
            mask = np.asarray(image)
        assert mask.shape == (48, 64)
        assert set(np.unique(mask)) <= {0, 1}
        assert (tmp_path / "found" / line["overlay"]).is_file()
    capsys.readouterr()
    untrained = ["--model.base_learner", "null", "--model.encoder", "tu-test_resnet"]
    with pytest.raises(SystemExit):
        main(["test", *method, *untrained, "--model.ensemble", "false"])
    assert "needs the trained model: give its checkpoint" in capsys.readouterr().err


def test_without_any_training(tmp_path, photos, capsys):
    own = config(
        "own", "CosinePrototypes", "FewShotFolderDataModule", photos, encoder="tu-test_resnet"
    )
    main(["predict", *own, "--predictions.output_dir", "found"])
    lines = read_manifest(tmp_path / "found/predictions.jsonl")
    assert [line["name"] for line in lines] == ["a", "b"]
    assert all(set(line["classes"]) <= {"background", "foreground"} for line in lines)
    resumed = ["predict", *own, "--predictions.output_dir", "found", "--predictions.resume", "true"]
    Path("found/masks/b.png").unlink()
    main(resumed)
    assert Path("found/masks/b.png").is_file()
    mask = np.zeros((48, 64), np.uint8)
    mask[:20, :20] = 1
    Image.fromarray(mask).save("support/masks/one.png")  # now another object
    with pytest.raises(SystemExit):
        main(resumed)
    assert "found holds predictions by another support" in capsys.readouterr().err


def test_a_base_learner_that_is_not_there(capsys):
    method = config(
        "cgmgm", "CGMGM", "EpisodesDataModule", {**FOLD, **EPISODES}, base_learner="no.ckpt"
    )
    with pytest.raises(SystemExit):
        main(["fit", *method])
    assert "base_learner 'no.ckpt' does not exist: give the checkpoint" in capsys.readouterr().err
