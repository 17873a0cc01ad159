"""Sparse labels of datamodules: every one of them, the command line, a user with a few clicks."""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_genseg import SoftmaxSegmenter
from lightning_genseg import data as genseg_data
from lightning_genseg.cli.check import check_data
from lightning_genseg.data import (
    Blocks,
    CityscapesDataModule,
    FolderDataModule,
    MixedDataModule,
    PointFiles,
    Points,
    ScribbleFiles,
    Scribbles,
    SegmentationDataModule,
    SparseDataset,
    SparseMasks,
    StreetHazardsDataModule,
    SyntheticScenes,
    SyntheticScenesDataModule,
    VOCDataModule,
)
from lightning_genseg.data.checks import check_batch
from lightning_genseg.data.derived import DerivedDataModule
from tests.contract import TINY, trainer
from tests.data.sets.cases import DENSE
from tests.miniatures import make_cityscapes, make_street_hazards, make_voc, save

SIZE = (48, 64)
VOC_POINTS = ["voc_whats_the_point.json", "voc_whats_the_point_bg_from_scribbles.json"]


def scenes(**arguments):
    given = {"batch_size": 2, "num_workers": 0, "crop_size": (32, 40), "sparse": Points(3)}
    return SyntheticScenesDataModule(
        (48, 64), train_length=6, val_length=2, test_length=2, **{**given, **arguments}
    )


def check_sparse(batch, num_classes, limit=0.2):
    """A batch of the agreed form, most of it without label."""
    check_batch(batch, num_classes)
    labelled = batch["mask"] != 255
    assert batch["unlabelled"].dtype == torch.bool
    assert not (batch["unlabelled"] & labelled).any()
    assert batch["image_classes"].shape == (len(batch["mask"]), num_classes)
    assert labelled.float().mean() < limit
    for mask, classes in zip(batch["mask"], batch["image_classes"], strict=True):
        assert classes[mask[mask != 255]].all()


# Training only, all datamodules


@pytest.mark.parametrize("case", DENSE)
def test_any_datamodule(tmp_path, case):
    words = {"batch_size": 2, "num_workers": 0, "crop_size": (32, 40), "sparse": Points(2)}
    data = case.datamodule(case.make(tmp_path, SIZE), **words)
    check_sparse(next(iter(data.train_dataloader())), case.classes)
    batch = next(iter(data.val_dataloader()))
    assert "unlabelled" not in batch
    assert (batch["mask"] != 255).float().mean() > 0.3


def test_all_that_train_have_the_argument():
    for name in (name for name in genseg_data.__all__ if name.endswith("DataModule")):
        kind = getattr(genseg_data, name)
        if inspect.isabstract(kind):
            continue
        parser = ArgumentParser()
        parser.add_class_arguments(kind, "data")
        made_of_others = issubclass(kind, DerivedDataModule | MixedDataModule)
        trains = "train" in kind.splits and not made_of_others
        assert ("sparse" in parser.get_defaults().data) == trains, name


@pytest.mark.filterwarnings("ignore:.* classes are labelled in no training image")
def test_voc_with_points_and_scribbles(tmp_path):
    root = make_voc(tmp_path, SIZE)
    for sparse in (PointFiles(VOC_POINTS), ScribbleFiles("voc_scribbles")):
        data = VOCDataModule(root, sparse=sparse, batch_size=4, num_workers=0, crop_size=(40, 48))
        check_sparse(next(iter(data.train_dataloader())), 21, 0.3)


@pytest.mark.filterwarnings("ignore:.* classes are labelled in no training image")
def test_cityscapes_with_clicks(tmp_path):
    root = make_cityscapes(tmp_path, SIZE)
    for sparse in (PointFiles("cityscapes_synthetic_clicks.json"), Points(20, per="image")):
        data = CityscapesDataModule(
            root, sparse=sparse, batch_size=2, num_workers=0, crop_size=SIZE
        )
        check_sparse(next(iter(data.train_dataloader())), 19)


