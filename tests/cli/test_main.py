"""The command as users call it: real configuration files, real networks."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lightning_genseg
from lightning_genseg.callbacks import ChannelsLast, read_manifest
from lightning_genseg.cli.calibrate import GenSegTrainer
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
    """Folder with config.yaml, and the checkpoint of a fit that was started with it."""
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


@pytest.fixture(autouse=True)
def _clean_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["genseg"]
    )  # Lightning warns when pytest's arguments are there


def fails(args, capsys):
    """The one line that a mistaken command prints."""
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("genseg: error: ")]
    assert line == lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)
    return line.removeprefix("genseg: error: ")


# --- the main job ---------------------------------------------------------------------------


def test_fit_leaves_a_run_that_explains_itself(run, checkpoint):
    folder = run / "runs" / "config" / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["class_path"].endswith("SoftmaxSegmenter")
    assert saved["report"] == {"num_pictures": 6}
    report = json.loads((folder / "val_metrics.json").read_text())
    assert set(report["IoU"]) == set(SyntheticScenes.CLASS_NAMES)
    assert (folder / "val_pictures.png").exists()
    parameters = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert parameters["num_classes"] == len(SyntheticScenes.CLASS_NAMES)  # linked from the data
    assert parameters["class_names"] == list(SyntheticScenes.CLASS_NAMES)


def test_test_leaves_scores_and_pictures(config, checkpoint, tmp_path):
    main(["test", "--config", config, "--ckpt_path", checkpoint])
    (folder,) = tmp_path.glob("runs/*/config/version_0")
    report = json.loads((folder / "metrics.json").read_text())
    assert 0 <= report["mIoU"] <= 1
    assert report["images"] == 2
    assert report["checkpoint"] == checkpoint
    assert (folder / "pictures.png").exists()
    assert (folder / "test_config.yaml").exists()
    assert not (folder / "config.yaml").exists()  # where it could be a fit's


def test_a_test_leaves_the_log_of_the_fit_alone(config, checkpoint, tmp_path, capsys):
    fit = tmp_path / "runs" / "a" / "b"
    fit.mkdir(parents=True)
    (fit / "config.yaml").touch()
    (fit / "metrics.csv").write_text("kept")
    place = {"save_dir": "runs", "name": "a", "version": "b"}
    logger = [x for key, value in place.items() for x in (f"--trainer.logger.{key}", value)]
    command = ["--config", config, "--ckpt_path", checkpoint, "--trainer.logger", "CSVLogger"]
    main(["test", *command, *logger])
    assert (fit / "metrics.csv").read_text() == "kept"
    assert (tmp_path / "runs" / "a" / "b-test" / "metrics.json").exists()
    assert "holds a fit; this run goes to b-test beside it" in capsys.readouterr().err


def test_the_saved_config_is_a_config(run, checkpoint, photos, tmp_path):
    """A run's own files are enough to predict a folder of images."""
    saved = run / "runs" / "config" / "version_0" / "config.yaml"
    options = ["--data.predict_root", str(photos), "--predictions.output_dir", "out"]
    main(["predict", "--config", str(saved), "--ckpt_path", checkpoint, *options])
    lines = read_manifest(tmp_path / "out" / "predictions.jsonl")
    assert len(lines) == 40
    assert {line["checkpoint"] for line in lines} == {checkpoint}
    module = lightning_genseg.SoftmaxSegmenter.load_from_checkpoint(checkpoint)
    for line in lines[::13]:
        with (
            Image.open(line["image"]) as image,
            Image.open(tmp_path / "out" / line["mask"]) as mask,
        ):
            expected = module.predict_image(np.array(image))["mask"]
            assert (np.array(mask) == expected).mean() > 0.999


def test_predict_keeps_nothing_in_memory(config, checkpoint, photos, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["predict", "--help"])
    assert exit.value.code == 0
    assert "return_predictions" not in capsys.readouterr().out


