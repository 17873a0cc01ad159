"""The command as users call it: real configuration files, real networks."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lightning_genseg
from lightning_genseg import data, methods
from lightning_genseg.callbacks import ChannelsLast, LastCheckpoint, read_manifest
from lightning_genseg.cli.calibrate import GenSegTrainer
from lightning_genseg.data import SyntheticScenes
from tests.cli.conftest import CONFIG
from tests.contract import types_of

CLASSES = list(SyntheticScenes.CLASS_NAMES)


# --- the main job ---------------------------------------------------------------------------


def test_fit_leaves_a_run_that_explains_itself(run, checkpoint):
    folder = run / "runs" / "config" / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["class_path"].endswith("SoftmaxSegmenter")
    assert saved["report"] == {"num_pictures": 6}
    assert saved["trainer"]["logger"]["init_args"]["name"] == "config"
    report = json.loads((folder / "val_metrics.json").read_text())
    assert list(report["IoU"]) == CLASSES
    assert (folder / "val_pictures.png").exists()
    parameters = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert parameters["num_classes"] == len(CLASSES)  # linked from the data
    assert parameters["class_names"] == CLASSES


def test_test_leaves_scores_and_pictures(genseg, config, checkpoint, tmp_path):
    genseg(f"test --config {config} --ckpt_path {checkpoint}")
    (folder,) = tmp_path.glob("runs/*/config/test")
    report = json.loads((folder / "metrics.json").read_text())
    assert 0 <= report["mIoU"] <= 1
    assert report["images"] == 2
    assert report["checkpoint"] == checkpoint
    assert (folder / "pictures.png").exists()
    assert (folder / "test_config.yaml").exists()
    assert not (folder / "config.yaml").exists()  # where it could be a fit's


def test_a_test_leaves_the_log_of_the_fit_alone(genseg, config, checkpoint, tmp_path, capsys):
    fit = tmp_path / "runs" / "a" / "b"
    fit.mkdir(parents=True)
    (fit / "config.yaml").touch()
    (fit / "metrics.csv").write_text("kept")
    place = {"save_dir": "runs", "name": "a", "version": "b"}
    logger = " ".join(f"--trainer.logger.{key} {value}" for key, value in place.items())
    genseg(f"test --config {config} --ckpt_path {checkpoint} {logger}")
    assert (fit / "metrics.csv").read_text() == "kept"
    assert (tmp_path / "runs" / "a" / "b" / "test" / "metrics.json").exists()
    assert capsys.readouterr().err.splitlines()[-1].endswith("are in runs/a/b/test")


def test_the_saved_config_is_a_config(genseg, run, checkpoint, photos, tmp_path):
    """A run's own files are enough to predict a folder of images."""
    saved = run / "runs" / "config" / "version_0" / "config.yaml"
    options = f"--data.predict_root {photos} --predictions.output_dir out"
    genseg(f"predict --config {saved} --ckpt_path {checkpoint} {options}")
    lines = read_manifest(tmp_path / "out" / "predictions.jsonl")
    assert len(lines) == 40
    assert {line["checkpoint"] for line in lines} == {checkpoint}
    module = lightning_genseg.SoftmaxSegmenter.load_from_checkpoint(checkpoint)
    for line in lines[::13]:
        expected = module.predict_image(np.array(Image.open(line["image"])))["mask"]
        mask = np.array(Image.open(tmp_path / "out" / line["mask"]))
        assert (mask == expected).mean() > 0.999


