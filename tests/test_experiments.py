"""Every configuration that ships: the smoke ones learn, the others run two steps as they are."""

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from lightning.pytorch import Callback
from PIL import Image

from lightning_genseg.cli.main import main
from lightning_genseg.data import CamVid
from lightning_genseg.uncertainty.scores import AnomalyName
from tests.miniatures import (
    make_ade20k,
    make_cityscapes,
    make_coco,
    make_coco_stuff_10k,
    make_fishyscapes,
    make_pascal5i,
    make_road_anomaly,
    make_road_anomaly21,
    make_voc,
)

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# Those that go on from another run are tested with it.
AFTER = ("gss_inverse_synthetic", "gss_ff", "gss_ft", "gss_ft_w")
SMOKE = [p for p in sorted((EXPERIMENTS / "smoke").glob("*_synthetic.yaml")) if p.stem not in AFTER]
CAMVID = [p for p in sorted((EXPERIMENTS / "camvid").glob("*.yaml")) if p.stem not in AFTER]
MSRC = sorted((EXPERIMENTS / "msrc").glob("*_points.yaml"))
MINIATURES = {
    "ade20k": make_ade20k,
    "cityscapes": make_cityscapes,
    "coco_stuff": make_coco_stuff_10k,
    "voc": make_voc,
}
FEW_SHOT_MINIATURES = {"pascal5i": make_pascal5i, "coco20i": make_coco}
ANOMALY_MINIATURES = {
    "fishyscapes": make_fishyscapes,
    "road_anomaly": make_road_anomaly,
    "road_anomaly21": make_road_anomaly21,
}
FEW_SHOT = sorted(
    p for folder in FEW_SHOT_MINIATURES for p in (EXPERIMENTS / folder).glob("*.yaml")
)
RECIPES = sorted(path for folder in MINIATURES for path in (EXPERIMENTS / folder).glob("*.yaml"))
SPARSE_RECIPES = [p for p in RECIPES if p.stem.endswith(("points", "scribbles", "clicks"))]
GSS_RECIPES = [p for p in RECIPES if p.stem.startswith("gss")]
RECIPES = [path for path in RECIPES if path not in [*SPARSE_RECIPES, *GSS_RECIPES]]
TWO_STEPS = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--data.num_workers=0"]


def name(path):
    return str(path.relative_to(EXPERIMENTS))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genseg"])


