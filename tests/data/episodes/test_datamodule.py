"""Episodes over other datamodules: settings, PASCAL-5i, COCO-20i, prediction, YAML."""

import json
import os
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_genseg.cli.check import check_data
from lightning_genseg.data import (
    VOC,
    BaseClassesDataModule,
    COCO20iDataModule,
    COCODataModule,
    EpisodesDataModule,
    FewShotFolderDataModule,
    FolderDataModule,
    Pascal5iDataModule,
    Points,
    SegmentationDataModule,
    SyntheticScenesDataModule,
    VOCDataModule,
)
from lightning_genseg.data.episodes.folds import few_shot_classes, read_folds
from tests.miniatures import make_coco, make_pascal5i, save

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
SCENES = ["sky", "ground", "building", "tree", "vehicle", "person"]


def scenes():
    return SyntheticScenesDataModule((48, 64), train_length=12, val_length=6, test_length=8)


def episodes(data=None, **arguments):
    given = {"novel_classes": ["tree", "vehicle"], "size": 64, "min_area": 8}
    given |= {"novel_setting": "background", "episodes": 7, "val_episodes": 5}
    given |= {"batch_size": 2, "num_workers": 0}
    return EpisodesDataModule(data or scenes(), **given | arguments)


def base_classes(**arguments):
    given = {"novel_classes": ["tree", "vehicle"], "size": 40, "num_workers": 0}
    return BaseClassesDataModule(scenes(), **given | arguments)


def categories(dataset):
    return {e.category for e in dataset.episodes}


def test_sparse_labels_are_refused():
    data = SyntheticScenesDataModule((48, 64), train_length=4, sparse=Points(3))
    for view in (episodes(data), BaseClassesDataModule(data, novel_classes=["tree"])):
        with pytest.raises(ValueError, match=r"need whole masks: leave sparse out of data\.data"):
            view.setup("fit")


def test_batches():
    data = episodes(shots=2)
    assert data.num_classes == 2
    assert data.class_names == ["background", "foreground"]
    assert data.novel_classes == ["tree", "vehicle"]
    assert data.base_classes == ["sky", "ground", "building", "person"]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 64, 64)
    assert batch["support_image"].shape == (2, 2, 3, 64, 64)
    assert batch["support_mask"].shape == batch["support_valid"].shape == (2, 2, 64, 64)
    assert set(batch["class_index"].tolist()) <= {0, 1, 2, 5}
    batches = list(data.test_dataloader())
    assert len(batches) == 7
    assert batches[0]["full_mask"].shape == (1, 48, 64)
    assert batches[0]["image"].shape == (1, 3, 64, 64)
    assert all(batch["base_index"].item() == 0 for batch in batches)
    assert batches[0]["candidates"].tolist() == [[3, 4]]
    assert len(data.val_dataloader()) == 5
    shown = next(iter(data.plain_loader("train")))  # what calibration reads
    assert not shown["valid"][0, 48:].any()


def test_workers_do_not_change_the_episodes():
    alone, two = (next(iter(episodes(num_workers=n).train_dataloader())) for n in (0, 2))
    assert alone["support_name"] == two["support_name"]
    assert torch.equal(alone["support_image"], two["support_image"])


def test_choices():
    data = episodes(val_classes="base", mode="balanced")
    data.setup()
    assert categories(data.val_dataset) == {0, 1, 2, 5}
    assert categories(data.test_dataset) == {3, 4}
    data = episodes(support_split="train", shots=5)
    data.setup("test")
    assert len(data.test_dataset.supports) == 12
    assert len(data.test_dataset.queries) == 8
    one, other = (episodes(test_seed=seed) for seed in (510, 365))
    for data in (one, other):
        data.setup()
    assert one.test_dataset.episodes != other.test_dataset.episodes
    assert one.val_dataset.episodes == other.val_dataset.episodes


def test_background_classes():
    data = episodes(background_classes=["sky", "ground"])
    assert data.base_classes == ["building", "person"]
    base = base_classes(background_classes=["sky", "ground"])
    assert base.class_names == ["background", *data.base_classes]
    data.setup("fit")
    for index in range(4):
        sample = data.train_dataset[index]
        assert base.class_names[sample["base_index"]] == sample["class_name"]


def test_base_learner_batches():
    data = base_classes(batch_size=3, class_balanced=True)
    assert data.num_classes == 5
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (3, 3, 40, 40)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3, 4, 255}
    assert next(iter(data.val_dataloader()))["mask"].shape == (1, 48, 64)


