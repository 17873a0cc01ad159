"""What `--ckpt_path` may be: no code runs, nothing is random, and one line tells what is wrong."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lightning_genseg import SoftmaxSegmenter
from lightning_genseg.data import FolderDataModule
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.checkpoints import read_run
from tests.hostile import CODE, Touch, changed, served

LIGHTNINGS = "lightning.pytorch.cli.instantiate_module"


@pytest.fixture
def hostile(checkpoint, tmp_path):
    """Folder with copies of a checkpoint that unpickle something, or import `evilmod`."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "evilmod.py").write_text(CODE)
    changed(checkpoint, folder / "pickle.ckpt", _class_path=Touch(folder / "ran"))
    named = {"class_path": "evilmod.M", "init_args": {}}
    for number, changes in enumerate(
        [
            {"_class_path": "evilmod.M"},
            {"_class_path": "os.system"},
            {"_instantiator": "evilmod.M"},
            {"features": named},
            {"features": "evilmod.M"},
            {"optimizer": "evilmod.M"},
            {"optimizer": {"class_path": "evilmod.M"}},
            {"lr_scheduler": "evilmod.M"},
            {"network_options": {"a": named}},
            {"network_options": {"a": "{class_path: evilmod.M}"}},
            {"network_options": "{class_path: evilmod.M}"},
            {"features.class_path": "evilmod.M"},
            {"encoder": named},
        ]
    ):
        changed(checkpoint, folder / f"names{number}.ckpt", **changes)
    return folder


@pytest.mark.parametrize(
    ("command", "address"),
    [
        *((command, "http") for command in ("fit", "validate", "test", "predict", "calibrate")),
        *(("test", "file://{}"), ("test", "{}"), ("calibrate", "{}")),
    ],
)
def test_no_command_unpickles(command, address, config, hostile, photos, fails):
    options = f"--data.predict_root {photos}" if command == "predict" else ""
    path = hostile / "pickle.ckpt"
    with served(hostile) as url:
        path = f"{url}/{path.name}" if address == "http" else address.format(path)
        message = fails(f"{command} --config {config} --ckpt_path {path} {options}")
    assert "pickle.ckpt' holds objects (posix.mkdir), not only tensors" in message
    assert not (hostile / "ran").exists()


def test_no_data_are_made_of_a_checkpoint(hostile):
    with served(hostile) as url, pytest.raises(GenSegError, match="no FolderDataModule"):
        FolderDataModule.load_from_checkpoint(f"{url}/pickle.ckpt")
    assert not (hostile / "ran").exists()


def test_no_command_imports(config, hostile, fails, monkeypatch):
    monkeypatch.syspath_prepend(hostile)
    for path in sorted(hostile.glob("names*.ckpt")):
        options = f"--config {config} --ckpt_path {path}"
        if torch.load(path, weights_only=True)["hyper_parameters"]["_instantiator"] == LIGHTNINGS:
            message = fails(f"test {options}")
            assert "evilmod.M" in message or "os.system" in message, path
        with pytest.raises(GenSegError, match=r"evilmod\.M|os\.system"):
            SoftmaxSegmenter.load_from_checkpoint(path)
    assert "evilmod" not in sys.modules
    assert not (hostile / "ran").exists()


def test_weights_only_cannot_be_switched_off(config, checkpoint, fails):
    options = f"--config {config} --ckpt_path {checkpoint} --weights_only false"
    assert "weights_only is false" in fails(f"test {options}")


