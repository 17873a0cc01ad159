import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from sklearn.metrics import jaccard_score

from lightning_genseg.cli.reconstruct import (
    _Scale,
    reconstruct_data,
    summary,
    token_statistics,
)
from lightning_genseg.data import SyntheticScenes, SyntheticScenesDataModule
from lightning_genseg.methods.gss.colors import class_colors
from lightning_genseg.methods.gss.maskige import Maskige, NearestColor
from lightning_genseg.methods.gss.tokenizers.dalle import DalleDVAE
from lightning_genseg.methods.gss.tokenizers.majority import CellMajority
from lightning_genseg.methods.gss.tokenizers.reconstruction import reconstruct

SMOKE = Path(__file__).parents[2] / "experiments" / "smoke" / "gss_tokenizer.yaml"
NUM_CLASSES = len(SyntheticScenes.CLASS_NAMES)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scenes(**arguments):
    options = {"size": (45, 62), "val_length": 5, "num_workers": 0, "eval_batch_size": 2}
    return SyntheticScenesDataModule(**{**options, **arguments})


def test_scores_by_scikit_learn(tmp_path):
    data = scenes()
    report = reconstruct_data(data, "majority-8", scales=[1.0, 2.0])
    assert read("reconstruction/reconstruct.json") == report
    assert (report["images"], report["codebook_size"], report["downsample"]) == (5, NUM_CLASSES, 8)
    masks = torch.stack([data.val_dataloader().dataset[i]["mask"] for i in range(5)])
    maskige = Maskige(class_colors("lattice", NUM_CLASSES))
    colors = maskige.colors[:-1]
    for scale in (1.0, 2.0):
        tokenizer = CellMajority(colors, 8)
        found = reconstruct(masks, maskige, tokenizer, NearestColor(colors), scale)
        known = masks != 255
        labels = list(range(NUM_CLASSES))
        iou = jaccard_score(
            masks[known], found.scores.argmax(1)[known], labels=labels, average=None
        )
        scores = report["scales"][f"{scale:g}"]
        np.testing.assert_allclose(list(scores["IoU"].values()), iou, rtol=1e-5)
        np.testing.assert_allclose(scores["mIoU"], iou.mean(), rtol=1e-5)
        # The baseline is the same, but for ignored pixels, which do not vote there.
        assert scores["majority"]["mIoU"] > scores["mIoU"] + 0.01
    assert report["scales"]["2"]["mIoU"] > report["scales"]["1"]["mIoU"]


def test_default_scales_and_the_printed_inverse():
    data = scenes()
    fine, coarse = (reconstruct_data(data, f"majority-{f}") for f in (4, 8))
    assert list(fine["scales"]) == ["1"]
    assert list(coarse["scales"]) == ["1", "2"]
    printed = reconstruct_data(data, "majority-4", colors="repulsion", inverse="lstsq")
    assert printed["scales"]["1"]["mIoU"] < fine["scales"]["1"]["mIoU"]


def test_token_statistics():
    counts = torch.randint(20, (4, 30))
    counts[:, 3:9] = 0
    found = token_statistics(counts)
    of_tokens = entropy(counts.sum(0), base=2)
    given = np.average(
        [entropy(row, base=2) for row in counts], weights=counts.sum(1) / counts.sum()
    )
    assert found["used"] == int((counts.sum(0) > 0).sum())
    np.testing.assert_allclose(found["entropy"], of_tokens)
    np.testing.assert_allclose(found["perplexity"], 2**of_tokens)
    np.testing.assert_allclose(found["conditional_entropy"], given)
    # A token for each class says nothing more than the class.
    assert token_statistics(torch.eye(5))["conditional_entropy"] == pytest.approx(0, abs=1e-12)


