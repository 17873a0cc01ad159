"""Loaders: order, workers, resuming, the check of the first batch."""

import re
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from lightning_genseg.data import SegmentationDataModule, SyntheticScenesDataModule
from lightning_genseg.data.checks import check_batch
from lightning_genseg.data.loaders import EpochSampler, TrainLoader, collate
from lightning_genseg.data.transforms import RandomCropLimitedClass

# Workers are started by fork, which Python 3.12 warns about in a process that has threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def synthetic(**arguments):
    defaults = {
        "size": (32, 40),
        "crop_size": (24, 24),
        "train_length": 13,
        "val_length": 3,
        "test_length": 2,
    }
    return SyntheticScenesDataModule(**{**defaults, "batch_size": 3, "num_workers": 0, **arguments})


def digest(batch):
    return batch["name"], round(batch["image"].double().sum().item(), 6), batch["mask"].sum().item()


# --- the datamodule alone ----------------------------------------------------------------------


def test_attributes_before_setup():
    data = synthetic()
    assert data.num_classes == len(data.class_names) == len(data.palette) == 6
    assert data.ignore_index == 255
    assert (
        data.train_dataset is data.val_dataset is data.test_dataset is data.predict_dataset is None
    )


@pytest.mark.parametrize(
    ("stage", "built"),
    [
        ("fit", "train val"),
        ("validate", "val"),
        ("test", "test"),
        (None, "train val test"),
        ("predict", "predict"),
    ],
)
def test_setup_builds_what_a_stage_needs(stage, built, tmp_path):
    write_image(tmp_path / "x.png")
    data = synthetic(predict_root=tmp_path if stage == "predict" else None)
    data.setup(stage)
    there = {
        name
        for name in ("train", "val", "test", "predict")
        if getattr(data, f"{name}_dataset") is not None
    }
    assert there == set(built.split())


def test_loaders_without_trainer_and_setup(tmp_path):
    write_image(tmp_path / "x.png")
    data = synthetic(predict_root=tmp_path)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 4
    assert batches[0]["image"].shape == (3, 3, 24, 24)
    assert batches[0]["mask"].shape == (3, 24, 24)
    assert len({name for batch in batches for name in batch["name"]}) == 12
    assert [len(batch["name"]) for batch in data.val_dataloader()] == [3]
    assert next(iter(data.test_dataloader()))["image"].shape == (2, 3, 32, 40)
    assert next(iter(data.predict_dataloader()))["name"] == ["x"]


