"""Every configuration that ships: the smoke ones learn, the others run two steps as they are."""

import csv
import functools
import io
import json
import math
import re
import runpy
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from PIL import Image

from lightning_genseg import methods
from lightning_genseg.cli.main import main
from lightning_genseg.data import CamVid
from lightning_genseg.uncertainty.scores import DENSITY_SCORES, AnomalyName
from tests import miniatures

pytestmark = pytest.mark.usefixtures("genseg")  # every test runs in its own folder
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def found(*patterns):
    return [path for pattern in patterns for path in sorted(EXPERIMENTS.glob(f"{pattern}.yaml"))]


# Those that go on from another run are tested with it.
SMOKE = [path for path in found("smoke/*_synthetic") if not path.stem.startswith("gss")]
CAMVID = [
    path
    for path in found("camvid/*")
    if path.stem not in ("gss_ff", "gss_ft", "gss_ft_w", "full", "half")
]
# One of each method; the others differ from these in a decoder or in the labels.
ONE_EACH = ("gmmseg_fpn", "agmm_fpn_points", "softmax_mla", "gss_ff_majority", "maskige_vq")
FEW_SHOT = found("pascal5i/*", "coco20i/*")
SPARSE = found("voc/*_points", "voc/*_scribbles", "cityscapes/*_clicks")
GSS = found("ade20k/gss*", "cityscapes/gss*")
DENSE = {*found("ade20k/*", "cityscapes/*", "coco_stuff/*", "voc/*")}
DENSE = sorted(DENSE.difference(SPARSE, GSS))
ALONE = [p for p in [*DENSE, *SPARSE, *GSS] if not re.search("posthoc|_ft_", p.stem)]
TWO_STEPS = "--trainer.max_steps=2 --trainer.limit_val_batches=1 --data.num_workers=0"
SHORT = "--trainer.max_steps=3 --trainer.val_check_interval=3"
FEW = "ignore:.* classes (occur|are labelled) in no training image"  # four images, 150 classes
FROZEN = "ignore:Found .* in eval mode at the start of training"  # and stays in it


def name(path):
    return str(path.relative_to(EXPERIMENTS))


def miniature(kind, folder):
    kind = {"coco_stuff": "coco_stuff_10k", "coco20i": "coco"}.get(kind, kind)
    return getattr(miniatures, f"make_{kind}")(folder / kind)


def run(*lines):
    main(shlex.split(" ".join(lines)))


def read(pattern):
    """The one JSON file that a run has left there."""
    (path,) = Path("runs").rglob(pattern)
    return json.loads(path.read_text())


def written(path, text=None):
    """What the YAML says: `trainer`, and the `init_args` of `model` and `data`."""
    config = yaml.safe_load(text or path.read_text())
    return config["trainer"], config["model"]["init_args"], config["data"]["init_args"]


@functools.cache
def printed(path):
    root = f"--data.{'data.' if path.stem.startswith('base_learner') else ''}root=data"
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stopped:
        run(f"fit --config {path} {root} --print_config")
    assert stopped.value.code == 0
    return out.getvalue()


def resolved(path):
    """The same with all defaults."""
    return written(path, printed(path))


def write_images(folder, masks, count, size, classes, **splits):
    """Random images and masks with the same names, and lists of their numbers."""
    for split, numbers in splits.items():
        Path(f"{split}.txt").write_text("\n".join(map(str, numbers)))
    rng = np.random.default_rng(0)
    for target, shape, values in ((folder, (*size, 3), 256), (masks, size, classes)):
        Path(target).mkdir(parents=True)
        for i in range(count):
            array = rng.integers(values, size=shape, dtype=np.uint8)
            Image.fromarray(array).save(f"{target}/{i}.png")


def write_camvid():
    for split in ("train", "val", "test"):
        write_images(split, f"{split}annot", 8, (72, 96), len(CamVid.CLASS_NAMES))


def fit(path, *options):
    """Fit, and give the run's checkpoint of the last step and what its validation found."""
    run(f"fit --config {path} --trainer.log_every_n_steps=1", *options)
    folder = sorted((Path("runs") / path.parent.name / path.stem).iterdir())[-1]
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert losses
    assert all(map(math.isfinite, losses))
    assert len(losses) == 2 or "max_steps=2" not in " ".join(options)
    return folder / "checkpoints/last.ckpt", json.loads((folder / "val_metrics.json").read_text())


