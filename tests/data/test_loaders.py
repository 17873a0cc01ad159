"""Loaders: order, workers, processes, resuming, class-balanced drawing, errors of samples."""

import os
import re
import socket
import time
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import Dataset

from lightning_genseg.data import Folder, SyntheticScenesDataModule
from lightning_genseg.data.loaders import ClassSampler, EpochSampler, TrainLoader, collate
from lightning_genseg.data.transforms import RandomCropLimitedClass
from lightning_genseg.errors import GenSegError, MissingFileError
from tests.contract import trainer
from tests.data.loading import (
    SKEWED,
    Recorder,
    StopAfter,
    digest,
    every_step,
    skewed,
    synthetic,
    write_skewed,
)

# Workers are started by fork, which Python 3.12 warns about in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_skewed(tmp_path_factory.mktemp("skewed"))


# --- order -------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_workers():
    runs = []
    for num_workers in (0, 1, 2):
        loader = synthetic(num_workers=num_workers).train_dataloader()
        runs.append([digest(batch) for _ in range(2) for batch in loader])
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][:4] != runs[0][4:]  # the epochs differ
    assert digest(next(iter(synthetic(seed=1).train_dataloader()))) != runs[0][0]


def test_augmentation_changes_between_epochs():
    loader = synthetic(train_length=3).train_dataloader()
    images = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batch = next(iter(loader))
        images.append(batch["image"][batch["name"].index("scene_0_00000")])
    assert not torch.equal(images[0], images[1])


def of_ranks(make, processes, size):
    """Samplers of the processes of a group, as torch would make them there."""
    for rank in range(processes):
        sampler = make()
        sampler.rank, sampler.num_replicas = rank, processes
        sampler.num_samples, sampler.total_size = size // processes, size // processes * processes
        yield sampler


def test_ranks_share_out_the_batches_of_one_process():
    single = EpochSampler(range(11), seed=4)
    ranks = list(of_ranks(lambda: EpochSampler(range(11), seed=4), 2, 11))
    for epoch in range(2):
        for sampler in (single, *ranks):
            sampler.set_epoch(epoch)
        whole, first, second = list(single), list(ranks[0]), list(ranks[1])
        assert sorted(index for index, _ in whole) == list(range(11))
        assert set(first + second) == set(whole[:10])
        for k in (0, 2):  # batch k of both = batch k of one process with twice the batch size
            assert {*first[k : k + 2], *second[k : k + 2]} == set(whole[2 * k : 2 * k + 4])


# --- class-balanced ----------------------------------------------------------------------------


def drawn(data, epochs):
    counts, loader = np.zeros(40, int), data.train_dataloader()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for index, _ in loader.sampler:
            counts[index] += 1
    return counts


def test_classes_come_up_equally_often(root):
    """Each class is chosen in a third of the draws, then one of its images, all alike."""
    counts = drawn(skewed(root), 300)
    expected = np.full(40, 1 / 3 / 40)
    expected[::5] += 1 / 3 / 8
    expected[[3, 17]] += 1 / 3 / 2
    assert expected.sum() == pytest.approx(1)
    deviation = counts / counts.sum() - expected
    assert np.abs(deviation / np.sqrt(expected * (1 - expected) / counts.sum())).max() < 4
    assert (drawn(skewed(root, class_balanced=False), 3) == 3).all()
    loader = skewed(root).train_dataloader()
    assert len(loader) == len(list(loader)) == 10  # as long as without


def test_draws_are_a_function_of_seed_and_epoch(root):
    def order(seed, epoch):
        sampler = skewed(root, seed=seed).train_dataloader().sampler
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    # An image that is drawn twice is augmented twice.
    assert len([seed for index, seed in order(1, 2) if index == 3]) > 1
    assert len({seed for _, seed in order(1, 2)}) == 40


def test_ranks_share_out_the_draws_of_one_process(root):
    data = skewed(root)
    data.setup("fit")
    held = data._class_images()
    parts = of_ranks(lambda: ClassSampler(data.train_dataset, held, 4), 3, 40)
    rows = zip(*map(list, parts), strict=True)
    single = ClassSampler(data.train_dataset, held, 4)
    assert [pair for row in rows for pair in row] == list(single)[:39]


