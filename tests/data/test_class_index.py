"""Counts of pixels per class: right, kept, taken up again, distrusted when they should be."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import Folder, SyntheticScenes
from lightning_genseg.data.class_index import Cache, class_index
from lightning_genseg.data.dataset import Sample, SegmentationDataset
from lightning_genseg.errors import GenSegError, MissingFileError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["a", "b", "c"]
COUNTS = [[2, 1, 0], [0, 0, 4], [0, 0, 0]]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def write(root, masks):
    """A folder data set whose masks hold one row per entry: the labels, in order."""
    for name, labels in masks.items():
        mask = np.array([labels], np.uint8)
        for folder, array in (("images", np.zeros((*mask.shape, 3), np.uint8)), ("masks", mask)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{name}.png")
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data", {"x": [0, 0, 1, 255], "y": [2, 2, 2, 2], "z": [255, 255]})


class Watched(Folder):
    """Notes which masks are read."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.read = []

    def read_mask_values(self, index):
        self.read.append(self.samples[index].name)
        return super().read_mask_values(index)


def index(root, folder, names=NAMES, **arguments):
    """Counts, and what was read for them."""
    dataset = Watched(root, names, **arguments)
    return class_index(dataset, folder).tolist(), dataset.read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts(root, tmp_path, num_workers):
    counts = class_index(Folder(root, NAMES), tmp_path / "cache", num_workers)
    assert counts.tolist() == COUNTS
    assert counts.dtype == np.int64


def test_counts_of_scenes_are_those_of_their_masks(tmp_path):
    dataset = SyntheticScenes(5, (48, 64), held_out=True)
    counts = class_index(dataset, tmp_path)
    for row, sample in zip(counts, dataset, strict=True):
        labels = sample["mask"][sample["mask"] != 255]
        assert row.tolist() == labels.bincount(minlength=6).tolist()
    assert list(tmp_path.iterdir()) == []  # drawn on the fly: nothing to compare a file with


def test_second_time_nothing_is_read(root, tmp_path):
    assert index(root, tmp_path / "c") == (COUNTS, ["x", "y", "z"])
    (path,) = (tmp_path / "c").iterdir()
    before = path.stat()
    assert index(root, tmp_path / "c") == (COUNTS, [])
    assert path.stat().st_ino == before.st_ino  # nor written: a folder may be read-only
    (tmp_path / "job").mkdir()
    root.rename(tmp_path / "job" / "data")  # data may move
    assert index(tmp_path / "job" / "data", tmp_path / "c") == (COUNTS, [])


def test_only_the_changed_mask_is_counted_again(root, tmp_path):
    index(root, tmp_path / "c")
    write(root, {"y": [1, 1, 1, 0]})
    os.utime(root / "masks" / "y.png", ns=(1, 2))
    assert index(root, tmp_path / "c") == ([[2, 1, 0], [1, 3, 0], [0, 0, 0]], ["y"])


def test_other_tables_and_other_samples_have_their_own_counts(root, tmp_path):
    index(root, tmp_path / "c")
    swapped, read = index(root, tmp_path / "c", ids={0: 1, 1: 0, 2: 255})
    assert swapped == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert len(read) == 3
    assert index(root, tmp_path / "c", [*NAMES, "d"])[1] == ["x", "y", "z"]
    write(root, {"w": [0]})
    assert index(root, tmp_path / "c")[0] == [[1, 0, 0], *COUNTS]
    assert len(list((tmp_path / "c").iterdir())) == 4


def test_masks_of_another_format_have_their_own_counts(root, tmp_path):
    class Shifted(Folder):
        def decode_mask(self, path):
            values = super().decode_mask(path)
            return np.where(values == 255, 255, (values + 1) % 3)

    first = Shifted

    class Shifted(Folder):
        def decode_mask(self, path):
            values = super().decode_mask(path)
            return np.where(values == 255, 255, (values + 2) % 3)

    for kind, shift in ((Folder, 0), (first, 1), (Shifted, 2)):
        expected = np.roll(COUNTS, shift, axis=1).tolist()
        assert class_index(kind(root, NAMES), tmp_path / "c").tolist() == expected


def test_other_colors_have_their_own_counts(tmp_path):
    red, blue = (255, 0, 0), (0, 0, 255)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.array([[red, red, blue]], np.uint8)).save(tmp_path / folder / "x.png")
    for colors, counts in (([red, blue], [[2, 1]]), ([blue, red], [[1, 2]])):
        assert index(tmp_path, tmp_path / "c", ["a", "b"], colors=colors)[0] == counts