@pytest.mark.slow
def test_killed_prediction_goes_on_where_it_stopped(config, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    options = ["--data.predict_root", str(photos), "--predictions.output_dir", str(out)]
    args = ["predict", "--config", config, "--ckpt_path", checkpoint, *options]
    manifest = out / "predictions.jsonl"
    with start(args) as process:
        wait_for(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") >= 3, process)
        process.kill()
    early = {line["name"]: line for line in read_manifest(manifest)}
    assert 3 <= len(early) < 40
    for line in early.values():
        for key in ("mask", "overlay"):
            read(out / line[key])
    for path in [*(out / "masks").iterdir(), *(out / "overlays").iterdir()]:
        read(path)  # also what is not listed yet is whole
    times = {name: (out / line["mask"]).stat().st_mtime_ns for name, line in early.items()}

    main([*args, "--predictions.resume", "true"])
    lines = {line["name"]: line for line in read_manifest(manifest)}
    assert sorted(lines) == [f"{index:02}" for index in range(40)]
    for name, moment in times.items():
        assert (out / lines[name]["mask"]).stat().st_mtime_ns == moment
    assert {path.name for path in out.iterdir()} == {"masks", "overlays", "predictions.jsonl"}


@pytest.mark.slow
def test_interrupted_training_says_where_to_go_on(config, tmp_path):
    args = ["fit", "--config", config, "--trainer.max_epochs", "10000"]
    with start(args) as process:
        wait_for(lambda: list(tmp_path.glob("runs/*/config/*/checkpoints/*.ckpt")), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("genseg: ")]
    assert line.startswith("genseg: interrupted; go on with the same command and --ckpt_path ")
    path = line.rpartition("--ckpt_path ")[2]
    assert torch.load(path, weights_only=True)["epoch"] >= 0


@contextmanager
def start(args):
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_genseg.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", "lightning_genseg", *args],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, process):
    while not condition():
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        time.sleep(0.005)


def read(path):
    with Image.open(path) as image:
        image.load()


# --- checkpoints and configuration ----------------------------------------------------------


def test_the_checkpoint_wins_and_says_so(config, checkpoint, capsys):
    args = ["test", "--config", config, "--ckpt_path", checkpoint, "--model.dropout", "0.5"]
    main(args)
    assert f"genseg: {checkpoint} sets model.dropout to 0.1, not 0.5" in capsys.readouterr().out


def test_a_checkpoint_of_a_script(config, checkpoint, tmp_path):
    """Such a checkpoint does not name its class, and plain Lightning cannot read it."""
    content = torch.load(checkpoint, weights_only=True)
    for key in ("_class_path", "_instantiator"):
        del content["hyper_parameters"][key]
    torch.save(content, tmp_path / "script.ckpt")
    main(["test", "--config", config, "--ckpt_path", "script.ckpt"])
    (report,) = tmp_path.glob("runs/*/config/*/metrics.json")
    assert json.loads(report.read_text())["checkpoint"] == "script.ckpt"


@pytest.mark.parametrize("args", [["--help"], ["fit", "--help"], ["fit", "--model.help", "GMMSeg"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 0
    assert "usage: genseg" in capsys.readouterr().out or "--model.help" in args


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"genseg {lightning_genseg.__version__}"


# --- what a run does unless it is told otherwise --------------------------------------------


class Stop(Exception):
    """Raised where the Trainer would run."""


def started(args, monkeypatch):
    """The Trainer that a command line makes."""
    found = []

    def stop(self, **kwargs):
        found.append(self)
        raise Stop

    monkeypatch.setattr(GenSegTrainer, "fit", stop)
    with pytest.raises(Stop):
        main(["fit", *args])
    return found[0]


def test_the_defaults_of_a_run(config, run, tmp_path, monkeypatch):
    trainer = started(["--config", config], monkeypatch)
    assert trainer.num_sanity_val_steps == 0
    assert trainer.check_val_every_n_epoch == 1  # CONFIG gives no interval
    (checkpoint,) = trainer.checkpoint_callbacks
    assert (checkpoint.save_last, checkpoint.save_top_k) == (True, 0)
    assert Path(trainer.log_dir) == Path("runs", run.name, "config", "version_0")
    options = ["--trainer.default_root_dir", "elsewhere", "--trainer.logger.version", "a"]
    trainer = started(["--config", config, *options], monkeypatch)
    assert Path(trainer.log_dir) == Path("elsewhere", "runs", run.name, "config", "a")
    content = {**CONFIG, "trainer": {"accelerator": "cpu"}}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    Path("other.yaml").write_text("trainer: {val_check_interval: 7}")
    trainer = started(["--config", "mine.yaml", "--config", "other.yaml"], monkeypatch)
    assert trainer.log_every_n_steps == 10
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (7, None)
    assert Path(trainer.log_dir) == Path("runs", "mine", "version_0")
    model, data = CONFIG["model"]["init_args"], ["--data", "SyntheticScenesDataModule"]
    options = [word for key, value in model.items() for word in (f"--model.{key}", value)]
    trainer = started(["--model", "SoftmaxSegmenter", *options, *data], monkeypatch)
    assert Path(trainer.log_dir) == Path("runs", "SoftmaxSegmenter", "version_0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"check_val_every_n_epoch": 3}, {"check_val_every_n_epoch": 3}),
        ({"val_check_interval": 0.5}, {"val_check_interval": 0.5, "check_val_every_n_epoch": 1}),
        ({"val_check_interval": 1, "check_val_every_n_epoch": 1}, {"check_val_every_n_epoch": 1}),
        ({"val_check_interval": "00:01:00:00"}, {"check_val_every_n_epoch": None}),
        ({"num_sanity_val_steps": 2}, {"num_sanity_val_steps": 2}),
        ({"log_every_n_steps": 50}, {"log_every_n_steps": 50}),
        ({"logger": False}, {"loggers": []}),
        ({"enable_checkpointing": False}, {"checkpoint_callbacks": []}),
        ({"barebones": True}, {"loggers": [], "checkpoint_callbacks": [], "log_every_n_steps": 0}),
        ({"fast_dev_run": True}, {"check_val_every_n_epoch": 1, "num_sanity_val_steps": 0}),
    ],
)
def test_what_is_given_holds(given, expected, monkeypatch):
    trainer = {"accelerator": "cpu", **given}
    Path("a.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))
    made = started(["--config", "a.yaml"], monkeypatch)
    assert {name: getattr(made, name) for name in expected} == expected


def test_a_checkpoint_callback_of_ones_own_is_the_only_one(config, monkeypatch):
    options = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.monitor", "val_mIoU"]
    (checkpoint,) = started(["--config", config, *options], monkeypatch).checkpoint_callbacks
    assert checkpoint.monitor == "val_mIoU"
    options = ["--trainer.callbacks", "lightning_genseg.callbacks.ChannelsLast"]
    trainer = started(["--config", config, *options], monkeypatch)
    assert any(isinstance(callback, ChannelsLast) for callback in trainer.callbacks)
    assert trainer.checkpoint_callback.save_last


# --- one line for what the user can mend ----------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.encodr", "resnet18"], "Option 'encodr' is not accepted; did you mean encoder"),
        (["--model", "GMMSeg", "--model.components", "3"], "did you mean mixture.components"),
        (["--model", "GMMSeg", "--model.mixture.componnts", "3"], "did you mean mixture.components"),
        (["--model", "GMMSeg", "--model.mixture.components", "0"], "components is 0; it must be at least 1."),
        (["--model", "GMMSg"], "--model: there is no class GMMSg; did you mean GMMSeg"),
        (["--data", "CamVidDatModule"], "--data: there is no class CamVidDatModule; did you mean CamVidDataModule"),
        (["--data.sparse", "Pints"], "--data.sparse: there is no class Pints; did you mean Points"),
        (["--model.encoder", "resnt18"], "encoder 'resnt18' is no encoder"),
        (["--trainer.max_epochs", "many"], 'Parser key "trainer.max_epochs"'),
        (["--data", "CamVidDataModule", "--data.root", "nowhere"], "'nowhere/train' does not exist"),
        (["--data.batch_size", "0"], "batch_size is 0 but must be at least 1."),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--report.num_pictures", "-1"], "num_pictures is -1"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)  # fmt: skip
def test_mistaken_fit(args, message, config, capsys):
    assert message in fails(["fit", "--config", config, *args], capsys)


def test_typo_in_a_yaml_key(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("trainr: {max_epochs: 1}")
    assert "trainr" in fails(["fit", "--config", "a.yaml"], capsys)


def test_broken_yaml(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model: {class_path: GMMSeg\n")
    assert "line 2" in fails(["fit", "--config", "a.yaml"], capsys)


@pytest.mark.parametrize("args", [[], ["fti"], ["fit"]])
def test_missing_arguments(args, capsys):
    assert fails(args, capsys)


def test_no_such_checkpoint(config, capsys):
    message = fails(["test", "--config", config, "--ckpt_path", "gone.ckpt"], capsys)
    assert message == "Checkpoint file not found: gone.ckpt"


@pytest.mark.parametrize("content", [b"", b"model: GMMSeg\n", b"PK\x03\x04 and no more"])
def test_file_that_is_no_checkpoint(content, config, tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes(content)
    message = fails(["test", "--config", config, "--ckpt_path", "a.ckpt"], capsys)
    assert message.startswith("a.ckpt is not a checkpoint that can be loaded safely")


def test_class_count_that_disagrees_with_the_checkpoint(config, checkpoint, tmp_path, capsys):
    for split in ("images", "masks"):
        (tmp_path / split).mkdir()
    dataset = SyntheticScenes(1, (64, 64))
    data = ["--data", "FolderDataModule", "--data.root", str(tmp_path), "--data.num_classes", "4"]
    size = (64, 64)
    for name in "abcdefghij":
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    message = fails(["test", "--config", config, "--ckpt_path", checkpoint, *data], capsys)
    assert f"trained on {dataset.num_classes} classes and the data have 4" in message


def test_nothing_to_predict(config, checkpoint, capsys):
    message = fails(["predict", "--config", config, "--ckpt_path", checkpoint], capsys)
    assert "--data.predict_root" in message


def test_earlier_predictions(config, checkpoint, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    options = ["--data.predict_root", str(photos), "--predictions.output_dir", "out"]
    message = fails(["predict", "--config", config, "--ckpt_path", checkpoint, *options], capsys)
    assert message.startswith("out already holds predictions: set --predictions.resume true")


def test_debug_shows_the_traceback(config, monkeypatch):
    monkeypatch.setenv("GENSEG_DEBUG", "1")
    with pytest.raises(ValueError, match="batch_size is 0"):
        main(["fit", "--config", config, "--data.batch_size", "0"])


def of_torch(*args, **options):
    raise ValueError("Expected input batch_size (2) to match target batch_size (3).")


def of_ours(*args, **options):
    list(zip([1], [], strict=True))


@pytest.mark.parametrize(
    ("broken", "message"), [(of_torch, "Expected input"), (of_ours, "shorter")]
)
@pytest.mark.parametrize("place", ["SoftmaxSegmenter.compute_loss", "SoftmaxSegmenter.__init__"])
def test_bugs_keep_their_traceback(place, broken, message, config, monkeypatch):
    monkeypatch.setattr(f"lightning_genseg.{place}", broken)
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", config])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_mistake_found_by_a_worker_is_one_line(config, tmp_path, capsys):
    for folder, shape in (("images", (64, 64, 3)), ("masks", (64, 64))):
        (tmp_path / folder).mkdir()
        for name in "abcdefghij":
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / folder / f"{name}.png")
    for path in (tmp_path / "masks").iterdir():
        path.write_bytes(b"torn")
    data = ["--data", "FolderDataModule", "--data.root", str(tmp_path), "--data.num_classes", "2"]
    message = fails(["fit", "--config", config, *data, "--data.num_workers", "1"], capsys)
    assert "cannot be read" in message
    assert "worker" not in message