def test_a_class_that_never_occurs_is_left_out_with_a_warning(root, tmp_path):
    data = skewed(root, class_names=[*SKEWED, "unseen"], absent_classes="warn", cache_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"1 classes occur in no training image .*\(unseen\)"):
        loader = data.train_dataloader()
    assert len(loader.sampler.lengths) == 3
    assert list(loader.sampler) == list(skewed(root).train_dataloader().sampler)
    with pytest.raises(GenSegError, match="class_balanced finds no labelled pixel"):
        skewed(root, ids=dict.fromkeys(range(3), 255), absent_classes="warn").train_dataloader()


# --- two processes -----------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    """No pair is lost; one process counts, which may take longer than the group would wait."""
    root = write_skewed(tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (tmp_path, root, port), nprocs=2)
    for balanced, counted in ((False, [0, 0]), (True, [40, 0])):
        found = [torch.load(tmp_path / f"{rank}_{balanced}.pt") for rank in range(2)]
        assert [result["counted"] for result in found] == counted
        data = skewed(root, class_balanced=balanced)
        single = seen_by(tmp_path, data, max_epochs=2, limit_val_batches=0)
        both = [sorted([*a, *b]) for a, b in zip(*(r["seen"] for r in found), strict=True)]
        assert both == [sorted(record[2]) for record in single]


def _run_rank(rank: int, path: Path, root: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    real, counted = Folder.read_mask_labels, []

    def slowly(dataset, index):
        counted.append(index)
        time.sleep(0.2)  # eight seconds in all
        return real(dataset, index)

    Folder.read_mask_labels = slowly
    for balanced in (False, True):
        module = Recorder()
        strategy = DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=4))
        run = trainer(path, devices=2, strategy=strategy, max_epochs=2, limit_val_batches=0)
        run.fit(module, skewed(root, class_balanced=balanced, batch_size=2))
        assert isinstance(run.train_dataloader.sampler, EpochSampler)  # Lightning leaves it alone
        seen = [record[2] for record in module.seen]
        torch.save({"counted": len(counted), "seen": seen}, path / f"{rank}_{balanced}.pt")


# --- resuming ----------------------------------------------------------------------------------


def seen_by(folder, data, *callbacks, path=None, **words):
    """What a module sees in a run, which perhaps goes on from a checkpoint, until it is killed."""
    module = Recorder()
    words = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks), **words}
    with suppress(RuntimeError):  # of StopAfter
        trainer(folder, **words).fit(module, data, ckpt_path=path)
    return module.seen


@pytest.mark.parametrize(
    ("stop", "num_workers"), [(1, 0), (3, 0), (4, 0), (6, 0), (8, 0), (3, 2), (4, 2)]
)
def test_resumed_run_goes_on_with_the_next_batch(tmp_path, stop, num_workers):
    """The interruption falls into the middle of an epoch of four batches, or on its last one."""

    def run(*callbacks, path=None):
        data = synthetic(num_workers=num_workers)
        return seen_by(tmp_path, data, *callbacks, path=path, max_epochs=3)

    whole = run()
    expected = [(epoch, batch) for epoch in range(3) for batch in range(4)]
    assert [record[:2] for record in whole] == expected
    # Checkpoints are written after all other callbacks: the last step is lost, as when a process
    # is killed.
    first = run(StopAfter(stop), every_step(tmp_path))
    assert len(first) == stop
    second = run(every_step(tmp_path), path=tmp_path / "step.ckpt" if stop > 1 else None)
    assert first[: stop - 1] + second == whole


def test_resumed_class_balanced_run(root, tmp_path):
    def run(*callbacks, path=None):
        words = {"max_epochs": 2, "limit_val_batches": 0}
        return seen_by(tmp_path, skewed(root), *callbacks, path=path, **words)

    whole, first = run(), run(StopAfter(14), every_step(tmp_path))
    second = run(every_step(tmp_path), path=tmp_path / "step.ckpt")
    assert len(second) == 7
    assert first[:13] + second == whole


