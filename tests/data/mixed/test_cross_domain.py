"""Train in one domain, test in another with its own classes, by the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix

from lightning_genseg import GMMSeg, SoftmaxSegmenter
from lightning_genseg.data import (
    VOC,
    CamVid,
    Cityscapes,
    FolderDataModule,
    MixedDataModule,
    TargetClasses,
    Taxonomy,
)
from lightning_genseg.ops.inference_options import has_several_views
from tests.domains import FIELD, TABLE, TOWN, write_domain
from tests.miniatures import save

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
NETWORK = {
    "encoder": "tu-test_resnet",
    "decoder": "fpn",
    "network_options": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
}
METHODS = {
    "SoftmaxSegmenter": (SoftmaxSegmenter, {}),
    "GMMSeg": (
        GMMSeg,
        {
            "mixture": {"components": 2, "embedding_dim": 16, "variance_floor": 0.1},
            "em": {"memory_size": 200, "interval": 1},
        },
    ),
}
TRAINER = {
    "accelerator": "cpu", "max_steps": 20, "val_check_interval": 20, "log_every_n_steps": 10,
    "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "enable_progress_bar": False,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "town"}},
}  # fmt: skip
MEMBERS = [[1, 0, 0, 0], [0, 1, 1, 0]]


@pytest.fixture
def here(genseg):
    """The command line in a folder with both domains and their table."""
    Path("table.tsv").write_text(TABLE)
    write_domain(Path("town"), "town", 40)
    write_domain(Path("field"), "field", 10)
    Path("all.txt").write_text("\n".join(map(str, range(10))))
    return genseg


def subclass(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def fit(genseg, name):
    """Train on the town, and give the run's checkpoint."""
    town = subclass("FolderDataModule", root="town", class_names=TOWN)
    data = {"taxonomy": "table.tsv", "data": {"town": town}, "batch_size": 4, "num_workers": 0}
    config = {
        "trainer": TRAINER,
        "model": subclass(name, **NETWORK, **METHODS[name][1]),
        "data": subclass("MixedDataModule", **data, crop_size=[32, 48]),
    }
    Path("fit.yaml").write_text(yaml.safe_dump(config))
    genseg("fit --config fit.yaml")
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    return checkpoint


def write_test_set(decision):
    """A configuration that comes after the run's, as those in experiments do."""
    field = subclass("FolderDataModule", root="field", class_names=FIELD, test_list="all.txt")
    given = {"taxonomy": "table.tsv", "dataset": "field", "decision": decision, "num_workers": 0}
    data = subclass("CrossDomainDataModule", data=field, **given)
    Path("field.yaml").write_text(yaml.safe_dump({"data": data}))


def by_hand(model, image, decision):
    """The protocol once more, in numpy: H x W classes of the field."""
    scores = model.predict_image(image)["scores"].astype(np.float64)
    if not has_several_views(model.inference):  # otherwise they are probabilities
        scores = np.exp(scores - scores.max(0))
        scores /= scores.sum(0)
    if decision == "hard":
        scores = np.eye(4)[scores.argmax(0)].transpose(2, 0, 1)
    return np.einsum("tu,uhw->thw", MEMBERS, scores).argmax(0)


@pytest.mark.parametrize(("name", "decision"), [("SoftmaxSegmenter", "soft"), ("GMMSeg", "hard")])
def test_zero_shot(here, name, decision):
    checkpoint = fit(here, name)
    write_test_set(decision)
    config = f"--config {checkpoint.parents[1]}/config.yaml --config field.yaml"
    here(f"test {config} --ckpt_path={checkpoint} --trainer.logger.init_args.version=field")

    folder = Path("runs/town/field")
    report = json.loads((folder / "metrics.json").read_text())
    labels, predictions = [], []
    model = METHODS[name][0].load_from_checkpoint(checkpoint)
    for path in sorted(Path("field/images").iterdir()):
        predictions.append(by_hand(model, np.asarray(Image.open(path)), decision))
        mask = np.asarray(Image.open(Path("field/masks") / path.name))
        labels.append(np.array([255, 0, 1])[mask])
    valid = np.stack(labels) != 255
    matrix = confusion_matrix(np.stack(labels)[valid], np.stack(predictions)[valid], labels=[0, 1])
    expected = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert list(report["IoU"]) == ["heaven", "ground"]
    np.testing.assert_allclose(list(report["IoU"].values()), expected, rtol=1e-6)
    np.testing.assert_allclose(report["mIoU"], expected.mean(), rtol=1e-6)
    assert report["mIoU"] > 0.8
    assert 0 <= report["ECE"] < 0.3
    with Image.open(folder / "pictures.png") as picture:
        assert picture.size[0] > 3 * 48


def target(decision):
    members = torch.tensor(MEMBERS, dtype=torch.bool)
    return TargetClasses(["heaven", "ground"], [(0, 0, 0), (1, 1, 1)], members, decision)