def test_an_image_is_counted_again_when_its_anomaly_mask_has_changed(root, tmp_path):
    for anomaly in ([0, 0, 0, 0], [1, 0, 0, 0]):  # of which the second takes a pixel away
        write(root, {"x": [0, 0, 1, 255]})
        (root / "anomalies").mkdir(exist_ok=True)
        path = root / "anomalies" / "x.png"
        Image.fromarray(np.array([anomaly], np.uint8)).save(path)
        os.utime(root / "masks" / "x.png", ns=(1, 1))
        os.utime(path, ns=(1, 2 + sum(anomaly)))
        sample = Sample("x", root / "images" / "x.png", root / "masks" / "x.png", path)
        dataset = SegmentationDataset([sample], NAMES, anomaly_ids={0: 0, 1: 1})
        assert class_index(dataset, tmp_path / "c").tolist() == [[2 - sum(anomaly), 1, 0]]


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "foreign"])
def test_a_broken_file_is_replaced(root, tmp_path, kind):
    index(root, tmp_path / "c")
    (path,) = (tmp_path / "c").iterdir()
    content = path.read_bytes()
    if kind == "foreign":
        np.savez(path, counts=np.zeros((2, 3), np.int64), stamps=np.zeros((3, 2)))
    else:
        middle = content.index(b"counts.npy") + 80
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        broken = {"empty": b"", "cut": content[: len(content) // 2], "flipped": flipped}
        path.write_bytes(broken[kind])
    with pytest.warns(UserWarning, match=rf"{path.name}' cannot be read .*: it is built anew"):
        assert index(root, tmp_path / "c") == (COUNTS, ["x", "y", "z"])
    assert index(root, tmp_path / "c") == (COUNTS, [])


def test_where_counts_are_kept(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    index(root, None)
    assert len(list((tmp_path / "xdg" / "lightning_genseg").iterdir())) == 1
    (tmp_path / "file").write_text("")  # stands in the way, which stops the super-user as well
    with pytest.warns(UserWarning, match=r"cannot be kept in '.*file/c' .*set cache_dir"):
        assert index(root, tmp_path / "file" / "c")[0] == COUNTS


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_keeps_what_was_counted(root, tmp_path, num_workers):
    names = [f"n{i:03}" for i in range(40)]
    write(root, {name: [1] for name in names})
    (root / "masks" / "n037.png").write_bytes(b"no image")
    with pytest.raises(GenSegError, match=r"^mask '.*n037\.png' cannot be read .*replace it"):
        class_index(Watched(root, NAMES), tmp_path / "c", num_workers)
    write(root, {"n037": [2]})
    counts, read = index(root, tmp_path / "c")
    assert counts[37] == [0, 0, 1]
    assert read == [*names[32:], "x", "y", "z"]  # two batches of 16 were done
    dataset = Folder(root, NAMES)
    (root / "masks" / "y.png").unlink()
    with pytest.raises(MissingFileError, match=r"^mask '.*y\.png' does not exist"):
        class_index(dataset, tmp_path / "d")


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_an_interrupted_build_goes_on(tmp_path, signal_number):
    names = [f"n{i:03}" for i in range(64)]
    root = write(tmp_path / "data", {name: [i % 3] for i, name in enumerate(names)})
    slow = f"""
import time
from pathlib import Path
from lightning_genseg.data import Folder, class_index as module
module._SAVE_EVERY = 0.0
class Watched(Folder):
    def read_mask_values(self, index):
        if index == 40: print("waiting", flush=True); time.sleep(600)
        return super().read_mask_values(index)
module.class_index(Watched({str(root)!r}, ["a", "b", "c"]), Path({str(tmp_path / "c")!r}))
"""
    with subprocess.Popen(
        [sys.executable, "-c", slow],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal_number)
        assert process.wait(60) != 0
    counts, read = index(root, tmp_path / "c")
    assert read == names[32:]
    assert counts == np.eye(3, dtype=int)[[i % 3 for i in range(64)]].tolist()
    assert len(list((tmp_path / "c").iterdir())) == 1  # no half file is left


def test_two_at_once_do_not_disturb_each_other(root, tmp_path):
    first, second = (Cache(Folder(root, NAMES), tmp_path) for _ in range(2))
    counts, done = first.load()
    first.save(counts + 1, ~done)
    second.save(counts + 2, np.array([True, False, True]))
    loaded, known = first.load()
    assert loaded.tolist() == [[2] * 3, [0] * 3, [2] * 3]
    assert known.tolist() == [True, False, True]


def test_counting_is_quick(tmp_path):
    """COCO-Stuff 164k has 118 000 masks of 171 classes: what is kept must be read in seconds."""
    names = [f"train/{i:06}" for i in range(8000)]
    for folder in ("images", "masks"):
        (tmp_path / folder / "train").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.png").touch()
    dataset = Folder(tmp_path, [f"c{i}" for i in range(171)])
    cache = Cache(dataset, tmp_path / "c")
    counts = np.random.default_rng(0).integers(0, 2, cache.shape)
    cache.save(counts, np.ones(len(names), bool))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began = time.monotonic()
        assert np.array_equal(class_index(dataset, tmp_path / "c"), counts)
    assert time.monotonic() - began < 10