def test_manifest(tmp_path):
    path = tmp_path / "episodes.json"
    first = episodes(manifest=path)
    first.setup("test")
    written = path.read_bytes()
    second = episodes(manifest=path)
    second.setup("test")
    assert second.test_dataset.episodes == first.test_dataset.episodes
    assert path.read_bytes() == written
    with pytest.raises(ValueError, match="was drawn with shots 1, not 2"):
        episodes(manifest=path, shots=2).setup("test")
    with pytest.raises(ValueError, match=r"was drawn with classes \['tree', 'vehicle'\], not"):
        episodes(manifest=path, novel_classes=["tree", "person"]).setup("test")  # another fold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: 0}, name) for name in ("shots", "size", "min_area", "episodes", "val_episodes")),
        *(({name: -1}, name) for name in ("test_seed", "val_seed")),
        *(({name: "some"}, name) for name in ("mode", "novel_setting", "val_classes")),
        ({"support_split": "val"}, "support_split"),
        ({"scale": (0.0, 0.9)}, "scale"),
        ({"scale": (1.2, 0.9)}, r"scale is \(1\.2, 0\.9\) but must be two factors"),
        ({"novel_classes": None}, "give novel_classes, or folds and fold"),
        ({"folds": "pascal5i", "fold": 0}, "give novel_classes, or folds and fold"),
        ({"novel_classes": None, "folds": "pascal5i"}, "give novel_classes, or folds and fold"),
        ({"novel_classes": None, "folds": "pascal5i", "fold": 4}, "fold is 4 but 'pascal5i' has 0"),
        ({"novel_classes": ["tree", "cow"]}, "novel_classes holds 'cow', which is no class"),
        ({"background_classes": ["fog"]}, "background_classes holds 'fog', which is no class"),
        ({"background_classes": ["tree"]}, "'tree' is in novel_classes and in background_classes"),
        ({"novel_classes": SCENES}, "6 novel and 0 base classes"),
        ({"novel_classes": []}, "0 novel and 6 base classes"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        episodes(**arguments)


def test_too_few_images():
    expected = r"too few test images hold min_area=8 pixels of tree.* shots=9"
    with pytest.raises(ValueError, match=expected):
        episodes(shots=9).setup("test")
    with pytest.raises(ValueError, match=r"lower min_area \(8\) or shots, or set novel_setting to"):
        episodes(novel_setting="remove").setup("fit")
    with pytest.warns(UserWarning, match="1 base classes have too few training images.*: person"):
        episodes(min_area=200).setup("fit")


def test_folds_of_a_file(tmp_path):
    path = tmp_path / "folds.json"
    path.write_text(json.dumps({"folds": [["tree"], ["sky", "person"]]}))
    data = episodes(novel_classes=None, folds=path, fold=1)
    assert data.novel_classes == ["sky", "person"]
    path.write_text('["tree"]')
    with pytest.raises(ValueError, match=r"folds '.*folds\.json' must hold"):
        read_folds(path)
    with pytest.raises(FileNotFoundError, match=r"folds '.*nowhere' does not exist: give pascal5i"):
        read_folds(tmp_path / "nowhere")


@pytest.mark.parametrize(("folds", "names"), [("pascal5i", 20), ("coco20i", 80)])
def test_folds_of_the_papers(folds, names):
    groups = read_folds(folds)
    assert [len(group) for group in groups] == [names // 4] * 4
    assert all(not set(one) & set(other) for one, other in combinations(groups, 2))
    assert len({name for group in groups for name in group}) == names
    if folds == "pascal5i":
        assert groups[2] == ["diningtable", "dog", "horse", "motorbike", "person"]
    else:  # the first and last of each
        assert (groups[0][0], groups[3][-1]) == ("person", "toothbrush")
        assert (groups[1][0], groups[0][1]) == ("bicycle", "airplane")


@pytest.mark.parametrize("fold", range(4))
def test_pascal5i(tmp_path, fold):
    root = make_pascal5i(tmp_path, (48, 64), images=3)
    data = Pascal5iDataModule(
        root, fold, min_area=40, episodes=6, val_episodes=3, batch_size=2, num_workers=0, size=64,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    data.setup()
    # Three of twelve images hold novel classes and are gone.
    assert len(data.train_dataset) == 9
    novel = set(data.classes.novel)
    assert novel == set(range(5 * fold + 1, 5 * fold + 6))
    for query in data.train_dataset.pool.queries:
        assert not novel & set(
            np.unique(data.train_dataset.queries.read_mask_labels(query)).tolist()
        )
    assert categories(data.test_dataset) <= novel
    assert len(data.test_dataset.queries) == 12
    assert {e.query for e in data.test_dataset.episodes} == {fold, fold + 4, fold + 8}
    next(iter(data.train_dataloader()))
    kept = Pascal5iDataModule(root, fold, min_area=40, novel_setting="background", num_workers=0)
    kept.setup("fit")
    assert len(kept.train_dataset) == 9  # the other three hold no base class
    base = BaseClassesDataModule(
        VOCDataModule(root, "pascal5i"), folds="pascal5i", fold=fold, size=48, num_workers=0
    )
    base.setup("fit")
    assert base.num_classes == 16
    assert len(base.train_dataset) == 12  # all stay, novel pixels are background
    assert set(np.unique(base.train_dataset.read_mask_labels(fold)).tolist()) == {0}


def test_novel_setting(tmp_path):
    """An image with a pixel of a novel class: gone, or kept with that pixel as background."""
    for name in ("a", "b", "c", "d"):
        mask = np.ones((20, 20), np.uint8)
        mask[0, 0] = 2 if name == "a" else 255
        save(mask, tmp_path / "masks" / f"{name}.png")
        save(np.zeros((20, 20, 3), np.uint8), tmp_path / "images" / f"{name}.png")
    for split, names in (("train", "a\nb\nc"), ("val", "d")):
        (tmp_path / f"{split}.txt").write_text(names)
    data = FolderDataModule(
        tmp_path, class_names=["grass", "cow", "sheep"], train_list="train.txt", val_list="val.txt"
    )  # fmt: skip
    for setting, expected in (("remove", ["b", "c"]), ("background", ["a", "b", "c"])):
        view = episodes(
            data, novel_classes=["sheep"], novel_setting=setting, background_classes=["grass"],
            train_transform=[], size=16,
        )  # fmt: skip
        train = view.split_dataset("train", [])
        assert [train[i]["name"] for i in range(len(train))] == expected
        first = train[0]["mask"][0, 0].item()
        assert first == (255 if setting == "remove" else 0)


def test_coco20i(tmp_path):
    root = make_coco(tmp_path, (64, 96), images=2, instances=True)
    arguments = {"min_area": 20, "episodes": 4, "val_episodes": 2, "num_workers": 0, "size": 64}
    with pytest.raises(FileNotFoundError, match="convert"):
        COCO20iDataModule(root, 1, **arguments).setup("fit")
    data = COCO20iDataModule(root, 1, convert=True, batch_size=2, **arguments)
    data.setup()
    assert data.classes.novel == list(range(2, 81, 4))
    assert len(data.train_dataset) == 6
    assert categories(data.test_dataset) <= set(data.classes.novel)
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 64, 64)
    base = BaseClassesDataModule(COCODataModule(root), folds="coco20i", fold=1)
    assert base.num_classes == 61


def test_prediction(tmp_path):
    save(np.zeros((20, 24, 3), np.uint8), tmp_path / "support" / "images" / "a.png")
    save(np.eye(20, 24, dtype=np.uint8), tmp_path / "support" / "masks" / "a.png")
    save(np.zeros((50, 30, 3), np.uint8), tmp_path / "queries" / "a.png")
    folders = {"support_root": tmp_path / "support", "predict_root": tmp_path / "queries"}
    for data in (
        FewShotFolderDataModule(**folders, size=32, num_workers=0),
        episodes(**folders, size=32),
    ):
        (batch,) = data.predict_dataloader()
        assert batch["image"].shape == (1, 3, 50, 30)
        assert batch["support_image"].shape == (1, 1, 3, 32, 32)
        assert batch["support_valid"].sum() == 24 * 32  # 26 rows are cut to 24
        assert (batch["support_mask"] == 1).any()
        assert batch["name"] == ["a"]
    with pytest.raises(ValueError, match="set support_root"):
        FewShotFolderDataModule(predict_root=tmp_path).setup("predict")
    with pytest.raises(ValueError, match="set predict_root"):
        episodes().setup("predict")
    with pytest.raises(ValueError, match="images to predict only: train and test with Episodes"):
        FewShotFolderDataModule(**folders).setup("fit")


def test_the_data_inside_still_stop_where_they_are_used_alone():
    own = scenes()
    assert episodes(own, on_error="skip").data.on_error == "skip"
    assert own.on_error == "stop"


def test_check_reads_the_dense_data(tmp_path):
    report = check_data(episodes(), tmp_path)
    assert report["class_names"] == SCENES
    assert report["splits"]["test"]["images"] == 8


YAML = """
data:
  class_path: EpisodesDataModule
  init_args:
    data:
      class_path: SyntheticScenesDataModule
      init_args: {size: [48, 64], train_length: 10, val_length: 6, test_length: 6}
    folds: FOLDS
    fold: 0
    size: 64
    min_area: 20
    novel_setting: background
    num_workers: 0
    batch_size: 2
    train_transform:
    - class_path: Letterbox
      init_args: {size: 64}
"""


def test_from_yaml(tmp_path):
    path = tmp_path / "folds.json"
    path.write_text(json.dumps({"folds": [["tree", "person"]]}))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    config = parser.parse_string(YAML.replace("FOLDS", str(path)))
    config = parser.parse_string(parser.dump(config))
    data = parser.instantiate(config).data
    assert data.novel_classes == ["tree", "person"]
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 64, 64)
    parser.parse_string(YAML.replace("FOLDS", "pascal5i"))


@pytest.mark.parametrize("kind", ["Pascal5iDataModule", "COCO20iDataModule"])
def test_by_name_on_the_command_line(genseg, capsys, kind):
    line = f"--data {kind} --data.root=nowhere --data.fold=2 --data.shots=5 --data.seed=3"
    with pytest.raises(SystemExit, match="0"):
        genseg(f"fit {line} --model SoftmaxSegmenter --print_config")
    given = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (given["fold"], given["shots"], given["seed"]) == (2, 5, 3)
    assert not {"novel_classes", "folds", "data", "sparse", "crop_size"} & given.keys()


def test_msrc(shared_dir, tmp_path):
    """The folds of the project's own photographs, on the real files."""
    root = shared_dir / "data" / "msrc_v2"
    names = json.loads((root / "meta.json").read_text())["classes"]
    lists = {f"{split}_list": f"{split}.txt" for split in ("train", "val", "test")}
    dense = FolderDataModule(root, class_names=names, cache_dir=tmp_path, **lists)
    data = EpisodesDataModule(
        dense, folds=root / "fewshot_folds.json", fold=1, size=96, min_area=400, shots=5,
        episodes=8, mode="balanced", support_split="train", num_workers=0,
    )  # fmt: skip
    assert data.novel_classes == ["face", "car", "bicycle", "flower"]
    batches = list(data.test_dataloader())
    assert [b["class_name"][0] for b in batches] == data.novel_classes * 2
    for batch in batches:
        assert ((batch["support_mask"] == 1).flatten(2).sum(2) > 20).all()
        assert (batch["full_mask"] == 1).sum() >= 400


GOLDEN = {
    "remove": (4208, 3726, 2752, 4510),
    "background": (4760, 4588, 4097, 5108),
    "val": (364, 445, 592, 336),
}


@pytest.mark.slow
@pytest.mark.skipif("GENSEG_VOC" not in os.environ, reason="set GENSEG_VOC to VOCdevkit/VOC2012")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fold", range(4))
def test_golden_counts_of_pascal5i(fold):
    for setting in ("remove", "background"):
        data = Pascal5iDataModule(os.environ["GENSEG_VOC"], fold, novel_setting=setting)
        data.setup("fit")
        assert len(data.train_dataset.queries) == 5953
        assert len(data.train_dataset) == GOLDEN[setting][fold]
    queries = {e.query for e in data.val_dataset.episodes}  # a thousand: all of them
    assert len(queries) == GOLDEN["val"][fold]
    assert few_shot_classes(VOC.CLASS_NAMES, None, "pascal5i", fold, None) == data.classes


@pytest.mark.slow
@pytest.mark.skipif("GENSEG_COCO" not in os.environ, reason="set GENSEG_COCO to COCO 2014")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("fold", "train", "val"),
    [(0, 21917, 26052), (1, 41809, 15305), (2, 43045, 13138), (3, 44614, 12640)],
)
def test_golden_counts_of_coco20i(fold, train, val):
    data = COCO20iDataModule(os.environ["GENSEG_COCO"], fold, val_episodes=val)
    data.setup("fit")
    assert len(data.train_dataset) == train
    assert len({e.query for e in data.val_dataset.episodes}) == val