@pytest.mark.slow
def test_killed_prediction_goes_on_where_it_stopped(genseg, config, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    options = f"--data.predict_root {photos} --predictions.output_dir {out}"
    line = f"predict --config {config} --ckpt_path {checkpoint} {options}"
    manifest = out / "predictions.jsonl"
    with start(line, tmp_path) as process:
        wait_for(lambda: manifest.exists() and manifest.read_bytes().count(b"\n") >= 3, process)
        process.kill()
    early = {line["name"]: line for line in read_manifest(manifest)}
    assert 3 <= len(early) < 40
    listed = [out / line[key] for line in early.values() for key in ("mask", "overlay")]
    for path in {*listed, *(out / "masks").iterdir(), *(out / "overlays").iterdir()}:
        Image.open(path).load()  # also what is not listed yet is whole
    times = {name: (out / line["mask"]).stat().st_mtime_ns for name, line in early.items()}

    genseg(f"{line} --predictions.resume true")
    lines = {line["name"]: line for line in read_manifest(manifest)}
    assert sorted(lines) == [f"{index:02}" for index in range(40)]
    for name, moment in times.items():
        assert (out / lines[name]["mask"]).stat().st_mtime_ns == moment
    folders, files = {"masks", "overlays"}, {"predictions.jsonl", "classes.json"}
    assert {path.name for path in out.iterdir()} == folders | files | {"predict_config.yaml"}


@pytest.mark.slow
def test_interrupted_training_says_where_to_go_on(config, tmp_path):
    with start(f"fit --config {config} --trainer.max_epochs 10000", tmp_path) as process:
        wait_for(lambda: list(tmp_path.glob("runs/*/config/*/checkpoints/*.ckpt")), process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "Tip:" not in errors
    assert "LeafSpec" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("genseg: ")]
    assert line.startswith("genseg: interrupted; go on with the same command and --ckpt_path ")
    path = tmp_path / line.rpartition("--ckpt_path ")[2]
    assert torch.load(path, weights_only=True)["epoch"] >= 0


@contextmanager
def start(line, folder):
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_genseg.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", "lightning_genseg", *line.split()],
        cwd=folder,
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


def test_a_fit_writes_over_no_other(config, checkpoint, fails, tmp_path):
    version = "--trainer.logger.version version_0"
    shutil.copytree(Path(checkpoint).parents[1], tmp_path / "runs" / "x" / "y" / "version_0")
    name = f"--trainer.logger.save_dir runs/x --trainer.logger.name y {version}"
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*"))
    message = "'runs/x/y/version_0' holds a training already: go on with it (--ckpt_path last)"
    assert message in fails(f"fit --config {config} {name}")
    assert message in fails(f"fit --config {config} {name} --ckpt_path {checkpoint}")
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "runs").rglob("*")) == before


def test_all_that_follows_a_fit_lies_in_its_folder(genseg, config, photos, tmp_path, capsys):
    def last_line(line):
        genseg(line)
        return capsys.readouterr().err.splitlines()[-1]

    line, run = f"fit --config {config}", Path("runs", Path(config).parent.name, "config")
    end = "genseg: the model, its scores and pictures are in"
    assert last_line(line) == f"{end} {run}/version_0"
    checkpoint = f"--ckpt_path {run}/version_0/checkpoints/last.ckpt"
    with (run / "version_0" / "metrics.csv").open("a") as file:
        file.write("0.5,")  # torn by a loss of power
    assert last_line(f"{line} --trainer.max_epochs 2 {checkpoint}") == f"{end} {run}/version_0"
    with (run / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows if row["val_mIoU"]] == ["0", "1"]
    assert [row["step"] for row in rows if row["train_loss"]] == ["0", "1", "2", "3"]
    line = f"--config {run}/version_0/config.yaml {checkpoint}"
    for name in ("test", "test_1"):
        end = f"genseg: scores and pictures are in {run}/version_0/{name}"
        assert last_line(f"test {line}") == end
    end = "genseg: masks and pictures are in"
    images = f"--data.predict_root {photos} --trainer.limit_predict_batches 1"
    assert last_line(f"predict {line} {images}") == f"{end} {run}/version_0/predictions"
    line = f"predict {line} {images} --predictions.output_dir out"
    assert last_line(line) == f"{end} out"
    assert {path.name for path in (tmp_path / run).iterdir()} == {"version_0"}
    checkpoints = tmp_path / run / "version_0" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
    line = f"fit --config {config} --trainer.max_steps 1 --trainer.limit_val_batches 0"
    assert last_line(line) == f"genseg: the model's checkpoints are in {run}/version_1"


def test_weights_that_the_checkpoint_holds_are_not_worth_a_line(
    genseg, config, checkpoint, tmp_path, capsys
):
    """The configuration names where they came from, the checkpoint has them."""
    (tmp_path / "weights.pth").touch()
    genseg(f"test --config {config} --ckpt_path {checkpoint} --model.encoder_weights weights.pth")
    assert "encoder_weights" not in capsys.readouterr().out