def test_an_address_is_as_good_as_a_path(genseg, fails, config, checkpoint, tmp_path, capsys):
    """Also its hyper-parameters win, and what is predicted names it."""
    (tmp_path / "www").mkdir()
    shutil.copy(checkpoint, tmp_path / "www" / "a.ckpt")
    with served(tmp_path / "www") as url:
        genseg(f"test --config {config} --ckpt_path {url}/a.ckpt --model.dropout 0.5")
        shown = capsys.readouterr().out
        assert "--output" in fails(f"calibrate --config {config} --ckpt_path {url}/a.ckpt")
    assert f"{url}/a.ckpt sets model.dropout to 0.1, not 0.5" in shown
    (report,) = tmp_path.glob("runs/*/config/*/metrics.json")
    assert json.loads(report.read_text())["checkpoint"] == f"{url}/a.ckpt"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("last", "--ckpt_path last: there is no last*.ckpt in runs/"),
        ("hpc", "there is no hpc_ckpt_*.ckpt in ."),
        ("best", "known only to the process that trained"),
        ("s3://bucket/a.ckpt", "'s3://bucket/a.ckpt' could not be fetched"),
        ("gs://bucket/a.ckpt", "'gs://bucket/a.ckpt' could not be fetched"),
        ("http://127.0.0.1:9/a.ckpt", "http://127.0.0.1:9/a.ckpt' could not be fetched"),
        ("file:///nowhere/a.ckpt", "a.ckpt' does not exist"),
        ("nonsense://a.ckpt", "could not be fetched"),
        ("C:\\\\runs\\\\a.ckpt", "does not exist"),
        ("../a.ckpt", "'../a.ckpt' does not exist"),
        ("a" * 300, "does not exist"),
        (".", "'.' is a folder"),
    ],
)
def test_no_checkpoint_there(path, message, config, fails):
    for command in ("test", "fit") if path in ("last", "best", "hpc") else ("test",):
        assert message in fails(f"{command} --config {config} --ckpt_path {path}")


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_last_is_in_the_folder_of_the_run(genseg, config, checkpoint, tmp_path, capsys):
    """By name of the run, in a folder that a callback gives, and hpc likewise."""
    name = Path(config).parent.name
    run = tmp_path / "runs" / name / "config" / "version_4" / "checkpoints"
    mine = tmp_path / "mine"
    for path in (run / "last.ckpt", mine / "last-v1.ckpt", tmp_path / "hpc_ckpt_2.ckpt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint, path)
    callback = "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath mine"
    for word, options, path in (
        ("last", "", run.relative_to(tmp_path) / "last.ckpt"),
        ("last", callback, "mine/last-v1.ckpt"),
        ("hpc", "", "hpc_ckpt_2.ckpt"),
    ):
        genseg(f"test --config {config} --ckpt_path {word} {options}")
        assert f"genseg: --ckpt_path {word} is {path}" in capsys.readouterr().err
    reports = tmp_path.glob("runs/*/config/*/metrics.json")
    told = {json.loads(report.read_text())["checkpoint"] for report in reports}
    first = str(run.relative_to(tmp_path) / "last.ckpt")
    assert told == {first, "mine/last-v1.ckpt", "hpc_ckpt_2.ckpt"}


def test_what_is_no_whole_checkpoint(config, checkpoint, fails, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content["state_dict"], tmp_path / "bare.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    one = next(iter(content["state_dict"]))
    rest = {key: value for key, value in content["state_dict"].items() if key != one}
    changed(checkpoint, tmp_path / "misses.ckpt", {"state_dict": rest})
    for key in ("state_dict", "pytorch-lightning_version", "loops", "optimizer_states"):
        changed(checkpoint, tmp_path / f"{key}.ckpt", {key: None})
    for key, value in (("epoch", "x"), ("callbacks", [1])):
        changed(checkpoint, tmp_path / f"{key}.ckpt", {key: value})
    changed(checkpoint, tmp_path / "empty.ckpt", {"loops": {}})
    for name, command, message in (
        ("epoch", "test", "'epoch.ckpt' has no 'epoch' as a Trainer writes it"),
        ("callbacks", "test", "'callbacks.ckpt' has no 'callbacks' as a Trainer writes it"),
        ("empty", "fit", "state of the training is not as a Trainer writes it"),
        ("bare", "test", "'bare.ckpt' is a bare state dict: give a .ckpt file"),
        ("tensor", "test", "'tensor.ckpt' is no checkpoint of a run"),
        (
            "misses",
            "test",
            f'arguments (Missing key(s) in state_dict: "{one}',
        ),
        ("state_dict", "test", "'state_dict.ckpt' is no checkpoint of a run"),
        ("pytorch-lightning_version", "test", "has no 'pytorch-lightning_version'"),
        ("loops", "fit", "has no 'loops': training cannot go on from it"),
        ("optimizer_states", "fit", "has no 'optimizer_states': training cannot go on"),
    ):
        assert message in fails(f"{command} --config {config} --ckpt_path {name}.ckpt"), name


WRONG = {
    "pytorch-lightning_version": [3, "x", "2.", None],
    "optimizer_states": [
        3,
        {},
        [3],
        *([{"param_groups": x}] for x in (3, [3])),
        [{"state": {0: 3}}],
    ],
    "lr_schedulers": [3, {}, [3], [[]], [{"last_epoch": "x"}]],
    "callbacks": [3, [], {"RandomStates": 3}, {"RandomStates": {"processes": 3}}],
    "loops": [3, [], {"fit_loop": 3}, {"fit_loop": {"epoch_progress": 3}}],
    "facts": [3, {"scores": 3}],
    "mixture_memory": [3, {"features": 3}],
    "anomaly": [
        3,
        {"thresholds": 3},
        {"thresholds": {"msp": 3}},
        {"thresholds": {"msp": [1.0]}},
        {"ranges": {"msp": [0.0, "x"]}},
        {"statistics": {"sml.average": 3}},
        {"inference": 3},
    ],
}


def test_every_entry_of_a_checkpoint_has_its_form(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content |= {"state_dict": {}, "optimizer_states": []}  # which is small
    words = {key for key, value in content.items() if isinstance(value, str)}
    wrong = {key: [[3], 3 if key in words else "x"] for key in {*content, *WRONG}}
    for key, values in wrong.items():
        for value in values + WRONG.get(key, []):
            torch.save({**content, key: value}, tmp_path / "a.ckpt")
            with pytest.raises(
                GenSegError, match=rf"a\.ckpt' (has no '{key}' as|is no checkpoint)"
            ):
                read_run(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("command", "keys", "message"),
    [
        ("fit", {"lr_schedulers": [{}]}, "'a.ckpt' holds no last_epoch, lr_lambdas of a LambdaLR"),
        ("fit", {"optimizer_states": [{}]}, "training is not as a Trainer writes it"),
        ("test", {"pytorch-lightning_version": "x"}, "'a.ckpt' has no 'pytorch-lightning_version'"),
        ("predict", {"anomaly": {"thresholds": 3}}, "'a.ckpt' has no 'anomaly' as a Trainer"),
    ],
)
def test_a_checkpoint_changed_by_hand(command, keys, message, config, checkpoint, fails, tmp_path):
    changed(checkpoint, tmp_path / "a.ckpt", keys)
    assert message in fails(f"{command} --config {config} --ckpt_path a.ckpt")


@pytest.mark.parametrize("bytes_left", [0, 5000, 0.5, -1])
def test_half_a_checkpoint(bytes_left, config, checkpoint, fails, tmp_path):
    whole = Path(checkpoint).read_bytes()
    cut = int(bytes_left * len(whole)) if isinstance(bytes_left, float) else bytes_left
    (tmp_path / "last.ckpt").write_bytes(whole[:cut])
    line = f"test --config {config} --ckpt_path last.ckpt"
    cause = "'last.ckpt' is truncated, as after a full disk or a broken download:"
    assert fails(line) == f"{cause} write or download it again."
    for age, name in enumerate(("best.ckpt", "older.ckpt")):
        (tmp_path / name).write_bytes(whole)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "half.ckpt").write_bytes(whole[:3000])
    assert fails(line).endswith("the newest whole one beside it is 'best.ckpt'.")


def test_where_weights_came_from_is_no_news(genseg, config, checkpoint, capsys):
    torch.save(SoftmaxSegmenter.load_from_checkpoint(checkpoint).state_dict(), "weights.pth")
    genseg(f"test --config {config} --ckpt_path {checkpoint} --model.encoder_weights weights.pth")
    assert " sets model." not in capsys.readouterr().out


@pytest.mark.parametrize("ranges", [{}, {"density": [0.0, 1.0]}], ids=["softmax", "GMMSeg"])
def test_calibrate_writes_over_nothing_of_others(ranges, config, checkpoint, fails, tmp_path):
    """Neither notes nor a checkpoint, that which it reads least of all.

    That of a method with a score of its own keeps what its scores were in validation.
    """
    content = torch.load(checkpoint, weights_only=True)
    content["anomaly"] = {"ranges": ranges} if ranges else {}
    checkpoint = tmp_path / "trained.ckpt"
    torch.save(content, checkpoint)
    (tmp_path / "notes.txt").write_text("mine")
    before = Path(checkpoint).read_bytes()
    for output, message in (
        ("notes.txt", "is not a checkpoint that can be read safely"),
        (checkpoint, "exists and genseg calibrate has not written it"),
    ):
        options = f"--config {config} --ckpt_path {checkpoint} --output {output}"
        assert message in fails(f"calibrate {options}")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert Path(checkpoint).read_bytes() == before