@pytest.mark.parametrize(
    "inference", [None, {"flip": True}, {"window": (16, 16), "stride": (8, 8)}]
)
@pytest.mark.parametrize("decision", ["soft", "hard"])
def test_every_kind_of_inference(decision, inference):
    model = SoftmaxSegmenter(4, encoder="tu-test_resnet", decoder="fpn", inference=inference).eval()
    torch.nn.init.normal_(model.classifier[1].weight)  # so that every class is somewhere
    model.set_target_classes(target(decision))
    picture = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        given = model.test_step({"image": image, "mask": torch.zeros(1, 32, 32).long()}, 0)["mask"]
    expected = by_hand(model, picture, decision)
    assert (given[0].numpy() == expected).mean() > 0.999  # ties of rounding
    assert 0 < expected.mean() < 1


def test_a_module_returns_to_its_own_classes():
    model = SoftmaxSegmenter(4, encoder="tu-test_resnet", decoder="fpn").eval()
    batch = {"image": torch.rand(2, 3, 32, 32), "mask": torch.randint(2, (2, 32, 32))}
    model.set_target_classes(target("soft"))
    assert model.test_step(batch, 0)["mask"].max() <= 1
    assert model.test_metrics.compute()["IoU"].shape == (2,)
    model.set_target_classes(None)
    model.test_step(batch, 0)
    assert model.test_metrics.compute()["IoU"].shape == (4,)


# --- harmonic mean ------------------------------------------------------------------------------


def harmonic_mean(*paths):
    script = EXPERIMENTS / "mseg" / "harmonic_mean.py"
    return subprocess.run([sys.executable, script, *paths], capture_output=True, text=True)


def write_scores(folder, *values):
    for index, value in enumerate(values):
        path = folder / f"set{index}" / "metrics.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"mIoU": value}))
        yield path.parent if index else path


# Table 6 of GSS.
@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ((64.1, 37.1, 72.3, 59.3, 62.0, 40.6), 52.6),
        ((65.2, 38.8, 75.2, 62.5, 66.2, 43.1), 55.2),
        ((78.7, 45.8, 74.2, 61.8, 65.4, 46.9), 59.5),
        ((79.5, 47.7, 75.9, 65.3, 68.0, 49.7), 61.9),
    ],
)
def test_harmonic_mean_of_the_paper(tmp_path, values, mean):
    done = harmonic_mean(*write_scores(tmp_path, *(value / 100 for value in values)))
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    assert [float(row.split()[0]) for row in rows] == pytest.approx([v / 100 for v in values])
    assert 100 * float(last.split()[0]) == pytest.approx(mean, abs=0.06)


def test_harmonic_mean_of_what_is_no_score(tmp_path):
    done = harmonic_mean(*write_scores(tmp_path, 0.5, None))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("set1/metrics.json' holds no mIoU: test the model first.")
    done = harmonic_mean(tmp_path / "no")
    assert done.returncode == 2
    assert "does not exist" in done.stderr


# --- the configurations that ship ---------------------------------------------------------------


def settings(folder, stem):
    return yaml.safe_load((EXPERIMENTS / folder / f"{stem}.yaml").read_text())["data"]["init_args"]


def camvid_and_msrc(folder):
    """Miniatures with every label: CamVid's 12, MSRC's 23."""
    rng = np.random.default_rng(0)
    folders = [
        (f"camvid/{split}", f"camvid/{split}annot", 12) for split in ("train", "val", "test")
    ]
    for images, masks, labels in (*folders, ("msrc/images", "msrc/masks", 23)):
        for number in range(4):
            image = rng.integers(256, size=(48, 64, 3), dtype=np.uint8)
            save(image, folder / images / f"{number}.png")
            mask = rng.integers(labels, size=(48, 64), dtype=np.uint8)
            save(mask, folder / masks / f"{number}.png")
    for split, names in {"train": "0\n1", "val": "2", "test": "3"}.items():
        (folder / "msrc" / f"{split}.txt").write_text(names)


def test_the_shared_table_fits_the_shipped_data():
    table = Taxonomy(EXPERIMENTS / "crossdomain" / "camvid_msrc.tsv")
    msrc = settings("crossdomain", "msrc")["data"]["msrc"]["init_args"]["class_names"]
    for dataset, names in (("camvid", CamVid.CLASS_NAMES), ("msrc", msrc)):
        labels = table.universal_labels(dataset, names)[: len(names)]
        assert set(labels.tolist()) == {*range(8), 255}
        palette = [(0, 0, 0)] * len(names)
        assert table.target_classes(dataset, names, palette)[0].members.sum(1).tolist() == [1] * 8
    own = Taxonomy(EXPERIMENTS / "crossdomain" / "camvid11_msrc.tsv")
    assert own.class_names == list(CamVid.CLASS_NAMES)  # so that their checkpoints fit
    target, _ = own.target_classes("msrc", msrc, [(0, 0, 0)] * len(msrc))
    wide = {n: int(m.sum()) for n, m in zip(target.class_names, target.members, strict=True)}
    assert wide == dict.fromkeys(wide, 1) | {"road": 2}
    assert len(wide) == 8


