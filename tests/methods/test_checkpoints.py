"""Reading checkpoints in Python without running them, and writing them beside the old one."""

import os
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_genseg import GMMSeg
from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError, UnwritableError
from lightning_genseg.files import replace_file, replace_written
from lightning_genseg.methods.checkpoints import SafeCheckpointIO, refuse_foreign_arguments
from lightning_genseg.methods.gmmseg.options import MixtureOptions
from lightning_genseg.methods.trained import TrainedModule
from tests.contract import TINY, loader, save, trainer
from tests.hostile import Touch, served

SMALL = {**TINY, "em": {"memory_size": 8}, "mixture": {"embedding_dim": 8}}


@pytest.fixture
def good(tmp_path):
    return save(GMMSeg(**SMALL), tmp_path / "good.ckpt")


@pytest.fixture
def evil(good, tmp_path):
    content = torch.load(good, weights_only=True) | {"extra": Touch(tmp_path / "ran")}
    torch.save(content, tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


def addresses(path, url):
    """A path as a user may give it."""
    with fsspec.open(f"memory://{path.name}", "wb") as file:
        file.write(path.read_bytes())
    return [path, str(path), f"file://{path}", f"memory://{path.name}", f"{url}/{path.name}"]


def test_python_reads_weights_only_wherever_they_are(good, evil, tmp_path):
    with served(tmp_path) as url:
        for path in [*addresses(evil, url), BytesIO(evil.read_bytes())]:
            with pytest.raises(GenSegError, match=r"holds objects \(posix\.mkdir\)"):
                GMMSeg.load_from_checkpoint(path)
        for path in addresses(good, url):
            loaded = GMMSeg.load_from_checkpoint(path, map_location="cpu")
            for key, value in torch.load(good, weights_only=True)["state_dict"].items():
                assert torch.equal(loaded.state_dict()[key], value)
        for path in addresses(evil, url)[2:]:
            with pytest.raises(GenSegError, match=r"holds objects \(posix\.mkdir\)"):
                trainer(tmp_path).test(loaded, loader(2), ckpt_path=path, verbose=False)
        for path in addresses(good, url)[1:]:
            assert trainer(tmp_path).test(loaded, loader(2), ckpt_path=path, verbose=False)
    assert not (tmp_path / "ran").exists()
    for unsafe in (
        lambda: GMMSeg.load_from_checkpoint(good, weights_only=False),
        lambda: trainer(tmp_path).test(loaded, loader(2), ckpt_path=good, weights_only=False),
    ):
        with pytest.raises(GenSegError, match="weights_only is false"):
            unsafe()
    with pytest.raises(DownloadError, match=r"'s3://bucket/a\.ckpt' could not be fetched"):
        GMMSeg.load_from_checkpoint("s3://bucket/a.ckpt")
    with pytest.raises(MissingFileError, match=r"gone\.ckpt' does not exist"):
        GMMSeg.load_from_checkpoint(tmp_path / "gone.ckpt")


def test_a_plugin_that_wraps_lightnings_is_guarded_too(good, tmp_path):
    plugin = AsyncCheckpointIO()
    run = trainer(tmp_path, plugins=[plugin])
    run.test(GMMSeg(**SMALL), loader(2), ckpt_path=good, verbose=False)
    assert type(plugin.checkpoint_io) is SafeCheckpointIO


class Typed:
    def __init__(
        self,
        number: float = 1.0,
        word: Literal["a", "b"] = "a",
        names: list[str] | None = None,
        path: Path | None = None,
        group: MixtureOptions = MixtureOptions(),
        table: dict[str, Any] | None = None,
        net: torch.nn.Module | None = None,
        untyped=None,
    ):
        pass


@pytest.mark.parametrize(
    ("saved", "foreign"),
    [
        ({"number": 2, "word": "b", "names": ["a: b"], "path": "x/y.z", "net": None}, False),
        ({"group": {"components": 3}, "table": {"norm": "batch", "sizes": [1, 2]}}, False),
        ({"untyped": 3}, False),
        ({"untyped": "os.system"}, True),
        ({"net": "torch.nn.Identity"}, True),
        ({"net": {"class_path": "torch.nn.Identity"}}, True),
        ({"number": "os.system"}, True),
        ({"group": "evil.yaml"}, True),
        ({"group": {"class_path": "evilmod.M"}}, True),
        ({"table": {"a": {"b.class_path": "evilmod.M"}}}, True),
        ({"table": {"a": [{"class_path": "evilmod.M"}]}}, True),
        ({"table": '{"class\\x5fpath": "evilmod.M"}'}, True),
        ({"names": [{"class_path": "evilmod.M"}]}, True),
        ({"net.class_path": "evilmod.M"}, True),
        ({"unknown": 3}, True),
    ],
)
def test_which_hyper_parameters_are_data(saved, foreign):
    if foreign:
        with pytest.raises(GenSegError, match=f"{next(iter(saved))}'"):
            refuse_foreign_arguments(Typed, saved, ())
    refuse_foreign_arguments(Typed, {} if foreign else saved, ())
    refuse_foreign_arguments(Typed, saved, list(saved))  # the user says the same


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, full_disk):
    """A disk that fills up in the middle of writing: the kernel refuses, nothing is simulated."""
    path = tmp_path / "last.ckpt"
    plugin = SafeCheckpointIO()
    plugin.save_checkpoint({"state_dict": {"a": torch.ones(3)}}, path)
    old = path.read_bytes()
    sentence = rf"'{path}' cannot be written \(File too large\), which takes 0\.2 MB: make room"
    full_disk(20_000)
    with pytest.raises(UnwritableError, match=sentence):
        plugin.save_checkpoint({"state_dict": {"a": torch.ones(50_000)}}, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(path.read_bytes()))
    plugin.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    assert flushed == [old]  # the new content was on the disk before it took the old one's place
    assert torch.load(path, weights_only=True)["state_dict"]["a"].sum() == 0