def after(checkpoint):
    return f"--config {checkpoint.parents[1] / 'config.yaml'} --ckpt_path={checkpoint}"


def scores_of(*options):
    run("test", *options, "--trainer.logger.init_args.version=test")
    return read("test/metrics.json")


def predict(checkpoint, *options):
    """Predict two photographs."""
    write_images("photos", "unused", 2, (60, 40), 2)
    options = ("--data.predict_root=photos --predictions.output_dir=out", *options)
    run("predict", after(checkpoint), *options)
    assert len(Path("out/predictions.jsonl").read_text().splitlines()) == 2


def test_index_is_up_to_date():
    """Else run `python experiments/make_index.py`."""
    readme = (EXPERIMENTS / "README.md").read_text()
    assert runpy.run_path(f"{EXPERIMENTS}/make_index.py")["with_index"](readme) == readme
    for path in found("**/*"):
        assert readme.count(f"]({name(path)})") == 1, path


def test_the_tables_are_those_of_the_kept_results():
    """Else run `python experiments/make_results.py`."""
    make = runpy.run_path(f"{EXPERIMENTS}/make_results.py")
    for page in make["PAGES"]:
        text = page.read_text()
        assert "<!-- table: " in text
        assert make["with_tables"](text) == text, page


def test_a_run_goes_on_at_the_commit_where_it_began(tmp_path):
    make = runpy.run_path(f"{EXPERIMENTS}/make_results.py")
    now = {"commit": "a" * 40, "changed": False, "hardware": "a processor"}
    make["note_origin"].__globals__["origin"] = lambda: now
    make["note_origin"](tmp_path)
    make["note_origin"](tmp_path)
    assert json.loads((tmp_path / "origin.json").read_text()) == now
    now = {**now, "commit": "b" * 40}
    with pytest.raises(SystemExit, match=r"was begun at commit a+ and this is b+: go on there"):
        make["note_origin"](tmp_path)
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    (old / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(SystemExit, match=r"nobody noted at which commit .*old was begun"):
        make["note_origin"](old)


def test_the_pages_know_the_options():
    known = set()
    for method in map(methods.__dict__.get, methods.__all__):
        parser = ArgumentParser()
        parser.add_class_arguments(method, "model", fail_untyped=False)
        known |= {*parser.get_defaults().keys()} | {"model.help", "model.base_learner"}
    for page in EXPERIMENTS.rglob("*.md"):
        named = re.findall(r"--(model\.[\w.]*\w)", page.read_text())
        assert {option.partition(".init_args")[0] for option in named} <= known


def test_a_result_keeps_the_tests_of_other_calls(tmp_path, monkeypatch):
    make = runpy.run_path(f"{EXPERIMENTS}/make_results.py")
    run, kept = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    (run / "config.yaml").write_text("seed_everything: 3\ntrainer: {max_steps: 5}\n")
    (run / "val_metrics.json").write_text('{"mIoU": 0.5}')
    (run / "metrics.csv").write_text("step,train_loss,val_mIoU\n1,2.0,\n1,,0.5\n")
    (run / "origin.json").write_text('{"commit": "a", "changed": false, "hardware": "b"}')
    for name in ("one", "two"):
        (run / name).mkdir()
        (run / name / "metrics.json").write_text(json.dumps({"AUROC": 0.25}))
        monkeypatch.setitem(make["add"].__globals__, "RESULTS", kept)
        make["add"]("x", run, [f"{name}={run / name}"])
    result = json.loads((kept / "x" / "seed3.json").read_text())
    assert set(result["test"]) == {"one", "two"}
    assert (result["train"], result["curve"]) == ({"loss": 2.0}, {"2": 0.5})
    (run / "val_metrics.json").write_text('{"mIoU": 0.6}')  # another training
    make["add"]("x", run, [])
    assert json.loads((kept / "x" / "seed3.json").read_text())["test"] == {}


@pytest.fixture(params=[pytest.param("", marks=pytest.mark.slow), SHORT], ids=["learns", "runs"])
def short(request):
    """Nothing, so that a chain takes its time and learns; or options that make it short."""
    return request.param


@pytest.mark.parametrize("path", SMOKE, ids=name)
def test_smoke(path, short):
    checkpoint, scores = fit(path, short)
    assert scores["mIoU"] > 0.3 or short  # guessing gives about 0.1, the most frequent class 0.07
    assert scores_of(after(checkpoint))["mIoU"] > 0.25 or short
    predict(checkpoint)
    assert sorted(p.name for p in Path("out/masks").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name(path), marks=[pytest.mark.slow] * (path.stem not in ONE_EACH))
        for path in CAMVID
    ],
)
def test_camvid(path):
    write_camvid()
    fit(path, "--data.root=. --data.batch_size=2 --trainer.val_check_interval=1", TWO_STEPS)


