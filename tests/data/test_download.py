"""Downloads from a server on this machine: whole or not at all, never twice, checked."""

import hashlib
import io
import re
import shutil
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lightning_genseg.data import (
    ADE20K,
    VOC,
    ADE20KDataModule,
    COCOStuff10k,
    COCOStuff10kDataModule,
    COCOStuff164k,
    COCOStuff164kDataModule,
    VOCDataModule,
)
from lightning_genseg.data.download import Archive, fetch
from lightning_genseg.errors import DownloadError, GenSegError, MissingFileError
from tests.miniatures import make_ade20k, make_coco_stuff_10k, make_coco_stuff_164k, make_voc

SIZE = (24, 32)


class Handler(SimpleHTTPRequestHandler):
    """A file server that notes what is asked for, and hangs up in the middle of broken files."""

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "broken" in self.path else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """`folder` of the files, `url` of the server, `asked`: the paths of all requests."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.folder, server.asked = folder, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def pack(folder, path, inside="."):
    """Put a folder, or one of its sub-folders, into a .zip, .tar or .tgz file."""
    kind = {".zip": "zip", ".tar": "tar", ".tgz": "gztar"}[path.suffix]
    made = shutil.make_archive(str(path.with_suffix("")), kind, folder, inside)
    shutil.move(made, path)


def digest(path, kind="md5"):
    return f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()}"


def serve(server, monkeypatch, dataset, name="ARCHIVES"):
    """Point a data set's archives to the server, with the checksums of the files there."""
    here = []
    for archive in getattr(dataset, name):
        file = server.folder / archive.url.rpartition("/")[2]
        kind = (archive.checksum or "").partition(":")[0]
        checksum = digest(file, kind) if kind else None
        here.append(archive._replace(url=f"{server.url}/{file.name}", checksum=checksum))
    monkeypatch.setattr(dataset, name, tuple(here))