def test_numbers_of_numpy_are_kept_as_pythons(tmp_path):
    model = GMMSeg(
        np.int64(3),
        encoder="tu-test_resnet",
        class_names=list(np.array(["a", "b", "c"])),
        mean=np.full(3, 0.5),
        head_lr_factor=np.float64(10),
        inference={"short_side": np.int64(32)},
        mixture=MixtureOptions(components=np.int64(2), variance_floor=np.float64(0.1)),
    )
    model.facts = {"miou": np.float64(0.5), "when": date(2026, 11, 30), "where": Path("x")}
    model.facts[1, 2] = [torch.ones(2), {3: None}]
    loaded = GMMSeg.load_from_checkpoint(save(model, tmp_path / "x.ckpt"))
    assert loaded.hparams == model.hparams
    assert loaded.eval()(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    others = {"(1, 2)": [[1.0, 1.0], {3: None}]}
    assert loaded.facts == {"miou": 0.5, "when": "2026-11-30", "where": "x", **others}
    model.save_pretrained(tmp_path / "folder")
    assert GMMSeg.from_pretrained(tmp_path / "folder").class_names == ["a", "b", "c"]


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.ckpt", Path("/proc/x.ckpt"), tmp_path / ("a" * 300)):
        with pytest.raises(UnwritableError, match=r"cannot be written \(.+\), which takes 0\.0 MB"):
            replace_file(path, b"content")
    replace_file(tmp_path / ("a" * 255), b"content")  # as long as a name may be


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_file_that_others_write_appears_whole_or_not_at_all(error, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def write(target, failure=None):
        assert target.name == path.name
        target.with_name("model.onnx.data").write_bytes(b"weights")
        target.write_bytes(b"half")
        if failure:
            raise failure
        target.write_bytes(b"whole")

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UnwritableError):
        replace_written(path, lambda target: write(target, error))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    replace_written(path, write)
    assert path.read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_abstract_bases_load_what_derives_from_them(good, tmp_path):
    content = torch.load(good, weights_only=True)
    content["hyper_parameters"] |= {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "lightning_genseg.methods.gmmseg.module.GMMSeg",
    }
    torch.save(content, tmp_path / "cli.ckpt")
    assert type(TrainedModule.load_from_checkpoint(tmp_path / "cli.ckpt")) is GMMSeg