def test_a_mistyped_checkpoint_leaves_nothing(fails, config, checkpoint, photos, tmp_path):
    for command in ("fit", "test", "predict", "calibrate"):
        line = f"{command} --config {config} --data.predict_root {photos}"
        assert fails(f"{line} --ckpt_path {checkpoint.replace('last', 'lst')}") == (
            f"checkpoint '{checkpoint.replace('last', 'lst')}' does not exist; "
            f"did you mean {checkpoint}?"
        )
    assert not list(tmp_path.iterdir())


# --- checkpoints and configuration ----------------------------------------------------------


def test_the_checkpoint_wins_and_says_so(genseg, config, checkpoint, capsys):
    genseg(f"test --config {config} --ckpt_path {checkpoint} --model.dropout 0.5")
    assert f"genseg: {checkpoint} sets model.dropout to 0.1, not 0.5" in capsys.readouterr().out


def test_a_group_is_compared_argument_by_argument(genseg, config, tmp_path, capsys):
    tiny = "--model.mixture.embedding_dim 8 --model.em.memory_size 10"
    genseg(f"fit --config {config} --model GMMSeg {tiny} --trainer.max_steps 1")
    (path,) = tmp_path.glob("runs/**/last.ckpt")
    capsys.readouterr()
    mixture = "--model.mixture.embedding_dim 8 --model.mixture.variance_floor 0.5"
    genseg(f"test --config {config} --model GMMSeg {mixture} --ckpt_path {path}")
    said = [line for line in capsys.readouterr().out.splitlines() if " sets model." in line]
    assert said == [
        f"genseg: {path} sets model.mixture.variance_floor to 0.01, not 0.5",
        f"genseg: {path} sets model.em.memory_size to 10, not 32000",
    ]


def test_a_checkpoint_of_a_script(genseg, config, checkpoint, tmp_path):
    """Such a checkpoint does not name its class, and plain Lightning cannot read it."""
    content = torch.load(checkpoint, weights_only=True)
    for key in ("_class_path", "_instantiator"):
        del content["hyper_parameters"][key]
    torch.save(content, tmp_path / "script.ckpt")
    genseg(f"test --config {config} --ckpt_path script.ckpt")
    (report,) = tmp_path.glob("runs/*/config/*/metrics.json")
    assert json.loads(report.read_text())["checkpoint"] == "script.ckpt"


# --- help -----------------------------------------------------------------------------------


def shown(genseg, line, capsys):
    with pytest.raises(SystemExit) as exit:
        genseg(line)
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_all_commands_are_listed_alike(genseg, capsys):
    text = shown(genseg, "--help", capsys)
    commands = [
        "fit",
        "validate",
        "test",
        "predict",
        "calibrate",
        "check",
        "convert-masks",
        "reconstruct",
        "add-class",
        "export",
        "convert-dalle",
    ]
    assert re.findall(r"^    ([\w-]+)  +[A-Z]", text, re.M) == commands
    for command in commands:
        assert f"{command} [" in shown(genseg, f"{command} --help", capsys)


def test_version(genseg, capsys):
    version = f"genseg {lightning_genseg.__version__}\n"
    assert shown(genseg, "--version", capsys) == version


def test_help_of_fit(genseg, capsys):
    text = shown(genseg, "fit --help", capsys)
    assert len(text.splitlines()) <= 200
    assert " FolderDataModule, " in " ".join(text.split())
    assert "checkpoints/last.ckpt" in text  # the defaults of a run
    for name in ("max_steps", "devices", "val_check_interval"):
        assert f"--trainer.{name} " in text
    assert "--trainer.benchmark" not in text
    text = shown(genseg, "predict --help", capsys)
    assert text.startswith("usage: genseg [options] predict [options]\n\nWrite masks")
    assert "return_predictions" not in text


KINDS = {"model": methods.__all__, "data": [n for n in data.__all__ if n.endswith("DataModule")]}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in KINDS[kind]])
def test_help_of_a_class_fits_on_a_few_screens(kind, name, genseg, capsys):
    text = shown(genseg, f"fit --{kind}.help {name}", capsys)
    assert len(text.splitlines()) <= 150
    assert "see there" not in text
    assert "torch.nn" not in text
    assert "albumentations." not in text