def test_data_with_anomalies(tmp_path):
    """Where all splits have them, an annotator of a few points still says nothing about them."""
    data = StreetHazardsDataModule(
        make_street_hazards(tmp_path, SIZE), sparse=Points(2), batch_size=2, num_workers=0
    )
    batch = next(iter(data.train_dataloader()))
    check_sparse(batch, data.num_classes)
    assert "anomaly" not in batch
    assert "anomaly" in next(iter(data.val_dataloader()))


@pytest.mark.filterwarnings("ignore:.* classes are labelled in no training image")
def test_unknown_classes(tmp_path):
    """No label is of a class that is left out, and the others are numbered anew."""
    root = make_voc(tmp_path, SIZE)
    for sparse in (Points(3), PointFiles(VOC_POINTS), ScribbleFiles("voc_scribbles")):
        every = VOCDataModule(root, sparse=sparse, num_workers=0)
        some = VOCDataModule(root, unknown_classes=["bicycle", "dog"], sparse=sparse, num_workers=0)
        for data in (every, some):
            data.setup("fit")
        names, left = (
            {data.class_names[c] for c in np.flatnonzero(data.class_index().sum(0))}
            for data in (every, some)
        )
        assert names & {"bicycle", "dog"}
        assert left == names - {"bicycle", "dog"}


@pytest.mark.parametrize(
    "sparse", [Points(2), Scribbles(), Blocks()], ids=lambda s: type(s).__name__
)
def test_workers_and_epochs_see_the_same_labels(sparse):
    """Without augmentation the masks of an image never change, with any number of workers."""
    seen = {}
    for workers in (0, 2):
        data = scenes(sparse=sparse, num_workers=workers, train_transform=[])
        loader = data.train_dataloader()
        for _ in range(2):
            for batch in loader:
                for name, mask in zip(batch["name"], batch["mask"], strict=True):
                    assert torch.equal(seen.setdefault(name, mask), mask)
    assert len(seen) == 6


def test_augmented_batches_are_reproducible():
    first, second = (next(iter(scenes(num_workers=n).train_dataloader())) for n in (0, 2))
    for key in ("image", "mask", "unlabelled", "image_classes"):
        assert torch.equal(first[key], second[key])


def test_class_balanced_draws_by_the_sparse_labels(tmp_path):
    """A click on a car in one image of four: that one makes up half of the epoch, not a quarter."""
    root = own_images(tmp_path, masks=range(4))
    points = {str(i): [{"x": 5, "y": 5, "cls": 0}] for i in range(8)}
    points["6"] = [{"x": 5, "y": 5, "cls": 1}]
    (root / "clicks.json").write_text(json.dumps(points))
    data = folder(root, PointFiles("clicks.json"), num_classes=3, class_balanced=True, seed=3)
    assert data.class_index().sum(0).tolist() == [27, 9, 0]
    with pytest.warns(UserWarning, match=r"1 classes occur in no training image .*\(class_2\)"):
        loader = data.train_dataloader()
    names = [name for _ in range(20) for batch in loader for name in batch["name"]]
    assert 0.35 < names.count("6") / len(names) < 0.65


def test_a_training_step_and_scores(tmp_path):
    module, data = SoftmaxSegmenter(**TINY), scenes()
    run = trainer(tmp_path, max_steps=2, log_every_n_steps=1)
    run.fit(module, datamodule=data)
    assert torch.isfinite(run.callback_metrics["train_loss"])
    (scores,) = run.validate(module, datamodule=data, verbose=False)
    assert 0 <= scores["val_mIoU"] <= 1


# The first batch


def batch(**changes):
    mask = torch.full((2, 4, 5), 255)
    mask[:, 0] = 1
    found = {"image": torch.zeros(2, 3, 4, 5), "mask": mask, "name": ["a", "b"]}
    return {**found, "unlabelled": mask == 255, "image_classes": torch.ones(2, 3) > 0, **changes}