def test_train_val_and_test_scenes_differ():
    data = synthetic(train_length=3, train_transform=[])
    data.setup()
    images = [
        dataset[0]["image"] for dataset in (data.train_dataset, data.val_dataset, data.test_dataset)
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_held_out_objects_only_in_test():
    data = synthetic(held_out=True)
    assert "anomaly" not in next(iter(data.train_dataloader()))
    assert "anomaly" not in next(iter(data.val_dataloader()))
    assert next(iter(data.test_dataloader()))["anomaly"].shape == (2, 32, 40)


def test_given_transforms_replace_the_default():
    data = synthetic(
        train_transform=[RandomCropLimitedClass(16, 8)],
        eval_transform=[RandomCropLimitedClass(8, 16)],
    )
    assert next(iter(data.train_dataloader()))["image"].shape[2:] == (16, 8)
    assert next(iter(data.val_dataloader()))["image"].shape[2:] == (8, 16)


def test_plain_loader_gives_any_split_in_order():
    data = synthetic()
    names = [name for batch in data.plain_loader("train") for name in batch["name"]]
    assert names == [f"scene_0_{index:05}" for index in range(13)]
    assert next(iter(data.plain_loader("test")))["image"].shape == (2, 3, 32, 40)


def test_batches_do_not_depend_on_workers():
    runs = []
    for num_workers in (0, 1, 2):
        loader = synthetic(num_workers=num_workers).train_dataloader()
        runs.append([digest(batch) for _ in range(2) for batch in loader])
    assert runs[0] == runs[1] == runs[2]
    first, second = runs[0][:4], runs[0][4:]
    assert first != second  # the epochs differ


def test_batches_depend_on_the_seed():
    assert digest(next(iter(synthetic().train_dataloader()))) != digest(
        next(iter(synthetic(seed=1).train_dataloader()))
    )


def test_augmentation_changes_between_epochs():
    data = synthetic(train_length=3)
    loader = data.train_dataloader()
    images = []
    for _ in range(2):
        batch = next(iter(loader))
        images.append(batch["image"][batch["name"].index("scene_0_00000")])
        loader.sampler.set_epoch(1)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0 but must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1 but must be at least 0"),
        ({"crop_size": (0, 8)}, "crop_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**arguments)


def test_fewer_images_than_a_batch():
    with pytest.raises(
        ValueError, match=r"has 2 images, fewer than one batch of 3 for each of 1 processes: lower"
    ):
        synthetic(train_length=2).train_dataloader()


def test_nothing_to_predict():
    with pytest.raises(ValueError, match="set predict_root"):
        synthetic().predict_dataloader()


# --- two processes -----------------------------------------------------------------------------


class Numbers(Dataset):
    def __len__(self):
        return 11


def test_ranks_share_out_the_batches_of_one_process():
    single = EpochSampler(Numbers(), seed=4)
    ranks = []
    for rank in range(2):
        sampler = EpochSampler(Numbers(), seed=4)
        sampler.rank, sampler.num_replicas, sampler.num_samples, sampler.total_size = rank, 2, 5, 10
        ranks.append(sampler)
    for epoch in range(2):
        for sampler in (single, *ranks):
            sampler.set_epoch(epoch)
        whole, first, second = list(single), list(ranks[0]), list(ranks[1])
        assert sorted(index for index, _ in whole) == list(range(11))
        assert set(first + second) == set(whole[:10])
        for start in (0, 2):  # batch k of both = batch k of one process with twice the batch size
            assert set(first[start : start + 2] + second[start : start + 2]) == set(
                whole[2 * start : 2 * start + 4]
            )


class Recorder(LightningModule):
    """A module that learns something and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 6, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, *digest(batch)))
        return torch.nn.functional.cross_entropy(
            self.net(batch["image"]), batch["mask"], ignore_index=255
        )

    def validation_step(self, batch, batch_idx):
        assert batch["mask"].shape[1:] == batch["image"].shape[2:]

    def test_step(self, batch, batch_idx):
        self.seen.append(batch["name"])

    def predict_step(self, batch, batch_idx):
        return batch["name"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAfter(Callback):
    """Leave training as an interruption would, after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.steps:
            raise RuntimeError("killed")


def trainer(path, *callbacks, **arguments):
    return Trainer(
        default_root_dir=path,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **arguments,
    )


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    """A real gloo group: no pair is lost, and Lightning leaves the sampler alone."""
    torch.multiprocessing.spawn(_run_rank, (str(tmp_path),), nprocs=2)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    single = Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(
        single, synthetic(train_length=12, batch_size=4)
    )
    names = [set(first) | set(second) for first, second in zip(*seen, strict=True)]
    assert names == [set(record[2]) for record in single.seen]


def _run_rank(rank, path):
    import os

    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29517",
        WORLD_SIZE="2",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = Recorder()
    runner = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    runner.fit(module, synthetic(train_length=12, batch_size=2))
    assert isinstance(runner.train_dataloader.sampler, EpochSampler)
    torch.save([record[2] for record in module.seen], f"{path}/{rank}.pt")


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8], ids="after_{}".format)
def test_resumed_run_goes_on_with_the_next_batch(tmp_path, num_workers, stop):
    """Four batches an epoch: the interruption falls into the middle of an epoch, or on its last batch."""
    whole = Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, synthetic(num_workers=num_workers))
    assert [record[:2] for record in whole.seen] == [
        (epoch, batch) for epoch in range(3) for batch in range(4)
    ]

    first, second = Recorder(), Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, StopAfter(stop), every_step(tmp_path), max_epochs=3).fit(
            first, synthetic(num_workers=num_workers)
        )
    # Checkpoints are written after all other callbacks: the last step is lost, as when a process is
    # killed.
    path = tmp_path / "step.ckpt" if stop > 1 else None
    trainer(tmp_path, every_step(tmp_path), max_epochs=3).fit(
        second, synthetic(num_workers=num_workers), ckpt_path=path
    )
    assert first.seen[: stop - 1] + second.seen == whole.seen


def every_step(path):
    return ModelCheckpoint(path, "step", every_n_train_steps=1, enable_version_counter=False)


@pytest.mark.parametrize(
    "arguments", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}], ids=str
)
@pytest.mark.parametrize("at_train_end", [True, False])
def test_resumed_from_the_end_of_an_epoch(tmp_path, arguments, at_train_end):
    def run(module, epochs, path=None):
        checkpoint = ModelCheckpoint(
            tmp_path, "epoch", save_on_train_epoch_end=at_train_end, enable_version_counter=False
        )
        trainer(tmp_path, checkpoint, max_epochs=epochs, **arguments).fit(
            module, synthetic(), ckpt_path=path
        )

    whole, first, second = Recorder(), Recorder(), Recorder()
    run(whole, 3)
    run(first, 1)
    run(second, 3, tmp_path / "epoch.ckpt")
    assert first.seen + second.seen == whole.seen