@pytest.mark.parametrize(
    "arguments", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}], ids=str
)
@pytest.mark.parametrize("at_train_end", [True, False])
def test_resumed_from_the_end_of_an_epoch(tmp_path, arguments, at_train_end):
    def run(epochs, path=None):
        words = {"save_on_train_epoch_end": at_train_end, "enable_version_counter": False}
        keep = ModelCheckpoint(tmp_path, "epoch", **words)
        return seen_by(tmp_path, synthetic(), keep, path=path, max_epochs=epochs, **arguments)

    whole = run(3)
    assert run(1) + run(3, tmp_path / "epoch.ckpt") == whole


def test_resumed_from_max_steps(tmp_path):
    def run(steps, path=None):
        words = {"max_epochs": -1, "max_steps": steps}
        return seen_by(tmp_path, synthetic(), every_step(tmp_path), path=path, **words)

    whole = run(10)
    assert run(6) + run(10, tmp_path / "step.ckpt") == whole


def test_reloaded_loaders_go_on_through_the_epochs(tmp_path):
    whole = seen_by(tmp_path, synthetic(), max_epochs=3)
    words = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    assert seen_by(tmp_path, synthetic(), **words) == whole


@pytest.mark.parametrize("done", [0, 2, 4])
def test_resuming_in_a_plain_loop(done):
    loader = synthetic().train_dataloader()
    whole = [digest(batch) for _ in range(2) for batch in loader]
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


def test_a_loop_of_ones_own_sees_new_epochs():
    """Also where it asks for the loader in each of them."""
    data = synthetic(train_length=4)
    epochs = [[digest(batch) for batch in data.train_dataloader()] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_abandoned_iteration_starts_the_epoch_again():
    loader = synthetic().train_dataloader()
    assert digest(next(iter(loader))) == digest(next(iter(loader)))
    assert len(list(loader)) == 4


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_repeats_its_batch(tmp_path):
    module = Recorder()
    run = trainer(tmp_path, max_epochs=2, overfit_batches=1)
    run.fit(module, synthetic(train_transform=[]))
    assert module.seen[0][2:] == module.seen[1][2:]
    assert type(run.train_dataloader) is TrainLoader


# --- wrong samples -----------------------------------------------------------------------------


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
    words = {"size": (32, 40), "train_length": 6, "batch_size": 2, "crop_size": (24, 24)}
    data = WrongDataModule(**{**words, "num_workers": 0, **arguments})
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
    raise MissingFileError("image 'x.png' does not exist: restore it.")


@pytest.mark.parametrize("loader", ["train", "val", "test"])
def test_first_batch_of_every_loader_is_checked(loader):
    with pytest.raises(GenSegError, match="divide by 255"):
        next(iter(getattr(wrong(too_bright), f"{loader}_dataloader")()))


def test_ignored_batches_are_warned_about_once():
    loader = wrong(all_ignored).train_dataloader()
    with pytest.warns(UserWarning, match="every pixel of the first batch") as record:
        assert len([*loader, *loader]) == 6
    assert len(record) == 1


def test_images_of_different_sizes():
    message = r"^images 'scene_0_0000\d' \(1\dx24\) and .*cannot share a batch.*\.$"
    with pytest.raises(GenSegError, match=message):
        list(wrong(odd_sizes).train_dataloader())
    assert len(list(wrong(odd_sizes, eval_batch_size=1).test_dataloader())) == 64
    result = collate([{"image": torch.zeros(3, 2, 2), "name": "a"}])
    assert result["image"].shape == (1, 3, 2, 2)
    assert result["name"] == ["a"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_a_worker_is_one_sentence(num_workers):
    sentence = re.escape("image 'x.png' does not exist: restore it.")
    with pytest.raises(MissingFileError, match=f"^{sentence}$"):
        next(iter(wrong(broken_file, num_workers=num_workers).train_dataloader()))


def test_crop_larger_than_the_image(tmp_path):
    data = synthetic(train_transform=[RandomCropLimitedClass(64, 64)])
    with pytest.raises(GenSegError, match=r"larger than image 'scene_0_\d+' \(32x40 .*PadIfNeeded"):
        trainer(tmp_path).fit(Recorder(), data)
