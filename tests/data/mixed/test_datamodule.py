"""Several data sets in one taxonomy."""

import json

import numpy as np
import pytest

from lightning_genseg import SoftmaxSegmenter
from lightning_genseg.cli.check import check_data
from lightning_genseg.data import (
    CrossDomainDataModule,
    FolderDataModule,
    MixedDataModule,
    Points,
    SyntheticScenesDataModule,
)
from lightning_genseg.data.mixed.datamodule import RepeatSampler, balancing_repeats
from tests.contract import PlainFeatures, trainer
from tests.domains import FIELD, TABLE, TOWN, write_domain

# As a training set the field needs one universal class for its ground.
MIXED_TABLE = TABLE.replace("road\tfield\tground\n", "")


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "table.tsv").write_text(TABLE)
    (tmp_path / "mixed.tsv").write_text(MIXED_TABLE)
    write_domain(tmp_path / "town", "town", 10)
    write_domain(tmp_path / "field", "field", 5)
    return tmp_path


def town(folders, **arguments):
    return FolderDataModule(folders / "town", class_names=TOWN, **arguments)


def field(folders, **arguments):
    return FolderDataModule(folders / "field", class_names=FIELD, **arguments)


def mixed(folders, **arguments):
    given = {"data": {"town": town(folders), "field": field(folders)}, "batch_size": 2}
    given |= {"taxonomy": folders / "mixed.tsv", "num_workers": 0, "crop_size": (24, 24)}
    return MixedDataModule(**{**given, "cache_dir": folders / "cache", **arguments})


def field_test(folders):
    return CrossDomainDataModule(
        field(folders), folders / "table.tsv", "field", num_workers=0, cache_dir=folders / "cache"
    )


def test_labels_are_universal(folders):
    data = mixed(folders)
    assert data.class_names == ["sky", "road", "grass", "car"]
    assert data.num_classes == len(data.palette) == 4
    data.setup("fit")
    assert len(data.train_dataset) == 8 + 4
    assert len(data.val_dataset) == 2 + 1
    train = data.train_dataset
    names = [train.sample_name(i) for i in range(len(train))]
    assert len(set(names)) == 12
    for key, own, wanted in (
        ("town", town(folders), {0: 255, 1: 3, 2: 0, 3: 1, 4: 2, 255: 255}),
        ("field", field(folders), {0: 255, 1: 0, 2: 2, 255: 255}),
    ):
        dataset = own.split_dataset("train", ())
        for i, sample in enumerate(dataset.samples):
            position = names.index(f"{key}/{sample.name}")
            before = dataset.read_mask_labels(i)
            after = train.read_mask_labels(position)
            assert (np.vectorize(wanted.get)(before) == after).all()
            assert (dataset.read_pixels(i) == train.read_pixels(position)).all()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 24, 24)
    assert all(name in names for name in batch["name"])


def seen(data):
    return [name for batch in data.train_dataloader() for name in batch["name"]]


@pytest.mark.parametrize(("repeats", "times"), [(None, (1, 2)), ({"town": 3, "field": 1}, (3, 1))])
def test_an_epoch_takes_images_as_often_as_asked(folders, repeats, times):
    names = seen(mixed(folders, repeats=repeats, batch_size=1))
    for key, count, often in (("town", 8, times[0]), ("field", 4, times[1])):
        mine = [name for name in names if name.startswith(f"{key}/")]
        assert len(mine) == count * often
        assert {mine.count(name) for name in mine} == {often}
    assert names != sorted(names)
    assert names == seen(mixed(folders, repeats=repeats, batch_size=1))


def test_the_repeats_of_mseg():
    """GSS' configuration; only for SUN RGB-D it has 24, where 22 come closest to 118 287."""
    sizes = {"ade20k": 20_210, "bdd": 7_000, "cityscapes": 2_975, "coco": 118_287, "idd": 6_993}
    sizes |= {"mapillary": 18_000, "sunrgbd": 5_285}
    assert list(balancing_repeats(sizes).values()) == [6, 17, 40, 1, 17, 7, 22]


def test_repeated_images_are_augmented_anew():
    sampler = RepeatSampler([2, 1], [1, 3], seed=5)
    pairs = list(sampler)
    assert sorted(index for index, _ in pairs) == [0, 1, 2, 2, 2]
    assert len({seed for _, seed in pairs}) == 5
    sampler.set_epoch(1)
    assert list(sampler) != pairs


def test_goes_on_within_an_epoch(folders):
    loader = mixed(folders).train_dataloader()
    whole = [batch["name"] for batch in loader]
    loader = mixed(folders).train_dataloader()
    batches = iter(loader)
    first = [next(batches)["name"] for _ in range(3)]
    state = loader.state_dict()
    rest = mixed(folders).train_dataloader()
    rest.load_state_dict(state)
    assert first + [batch["name"] for batch in rest] == whole