@pytest.mark.parametrize(("size", "recipe"), [("full", "gmmseg_fpn"), ("half", "softmax_mla")])
def test_camvid_at_two_sizes(size, recipe):
    write_camvid()
    beside = f"--config={EXPERIMENTS}/camvid/{size}.yaml --model.encoder_weights=null"
    path = EXPERIMENTS / "camvid" / f"{recipe}.yaml"
    options = "--data.root=. --data.batch_size=2 --trainer.val_check_interval=1"
    fit(path, beside, options, TWO_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("path", found("msrc/*_points"), ids=name)
def test_msrc(path):
    write_images("images", "masks", 12, (72, 96), 23, train=range(8), val=(8, 9), test=(10, 11))
    fit(path, "--data.root=. --trainer.val_check_interval=1", TWO_STEPS)


SHARED = {"encoder", "encoder_weights", "decoder", "network_options", "inference", "optimizer"}
SHARED |= {"lr_scheduler", "head_lr_factor", "decay_norms", "dropout"}


def training(path, *own):
    """Schedule, network and data: all that methods which are compared have in common."""
    trainer, model, data = written(path)
    trainer.pop("callbacks", None)
    return trainer, {key: model.get(key) for key in SHARED.difference(own)}, data


@pytest.mark.parametrize("folder", ["camvid", "msrc"])
def test_points_are_learned_from_in_the_same_way(folder):
    """One network, schedule and data; of the methods only their own arguments differ."""
    softmax = EXPERIMENTS / folder / "softmax_fpn_points.yaml"
    for method in ("agmm", "gmmseg"):
        assert training(softmax.with_stem(f"{method}_fpn_points")) == training(softmax)
    dense = EXPERIMENTS / "camvid" / "softmax_fpn.yaml"
    assert training(dense, "inference")[1] == training(softmax, "inference")[1]


def test_gss_is_trained_as_softmax_is():
    softmax = EXPERIMENTS / "camvid" / "softmax_fpn.yaml"
    for stem in ("gss_ff", "gss_ff_majority", "softmax_mla"):
        own = training(softmax.with_stem(stem), "decoder", "network_options")
        assert own == training(softmax, "decoder", "network_options")
    for folder in ("camvid", "idd_lite"):
        softmax = EXPERIMENTS / folder / "softmax_mla.yaml"
        gss = softmax.with_stem("gss_ff")
        own = training(gss, "decoder", "network_options")
        assert own == training(softmax, "decoder", "network_options")
        options, theirs = written(softmax)[1]["network_options"], written(gss)[1]["decoder"]
        for key in ("level_channels", "depth", "auxiliary"):
            assert theirs[key] == options[key]
        assert theirs["fused_channels"] == options["decoder_channels"]
        assert "dropout" not in theirs


# Another encoder: ResNet-50's checkpoints take longer to write than the rest.
MINE = "--data.root=mine --data.num_classes=3 --model.encoder=tu-test_resnet"
MINE += " --model.encoder_weights=null"
MINE += " --trainer.accelerator=cpu --trainer.val_check_interval=1"
OWN = {
    "quickstart": "",
    "own_images": f"{MINE} --data.crop_size=[64,64] --data.batch_size=4 --data.short_side=64"
    " --model.inference.short_side=64",
    "own_clicks": f"{MINE} --data.batch_size=2",
}


@pytest.mark.parametrize(("stem", "options"), OWN.items(), ids=OWN)
def test_own_data(stem, options):
    write_images("mine/images", "mine/masks", 10, (180, 190), 3)
    points = [{"x": 60 * c, "y": 90, "cls": c} for c in range(3)]
    Path("mine/clicks.json").write_text(json.dumps({f"{i}.png": points for i in range(10)}))
    if stem == "own_clicks":
        for number in range(8):
            Path(f"mine/masks/{number}.png").unlink()
    run(f"fit --config {EXPERIMENTS}/{stem}.yaml", options, TWO_STEPS)
    folder = Path("runs", stem, "version_0")
    assert list((folder / "checkpoints").iterdir())
    assert (folder / "label_spreading").is_dir() == (stem == "own_clicks")


# Images of a step, steps, side of the crops, learning rate; the first pattern that fits.
PUBLISHED = {
    "ade20k/gmmseg_posthoc*": (16, 2_500, 512, 0.01),
    "ade20k/*_80k.yaml": (16, 80_000, 512, 0.01),
    "ade20k/gss_ff*": (32, 160_000, 512, 1.2e-4),
    "ade20k/gss_ft_w*": (16, 40_000, 512, 1.5e-3),
    "ade20k/gss_ft*": (16, 3_000, 512, 1.5e-3),
    "ade20k/*": (16, 160_000, 512, None),
    "cityscapes/gss_ff*": (16, 80_000, 768, 1.5e-3),
    "cityscapes/gss_ft_w*": (8, 40_000, 768, 7.5e-4),
    "cityscapes/*_clicks.yaml": (8, 240 * (2_975 // 8), 721, 5e-3),  # epochs in whole batches
    "cityscapes/*": (8, 80_000, 768, None),
    "coco_stuff/*": (16, 80_000, 512, None),
    "voc/*_r101.yaml": (16, 40_000, 512, 0.01),
    "voc/*": (16, 80 * (10_582 // 16), 321, 1e-3),
    "pascal5i/base_learner*": (12, 5_953 // 12 * 100, 417, 2.5e-4),
    "pascal5i/*": (8, 4_208 // 8 * 200, 473, 0.05),
    "coco20i/base_learner*": (12, 82_081 // 12 * 20, 417, 2.5e-3),
    "coco20i/*": (8, 21_917 // 8 * 50, 641, 0.05),
}


@pytest.mark.parametrize("path", [*DENSE, *SPARSE, *GSS, *FEW_SHOT], ids=name)
def test_recipe_agrees_with_itself_and_the_paper(path):
    trainer, model, data = resolved(path)
    images, steps, side, rate = next(PUBLISHED[key] for key in PUBLISHED if path.match(key))
    schedule = model["lr_scheduler"]["init_args"]
    assert schedule.get("T_max", schedule.get("total_iters")) == trainer["max_steps"] == steps
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert trainer["check_val_every_n_epoch"] is None
    assert trainer["devices"] * data["batch_size"] == images
    assert model["optimizer"]["init_args"]["lr"] == rate or rate is None
    crop = data["train_transform"][0]["init_args"] if path not in FEW_SHOT else {}
    assert {crop.get("height", data.get("size")), crop.get("width", side)} == {side}
    assert (model.get("network_options") or {}).get("img_size", side) == side
    assert "logger" not in written(path)[0]  # by default runs/FOLDER/NAME
    root = "" if path in FEW_SHOT else "root PATH/"
    assert f"# genseg fit --config experiments/{name(path)} --data.{root}" in path.read_text()


@pytest.mark.parametrize("path", DENSE, ids=name)
def test_dense_recipe_crops_and_scores_as_mmsegmentation(path):
    _, model, data = resolved(path)
    if "gmmseg" in path.stem:
        assert model["em"]["train"] == ("posthoc" if "posthoc" in path.stem else "em")
    whole = {"short_side": 512, "long_side": 2048} if path.parent.name != "cityscapes" else {}
    crop = dict.fromkeys(("short_side", "long_side")) | whole
    crop |= {"scale": [0.5, 2.0], "max_class_share": 0.75, "fill": [124, 116, 104], "tries": 10}
    assert data["train_transform"][0]["init_args"].items() >= crop.items()
    # mmsegmentation resizes to multiples of 32 in this one recipe.
    if name(path).startswith("ade20k") and path.stem.endswith("mit_b5"):
        whole["multiple"] = 32
    assert model["inference"] == (whole or {"window": [768, 768], "stride": [512, 512]})


@pytest.mark.parametrize("path", [p for p in DENSE if p.stem.startswith("softmax")], ids=name)
def test_softmax_and_gmmseg_differ_in_the_classifier_only(path):
    own = resolved(path)
    other = resolved(path.with_stem(path.stem.replace("softmax", "gmmseg")))
    assert own[0] == other[0]
    assert own[1].pop("align_corners") is False  # GMMSeg has no such option
    assert other[1].items() >= own[1].items()
    assert (own[2].pop("class_balanced"), other[2].pop("class_balanced")) == (False, True)
    assert own[2] == other[2]


class EveryParameterLearns(Callback):
    """DDP would wait for a parameter without a gradient for ever."""

    def on_after_backward(self, trainer, pl_module):
        assert trainer.train_dataloader.batch_size == 2
        named = pl_module.named_parameters()
        assert [key for key, p in named if p.requires_grad and p.grad is None] == []


SMALL = "--data.batch_size=2 --trainer.accelerator=cpu --trainer.devices=1"
SMALL += f" --trainer.val_check_interval=2 {TWO_STEPS}"


def two_steps(path, root, *options, smaller=8):
    """Fit two steps of the configuration; only sizes are smaller, and the weights random."""
    _, model, data = written(path)
    small = model.get("inference") or {}
    small |= {"short_side": 96, "long_side": 384} if "short_side" in small else {}
    crop = data["train_transform"][0]["init_args"]
    sides = [key for key in crop if key.endswith(("height", "width", "side"))]
    crop.update({key: crop[key] // smaller for key in sides})
    if "gmmseg" in path.stem:
        options = ("--model.em.memory_size=50 --model.em.interval=1", *options)
    checkpoint, scores = fit(
        path, f"--data.root={root} --data.cache_dir=cache --model.encoder_weights=null",
        f"--data.train_transform='{json.dumps(data['train_transform'])}'",
        f"--model.inference='{json.dumps(small)}'",
        "--trainer.callbacks+=tests.test_experiments.EveryParameterLearns", *options, SMALL,
    )  # fmt: skip
    assert 0 <= scores["mIoU"] <= 1
    return checkpoint


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW, FROZEN, "ignore:every pixel of the first batch")
@pytest.mark.parametrize("path", ALONE, ids=name)
def test_recipe_trains_two_steps(path, tmp_path):
    root = miniature(path.parent.name, tmp_path)
    gss = ["--model.tokenizer=majority-8"] if path in GSS else []
    # Of VOC's two points an image most crops show none.
    crowded = path in SPARSE and path.parent.name == "voc"
    checkpoint = two_steps(path, root, *gss, smaller=4 if crowded else 8)
    assert (checkpoint.parents[1] / "label_spreading").is_dir() == path.stem.startswith("agmm")
    if path.stem == "gss_ff_swin_l":
        small = f"--data.root={root} --model.inference=null --model.width=32 {SMALL}"
        for own in path.parent.glob("gss_ft*.yaml"):
            fit(own, small, f"--model.prior={checkpoint}")[0].unlink()
    checkpoint.unlink()  # a gigabyte, which pytest would keep


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW, FROZEN)
def test_post_hoc_recipe_follows_its_softmax_recipe(tmp_path):
    folder, root = EXPERIMENTS / "ade20k", miniature("ade20k", tmp_path)
    extractor = two_steps(folder / "softmax_deeplabv3plus_r101_80k.yaml", root)
    path = folder / "gmmseg_posthoc_deeplabv3plus_r101.yaml"
    assert f"--model.extractor {extractor}" in path.read_text()
    two_steps(path, root, f"--model.extractor={extractor}").unlink()
    extractor.unlink()


POINTS = ["voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"]
SPARSE_LABELS = {
    "points": ("PointFiles", {"files": POINTS, "size": 3}),
    "scribbles": ("ScribbleFiles", {"folder": "voc_scribbles", "size": 3}),
    "clicks": ("Points", {"count": 20, "per": "image", "seed": 0}),
}


def test_there_is_a_recipe_for_each_row():
    rows = [re.sub("(agmm|softmax)_deeplabv3plus", "*", name(path)) for path in SPARSE]
    wanted = ["cityscapes/*_r50_clicks.yaml", "voc/*_r101_points.yaml", "voc/*_r101_scribbles.yaml"]
    assert sorted(rows) == sorted(2 * wanted)


@pytest.mark.parametrize("path", SPARSE, ids=name)
def test_sparse_recipe_agrees_with_the_published_code(path):
    _, model, data = resolved(path)
    voc = path.parent.name == "voc"
    assert model["lr_scheduler"]["class_path"].endswith(".PolynomialLR")
    assert model["lr_scheduler"]["init_args"]["power"] == 0.9
    kind, arguments = SPARSE_LABELS[path.stem.rpartition("_")[2]]
    assert data["sparse"]["class_path"].rpartition(".")[2] == kind
    assert data["sparse"]["init_args"].items() >= arguments.items()
    assert data["train_transform"][0]["init_args"]["scale"] == [0.5, 2.0]
    sgd = {"momentum": 0.9, "weight_decay": 1e-4}
    assert model["optimizer"]["init_args"].items() >= sgd.items()
    assert model["head_lr_factor"] == (10 if voc else 1)
    assert model["inference"] == (None if voc else {"window": [721, 721], "stride": [241, 241]})
    baseline = resolved(path.with_stem(path.stem.replace("agmm", "softmax")))
    assert baseline[2] == data
    assert model.items() >= baseline[1].items()


def test_anomaly_data_of_a_network_trained_on_cityscapes(tmp_path):
    model = "--model=SoftmaxSegmenter --model.encoder=tu-test_resnet --model.decoder=fpn"
    data = f"--data=CityscapesDataModule --data.root={miniature('cityscapes', tmp_path)}"
    run("fit", model, data, "--data.crop_size=[64,64]", SMALL)
    trained = after(Path("runs/SoftmaxSegmenter/version_0/checkpoints/last.ckpt"))
    run("calibrate", trained, "--risk=0.5 --output=calibrated.ckpt")
    for stem in ("fishyscapes", "road_anomaly", "road_anomaly21"):
        run(
            f"test {trained} --config {EXPERIMENTS}/anomaly/{stem}.yaml --data.num_workers=0",
            f"--data.root={miniature(stem, tmp_path)} --ckpt_path=calibrated.ckpt",
            "--trainer.callbacks+=CompareScores --model.anomaly_score=sml",
            f"--trainer.logger.init_args.version={stem}",
        )
        scores = set(read(f"{stem}/anomaly_scores.json"))
        assert scores == set(get_args(AnomalyName)) - set(DENSITY_SCORES)
        report = read(f"{stem}/metrics.json")
        assert report["anomaly"]["score"] == "sml"
        assert 0 <= report["AUROC"] <= 1


@pytest.mark.filterwarnings(FROZEN)
def test_few_shot_smoke(short):
    base, scores = fit(EXPERIMENTS / "smoke/few_shot_base_learner.yaml", short)
    assert scores["mIoU_base"] > 0.25 or short  # one class everywhere: 0.1
    path = EXPERIMENTS / "smoke/few_shot_cgmgm.yaml"
    assert f"--model.base_learner {base}" in path.read_text()
    few = short and "--data.episodes=8 --data.val_episodes=4"
    trained, _ = fit(path, f"--model.base_learner={base}", short, few)
    base.unlink()  # is part of the other checkpoint
    # Vehicles are a tenth of the pixels: everything 0.1, half of it at random 0.09.
    assert scores_of(after(trained), few)["GmIoU"] > 0.13 or short
    write_images("support/images", "support/masks", 2, (50, 70), 2)
    predict(trained, "--data.support_root=support")
    with Image.open("out/masks/0.png") as mask:
        assert mask.size == (40, 60)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
def test_few_shot_msrc():
    folder = EXPERIMENTS / "msrc"
    write_images("images", "masks", 12, (53, 80), 23, train=range(6), val=(6, 7, 8), test=(9, 10))
    Path("folds.json").write_text(json.dumps({"folds": [["cow", "car"]]}))
    fold = "--data.data.root=. --data.folds=folds.json --data.fold=0 --data.size=64"
    short = f"{fold} --data.train_transform=null {SMALL}"
    base, _ = fit(folder / "base_learner.yaml", short)
    few = "--data.min_area=10 --data.novel_setting=background --data.shots=2 --data.episodes=2"
    few += f" --model.base_learner={base}"
    for method in ("cgmgm", "bam"):
        trained, scores = fit(folder / f"{method}.yaml", short, few, "--model.shots=2")
        assert set(scores["IoU"]) <= {"cow", "car"}
        trained.unlink()
    scores = scores_of(f"--config {folder}/prototypes.yaml --data.num_workers=0", fold, few)
    assert set(scores["IoU"]) == {"cow", "car"}


@pytest.mark.parametrize("path", FEW_SHOT, ids=name)
def test_few_shot_recipe_agrees_with_published_code(path):
    trainer, model, data = resolved(path)
    folder, text, encoder = path.parent.name, path.read_text(), path.stem.rpartition("_")[2]
    if path.stem.startswith("base_learner"):
        assert model["encoder"] == {"vgg16": "vgg16_bn", "resnet50": "tu-resnet50s"}[encoder]
        assert data["folds"] == folder
        return
    coco = folder == "coco20i"
    epochs, folds = (50, (41_809, 43_045, 44_614)) if coco else (200, (3_726, 2_752, 4_510))
    steps = [str(images // 8 * epochs) for images in folds]
    assert f"folds 1, 2, 3 have {', '.join(steps)}: give --trainer.max_steps and" in text
    assert trainer["devices"] == 1
    sgd = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    assert written(path)[1]["optimizer"]["init_args"] == sgd
    assert model["mixture"]["components"] == (6 if coco and "cgmgm" in path.stem else 3)
    best = f"runs/{folder}/base_learner_{encoder}/fold0/checkpoints/best.ckpt"
    assert f"--model.base_learner {best}" in text


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
@pytest.mark.parametrize("path", [p for p in FEW_SHOT if p.stem.startswith("base")], ids=name)
def test_few_shot_recipe_trains_two_steps(path, tmp_path):
    root = miniature(path.parent.name, tmp_path)
    short = f"--data.fold=1 --data.size=97 {SMALL}"
    base, _ = fit(path, short, f"--data.data.root={root} --model.encoder_weights=null")
    small = f"--data.root={root} --data.min_area=64 --data.val_episodes=1 --data.shots=2"
    small += f" --model.shots=2 --model.base_learner={base}"
    for method in ("bam", "cgmgm"):
        fit(path.with_stem(path.stem.replace("base_learner", method)), short, small)[0].unlink()
    base.unlink()


@pytest.mark.filterwarnings(FROZEN)
def test_gss_smoke(short):
    prior, _ = fit(EXPERIMENTS / "smoke" / "gss_synthetic.yaml", short)
    path = EXPERIMENTS / "smoke" / "gss_inverse_synthetic.yaml"
    assert f"--model.prior {prior}" in path.read_text()
    trained, scores = fit(path, f"--model.prior={prior}", short)
    assert scores["mIoU"] > 0.3 or short
    prior.unlink()  # is part of the other checkpoint
    assert 0 <= scores_of(after(trained))["mIoU"] <= 1
    predict(trained)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
def test_gss_camvid():
    write_camvid()
    short = f"--data.root=. --trainer.val_check_interval=1 {TWO_STEPS}"
    prior, _ = fit(EXPERIMENTS / "camvid" / "gss_ff.yaml", short, "--model.tokenizer=majority-4")
    for stem in ("gss_ft", "gss_ft_w"):
        path = EXPERIMENTS / "camvid" / f"{stem}.yaml"
        assert f"--model.prior {prior}" in path.read_text()
        fit(path, short, f"--model.prior={prior}")


@pytest.mark.parametrize("path", GSS, ids=name)
def test_gss_recipe_agrees_with_the_published_code(path):
    _, model, _ = resolved(path)
    kind = path.stem.split("_")[1:]
    if kind[0] == "ff":
        decoder = model["decoder"]
        assert decoder["depth"] == (6 if "r101" in kind else 0 if len(kind) > 3 else 2)
        assert decoder["stride"] == (8 if "stride8" in kind else 4)
        assert model["colors"] == path.parent.name
    elif kind[1] == "w":
        assert model["inverse_depth"] == (1 if path.parent.name == "cityscapes" else 2)