# --- what a run does unless it is told otherwise --------------------------------------------


class Stop(Exception):
    """Raised where the Trainer would run."""


@pytest.fixture
def trainer_of(genseg, monkeypatch):
    """The Trainer that a command line makes."""
    found = []

    def stop(self, **kwargs):
        found.append(self)
        raise Stop

    monkeypatch.setattr(GenSegTrainer, "fit", stop)

    def make(line):
        with pytest.raises(Stop):
            genseg(f"fit {line}")
        return found[-1]

    return make


def test_the_defaults_of_a_run(trainer_of, config, run, tmp_path):
    trainer = trainer_of(f"--config {config}")
    assert trainer.num_sanity_val_steps == 0
    assert trainer.check_val_every_n_epoch == 1  # CONFIG gives no interval
    (checkpoint,) = trainer.checkpoint_callbacks
    assert isinstance(checkpoint, LastCheckpoint)
    assert Path(trainer.log_dir) == Path("runs", run.name, "config", "version_0")
    options = "--trainer.default_root_dir elsewhere --trainer.logger.version a"
    trainer = trainer_of(f"--config {config} {options}")
    assert Path(trainer.log_dir) == Path("elsewhere", "runs", run.name, "config", "a")
    content = {**CONFIG, "trainer": {"accelerator": "cpu"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "other.yaml").write_text("trainer: {val_check_interval: 7}")
    trainer = trainer_of("--config mine.yaml --config other.yaml")
    assert trainer.log_every_n_steps == 10
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (7, None)
    assert Path(trainer.log_dir) == Path("runs", "mine", "version_0")
    model = "--model SoftmaxSegmenter --model.encoder tu-test_resnet --model.decoder fpn"
    trainer = trainer_of(f"{model} --data SyntheticScenesDataModule")
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
def test_what_is_given_holds(given, expected, trainer_of, tmp_path):
    content = {**CONFIG, "trainer": {"accelerator": "cpu", **given}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    trainer = trainer_of("--config a.yaml")
    assert {name: getattr(trainer, name) for name in expected} == expected


def test_a_checkpoint_callback_of_ones_own_is_the_only_one(trainer_of, config):
    options = "--trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor val_mIoU"
    (checkpoint,) = trainer_of(f"--config {config} {options}").checkpoint_callbacks
    assert checkpoint.monitor == "val_mIoU"
    options = "--trainer.callbacks lightning_genseg.callbacks.ChannelsLast"
    trainer = trainer_of(f"--config {config} {options}")
    assert any(isinstance(callback, ChannelsLast) for callback in trainer.callbacks)
    assert isinstance(trainer.checkpoint_callback, LastCheckpoint)


# --- one line for what the user can mend ----------------------------------------------------

NESTED = "--model GMMSeg --model.mixture"
SGD = "--model.optimizer SGD --model.optimizer.lr"
DIRPATH = "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model.encodr resnet18", "Option 'encodr' is not accepted; did you mean encoder?"),
        ("--model GMMSeg --model.components 3", "did you mean mixture.components?"),
        (f"{NESTED}.componnts 3", "did you mean mixture.components?"),
        (NESTED + " null", "model.mixture is null, but it is a group of arguments: leave it out"),
        (f"{NESTED}.components many", "mixture.components is many; it must be a whole number."),
        (f"{NESTED}.embedding_dim many", "dim is many; it must be a whole number or null."),
        (f"{NESTED}.components 0", "components is 0; it must be at least 1."),
        ("--model GMMSg", "--model: there is no class GMMSg; did you mean GMMSeg?"),
        ("--data CamVidDatModule", "no class CamVidDatModule; did you mean CamVidDataModule?"),
        ("--data.sparse Pints", "--data.sparse: there is no class Pints; did you mean Points?"),
        ("--model.encoder resnt18", "encoder 'resnt18' is no encoder"),
        ("--trainer.max_epochs many", "max_epochs is many; it must be a whole number or null."),
        ("--data CamVidDataModule --data.root nowhere", "'nowhere/train' does not exist"),
        ("--data.batch_size 0", "batch_size is 0"),
        ("--trainer.accelerator abacus", "abacus"),
        ("--trainer.devices 0", "devices"),
        ("--report.num_pictures -1", "num_pictures is -1"),
        ("--config missing.yaml", "missing.yaml"),
        ("--model.dropout 2", "dropout is 2.0; it must be at least 0 and less than 1."),
        (f"{SGD} -1", "optimizer cannot be used (Invalid learning rate: -1.0): correct its"),
        (f"{SGD} .nan", "optimizer.lr is nan; it must be finite."),
        (f"{SGD} .inf", "optimizer.lr is inf; it must be finite."),
        (
            "--model.lr_scheduler StepLR --model.lr_scheduler.step_size 0",
            "lr_scheduler cannot be used (integer modulo by zero): correct its",
        ),
        (
            "--model.lr_scheduler ReduceLROnPlateau --model.lr_scheduler.monitor val_mIoU",
            "--model.lr_scheduler: several classes are called ReduceLROnPlateau: give torch.optim.",
        ),
        ("--trainer.accumulate_grad_batches 0", "accumulate_grad_batches is 0; it must be at leas"),
        ("--trainer.val_check_interval 0", "val_check_interval is 0; it must be positive."),
        ("--trainer.gradient_clip_val -1", "gradient_clip_val is -1.0; it must be at least 0."),
        ("--trainer.devices -3", "devices"),
        ("--trainer.precision foo", "precision is foo; it must be one of transformer-engine, "),
        ("--trainer.logger.save_dir null", "--trainer.logger: CSVLogger needs save_dir: give it."),
        (
            "--trainer.logger.flush_logs_every_n_steps x",
            "--trainer.logger.flush_logs_every_n_steps is x; it must be a whole number.",
        ),
        ("--seed_everything -1", "seed is -1; it must be between 0 and"),
        (
            "--trainer.callbacks ModelCheckpoint --trainer.callbacks.save_top_k -5",
            "of the Trainer cannot be used (Invalid value for save_top_k=-5. Must be >= -1):",
        ),
        ("--trainer.logger nonsense", "--trainer.logger: there is no class nonsense."),
        ("--trainer.callbacks [Nonsense]", "--trainer.callbacks: there is no class Nonsense."),
        ("--trainer.logger CometLogger", "Requirement 'comet-ml>="),
        ("--trainer.default_root_dir /proc/x", "'/proc/x' cannot be used (No such file or direct"),
        (f"--trainer.logger.name {300 * 'a'}", "cannot be used (File name too long)"),
        (f"{DIRPATH} /proc/x", "ckpt' cannot be written (No such file or directory), which takes"),
        ("--trainer.logger.save_dir a.yaml", "a.yaml/config' cannot be used (Not a directory)"),
    ],
)
def test_mistaken_fit(args, message, config, fails, tmp_path):
    (tmp_path / "a.yaml").touch()
    assert message in fails(f"fit --config {config} {args}")