def write_images(folder, masks, count, size, classes):
    """Random images and masks with the same names."""
    rng = np.random.default_rng(0)
    for target in (folder, masks):
        target.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(256, size=(*size, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        labels = rng.integers(classes, size=size, dtype=np.uint8)
        Image.fromarray(labels).save(masks / f"{i}.png")


@pytest.mark.parametrize("path", SMOKE, ids=name)
def test_smoke(path, tmp_path):
    main(["fit", "--config", str(path)])
    (run,) = (tmp_path / "runs").glob("*/version_0")
    scores = json.loads((run / "val_metrics.json").read_text())
    assert scores["mIoU"] > 0.3  # guessing gives about 0.1, the most frequent class 0.07

    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    after = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    main(["test", *after])
    tested = json.loads(next((tmp_path / "runs").glob("*/*/metrics.json")).read_text())
    assert tested["mIoU"] > 0.25

    write_images(tmp_path / "photos", tmp_path / "unused", 2, (50, 70), 2)
    main(["predict", *after, "--data.predict_root=photos", "--predictions.output_dir=out"])
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == ["0.png", "1.png"]


@pytest.mark.parametrize("path", CAMVID, ids=name)
def test_camvid(path, tmp_path):
    for split in ("train", "val", "test"):
        write_images(
            tmp_path / split, tmp_path / f"{split}annot", 8, (72, 96), len(CamVid.CLASS_NAMES)
        )
    main(
        [
            "fit",
            "--config",
            str(path),
            "--data.root=.",
            "--trainer.val_check_interval=1",
            *TWO_STEPS,
        ]
    )
    assert list((tmp_path / "runs").glob("*/*/*/checkpoints/last.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("path", MSRC, ids=name)
def test_msrc(path, tmp_path):
    write_images(tmp_path / "images", tmp_path / "masks", 12, (72, 96), 23)
    for split, numbers in {"train": range(8), "val": range(8, 10), "test": range(10, 12)}.items():
        (tmp_path / f"{split}.txt").write_text("".join(f"{number}\n" for number in numbers))
    main(
        [
            "fit",
            "--config",
            str(path),
            "--data.root=.",
            "--trainer.val_check_interval=1",
            *TWO_STEPS,
        ]
    )
    assert list((tmp_path / "runs" / "msrc" / path.stem).glob("*/checkpoints/last.ckpt"))


@pytest.mark.parametrize("folder", ["camvid", "msrc"])
def test_points_are_learned_from_in_the_same_way(folder):
    """One network, schedule and data; of the methods only their own arguments differ."""
    softmax, agmm, gmmseg = (
        arguments(EXPERIMENTS / folder / f"{method}_fpn_points.yaml")
        for method in ("softmax", "agmm", "gmmseg")
    )
    assert softmax[2] == agmm[2] == gmmseg[2]
    for own in (agmm, gmmseg):
        assert {k: own[0][k] for k in own[0].keys() - {"logger", "callbacks"}} == {
            k: softmax[0][k] for k in softmax[0].keys() - {"logger", "callbacks"}
        }
        for key in softmax[1].keys() - {"dropout"}:
            assert own[1][key] == softmax[1][key]
    assert agmm[1]["dropout"] == softmax[1]["dropout"]
    dense = arguments(EXPERIMENTS / "camvid" / "softmax_fpn.yaml")
    for key in dense[1].keys() - {"inference"}:
        assert softmax[1][key] == dense[1][key]


def test_quickstart():
    main(["fit", "--config", str(EXPERIMENTS / "quickstart.yaml"), *TWO_STEPS])


def test_own_images(tmp_path):
    write_images(tmp_path / "mine" / "images", tmp_path / "mine" / "masks", 10, (80, 90), 3)
    options = "--data.num_classes=3 --data.crop_size=[64,64] --data.batch_size=4 --data.root=mine"
    options += " --trainer.accelerator=cpu --trainer.val_check_interval=1"
    options += " --model.encoder_weights=null"
    config = str(EXPERIMENTS / "own_images.yaml")
    main(["fit", "--config", config, *options.split(), *TWO_STEPS])


def test_own_clicks(tmp_path):
    write_images(tmp_path / "mine" / "images", tmp_path / "mine" / "masks", 10, (180, 190), 3)
    images = sorted(path.name for path in (tmp_path / "mine" / "images").iterdir())
    for name in images[:-2]:
        (tmp_path / "mine" / "masks" / name).with_suffix(".png").unlink()
    points = [{"x": 60 * c, "y": 90, "cls": c} for c in range(3)]
    (tmp_path / "mine" / "clicks.json").write_text(json.dumps(dict.fromkeys(images, points)))
    options = "--data.num_classes=3 --data.batch_size=2 --data.root=mine --data.num_workers=0"
    options += " --trainer.accelerator=cpu --trainer.val_check_interval=1"
    options += " --model.encoder=tu-test_resnet --model.encoder_weights=null"
    config = str(EXPERIMENTS / "own_clicks.yaml")
    main(["fit", "--config", config, *options.split(), *TWO_STEPS])
    run = tmp_path / "runs" / "own_clicks" / "version_0"
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "label_spreading").iterdir())


# --- the papers' recipes ---------------------------------------------------------------------


def arguments(path):
    """`trainer`, and the `init_args` of `model` and `data`."""
    config = yaml.safe_load(path.read_text())
    return config["trainer"], config["model"]["init_args"], config["data"]["init_args"]


@pytest.mark.parametrize("path", [*RECIPES, *FEW_SHOT], ids=name)
def test_recipe_is_parsed(path, capsys):
    root = f"--data.{'data.' if path.stem.startswith('base_learner') else ''}root=data"
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), root, "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    trainer, model, _ = arguments(path)
    assert printed["trainer"]["max_steps"] == trainer["max_steps"]
    assert printed["model"]["init_args"]["encoder"] == model.get("encoder")


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_agrees_with_itself_and_the_paper(path):
    trainer, model, data = arguments(path)
    post_hoc = model.get("train_mixture") == "posthoc"
    assert model["lr_scheduler"]["init_args"]["total_iters"] == trainer["max_steps"]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    images, steps, crop = {
        "ade20k": (16, 160_000, 512), "cityscapes": (8, 80_000, 768),
        "coco_stuff": (16, 80_000, 512), "voc": (16, 40_000, 512),
    }[path.parent.name]  # fmt: skip
    assert trainer["devices"] * data["batch_size"] == images
    assert trainer["max_steps"] == (2_500 if post_hoc else 80_000 if "80k" in path.stem else steps)
    whole = {} if crop == 768 else {"short_side": 512, "long_side": 2048}
    assert data["train_transform"][0]["init_args"] == {
        "height": crop, "width": crop, "scale": [0.5, 2.0], **whole,
        "max_class_share": 0.75, "fill": [124, 116, 104],
    }  # fmt: skip
    if crop == 768:
        assert model["inference"] == {"window": [768, 768], "stride": [512, 512]}
    else:
        # mmsegmentation resizes to multiples of 32 in this one recipe.
        aligned = name(path).startswith("ade20k") and path.stem.endswith("mit_b5")
        assert model["inference"] == {**whole, **({"multiple": 32} if aligned else {})}
    assert model["network_options"].get("img_size", crop) == crop
    logger = trainer["logger"]["init_args"]
    assert logger == {"save_dir": f"runs/{path.parent.name}", "name": path.stem}
    # The command in its head is the one that runs it.
    command = f"# genseg fit --config experiments/{name(path)} --data.root PATH/"
    assert command in path.read_text()


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("softmax")], ids=name)
def test_softmax_and_gmmseg_differ_in_the_classifier_only(path):
    own = arguments(path)
    trainer, model, data = arguments(path.with_stem(path.stem.replace("softmax", "gmmseg")))
    for config in (own[0], trainer):
        config.pop("logger")
    assert own[0] == trainer
    for key in own[1].keys() - {"dropout"}:
        assert own[1][key] == model[key]
    assert (own[2].pop("class_balanced"), data.pop("class_balanced")) == (False, True)
    assert own[2] == data