def tree(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


# --- the data sets -----------------------------------------------------------------------------


def check_datamodule(server, datamodule, dataset, source, splits):
    """What was downloaded is what was packed, and is not downloaded again."""
    datamodule.prepare_data()
    asked = list(server.asked)
    assert asked
    for split in splits:
        here, there = dataset(datamodule.root, split), dataset(source, split)
        assert [s.name for s in here.samples] == [s.name for s in there.samples]
        for index in range(len(here)):
            assert (here[index]["image"] == there[index]["image"]).all()
            assert (here[index]["mask"] == there[index]["mask"]).all()
    datamodule.setup("fit")
    datamodule.prepare_data()
    assert server.asked == asked
    left = [name for name in tree(datamodule.root) if re.search("zip|tar|tgz|tmp|unpack", name)]
    assert left == []


def test_ade20k(tmp_path, server, monkeypatch, capsys):
    source = make_ade20k(tmp_path / "source", SIZE)
    pack(source.parent, server.folder / "ADEChallengeData2016.zip")
    serve(server, monkeypatch, ADE20K)
    root = tmp_path / "new" / "ade"
    unasked = ADE20KDataModule(root, num_workers=0)
    unasked.prepare_data()
    with pytest.raises(MissingFileError, match=r"does not exist.*or set download to true\."):
        unasked.setup("fit")
    assert server.asked == []
    data = ADE20KDataModule(root, download=True, num_workers=0)
    check_datamodule(server, data, ADE20K, source, ("train", "val"))
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "unpacking ADEChallengeData2016.zip" in shown


def test_masks_without_checksum_are_asked_for(tmp_path, server, monkeypatch):
    source, root = make_coco_stuff_164k(tmp_path / "source", SIZE), tmp_path / "new"
    shutil.copytree(source / "images" / "train2017", root / "images" / "train2017")
    for split in ("train2017", "val2017"):
        pack(source / "images", server.folder / f"{split}.zip", split)
    pack(source / "annotations", server.folder / "stuffthingmaps_trainval2017.zip")
    serve(server, monkeypatch, COCOStuff164k)
    data = COCOStuff164kDataModule(root, download=True, num_workers=0)
    places = "unpack its 'train2017' to '.*annotations/train2017' and its 'val2017' to '.*val2017'"
    with pytest.raises(GenSegError, match=f"_trainval2017.zip' has no published .*{places}"):
        data.prepare_data()
    assert server.asked == []
    shutil.copytree(source / "annotations", root / "annotations")
    check_datamodule(server, data, COCOStuff164k, source, ("train", "val"))
    assert server.asked == ["/val2017.zip"]  # only what is missing
    small = COCOStuff10kDataModule(tmp_path / "10k", download=True)
    with pytest.raises(GenSegError, match=r"/cocostuff-10k-v1.1.zip' has no published checksum"):
        small.setup("fit")
    source = make_coco_stuff_10k(tmp_path / "10k", SIZE)
    small.setup("fit")
    assert small.train_dataset.samples == COCOStuff10k(source).samples


@pytest.mark.parametrize("split", ["trainaug", "train"])
def test_voc(tmp_path, server, monkeypatch, split):
    """VOC's archive without, and SBD's with, what the augmentation consists of."""
    source = make_voc(tmp_path / "source", SIZE)
    plain = tmp_path / "plain" / "VOCdevkit"
    shutil.copytree(source.parent, plain)
    shutil.rmtree(plain / "VOC2012" / "SegmentationClassAug")
    for name in ("trainaug", "aug"):
        (plain / "VOC2012" / "ImageSets" / "Segmentation" / f"{name}.txt").unlink()
    pack(plain.parent, server.folder / "VOCtrainval_11-May-2012.tar")
    sbd = tmp_path / "sbd" / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    names = sorted(path.stem for path in (source / "SegmentationClassAug").iterdir())
    for name in names:
        mask = np.array(Image.open(source / "SegmentationClassAug" / f"{name}.png"))
        contents = {"GTcls": {"Segmentation": mask, "CategoriesPresent": np.unique(mask)}}
        savemat(sbd / "cls" / f"{name}.mat", contents)
    # SBD's own splits cut across those of VOC.
    (sbd / "train.txt").write_text("\n".join(names[::2]))
    (sbd / "val.txt").write_text("\n".join(names[1::2]))
    pack(tmp_path / "sbd", server.folder / "benchmark.tgz")
    serve(server, monkeypatch, VOC)
    serve(server, monkeypatch, VOC, "AUGMENTATION")
    data = VOCDataModule(tmp_path / "new", split, download=True, num_workers=0)
    augmented = split == "trainaug"
    splits = ("trainaug", "train", "val") if augmented else ("train", "val")
    check_datamodule(server, data, VOC, source, splits)
    assert server.asked == ["/VOCtrainval_11-May-2012.tar", "/benchmark.tgz"][: 1 + augmented]
    assert (data.root / "SegmentationClassAug").exists() == augmented


# --- when something goes wrong -----------------------------------------------------------------


@pytest.fixture
def archive(server, tmp_path):
    """An archive on the server with one folder."""
    source = tmp_path / "some" / "pictures"
    source.mkdir(parents=True)
    (source / "a.txt").write_text("a" * 5000)
    pack(source.parent, server.folder / "some.zip")
    url = f"{server.url}/some.zip"
    return Archive(url, digest(server.folder / "some.zip"), {"pictures": "images"})


def test_a_file_that_does_not_arrive(tmp_path, server, archive):
    root = tmp_path / "new"
    shutil.copy(server.folder / "some.zip", server.folder / "broken.zip")
    for wrong, message in (
        (archive._replace(url=f"{server.url}/broken.zip"), r"broken\.zip' could not be downloaded"),
        (archive._replace(url=f"{server.url}/other.zip"), r"other\.zip' .*404"),
        (
            archive._replace(url="http://127.0.0.1:9/x.zip"),
            r"or put the file at '.*x.zip' yourself",
        ),
        (archive._replace(checksum="md5:00"), "does not match the known hash: expected md5:00"),
    ):
        with pytest.raises(DownloadError, match=message) as error:
            fetch(root, [wrong])
        assert str(error.value).endswith(".")
        assert "\n" not in str(error.value)
        assert tree(root) == set()
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["shutil.unpack_archive", "pooch.core.shutil.move"])
def test_user_interrupts(tmp_path, archive, monkeypatch, place):
    root = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(root, [archive])
        assert tree(root) == ({"some.zip"} if "unpack" in place else set())
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}


def test_archive_that_was_put_there(tmp_path, server, archive):
    root = tmp_path / "new"
    root.mkdir()
    shutil.copy(server.folder / "some.zip", root)
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}
    assert server.asked == []
    shutil.rmtree(root / "images")
    (root / "some.zip").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=r"put the file at '.*some\.zip' yourself"):
        fetch(root, [archive._replace(url="http://127.0.0.1:9/some.zip")])
    assert tree(root) == {"some.zip"}  # perhaps it is wanted for something else
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}


def test_archive_without_the_folder(tmp_path, archive):
    with pytest.raises(GenSegError, match=r"some\.zip' holds no 'photos': remove it"):
        fetch(tmp_path / "new", [archive._replace(folders={"pictures": "a", "photos": "b"})])
    assert not (tmp_path / "new" / "a").exists()


NO_FILTER = pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="Python before 3.11.4 has no filter of archives"
)


@pytest.mark.parametrize("kind", ["zip", pytest.param("tar", marks=NO_FILTER)])
def test_archive_that_points_outside(tmp_path, kind):
    root = tmp_path / "root"
    root.mkdir()
    path = root / f"evil.{kind}"
    names = ("pictures/a.txt", "pictures/../../../evil.txt", f"{tmp_path}/evil.txt")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, "content")
    else:
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    evil = Archive(f"http://127.0.0.1:9/{path.name}", digest(path), {"pictures": "images"})
    if kind == "zip":
        fetch(root, [evil])
        assert tree(tmp_path) == {"root/images/a.txt"}
    else:
        with pytest.raises(tarfile.FilterError):
            fetch(root, [evil])
        assert tree(tmp_path) == {"root/evil.tar"}