def test_cells_without_labels_are_not_counted():
    mask = torch.full((1, 8, 8), 255)
    mask[0, :4, :4], mask[0, 0, 0] = 2, 1
    mask[0, 5, 5] = 3
    maskige = Maskige(class_colors("lattice", 4))
    nearest = NearestColor(maskige.colors[:-1])
    found = _Scale(1.0, CellMajority(maskige.colors[:-1], 4), maskige, 4)
    found.update(mask, nearest)
    assert found.counts.sum(1).tolist() == [0, 0, 1, 1]


def test_pictures(tmp_path):
    reconstruct_data(scenes(), num_pictures=2, output_dir=tmp_path / "out")
    assert np.asarray(Image.open(tmp_path / "out" / "reconstruct.png")).shape[1] > 4 * 320
    reconstruct_data(scenes(), num_pictures=0, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "reconstruct.png").exists()


def test_a_dvae_without_training_loses_everything(tmp_path):
    torch.save(DalleDVAE(16, 8).state_dict(), tmp_path / "dalle.pth")
    report = reconstruct_data(scenes(val_length=1), tmp_path / "dalle.pth", scales=[1.0])
    scores = report["scales"]["1"]
    assert scores["mIoU"] < scores["majority"]["mIoU"]
    assert scores["tokens"]["used"] <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pictures": -1}, "num_pictures is -1"),
        ({"scales": [0.0]}, "scales is 0.0; it must be positive"),
        ({"inverse": "foo"}, "inverse is 'foo'; it must be one of nearest, lstsq"),
        ({"output_dir": Path("file")}, "file' cannot be made"),
        ({"colors": "mseg"}, "colors mseg is for 194 classes"),
    ],
)
def test_wrong_arguments(options, message):
    Path("file").write_text("")
    with pytest.raises(ValueError, match=message):
        reconstruct_data(scenes(), **options)


def read(path):
    return json.loads(Path(path).read_text())


@pytest.mark.slow
def test_command(genseg, fails, tmp_path, capsys):
    """Stage one as shipped, and its reconstruction: better than one class for each cell."""
    genseg(f"fit --config {SMOKE}")
    (checkpoint,) = tmp_path.glob("runs/**/last.ckpt")
    run = checkpoint.parents[1]
    capsys.readouterr()
    genseg(f"reconstruct --config {run}/config.yaml --tokenizer {checkpoint}")
    report = read("reconstruction/reconstruct.json")
    assert capsys.readouterr().out.startswith(summary(report))
    scores = report["scales"]["1"]
    assert scores["mIoU"] > scores["majority"]["mIoU"]
    assert scores["mIoU"] == read(run / "val_metrics.json")["mIoU"]
    assert scores["tokens"]["used"] > NUM_CLASSES

    genseg(f"test --config {run}/config.yaml --ckpt_path {checkpoint}")
    (tested,) = tmp_path.glob("runs/**/metrics.json")
    assert read(tested)["mIoU"] > scores["majority"]["mIoU"]
    for options, message in (
        ("--tokenizer none.ckpt", "tokenizer 'none.ckpt' is no file"),
        ("--split tst", "tst"),
        ("--model.levels [4,4]", "leave --model.levels out"),
    ):
        assert message in fails(f"reconstruct --config {run}/config.yaml {options}")


@pytest.mark.parametrize("given", ["", "majority-4"])
def test_a_configuration_of_gss_gives_tokenizer_and_colours(given, genseg):
    model = {"class_path": "GSS", "init_args": {"tokenizer": "majority-2", "colors": "arithmetic"}}
    data = {"class_path": "SyntheticScenesDataModule", "init_args": {"val_length": 2}}
    Path("gss.yaml").write_text(json.dumps({"model": model, "data": data}))
    genseg("reconstruct --config gss.yaml" + (given and f" --tokenizer {given}"))
    report = read("reconstruction/reconstruct.json")
    assert report["tokenizer"] == (given or "majority-2")
    colors = class_colors("arithmetic", NUM_CLASSES)
    assert report["colors"] == [list(color) for color in colors]
