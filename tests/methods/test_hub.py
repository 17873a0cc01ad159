"""Sharing: a folder, the hub's cache, the model card, a push."""

import base64
import json
import shutil
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from lightning_genseg import EMOptions, GMMSeg, SegmentationModule, SoftmaxSegmenter
from lightning_genseg.data import SyntheticScenesDataModule
from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError, UnwritableError
from lightning_genseg.uncertainty.conformal import Threshold
from tests.contract import TINY, PlainFeatures, trainer

SMALL = {**TINY, "em": EMOptions(memory_size=50)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A GMMSeg after a fit and a test, calibrated by hand."""
    data = SyntheticScenesDataModule(
        size=(48, 64),
        crop_size=(48, 64),
        batch_size=2,
        num_workers=0,
        train_length=4,
        val_length=2,
        test_length=2,
    )
    model = GMMSeg(**SMALL, class_names=list(data.class_names))
    run = trainer(tmp_path_factory.mktemp("run"))
    run.fit(model, data)
    run.save_checkpoint(tmp_path_factory.mktemp("run") / "last.ckpt")
    run.test(model, data, verbose=False)
    model.anomaly.thresholds = {"density": Threshold(-3.5, 0.05, "image", 0.1, 19)}
    model.anomaly.sml.average = torch.arange(6.0)
    model.anomaly.sml.deviation = torch.ones(6)
    return model


@pytest.fixture
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"


def test_weights_only_and_what_calibration_found(trained, folder):
    loaded = GMMSeg.from_pretrained(folder)
    assert loaded.anomaly.thresholds == trained.anomaly.thresholds
    assert loaded.facts == trained.facts
    image = torch.rand(1, 3, 40, 50)
    names = ["sml", "density"]
    mine, theirs = trained.eval().score_maps(image, names), loaded.score_maps(image, names)
    assert all(torch.equal(mine[name], theirs[name]) for name in names)
    size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert size <= 1.01 * sum(x.nbytes for x in trained.state_dict().values())


def test_arguments_of_the_caller_win(folder):
    model = GMMSeg.from_pretrained(folder, anomaly_score="energy", inference={"flip": True})
    assert model.anomaly_score == "energy"
    assert model.inference == {"flip": True}


def test_the_card_fills_itself(trained, folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "lightning-genseg"
    for words in (
        "one Gaussian mixture per class",
        "GMMSeg.from_pretrained",
        "SyntheticScenesDataModule",
        f"| 0 | {trained.class_names[0]} | #",
        "| val | mIoU | 0.",
        "| test | mIoU | 0.",
        "at most 5.00% of the known pixels lie above it, with probability 90.00%",
        "| torch | 2.",
    ):
        assert words in card.text


def test_a_card_of_ours_is_renewed_and_one_that_was_changed_is_kept(trained, folder):
    trained.set_anomaly_score("energy")
    trained.save_pretrained(folder)
    assert "The score is `energy`" in (folder / "README.md").read_text()
    assert GMMSeg.from_pretrained(folder).anomaly_score == "energy"
    card = (folder / "README.md").read_text().replace("pipeline_tag", "license: mit\npipeline_tag")
    (folder / "README.md").write_text(card)
    trained.set_anomaly_score("msp")
    trained.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card


class Named(SoftmaxSegmenter):
    """Passes everything on under another name than kwargs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


def test_a_subclass_that_passes_its_arguments_on(tmp_path):
    model = Named(**TINY)
    model.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 33, 41)
    assert torch.equal(Named.from_pretrained(tmp_path)(image), model.eval()(image))
    with pytest.raises(TypeError, match="Named has no argument 'encodr'; did you mean encoder"):
        Named(**TINY, encodr="resnet18")


def test_a_checkpoint_carries_what_the_card_says(trained, tmp_path):
    run = trainer(tmp_path)
    run.strategy.connect(trained)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = GMMSeg.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.facts == trained.facts
    assert loaded.facts["scores"].keys() == {"val", "test"}


def test_a_network_of_ones_own_is_asked_for(tmp_path):
    model = SoftmaxSegmenter(6, features=PlainFeatures())
    model.save_pretrained(tmp_path)
    assert "features=network" in (tmp_path / "README.md").read_text()
    with pytest.raises(GenSegError, match=r"network of its own, tests\.contract\.PlainFeatures"):
        SoftmaxSegmenter.from_pretrained(tmp_path)
    loaded = SoftmaxSegmenter.from_pretrained(tmp_path, features=PlainFeatures())
    image = torch.rand(1, 3, 33, 41)
    assert torch.equal(loaded(image), model.eval()(image))


def test_from_the_cache_of_the_hub(folder, tmp_path):
    """As huggingface_hub leaves a download; no network is used."""
    snapshot = tmp_path / "cache" / "models--me--streets" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    model = SegmentationModule.from_pretrained("me/streets", cache_dir=tmp_path / "cache")
    assert isinstance(model, GMMSeg)
    with pytest.raises(DownloadError, match="'me/others' is no folder, and "):
        GMMSeg.from_pretrained("me/others", cache_dir=tmp_path / "cache")


def test_what_is_no_such_model(folder, tmp_path):
    with pytest.raises(GenSegError, match="holds a GMMSeg, which is no SoftmaxSegmenter"):
        SoftmaxSegmenter.from_pretrained(folder)
    with pytest.raises(MissingFileError, match=r"no config\.json in"):
        GMMSeg.from_pretrained(tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(GenSegError, match="another library"):
        GMMSeg.from_pretrained(folder)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a push of small files needs."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = f"http://{self.headers['Host']}/me/streets"
        answer: dict = {"url": url, "name": "me/streets"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for name in names
            ]
            answer = {"files": modes}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/streets", "sha": "0", "siblings": [], "private": False})

    def _answer(self, content: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args: object) -> None:
        pass


def test_a_full_disk_is_told(trained, tmp_path, full_disk):
    full_disk(20_000)
    with pytest.raises(UnwritableError, match="cannot be written"):
        trained.save_pretrained(tmp_path / "shared")
    assert not (tmp_path / "shared" / "model.safetensors").exists()


def test_push_to_hub(trained, tmp_path: Path, monkeypatch):
    """The real client against a server of this process."""
    _Hub.files = {}
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        trained.push_to_hub("me/streets", token="hf_none")
    finally:
        server.shutdown()
        server.server_close()
    for name, content in _Hub.files.items():
        (tmp_path / name).write_bytes(content)
    loaded = GMMSeg.from_pretrained(tmp_path)
    assert loaded.facts == trained.facts