class EveryParameterLearns(Callback):
    """DDP would wait for a parameter without a gradient for ever."""

    def on_after_backward(self, trainer, pl_module):
        assert trainer.train_dataloader.batch_size == 2
        named = pl_module.named_parameters()
        assert [key for key, p in named if p.requires_grad and p.grad is None] == []


def two_steps(path, root, *options, smaller=8):
    """Fit two steps of the configuration; only sizes are smaller, and the weights random."""
    _, model, data = arguments(path)
    small = model.get("inference") or {}
    if "short_side" in small:
        small = {**small, "short_side": 96, "long_side": 384}
    crop = data["train_transform"][0]["init_args"]
    crop.update(
        {key: crop[key] // smaller for key in crop if key.endswith(("height", "width", "side"))}
    )
    if "memory_size" in model:
        options = ("--model.memory_size=50", "--model.em_interval=1", *options)
    main(
        [
            "fit",
            "--config",
            str(path),
            f"--data.root={root}",
            "--data.batch_size=2",
            f"--data.train_transform={json.dumps(data['train_transform'])}",
            "--data.cache_dir=cache",
            "--model.encoder_weights=null",
            f"--model.inference={json.dumps(small)}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.val_check_interval=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.callbacks+=tests.test_experiments.EveryParameterLearns",
            *options,
            *TWO_STEPS,
        ]
    )
    (run,) = (Path("runs") / path.parent.name / path.stem).iterdir()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert 0 <= float(rows[-1]["val_mIoU"]) <= 1
    return run / "checkpoints" / "last.ckpt"


# Four images do not hold 150 classes.
FEW = "ignore:.*classes occur in no training image"


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("path", [p for p in RECIPES if "posthoc" not in p.stem], ids=name)
def test_recipe_trains_two_steps(path, tmp_path):
    checkpoint = two_steps(path, MINIATURES[path.parent.name](tmp_path / "data"))
    checkpoint.unlink()  # a gigabyte, which pytest would keep


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW, "ignore:Found .* in eval mode at the start of training")
def test_post_hoc_recipe_follows_its_softmax_recipe(tmp_path):
    folder, root = EXPERIMENTS / "ade20k", make_ade20k(tmp_path / "data")
    extractor = two_steps(folder / "softmax_deeplabv3plus_r101_80k.yaml", root)
    path = folder / "gmmseg_posthoc_deeplabv3plus_r101.yaml"
    assert f"--model.extractor {extractor}" in path.read_text()
    fitted = two_steps(path, root, f"--model.extractor={extractor}")
    for checkpoint in (extractor, fitted):
        checkpoint.unlink()


