"""The command as users call it: a tiny run, and the one line that a mistake prints."""

import sys

import pytest
import yaml
from PIL import Image

from lightning_genseg.cli.main import main
from lightning_genseg.data import SyntheticScenes

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {
        "class_path": "SoftmaxSegmenter",
        "init_args": {"encoder": "tu-test_resnet", "decoder": "segformer"},
    },
    "data": {
        "class_path": "SyntheticScenesDataModule",
        "init_args": {
            "size": [64, 64],
            "crop_size": [64, 64],
            "train_length": 4,
            "val_length": 2,
            "test_length": 2,
            "batch_size": 2,
            "eval_batch_size": 1,
            "num_workers": 0,
        },
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder with config.yaml, and the run of a fit that was started with it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["genseg"])
        main(["fit", "--config", "config.yaml"])
    return folder


@pytest.fixture
def config(run):
    return str(run / "config.yaml")


@pytest.fixture
def checkpoint(run):
    return str(run / "runs" / "config" / "version_0" / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    dataset = SyntheticScenes(40, (64, 64), seed=3)
    for index in range(40):
        image = dataset[index]["image"].mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def fails(genseg, capsys):
    """Run a mistaken command line: the one line that it prints."""

    def run(line):
        with pytest.raises(SystemExit) as exit:
            genseg(line)
        assert exit.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (error,) = [line for line in lines if line.startswith("genseg: error: ")]
        assert error == lines[-1]
        assert not any(line.startswith("Traceback") for line in lines)
        return error.removeprefix("genseg: error: ")

    return run