def optional_fields(method):
    """Options of a method's groups that may be null."""
    return [
        (name, field)
        for name, hint in types_of(method).items()
        for kind in (hint, *get_args(hint))
        if is_dataclass(kind)
        for field, type_ in get_type_hints(kind).items()
        if NoneType in get_args(type_)
    ]


@pytest.mark.parametrize(
    "method", [kind for name in methods.__all__ if optional_fields(kind := getattr(methods, name))]
)
def test_an_option_of_a_group_may_be_null(method, genseg, capsys):
    options = optional_fields(method)
    words = " ".join(f"--model.{group}.{field} null" for group, field in options)
    words += " --model.optimizer AdamW --model.optimizer.foreach null"
    data = "--data SyntheticScenesDataModule --print_config"
    with pytest.raises(SystemExit) as exit:
        genseg(f"fit --model {method.__name__} {words} {data}")
    assert not exit.value.code
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert found["optimizer"]["init_args"]["foreach"] is None
    assert [found[group][field] for group, field in options] == [None] * len(options)


def test_the_class_comes_before_its_arguments(config, fails):
    assert "--data: its class is not known yet" in fails(f"fit --data.seed 1 --config {config}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainr: {max_epochs: 1}", "trainr"),
        ("model: {class_path: GMMSeg\n", "the configuration 'a.yaml' is no YAML"),
        ("model: {class_path: GMMSeg\n", "line 2"),
        ("# nothing\n", "the configuration 'a.yaml' is empty"),
        ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "has 'max_steps' twice, again in line 3"),
        ("x: [{a: 1}, {b: 1, b: 2}]", "has 'b' twice"),
    ],
)
def test_mistaken_yaml(content, message, fails, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    assert message in fails("fit --config a.yaml")


@pytest.mark.parametrize("line", ["", "fti", "fit"])
def test_missing_arguments(line, fails):
    assert fails(line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give its checkpoint with --ckpt_path"),
        ("--ckpt_path best", "known only to the process that trained"),
        ("--ckpt_path gone.ckpt", "'gone.ckpt' does not exist"),
        ("--ckpt_path empty.ckpt", "'empty.ckpt' is truncated"),
        ("--ckpt_path text.ckpt", "'text.ckpt' is not a checkpoint that can be read safely"),
        ("--ckpt_path torn.ckpt", "'torn.ckpt' is truncated"),
    ],
)
def test_mistaken_checkpoint(options, message, config, fails, tmp_path):
    for name, content in {"empty": b"", "text": b"model: GMMSeg\n", "torn": b"PK\x03\x04"}.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    assert message in fails(f"test --config {config} {options}")