# --- recipes on sparse labels ------------------------------------------------------------------

SPARSE_LABELS = {
    "points": {
        "class_path": "PointFiles",
        "init_args": {
            "files": ["voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"],
            "size": 3,
        },
    },
    "scribbles": {
        "class_path": "ScribbleFiles",
        "init_args": {"folder": "voc_scribbles", "size": 3},
    },
    "clicks": {"class_path": "Points", "init_args": {"count": 20, "per": "image", "seed": 0}},
}


def test_there_is_a_recipe_for_each_row():
    assert [name(path) for path in SPARSE_RECIPES] == [
        "cityscapes/agmm_deeplabv3plus_r50_clicks.yaml",
        "cityscapes/softmax_deeplabv3plus_r50_clicks.yaml",
        "voc/agmm_deeplabv3plus_r101_points.yaml",
        "voc/agmm_deeplabv3plus_r101_scribbles.yaml",
        "voc/softmax_deeplabv3plus_r101_points.yaml",
        "voc/softmax_deeplabv3plus_r101_scribbles.yaml",
    ]


@pytest.mark.parametrize("path", SPARSE_RECIPES, ids=name)
def test_sparse_recipe_agrees_with_the_published_code(path):
    trainer, model, data = arguments(path)
    voc = path.parent.name == "voc"
    # Epochs of the training set in whole batches.
    assert trainer["max_steps"] == (80 * (10_582 // 16) if voc else 240 * (2_975 // 8))
    assert model["lr_scheduler"]["init_args"] == {"total_iters": trainer["max_steps"], "power": 0.9}
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert trainer["devices"] * data["batch_size"] == (16 if voc else 8)
    assert data["sparse"] == SPARSE_LABELS[path.stem.rpartition("_")[2]]
    crop = data["train_transform"][0]["init_args"]
    assert crop["height"] == crop["width"] == (321 if voc else 721)
    assert crop["scale"] == [0.5, 2.0]
    sgd = model["optimizer"]["init_args"]
    lr = (sgd["lr"], sgd["lr"] * model["head_lr_factor"])
    assert lr == pytest.approx((1e-3, 1e-2) if voc else (5e-3, 5e-3))
    assert (sgd["momentum"], sgd["weight_decay"]) == (0.9, 1e-4)
    assert model.get("inference") == (None if voc else {"window": [721, 721], "stride": [241, 241]})
    logger = trainer["logger"]["init_args"]
    assert logger == {"save_dir": f"runs/{path.parent.name}", "name": path.stem}
    command = f"# genseg fit --config experiments/{name(path)} --data.root PATH/"
    assert command in path.read_text()
    baseline = arguments(path.with_stem(path.stem.replace("agmm", "softmax")))
    assert baseline[2] == data
    for key in baseline[1]:
        assert baseline[1][key] == model[key]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:every pixel of the first batch")
@pytest.mark.filterwarnings("ignore:.* classes are labelled in no training image")  # of six
@pytest.mark.parametrize("path", SPARSE_RECIPES, ids=name)
def test_sparse_recipe_trains_two_steps(path, tmp_path):
    root = MINIATURES[path.parent.name](tmp_path / "data")
    # Of VOC's two points an image most crops show none.
    checkpoint = two_steps(path, root, smaller=4 if path.parent.name == "voc" else 8)
    assert (checkpoint.parents[1] / "label_spreading").is_dir() == path.stem.startswith("agmm")
    checkpoint.unlink()


# --- anomalies -------------------------------------------------------------------------------


def test_anomaly_data_of_a_network_trained_on_cityscapes(tmp_path):
    root = make_cityscapes(tmp_path / "cityscapes")
    base = ["--trainer.accelerator=cpu", "--data.num_workers=0", "--trainer.logger=CSVLogger"]
    base.append("--trainer.logger.save_dir=runs")
    main(
        [
            "fit",
            "--model=SoftmaxSegmenter",
            "--model.encoder=tu-test_resnet",
            "--model.decoder=fpn",
            "--data=CityscapesDataModule",
            f"--data.root={root}",
            "--data.batch_size=2",
            "--data.crop_size=[64,64]",
            "--trainer.log_every_n_steps=1",
            *base,
            *TWO_STEPS,
        ]
    )
    (run,) = (tmp_path / "runs").rglob("version_0")
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    config = ["--config", str(run / "config.yaml")]
    main(
        [
            "calibrate",
            *config,
            f"--ckpt_path={checkpoint}",
            "--risk=0.5",
            "--output=calibrated.ckpt",
        ]
    )
    for name, make in ANOMALY_MINIATURES.items():
        main(
            [
                "test",
                *config,
                "--config",
                str(EXPERIMENTS / "anomaly" / f"{name}.yaml"),
                f"--data.root={make(tmp_path / name)}",
                "--ckpt_path=calibrated.ckpt",
                "--trainer.callbacks+=CompareScores",
                "--data.num_workers=0",
                "--model.anomaly_score=sml",
                f"--trainer.logger.init_args.version={name}",
            ]
        )
        (scores,) = (tmp_path / "runs").rglob(f"{name}/anomaly_scores.json")
        assert set(json.loads(scores.read_text())) == set(get_args(AnomalyName)) - {"density"}
        (report,) = (tmp_path / "runs").rglob(f"{name}/metrics.json")
        report = json.loads(report.read_text())
        assert report["anomaly"]["score"] == "sml"
        assert 0 <= report["AUROC"] <= 1


# --- a new class from a few examples ---------------------------------------------------------

# What is frozen stays in evaluation mode.
FROZEN = "ignore:Found .* in eval mode at the start of training"


def fit(path, *options):
    """Fit, and give the run's checkpoint of the last step and what its validation found."""
    main(["fit", "--config", str(path), "--trainer.log_every_n_steps=1", *options])
    logger = arguments(path)[0]["logger"]["init_args"]
    (run,) = (Path(logger["save_dir"]) / logger["name"]).iterdir()
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert losses
    assert all(map(math.isfinite, losses))
    return run / "checkpoints" / "last.ckpt", json.loads((run / "val_metrics.json").read_text())


def scores_of(*options):
    main(["test", *options, "--trainer.logger.init_args.version=test"])
    (path,) = Path("runs").rglob("test/metrics.json")
    return json.loads(path.read_text())


@pytest.mark.filterwarnings(FROZEN)
def test_few_shot_smoke(tmp_path):
    folder = EXPERIMENTS / "smoke"
    base, scores = fit(folder / "few_shot_base_learner.yaml")
    assert scores["mIoU_base"] > 0.25  # one class everywhere: 0.1

    path = folder / "few_shot_cgmgm.yaml"
    assert f"--model.base_learner {base}" in path.read_text()
    trained, scores = fit(path, f"--model.base_learner={base}")
    base.unlink()  # is part of the other checkpoint
    after = ["--config", str(trained.parents[1] / "config.yaml"), f"--ckpt_path={trained}"]
    scores = scores_of(*after)
    assert (
        scores["GmIoU"] > 0.13
    )  # vehicles are a tenth of the pixels: everything 0.1, half of it at random 0.09

    objects = tmp_path / "support"
    write_images(objects / "images", objects / "masks", 2, (50, 70), 2)
    write_images(tmp_path / "photos", tmp_path / "unused", 2, (60, 40), 2)
    given = "--data.support_root=support --data.predict_root=photos --predictions.output_dir=out"
    main(["predict", *after, *given.split()])
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    with Image.open(tmp_path / "out" / "masks" / "0.png") as mask:
        assert mask.size == (40, 60)


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
def test_few_shot_msrc(tmp_path):
    folder = EXPERIMENTS / "msrc"
    names = arguments(folder / "cgmgm.yaml")[2]["data"]["init_args"]["class_names"]
    write_images(tmp_path / "msrc" / "images", tmp_path / "msrc" / "masks", 12, (53, 80), 23)
    for split, numbers in {"train": range(6), "val": range(6, 9), "test": range(9, 12)}.items():
        (tmp_path / "msrc" / f"{split}.txt").write_text("\n".join(map(str, numbers)))
    (tmp_path / "msrc" / "fewshot_folds.json").write_text(json.dumps({"folds": [["cow", "car"]]}))
    assert {"cow", "car"} < set(names)
    fold = "--data.data.root=msrc --data.folds=msrc/fewshot_folds.json --data.fold=0 --data.num_workers=0"
    short = [
        *fold.split(),
        "--data.size=64",
        "--data.train_transform=null",
        "--data.batch_size=2",
        "--trainer.max_steps=2",
    ]
    short += ["--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    base, _ = fit(folder / "base_learner.yaml", *short)

    few = ["--data.min_area=10", "--data.novel_setting=background", f"--model.base_learner={base}"]
    shots = ["--data.shots=2", "--data.episodes=2"]
    for name in ("cgmgm", "bam"):
        options = [*short, *few, *shots, "--model.shots=2"]
        trained, scores = fit(folder / f"{name}.yaml", *options)
        assert set(scores["IoU"]) <= {"cow", "car"}
        trained.unlink()
    options = [*fold.split(), "--data.size=64", *few, *shots]
    scores = scores_of("--config", str(folder / "prototypes.yaml"), *options)
    assert set(scores["IoU"]) == {"cow", "car"}


@pytest.mark.parametrize("path", FEW_SHOT, ids=name)
def test_few_shot_recipe_agrees_with_itself_and_the_paper(path):
    trainer, model, data = arguments(path)
    folder, stem = path.parent.name, path.stem
    coco = folder == "coco20i"
    encoder = "vgg16_bn" if stem.endswith("vgg16") else "resnet50"
    schedule = model["lr_scheduler"]["init_args"]
    assert schedule.get("T_max", schedule.get("total_iters")) == trainer["max_steps"]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert trainer["logger"]["init_args"] == {"save_dir": f"runs/{folder}", "name": stem}
    command = path.read_text()
    assert f"# genseg fit --config experiments/{name(path)} --data." in command
    if stem.startswith("base_learner"):  # images, epochs
        images, epochs = (82_081, 20) if coco else (5_953, 100)
        assert trainer["devices"] * data["batch_size"] == 12
        assert trainer["max_steps"] == images // 12 * epochs
        assert (model["encoder"], data["folds"], data["size"]) == (encoder, folder, 417)
        return
    epochs, folds = (
        (50, (21_917, 41_809, 43_045, 44_614)) if coco else (200, (4_208, 3_726, 2_752, 4_510))
    )
    steps = [images // 8 * epochs for images in folds]
    assert [
        trainer["max_steps"],
        *map(int, re.findall(r"have (\d+), (\d+), (\d+):", command)[0]),
    ] == steps
    assert (trainer["devices"], data["batch_size"]) == (1, 8)
    assert data["size"] == (641 if coco else 473)
    assert model["optimizer"]["init_args"] == {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}
    assert model.get("components", 3) == (6 if coco and "cgmgm" in stem else 3)
    best = f"runs/{folder}/base_learner_{stem.split('_')[1]}/fold0/checkpoints/best.ckpt"
    assert f"--model.base_learner {best}" in command


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
@pytest.mark.parametrize("path", [p for p in FEW_SHOT if p.stem.startswith("base")], ids=name)
def test_few_shot_recipe_trains_two_steps(path, tmp_path):
    root = FEW_SHOT_MINIATURES[path.parent.name](tmp_path / "data")
    short = ["--data.fold=1", "--data.batch_size=2", "--trainer.accelerator=cpu"]
    short += ["--trainer.devices=1", "--trainer.val_check_interval=2", *TWO_STEPS]
    weights = "--model.encoder_weights=null"
    base, _ = fit(path, *short, f"--data.data.root={root}", "--data.size=97", weights)
    small = [f"--data.root={root}", "--data.size=97", "--data.min_area=64"]
    small += ["--data.val_episodes=1", f"--model.base_learner={base}"]
    for method in ("bam", "cgmgm"):
        own = path.with_stem(path.stem.replace("base_learner", method))
        trained, _ = fit(own, *short, *small, "--data.shots=2", "--model.shots=2")
        trained.unlink()
    base.unlink()


# --- masks as pictures -----------------------------------------------------------------------


@pytest.mark.filterwarnings(FROZEN)
def test_gss_smoke(tmp_path):
    folder = EXPERIMENTS / "smoke"
    short = ["--trainer.max_steps=3", "--trainer.val_check_interval=3"]
    prior, _ = fit(folder / "gss_synthetic.yaml", *short)
    path = folder / "gss_inverse_synthetic.yaml"
    assert f"--model.prior {prior}" in path.read_text()
    trained, _ = fit(path, *short, f"--model.prior={prior}")
    prior.unlink()  # is part of the other checkpoint
    after = ["--config", str(trained.parents[1] / "config.yaml"), f"--ckpt_path={trained}"]
    assert 0 <= scores_of(*after)["mIoU"] <= 1
    write_images(tmp_path / "photos", tmp_path / "unused", 2, (50, 70), 2)
    main(["predict", *after, "--data.predict_root=photos", "--predictions.output_dir=out"])
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
def test_gss_smoke_learns():
    folder = EXPERIMENTS / "smoke"
    prior, _ = fit(folder / "gss_synthetic.yaml")
    _, scores = fit(folder / "gss_inverse_synthetic.yaml", f"--model.prior={prior}")
    assert scores["mIoU"] > 0.3


@pytest.mark.slow
@pytest.mark.filterwarnings(FROZEN)
def test_gss_camvid(tmp_path):
    folder = EXPERIMENTS / "camvid"
    for split in ("train", "val", "test"):
        masks = tmp_path / f"{split}annot"
        write_images(tmp_path / split, masks, 8, (72, 96), len(CamVid.CLASS_NAMES))
    short = ["--data.root=.", "--trainer.val_check_interval=1", *TWO_STEPS]
    prior, _ = fit(folder / "gss_ff.yaml", *short, "--model.tokenizer=majority-4")
    for stem in ("gss_ft", "gss_ft_w"):
        path = folder / f"{stem}.yaml"
        assert f"--model.prior {prior}" in path.read_text()
        fit(path, *short, f"--model.prior={prior}")


def test_gss_is_trained_as_softmax_is():
    folder = EXPERIMENTS / "camvid"
    trainer, model, data = arguments(folder / "softmax_fpn.yaml")
    for stem in ("gss_ff", "gss_ff_majority"):
        own = arguments(folder / f"{stem}.yaml")
        assert own[2] == data
        for key in trainer.keys() - {"logger", "callbacks"}:
            assert own[0][key] == trainer[key]
        for key in model.keys() - {"decoder", "network_options"}:
            assert own[1][key] == model[key]


@pytest.mark.parametrize("path", GSS_RECIPES, ids=name)
def test_gss_recipe_agrees_with_itself_and_the_published_code(path):
    trainer, model, data = arguments(path)
    city = path.parent.name == "cityscapes"
    kind = path.stem.split("_")[1:]
    rate, steps, images = {
        (True, "ff"): (1.5e-3, 80_000, 16), (False, "ff"): (1.2e-4, 160_000, 32),
        (True, "w"): (7.5e-4, 40_000, 8), (False, "w"): (1.5e-3, 40_000, 16),
        (False, "ft"): (1.5e-3, 3_000, 16),
    }[city, "w" if kind[1] == "w" else kind[0]]  # fmt: skip
    assert trainer["max_steps"] == steps == model["lr_scheduler"]["init_args"]["total_iters"]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0
    assert trainer["devices"] * data["batch_size"] == images
    assert model["optimizer"]["init_args"]["lr"] == rate
    crop = data["train_transform"][0]["init_args"]["height"]
    assert crop == (768 if city else 512)
    assert model.get("network_options", {}).get("img_size", crop) == crop
    if kind[0] == "ff":
        assert model["depth"] == (6 if "r101" in kind else 0 if len(kind) > 3 else 2)
        assert model["token_stride"] == (8 if "stride8" in kind else 4)
        assert model["colors"] == path.parent.name
    elif kind[1] == "w":
        assert model["inverse_depth"] == (1 if city else 2)
    logger = trainer["logger"]["init_args"]
    assert logger == {"save_dir": f"runs/{path.parent.name}", "name": path.stem}
    assert f"# genseg fit --config experiments/{name(path)} --data.root PATH/" in path.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings(FEW, FROZEN)
@pytest.mark.parametrize("path", [p for p in GSS_RECIPES if "_ff_" in p.stem], ids=name)
def test_gss_recipe_trains_two_steps(path, tmp_path):
    root = MINIATURES[path.parent.name](tmp_path / "data")
    prior = two_steps(path, root, "--model.tokenizer=majority-8")
    if path.stem == "gss_ff_swin_l":
        for own in path.parent.glob("gss_ft*.yaml"):
            small = ["--data.batch_size=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
            small += [
                "--trainer.val_check_interval=2",
                "--model.inference=null",
                "--model.width=32",
            ]
            trained, _ = fit(
                own, f"--data.root={root}", f"--model.prior={prior}", *small, *TWO_STEPS
            )
            trained.unlink()
    prior.unlink()
