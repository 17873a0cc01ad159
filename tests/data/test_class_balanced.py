"""Class-balanced sampling: what is drawn, in which order, by how many processes."""

import datetime
import os
import socket
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import Dataset

from lightning_genseg.data import CamVidDataModule, FolderDataModule, SyntheticScenesDataModule
from lightning_genseg.data import datamodule as base
from lightning_genseg.data.loaders import ClassSampler, EpochSampler, on_first_process

NAMES = ["road", "car", "horse", "unseen"]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def skewed(root, count=40):
    """Road is everywhere, a car in every fifth image, the horse in two; the last class never occurs."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        mask = np.zeros((8, 8), np.uint8)
        mask[0, 0] = 255
        if index % 5 == 0:
            mask[4:6] = 1
        if index in (3, 17):
            mask[7, 7] = 2
        image = np.full((8, 8, 3), index, np.uint8)
        Image.fromarray(image).save(root / "images" / f"{index:02}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index:02}.png")
    (root / "train.txt").write_text("".join(f"{index:02}\n" for index in range(count)))
    (root / "val.txt").write_text("00\n")
    return root


def data_of(root, **arguments):
    defaults = {"class_names": NAMES[:3], "batch_size": 4, "num_workers": 0, "train_transform": []}
    names = [f"{index:02}" for index in range(40)]
    data = FolderDataModule(root, **{**defaults, "class_balanced": True, **arguments})
    # The whole folder is for training: what is tested here is the order.
    data._names = {"train": names, "val": names[:1], "test": names[:1]}
    data.cache_dir = data.cache_dir or root / "cache"
    return data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return skewed(tmp_path_factory.mktemp("skewed"))


def drawn(loader, epochs):
    counts = np.zeros(40, int)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for index, _ in loader.sampler:
            counts[index] += 1
    return counts


def test_classes_come_up_equally_often(root):
    """Each class is chosen in a third of the draws, then one of its images, all alike."""
    counts = drawn(data_of(root).train_dataloader(), 300)
    shares = counts / counts.sum()
    expected = np.full(40, 1 / 3 / 40)
    expected[::5] += 1 / 3 / 8
    expected[[3, 17]] += 1 / 3 / 2
    assert expected.sum() == pytest.approx(1)
    deviation = (shares - expected) / np.sqrt(expected * (1 - expected) / counts.sum())
    assert np.abs(deviation).max() < 4
    plain = drawn(data_of(root, class_balanced=False).train_dataloader(), 3)
    assert (plain == 3).all()


def test_an_epoch_is_as_long_as_without(root):
    assert len(data_of(root).train_dataloader()) == 10
    assert len(list(data_of(root).train_dataloader())) == 10


def test_order_is_a_function_of_seed_and_epoch(root):
    def order(seed, epoch):
        loader = data_of(root, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_an_image_drawn_twice_is_augmented_twice(root):
    pairs = list(data_of(root).train_dataloader().sampler)
    horse = [seed for index, seed in pairs if index == 3]
    assert len(horse) > 1
    assert len({seed for _, seed in pairs}) == len(pairs)


def test_a_class_that_never_occurs_is_left_out_with_a_warning(root, tmp_path):
    data = data_of(root, class_names=NAMES, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"1 classes occur in no training image .*: unseen\."):
        loader = data.train_dataloader()
    assert len(loader.sampler.lengths) == 3
    assert list(loader.sampler) == list(data_of(root).train_dataloader().sampler)


def test_no_label_at_all(tmp_path):
    root = skewed(tmp_path, 40)
    data = data_of(root, ids={0: 255, 1: 255, 2: 255})
    with pytest.raises(ValueError, match="class_balanced finds no labelled pixel"):
        data.train_dataloader()


def test_a_data_set_without_labels_to_read(root):
    class Foreign(FolderDataModule):
        def make_dataset(self, split, transform):
            class Plain(Dataset):
                def __len__(self):
                    return 9

            return Plain()

    data = Foreign(root, class_names=NAMES, class_balanced=True)
    with pytest.raises(ValueError, match=r"Plain has no read_mask_labels\(index\).*class_balanced"):
        data.train_dataloader()


def test_class_index_of_a_split(root):
    data = data_of(root)
    assert (data.class_index() > 0).sum(0).tolist() == [40, 8, 2]
    assert data.class_index("val").tolist() == [[47, 16, 0]]


def test_scenes_that_are_drawn():
    data = SyntheticScenesDataModule((48, 64), train_length=12, class_balanced=True, num_workers=0)
    assert len(next(iter(data.train_dataloader()))["name"]) == 8


def test_camvid(shared_dir, tmp_path):
    """The bicyclist, in one frame of four, comes as often as the road, in all."""
    data = CamVidDataModule(
        shared_dir / "data" / "camvid", class_balanced=True, cache_dir=tmp_path, num_workers=2
    )
    counts = data.class_index("train")
    assert counts.sum() > 0.9 * 367 * 360 * 480
    sampler = data.train_dataloader().sampler
    order = [index for index, _ in sampler]
    present = counts > 0
    assert present[order].mean(0)[10] > present.mean(0)[10] + 0.05
    rarest = present.mean(0).argmin()
    assert present[order].mean(0)[rarest] > present.mean(0)[rarest]


# --- Lightning ----------------------------------------------------------------------------------


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, *batch["name"], batch["image"].sum().item()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAfter(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 14:
            raise RuntimeError("killed")


def trainer(path, *callbacks, **arguments):
    return Trainer(
        **{
            "default_root_dir": path,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "limit_val_batches": 0,
            "callbacks": list(callbacks),
            **arguments,
        }
    )


def test_resumed_in_the_middle_of_an_epoch(root, tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path).fit(whole, data_of(root))

    def keep():
        return ModelCheckpoint(
            tmp_path, "step", every_n_train_steps=1, enable_version_counter=False
        )

    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, StopAfter(), keep()).fit(first, data_of(root))
    runner = trainer(tmp_path, keep())
    runner.fit(second, data_of(root), ckpt_path=tmp_path / "step.ckpt")
    assert isinstance(runner.train_dataloader.sampler, ClassSampler)
    assert len(second.seen) == 17
    assert first.seen[:13] + second.seen == whole.seen


def test_ranks_share_out_the_draws_of_one_process(root):
    images = data_of(root)
    images.setup("fit")
    held = images._class_images()
    single = ClassSampler(images.train_dataset, held, 4)
    ranks = [ClassSampler(images.train_dataset, held, 4) for _ in range(3)]
    for rank, sampler in enumerate(ranks):
        sampler.rank, sampler.num_replicas, sampler.num_samples, sampler.total_size = (
            rank,
            3,
            13,
            39,
        )
    parts = [list(sampler) for sampler in ranks]
    assert [pair for row in zip(*parts, strict=True) for pair in row] == list(single)[:39]


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes(root, tmp_path):
    """One process counts, both draw the same; waiting does not depend on the group's timeout."""
    data_root = skewed(tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (str(tmp_path), str(data_root), port), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [result["counted"] for result in found] == [1, 0]
    assert [result["waited"] for result in found] == ["built"] * 2
    assert [result["error"] for result in found] == ["mask 'x' cannot be read: replace it."] * 2
    assert [result["crash"] for result in found] == [
        "KeyError: 'bug'",
        "RuntimeError: the first process stopped: KeyError('bug')",
    ]
    single = Recorder()
    trainer(tmp_path).fit(single, data_of(data_root, batch_size=4))
    pairs = zip(found[0]["seen"], found[1]["seen"], strict=True)
    both = [sorted([*first[1:3], *second[1:3]]) for first, second in pairs]
    assert both == [sorted(record[1:5]) for record in single.seen]


def _run_rank(rank, path, root, port):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counted = []
    real = base.class_index

    def watched(*arguments):
        counted.append(1)
        return real(*arguments)

    base.class_index = watched
    module = Recorder()
    runner = trainer(path, devices=2, strategy="ddp")
    runner.fit(module, data_of(Path(root), batch_size=2))
    assert isinstance(runner.train_dataloader.sampler, EpochSampler)
    torch.distributed.destroy_process_group()

    # The next part needs a group that gives up after four seconds.
    store = torch.distributed.FileStore(f"{path}/store", 2)
    limit = datetime.timedelta(seconds=4)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=limit
    )

    def slow(heartbeat):
        for _ in range(40):  # eight seconds
            time.sleep(0.2)
            heartbeat()
        return "built"

    def wrong(heartbeat):
        raise ValueError("mask 'x' cannot be read: replace it.")

    def buggy(heartbeat):
        raise KeyError("bug")

    result = {
        "counted": len(counted),
        "seen": module.seen,
        "waited": on_first_process(slow, every=0.5),
    }
    with pytest.raises(ValueError, match="cannot be read") as error:
        on_first_process(wrong)
    result["error"] = str(error.value)
    with pytest.raises((KeyError, RuntimeError)) as crash:
        on_first_process(buggy)
    result["crash"] = f"{crash.typename}: {crash.value}"
    torch.save(result, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()