def test_a_right_batch():
    check_batch(batch(), 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("unlabelled", torch.ones(2, 4, 5), "of the batch with 'a' is float32 .* must be bool"),
        ("unlabelled", torch.ones(2, 4, 4) > 0, "is bool of shape 2x4x4 .* shape 2x4x5"),
        ("unlabelled", [True], "is list but must be bool"),
        ("unlabelled", torch.ones(2, 4, 5) > 0, "'a' names a class at 5 pixels where unlabelled"),
        ("image_classes", None, "batch with 'a' is NoneType but must be bool of shape 2x3"),
        ("image_classes", torch.ones(2, 3), "is float32 of shape 2x3 .* bool of shape 2x3"),
        ("image_classes", torch.ones(2, 4) > 0, "is bool of shape 2x4 .* bool of shape 2x3"),
        ("image_classes", torch.ones(3) > 0, "is bool of shape 3 but must be bool of shape 2x3"),
        ("image_classes", torch.tensor([[1, 1, 1], [1, 0, 1]]) > 0, "'b' holds class 1"),
    ],
)  # fmt: skip
def test_wrong_batches(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        check_batch(batch(**{key: value}), 3)
    assert key in str(error.value)


# The command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("Points --data.sparse.count=3 --data.sparse.per=image",
         {"count": 3, "per": "image", "size": 1, "seed": 0, "zoom": False}),
        ("Scribbles --data.sparse.size 5", {"size": 5, "min_area": 0.002, "seed": 0,
          "zoom": False}),
        ("Blocks --data.sparse.share 0.2", {"share": 0.2, "grid": 10, "seed": 0, "zoom": False}),
        ("PointFiles --data.sparse.files a.json",
         {"files": "a.json", "ids": None, "size": 3, "zoom": False}),
        ("PointFiles --data.sparse.files=[a.json,b.json]",
         {"files": ["a.json", "b.json"], "ids": None, "size": 3, "zoom": False}),
        ("ScribbleFiles --data.sparse.folder xml", {"folder": "xml", "names": None, "size": 3,
          "zoom": False}),
        ("SparseMasks --data.sparse.unlabelled=254 --data.sparse.ids='{1: 0, 2: 1}'",
         {"unlabelled": 254, "folder": None, "suffix": ".png", "ids": {1: 0, 2: 1},
          "max_labelled": 0.2}),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_short_names_on_the_command_line(genseg, capsys, arguments, expected):
    words = "fit --data SyntheticScenesDataModule --model SoftmaxSegmenter --data.sparse"
    with pytest.raises(SystemExit, match="0"):
        genseg(f"{words} {arguments} --print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    shown = printed["init_args"]["sparse"]
    assert shown["class_path"].startswith("lightning_genseg.data.")
    assert shown["class_path"].endswith(f".{arguments.split()[0]}")
    # As config.yaml of a run is read again.
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    again = parser.parse_string(yaml.safe_dump({"data": printed}))
    given = again.data.init_args.sparse.init_args.as_dict()
    assert json.loads(json.dumps(given, default=str)) == json.loads(json.dumps(expected))
    assert type(parser.instantiate(again).data.sparse).__name__ == arguments.split()[0]


def test_data_without_files_have_nothing_to_skip():
    sparse = Points(count=2)
    data = SyntheticScenesDataModule(train_length=2, sparse=sparse, on_error="skip")
    data.setup("fit")
    assert len(data.train_dataset) == 2
    assert sparse.arguments() == Points(count=2).arguments(), "the user's own labels are changed"


def test_data_without_files_whose_masks_do_not_fit():
    class Wrong(SyntheticScenes):
        def read_mask_labels(self, index):
            return super().read_mask_labels(index)[:-1]

    dataset = SparseDataset(Wrong(2, (48, 64), seed=0), Points(count=2))
    with pytest.raises(ValueError, match=r"mask '.*' is 47x64 but image '.*' is 48x64"):
        dataset[0]


# Own images with a few clicks


def own_images(root, masks=(), dense=True):
    """Eight images, sky above road, masks of some: whole, or a stroke of each class on 9."""
    for index in range(8):
        truth = np.zeros((40, 60), np.uint8)
        truth[20:] = 1
        if not dense:
            strokes = np.full_like(truth, 9)
            strokes[10, 5:30], strokes[30, 5:30] = 0, 1
            truth = strokes
        image = np.random.default_rng(index).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        save(image, root / "images" / f"{index}.jpg")
        if index in masks:
            save(truth, root / "masks" / f"{index}.png")
    clicks = [{"x": 7, "y": 8, "cls": 0}, {"x": 30, "y": 33, "cls": 1}]
    (root / "clicks.json").write_text(json.dumps({f"{index}.jpg": clicks for index in range(8)}))
    return root


def folder(root, sparse, **arguments):
    given = {"num_classes": 2, "batch_size": 2, "num_workers": 0, "crop_size": (32, 32)}
    given |= {"cache_dir": root / "cache"}
    return FolderDataModule(root, sparse=sparse, **{**given, **arguments})


def names(dataset):
    return [sample.name for sample in dataset.samples]


def test_images_with_a_mask_are_for_validation(tmp_path):
    data = folder(own_images(tmp_path, masks=(1, 4)), PointFiles("clicks.json"))
    data.setup()
    assert names(data.train_dataset) == list("023567")
    assert names(data.val_dataset) == names(data.test_dataset) == list("14")
    check_sparse(next(iter(data.train_dataloader())), 2)
    assert "unlabelled" not in next(iter(data.val_dataloader()))


def test_masks_of_all_images_are_drawn_from_for_validation(tmp_path):
    root = own_images(tmp_path, masks=range(8))
    data, dense = folder(root, PointFiles("clicks.json")), folder(root, None)
    for each in (data, dense):
        each.setup()
    assert names(data.val_dataset) == names(dense.val_dataset)
    assert not isinstance(data.val_dataset, SparseDataset)


@pytest.mark.parametrize("hidden", [None, "", ".DS_Store"])
def test_no_masks_at_all(tmp_path, hidden):
    """Scores are of the clicks then, and a warning says so; a hidden file is no mask."""
    root = own_images(tmp_path)
    if hidden is not None:
        (root / "masks").mkdir()
    if hidden:
        (root / "masks" / hidden).write_bytes(b"x")
    data = folder(root, PointFiles("clicks.json", size=1))
    expected = "no (val|test) image has a mask: the (val|test) scores are"
    with pytest.warns(UserWarning, match=expected):
        data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (6, 2)
    check_sparse(next(iter(data.train_dataloader())), 2)
    batch = next(iter(data.val_dataloader()))
    assert (batch["mask"] != 255).nonzero()[:, 1:].tolist() == [[8, 7], [33, 30]]


def test_classes_without_a_click(tmp_path):
    data = folder(own_images(tmp_path, masks=(7,)), PointFiles("clicks.json"), num_classes=4)
    expected = r"2 classes are labelled in no training image .* \(class_2, class_3\)"
    with pytest.warns(UserWarning, match=expected):
        data.setup("fit")


def test_lists(tmp_path):
    root = own_images(tmp_path, masks=(6, 7))
    for split, listed in (("train", "012"), ("val", "67"), ("more", "56")):
        (root / f"{split}.txt").write_text("\n".join(listed))
    lists = {"train_list": root / "train.txt", "val_list": root / "val.txt"}
    data = folder(root, PointFiles("clicks.json"), **lists)
    data.setup()
    assert (names(data.train_dataset), names(data.val_dataset)) == (list("012"), list("67"))
    data = folder(root, PointFiles("clicks.json"), **{**lists, "val_list": root / "more.txt"})
    with pytest.raises(ValueError, match=r"1 images have no mask of the same name .*\('5'\)"):
        data.setup()
    # Points that are drawn from masks need these.
    expected = r"3 images have no mask of the same name .*\('0', '1', '2'\)"
    with pytest.raises(ValueError, match=expected):
        folder(root, Points(3), **lists).setup()


def test_labels_that_two_data_share(tmp_path):
    """What one of them finds, or leaves out, is not the other's."""
    here, there = (own_images(tmp_path / name, masks=(7,)) for name in ("here", "there"))
    (there / "clicks.json").write_text(
        json.dumps({f"{index}": [{"x": 1, "y": 1, "cls": 1}] for index in range(8)})
    )
    sparse = PointFiles("clicks.json")
    first, second = folder(here, sparse), folder(there, sparse, absent_classes="warn")
    first.setup("fit")
    with pytest.warns(UserWarning, match=r"1 classes are labelled in no training image"):
        second.setup("fit")
    assert first.train_dataset.read_marks(0).classes.tolist() == [0, 1]
    assert second.train_dataset.read_marks(0).classes.tolist() == [1]


def test_no_class_is_called_absent_when_broken_samples_are_left_out(tmp_path):
    data = folder(own_images(tmp_path, masks=(7,)), PointFiles("clicks.json"), on_error="skip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")


def test_images_without_clicks(tmp_path):
    root = own_images(tmp_path, masks=(7,))
    clicks = {"0": [], "1": [{"x": 1, "y": 1, "cls": 0}, {"x": 2, "y": 1, "cls": 1}]}
    (root / "clicks.json").write_text(json.dumps(clicks))
    data = folder(root, PointFiles("clicks.json"))
    expected = r"5 of 7 images are not in .*clicks.json' \('2', '3', '4' \.\.\."
    with pytest.raises(ValueError, match=expected):
        data.setup("fit")
    data = folder(root, PointFiles("clicks.json"), on_error="skip")
    left_out = r"5 of 7 train samples are left out \(2, 3, 4, 5, 6\)"
    with pytest.warns(UserWarning, match=expected), pytest.warns(UserWarning, match=left_out):
        data.setup("fit")
    assert names(data.train_dataset) == ["0", "1"]
    problems = check_data(folder(root, PointFiles("clicks.json")), tmp_path / "report")["problems"]
    assert {problem["name"] for problem in problems} >= set("23456")


def test_masks_that_are_sparse(tmp_path):
    """Training knows what is unlabelled, validation is scored at the strokes."""
    root = own_images(tmp_path, masks=range(8), dense=False)
    data = folder(root, SparseMasks(9))
    expected = "masks of the val images are sparse as well: the val scores are"
    with pytest.warns(UserWarning, match=expected):
        batch = next(iter(data.train_dataloader()))
    check_sparse(batch, 2)
    assert batch["unlabelled"].any()
    batch = next(iter(data.val_dataloader()))
    assert (batch["mask"] != 255).sum() == 50
    with pytest.raises(ValueError, match="holds the values 9, which are no classes"):
        next(iter(folder(root, None).train_dataloader()))
    data = folder(root, SparseMasks(9), ids={0: 1, 1: 0})
    with pytest.warns(UserWarning, match="sparse as well"):
        batch = next(iter(data.val_dataloader()))
    assert set(batch["mask"].unique().tolist()) == {0, 1, 255}
    with pytest.raises(ValueError, match="unlabelled is 1, which is class 'class_1'"):
        folder(root, SparseMasks(1)).setup("fit")


def test_sparse_masks_beside_dense_ones(tmp_path):
    root = own_images(tmp_path, masks=range(8), dense=False)
    (root / "masks").rename(root / "strokes")
    own_images(root, masks=(0, 1))
    data = folder(root, SparseMasks(9, "strokes"))
    data.setup("fit")
    assert (names(data.train_dataset), names(data.val_dataset)) == (list("234567"), list("01"))
    check_sparse(next(iter(data.train_dataloader())), 2)


def test_prediction_needs_no_labels(tmp_path):
    root = own_images(tmp_path)
    data = folder(root / "nowhere", PointFiles("gone.json"), predict_root=root / "images")
    data.setup("predict")
    assert len(data.predict_dataset) == 8