def test_resumed_from_max_steps(tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, every_step(tmp_path), max_steps=10).fit(whole, synthetic())
    trainer(tmp_path, every_step(tmp_path), max_steps=6).fit(first, synthetic())
    trainer(tmp_path, every_step(tmp_path), max_steps=10).fit(
        second, synthetic(), ckpt_path=tmp_path / "step.ckpt"
    )
    assert first.seen + second.seen == whole.seen


def test_reloaded_loaders_go_on_through_the_epochs(tmp_path):
    whole, reloaded = Recorder(), Recorder()
    trainer(tmp_path, max_epochs=3).fit(whole, synthetic())
    trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(reloaded, synthetic())
    assert reloaded.seen == whole.seen


@pytest.mark.parametrize("done", [0, 2, 4])
def test_resuming_in_a_plain_loop(done):
    whole = [
        digest(batch)
        for loader in [synthetic().train_dataloader()]
        for _ in range(2)
        for batch in loader
    ]
    loader = synthetic().train_dataloader()
    batches = iter(loader)
    seen = [digest(next(batches)) for _ in range(done)]
    state = loader.state_dict()
    assert state == {"epoch": 0, "batch": done}
    loader = synthetic().train_dataloader()
    loader.load_state_dict(state)
    while len(seen) < 8:
        seen += [digest(batch) for batch in loader]
    assert seen == whole


def test_abandoned_iteration_starts_the_epoch_again():
    loader = synthetic().train_dataloader()
    assert digest(next(iter(loader))) == digest(next(iter(loader)))
    assert len(list(loader)) == 4


def test_every_stage_runs_in_a_trainer(tmp_path):
    write_image(tmp_path / "in" / "a.png", (20, 30))
    write_image(tmp_path / "in" / "b.png", (30, 20))
    data = synthetic(eval_batch_size=1, num_workers=1, predict_root=tmp_path / "in")
    module = Recorder()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, data)
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    assert module.seen[-2:] == [["scene_2_00000"], ["scene_2_00001"]]
    assert run.predict(module, data) == [["a"], ["b"]]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_repeats_its_batch(tmp_path):
    module = Recorder()
    trainer(tmp_path, max_epochs=2, overfit_batches=1).fit(module, synthetic(train_transform=[]))
    assert module.seen[0][2:] == module.seen[1][2:]


# --- the first batch ---------------------------------------------------------------------------


def batch(**changes):
    return {
        "image": torch.rand(2, 3, 4, 5),
        "mask": torch.randint(3, (2, 4, 5)),
        "name": ["a", "b"],
        **changes,
    }


def labels(value):
    mask = torch.zeros(2, 4, 5, dtype=torch.int64)
    mask[1, 2, 3] = value
    return mask


def image(value):
    result = torch.rand(2, 3, 4, 5)
    result[1, 2, 3, 4] = value
    return result


def test_good_batches_pass():
    check_batch(batch(), 3)
    check_batch(batch(mask=labels(255)), 3)
    check_batch({"image": torch.rand(1, 3, 4, 5), "name": ["a"]}, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": torch.zeros(2, 3, 4, 5, dtype=torch.uint8)},
            "with 'a' are uint8 of shape 2x3x4x5 but must be float32",
        ),
        (
            {"image": torch.rand(2, 4, 5, 3)},
            "'a' are float32 of shape 2x4x5x3 but must be float32 Bx3xHxW",
        ),
        ({"image": [1, 2]}, "'a' are list but must be"),
        (
            {"image": torch.rand(2, 3, 4, 5) * 255},
            r"image 'a' holds values .* must lie in \[0, 1\]: divide by 255",
        ),
        ({"image": image(-1.5)}, "image 'b' holds values from -1.5 to .*leave out Normalize"),
        ({"image": image(float("nan"))}, "image 'b' holds values from nan"),
        (
            {"mask": torch.zeros(2, 4, 5)},
            "'a' are float32 of shape 2x4x5 but must be int64 of shape 2x4x5",
        ),
        ({"mask": torch.zeros(2, 1, 4, 5, dtype=torch.int64)}, "'a' are int64 of shape 2x1x4x5"),
        (
            {"mask": torch.zeros(2, 5, 4, dtype=torch.int64)},
            "int64 of shape 2x5x4 but must be int64 of shape 2x4x5",
        ),
        (
            {"mask": labels(3)},
            "mask 'b' holds the labels 3 but there are 3 classes: use 0 to 2 and 255",
        ),
        ({"mask": labels(-1)}, "mask 'b' holds the labels -1"),
    ],
)
def test_wrong_batches(changes, message):
    with pytest.raises(ValueError, match=message):
        check_batch(batch(**changes), 3)