def test_class_balanced(folders):
    names = seen(mixed(folders, class_balanced=True, batch_size=1))
    assert len(names) == 12
    assert {name.split("/")[0] for name in names} == {"town", "field"}


def test_datamodules_without_files(tmp_path):
    """Scenes that are drawn, beside a data set that has no training images."""
    table = "universal\tdataset\tclass\n" + "".join(
        f"{name}\tscenes\t{name}\n" for name in SyntheticScenesDataModule().class_names
    )
    (tmp_path / "table.tsv").write_text(table)
    scenes = SyntheticScenesDataModule(size=(32, 32), train_length=3, val_length=2, test_length=2)
    data = MixedDataModule({"scenes": scenes}, tmp_path / "table.tsv", num_workers=0, batch_size=2)
    data.setup()
    assert len(data.train_dataset) == 3
    assert next(iter(data.test_dataloader()))["mask"].shape == (1, 32, 32)


def test_fit_and_test(folders):
    data = mixed(folders)
    module = SoftmaxSegmenter(data.num_classes, features=PlainFeatures())
    run = trainer(folders, max_steps=2, log_every_n_steps=1)
    run.fit(module, datamodule=data)
    assert run.global_step == 2
    (scores,) = run.test(module, datamodule=data, verbose=False)
    assert "test_IoU_3" in scores


def test_check(folders):
    report = check_data(mixed(folders), folders / "check", num_pictures=1)
    assert report["problems"] == []
    assert {split: found["images"] for split, found in report["splits"].items()} == {
        "train": 12, "val": 3, "test": 3,
    }  # fmt: skip
    assert report["splits"]["train"]["classes"]["car"]["images"] == 8
    (folders / "field" / "masks" / "0.png").write_bytes(b"broken")
    report = check_data(mixed(folders), folders / "check", num_pictures=1)
    (problem,) = {problem["problem"] for problem in report["problems"]}
    assert "0.png' cannot be read" in problem
    assert json.loads((folders / "check" / "data_check.json").read_text()) == report
    lists = {split: folders / "field" / f"{split}.txt" for split in ("train", "val")}
    lists["train"].write_text("1\n2\nlost\n")
    lists["val"].write_text("3\n")
    listed = field(folders, train_list=lists["train"], val_list=lists["val"])
    data = mixed(folders, data={"field": listed, "town": town(folders)})
    report = check_data(data, folders / "check", num_pictures=1)
    assert any("lost" in problem["problem"] for problem in report["problems"])
    assert report["splits"]["train"]["images"] == 11
    assert report["splits"]["train"]["classes"]["car"]["images"] == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"data": {}}, "data is empty: give at least one datamodule"),
        ({"repeats": {"town": 2}}, "must hold a number from 1 for each of town, field"),
        ({"repeats": {"town": 2, "field": 0}}, "must hold a number from 1"),
        (
            {"repeats": {"town": 1, "field": 1}, "class_balanced": True},
            "repeats and class_balanced both say how often",
        ),
    ],
)
def test_wrong_arguments(folders, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        mixed(folders, **arguments)


def test_a_table_for_testing_only(folders):
    with pytest.raises(ValueError, match="from the class 'ground' of field to several universal"):
        mixed(folders, taxonomy=folders / "table.tsv")


def test_the_data_inside_still_stop_where_they_are_used_alone(folders):
    own = town(folders)
    (parts,) = (mixed(folders, data={"town": own}, on_error="skip").data.values(),)
    assert [part.on_error for part in parts] == ["skip"]
    assert own.on_error == "stop"


def test_sparse_labels_inside(folders):
    data = mixed(folders, data={"town": town(folders, sparse=Points())})
    with pytest.raises(ValueError, match=r"need whole masks: leave sparse out of data\.data"):
        data.setup("fit")


# --- a test set in its own classes -------------------------------------------------------------


def test_the_test_set_keeps_its_classes(folders):
    data = field_test(folders)
    assert data.class_names == ["sky", "road", "grass", "car"]
    assert data.target_classes.class_names == ["heaven", "ground"]
    assert data.target_classes.palette == field(folders).palette[1:]
    (batch,) = data.test_dataloader()
    own = field(folders)
    own.setup("test")
    labels = own.test_dataset[0]["mask"].numpy()
    assert (batch["mask"][0].numpy() == np.array([255, 0, 1])[labels]).all()
    with pytest.raises(ValueError, match="CrossDomainDataModule has no train split"):
        data.setup("fit")


def test_check_of_a_test_set(folders):
    data = field_test(folders)
    report = check_data(data, folders / "check", num_pictures=1)
    assert report["class_names"] == FIELD  # of the data as they are
    assert report["problems"] == []


def test_another_models_taxonomy(folders):
    data = field_test(folders)
    module = SoftmaxSegmenter(3, features=PlainFeatures())
    with pytest.raises(ValueError, match="has 4 universal classes and the model 3: give the table"):
        trainer(folders).test(module, datamodule=data)