@pytest.fixture
def pairs(tmp_path):
    """Ten images with masks."""
    for folder, shape in (("images", (64, 64, 3)), ("masks", (64, 64))):
        (tmp_path / folder).mkdir()
        for name in "abcdefghij":
            Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / folder / f"{name}.png")
    return f"--data FolderDataModule --data.root {tmp_path}"


def test_class_count_that_disagrees_with_the_checkpoint(config, checkpoint, pairs, fails):
    data = f"{pairs} --data.num_classes 4"
    message = fails(f"test --config {config} --ckpt_path {checkpoint} {data}")
    assert f"trained on {len(CLASSES)} classes and the data have 4" in message


def test_mistaken_prediction(config, checkpoint, photos, fails, tmp_path):
    line = f"predict --config {config} --ckpt_path {checkpoint}"
    assert "--data.predict_root" in fails(line)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.jsonl").write_text("")
    options = f"--data.predict_root {photos} --predictions.output_dir out"
    message = fails(f"{line} {options}")
    assert message.startswith("out already holds predictions: set --predictions.resume true")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_mistake_found_by_a_worker_is_one_line(config, pairs, fails, tmp_path):
    for path in (tmp_path / "masks").iterdir():
        path.write_bytes(b"torn")
    data = f"{pairs} --data.num_classes 2 --data.num_workers 1"
    message = fails(f"fit --config {config} {data}")
    assert "cannot be read" in message
    assert "worker" not in message


def test_a_full_disk_is_told(config, fails, tmp_path, full_disk):
    full_disk(300)  # config.yaml is longer
    assert "cannot be written (File too large): make room" in fails(f"fit --config {config}")


def test_debug_shows_the_traceback(genseg, config, monkeypatch):
    monkeypatch.setenv("GENSEG_DEBUG", "1")
    with pytest.raises(ValueError, match="batch_size is 0"):
        genseg(f"fit --config {config} --data.batch_size 0")


def of_torch(*args, **options):
    raise ValueError("Expected input batch_size (2) to match target batch_size (3).")


def of_ours(*args, **options):
    list(zip([1], [], strict=True))


@pytest.mark.parametrize(
    ("broken", "message"), [(of_torch, "Expected input"), (of_ours, "shorter")]
)
@pytest.mark.parametrize("place", ["SoftmaxSegmenter.compute_loss", "SoftmaxSegmenter.__init__"])
def test_bugs_keep_their_traceback(place, broken, message, genseg, config, monkeypatch):
    monkeypatch.setattr(f"lightning_genseg.{place}", broken)
    with pytest.raises(ValueError, match=message):
        genseg(f"fit --config {config}")