def test_the_three_trainings_differ_in_their_images_only():
    camvid, msrc, both = (settings("crossdomain", stem) for stem in ("camvid", "msrc", "both"))
    assert both.pop("data") == {**camvid.pop("data"), **msrc["data"]}
    inner = msrc.pop("data")["msrc"]
    assert camvid == msrc == both
    assert settings("crossdomain", "test_msrc")["data"] == inner


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:every pixel of the first batch")
def test_the_commands_between_camvid_and_msrc(tmp_path, genseg):
    camvid_and_msrc(tmp_path)
    Path("experiments").symlink_to(EXPERIMENTS)
    folder, run = "experiments/crossdomain", Path("runs/crossdomain/softmax_fpn")
    short = "--data.batch_size=2 --trainer.val_check_interval=1 --trainer.limit_val_batches=1"
    version = "--data.num_workers=0 --trainer.logger.init_args.version"
    for stem, keys in {"camvid": ["camvid"], "msrc": ["msrc"], "both": ["camvid", "msrc"]}.items():
        data = f"--config {folder}/{stem}.yaml "
        roots = " ".join(f"--data.data.{key}.root={key}" for key in keys)
        genseg(
            f"fit --config experiments/camvid/softmax_fpn.yaml {data} {roots} {short} "
            f"--config {folder}/short_side.yaml --trainer.max_steps=2 "
            f"--trainer.logger.init_args.name=softmax_fpn {version}={stem}"
        )
        genseg(
            f"fit --config experiments/camvid/maskige_vq.yaml {data} {roots} {short} "
            "--trainer.max_steps=1 --data.num_workers=0"
        )
        for test in ("camvid", "msrc"):
            genseg(
                f"test --config {run}/{stem}/config.yaml --config {folder}/test_{test}.yaml "
                f"--data.data.root={test} --ckpt_path={run}/{stem}/checkpoints/last.ckpt "
                f"{version}={stem}-on-{test}"
            )
            report = json.loads((run / f"{stem}-on-{test}" / "metrics.json").read_text())
            assert len(report["IoU"]) == 8


MSEG = sorted((EXPERIMENTS / "mseg").glob("test_*.yaml"))


@pytest.mark.parametrize("path", MSEG, ids=lambda path: path.stem)
def test_mseg_test_sets_have_their_number_of_classes(path):
    data = settings("mseg", path.stem)
    kind = {"CityscapesDataModule": Cityscapes, "VOCDataModule": VOC}.get(
        data["data"]["class_path"]
    )
    names = kind.CLASS_NAMES if kind else data["data"]["init_args"]["class_names"]
    wanted = {"voc2012": 21}.get(data["dataset"]) or int(data["dataset"].rpartition("-")[2])
    assert len(set(names)) == len(names) == wanted
    assert data["decision"] == "hard"


def test_mseg_training_sets():
    data = settings("mseg", "data")
    assert data["repeats"] == {
        "ade20k-150-relabeled": 6, "bdd-relabeled": 17, "cityscapes-19-relabeled": 40,
        "coco-panoptic-133-relabeled": 1, "idd-39-relabeled": 17, "mapillary-public65-relabeled": 7,
        "sunrgbd-37-relabeled": 24,
    }  # fmt: skip
    assert data["repeats"].keys() == data["data"].keys()
    every = {name for one in data["data"].values() for name in one["init_args"]["class_names"]}
    assert len(every) == 194  # all of the taxonomy
    for one in data["data"].values():
        names = one["init_args"]["class_names"]
        assert names == sorted(names)
    colors = json.loads((EXPERIMENTS / "mseg" / "cityscapes_colors.json").read_text())
    assert len(colors) == len(Cityscapes.CLASS_NAMES) + 1


def test_mseg_is_parsed(genseg, capsys):
    """With a table in the wide form of MSeg_master.tsv."""
    sets = {k: v["init_args"]["class_names"] for k, v in settings("mseg", "data")["data"].items()}
    rows = [
        [name, *(name if name in names else "" for names in sets.values())]
        for name in sorted({name for names in sets.values() for name in names})
    ]
    Path("mseg").mkdir()
    text = "\n".join("\t".join(row) for row in [["universal", *sets], *rows, ["unlabeled"]])
    Path("mseg/MSeg_master.tsv").write_text(text + "\n")
    data = EXPERIMENTS / "mseg" / "data.yaml"
    model = EXPERIMENTS / "mseg" / "softmax_ocrnet_hrnet_w48.yaml"
    with pytest.raises(SystemExit, match="0"):
        genseg(f"fit --config {data} --config {model} --print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 160_000
    arguments = yaml.safe_load(data.read_text())["data"]["init_args"]
    parts = {k: FolderDataModule(**v["init_args"]) for k, v in arguments["data"].items()}
    mixed = MixedDataModule(parts, Path("mseg/MSeg_master.tsv"), arguments["repeats"])
    assert mixed.num_classes == 194