def test_batch_of_ignored_pixels_is_warned_about():
    with pytest.warns(UserWarning, match=r"every pixel of the first batch \(a, b\) is ignored"):
        check_batch(batch(mask=torch.full((2, 4, 5), 255)), 3)


def strange(value=1, **changes):
    anomaly = torch.zeros(2, 4, 5, dtype=torch.int64)
    anomaly[1, 0, 0] = value
    mask = torch.where(anomaly == 1, 255, torch.ones_like(anomaly))
    return batch(**{"mask": mask, "anomaly": anomaly, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": 2}, "anomaly mask 'b' holds 2: use 1 for anomalous, 0 for known and 255"),
        (
            {"mask": torch.ones(2, 4, 5, dtype=torch.int64)},
            "mask 'b' names a class where the anomaly",
        ),
        (
            {"anomaly": torch.zeros(2, 4, 5)},
            "anomaly masks of the batch with 'a' are float32 of shape",
        ),
        (
            {"anomaly": torch.zeros(2, 5, 4, dtype=torch.int64)},
            "are int64 of shape 2x5x4 but must be int64 of shape 2x4x5, like the masks",
        ),
    ],
)
def test_wrong_anomalies(changes, message):
    check_batch(strange(), 3)
    with pytest.raises(ValueError, match=message):
        check_batch(strange(**changes), 3)


def test_data_without_classes_are_not_warned_about():
    ignored = torch.full((2, 4, 5), 255)
    check_batch(strange(mask=ignored), 3)
    with pytest.warns(UserWarning, match="every pixel of the first batch"):
        check_batch(strange(mask=ignored, anomaly=ignored), 3)


class Wrong(Dataset):
    """Scenes of which something is changed."""

    num_classes = 6

    def __init__(self, dataset, change):
        self.dataset, self.change = dataset, change

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        item = self.dataset[index]
        self.change(item)
        return item


class WrongDataModule(SyntheticScenesDataModule):
    change = None

    def make_dataset(self, split, transform):
        return Wrong(super().make_dataset(split, transform), self.change)


def wrong(change, **arguments):
    data = WrongDataModule(
        size=(32, 40),
        train_length=6,
        batch_size=2,
        crop_size=(24, 24),
        **{"num_workers": 0, **arguments},
    )
    data.change = change
    return data


def too_bright(item):
    item["image"] *= 255


def all_ignored(item):
    item["mask"][:] = 255


def odd_sizes(item):
    number = int(item["name"][-1])
    item["image"] = item["image"][:, : 10 + number]
    item["mask"] = item["mask"][: 10 + number]


def broken_file(item):
    raise FileNotFoundError("image 'x.png' does not exist: restore it.")


@pytest.mark.parametrize("loader", ["train", "val", "test"])
def test_first_batch_of_every_loader_is_checked(loader):
    with pytest.raises(ValueError, match="divide by 255"):
        next(iter(getattr(wrong(too_bright), f"{loader}_dataloader")()))


def test_ignored_batches_are_warned_about_once():
    loader = wrong(all_ignored).train_dataloader()
    with pytest.warns(UserWarning, match="every pixel of the first batch") as record:
        assert len([*loader, *loader]) == 6
    assert len(record) == 1


def test_images_of_different_sizes():
    with pytest.raises(
        ValueError, match=r"^images 'scene_0_0000\d' \(1\dx24\) and .*cannot share a batch"
    ) as caught:
        list(wrong(odd_sizes).train_dataloader())
    assert "\n" not in str(caught.value)


def test_images_of_different_sizes_are_fine_one_by_one():
    assert len(list(wrong(odd_sizes, eval_batch_size=1).test_dataloader())) == 64


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_worker_is_one_sentence(num_workers):
    with pytest.raises(
        FileNotFoundError, match=f"^{re.escape('image ')}'x.png' does not exist: restore it.$"
    ):
        next(iter(wrong(broken_file, num_workers=num_workers).train_dataloader()))


def test_crop_larger_than_the_image(tmp_path):
    data = synthetic(train_transform=[RandomCropLimitedClass(64, 64)])
    with pytest.raises(ValueError, match=r"larger than image 'scene_0_\d+' \(32x40 .*PadIfNeeded"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), data)


def test_collate_of_one_sample():
    result = collate([{"image": torch.zeros(3, 2, 2), "name": "a"}])
    assert result["image"].shape == (1, 3, 2, 2)
    assert result["name"] == ["a"]


def test_abstract():
    with pytest.raises(TypeError, match="make_dataset"):
        SegmentationDataModule(["a"])


def test_loader_of_lightning_is_ours(tmp_path):
    data = synthetic()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Recorder(), data)
    assert type(run.train_dataloader) is TrainLoader


def write_image(path, size=(20, 30)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 99, np.uint8)).save(path)
