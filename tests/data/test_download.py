"""Downloads from a server on this machine: whole or not at all, never twice, checked."""

import hashlib
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
from tests.miniatures import (
    make_ade20k,
    make_coco_stuff_10k,
    make_coco_stuff_164k,
    make_voc,
)

SIZE = (24, 32)


class Handler(SimpleHTTPRequestHandler):
    """A file server that writes down what is asked for, and hangs up in the middle of files called broken."""

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


def pack(folder, path):
    """Put a folder, by its own name, into a .zip or .tgz file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir(folder.name)
            for file in files:
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for file in files:
                archive.add(file, file.relative_to(folder.parent))


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
    leftovers = [
        name for name in tree(datamodule.root) if re.search(r"zip|tar|tgz|part|unpack", name)
    ]
    assert leftovers == []


def test_ade20k(tmp_path, server, monkeypatch, capsys):
    source = make_ade20k(tmp_path / "source", SIZE)
    pack(source, server.folder / "ADEChallengeData2016.zip")
    serve(server, monkeypatch, ADE20K)
    data = ADE20KDataModule(tmp_path / "new" / "ade", download=True, num_workers=0)
    check_datamodule(server, data, ADE20K, source, ("train", "val"))
    shown = capsys.readouterr().err
    assert "ADEChallengeData2016.zip: 100%" in shown
    assert "unpacking ADEChallengeData2016.zip" in shown


def test_coco_stuff_10k(tmp_path, server, monkeypatch):
    source = make_coco_stuff_10k(tmp_path / "source", SIZE)
    # This archive has no folder around its folders.
    shutil.make_archive(str(server.folder / "cocostuff-10k-v1.1"), "zip", source)
    serve(server, monkeypatch, COCOStuff10k)
    data = COCOStuff10kDataModule(tmp_path / "new", download=True, num_workers=0)
    check_datamodule(server, data, COCOStuff10k, source, ("train", "test"))


def test_coco_stuff_164k_gets_only_what_is_missing(tmp_path, server, monkeypatch):
    source = make_coco_stuff_164k(tmp_path / "source", SIZE)
    root = tmp_path / "new"
    shutil.copytree(source / "images" / "train2017", root / "images" / "train2017")
    pack(source / "images" / "train2017", server.folder / "train2017.zip")
    pack(source / "images" / "val2017", server.folder / "val2017.zip")
    shutil.make_archive(
        str(server.folder / "stuffthingmaps_trainval2017"), "zip", source / "annotations"
    )
    serve(server, monkeypatch, COCOStuff164k)
    data = COCOStuff164kDataModule(root, download=True, num_workers=0)
    check_datamodule(server, data, COCOStuff164k, source, ("train", "val"))
    assert server.asked == ["/stuffthingmaps_trainval2017.zip", "/val2017.zip"]


def pack_voc(tmp_path, server, monkeypatch):
    """VOC's archive without, and SBD's with, what the augmentation consists of."""
    source = make_voc(tmp_path / "source", SIZE)
    plain = tmp_path / "plain" / "VOCdevkit"
    shutil.copytree(source.parent, plain)
    shutil.rmtree(plain / "VOC2012" / "SegmentationClassAug")
    (plain / "VOC2012" / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    (plain / "VOC2012" / "ImageSets" / "Segmentation" / "aug.txt").unlink()
    pack(plain, server.folder / "VOCtrainval_11-May-2012.tar")
    sbd = tmp_path / "benchmark_RELEASE"
    (sbd / "dataset" / "cls").mkdir(parents=True)
    names = sorted(path.stem for path in (source / "SegmentationClassAug").iterdir())
    for name in names:
        mask = np.array(Image.open(source / "SegmentationClassAug" / f"{name}.png"))
        contents = {"GTcls": {"Segmentation": mask, "CategoriesPresent": np.unique(mask)}}
        savemat(sbd / "dataset" / "cls" / f"{name}.mat", contents)
    # SBD's own splits cut across those of VOC.
    (sbd / "dataset" / "train.txt").write_text("\n".join(names[::2]))
    (sbd / "dataset" / "val.txt").write_text("\n".join(names[1::2]))
    pack(sbd, server.folder / "benchmark.tgz")
    serve(server, monkeypatch, VOC)
    serve(server, monkeypatch, VOC, "AUGMENTATION")
    return source


def test_voc_with_augmentation(tmp_path, server, monkeypatch):
    source = pack_voc(tmp_path, server, monkeypatch)
    data = VOCDataModule(tmp_path / "new", download=True, num_workers=0)
    check_datamodule(server, data, VOC, source, ("trainaug", "train", "val"))
    assert server.asked == ["/VOCtrainval_11-May-2012.tar", "/benchmark.tgz"]


def test_voc_alone(tmp_path, server, monkeypatch):
    source = pack_voc(tmp_path, server, monkeypatch)
    data = VOCDataModule(tmp_path / "new", "train", download=True, num_workers=0)
    check_datamodule(server, data, VOC, source, ("train", "val"))
    assert server.asked == ["/VOCtrainval_11-May-2012.tar"]
    assert not (data.root / "SegmentationClassAug").exists()


def test_nothing_is_downloaded_unless_asked(tmp_path, server, monkeypatch):
    source = make_ade20k(tmp_path / "source", SIZE)
    pack(source, server.folder / "ADEChallengeData2016.zip")
    serve(server, monkeypatch, ADE20K)
    data = ADE20KDataModule(tmp_path / "new", num_workers=0)
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"does not exist.*or set download to true\."):
        data.setup("fit")
    assert server.asked == []


# --- when something goes wrong -----------------------------------------------------------------


@pytest.fixture
def archive(server, tmp_path):
    """An archive on the server with one folder."""
    source = tmp_path / "some" / "pictures"
    source.mkdir(parents=True)
    (source / "a.txt").write_text("a" * 5000)
    pack(source, server.folder / "some.zip")
    url = f"{server.url}/some.zip"
    return Archive(url, digest(server.folder / "some.zip"), {"pictures": "images"})


def test_connection_breaks(tmp_path, server, archive):
    root = tmp_path / "new"
    (server.folder / "some.zip").rename(server.folder / "broken.zip")
    with pytest.raises(
        ConnectionError,
        match=r"broken\.zip' could not be downloaded \(it ended after .* of .* bytes",
    ):
        fetch(root, [archive._replace(url=f"{server.url}/broken.zip")])
    assert tree(root) == set()
    (server.folder / "broken.zip").rename(server.folder / "some.zip")
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}


def test_user_interrupts(tmp_path, archive, monkeypatch):
    root = tmp_path / "new"

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_genseg.data.download.tqdm.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(root, [archive])
        assert tree(root) == set()
        shutil.copy(tmp_path / "served" / "some.zip", root)  # now while it is unpacked
        with pytest.raises(KeyboardInterrupt):
            fetch(root, [archive])
        assert tree(root) == {"some.zip"}
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}


def test_no_such_address(tmp_path, server, archive):
    with pytest.raises(ConnectionError, match=r"other\.zip' could not be downloaded \(.*404"):
        fetch(tmp_path / "new", [archive._replace(url=f"{server.url}/other.zip")])
    with pytest.raises(ConnectionError, match=r"or put the file at '.*some\.zip' yourself\.$"):
        fetch(tmp_path / "new", [archive._replace(url="http://127.0.0.1:9/some.zip")])
    assert tree(tmp_path / "new") == set()


def test_another_file_than_expected(tmp_path, archive):
    root = tmp_path / "new"
    with pytest.raises(
        ValueError, match=r"'some\.zip.*' is not the expected file \(its md5 is .* instead of 00"
    ):
        fetch(root, [archive._replace(checksum="md5:00")])
    assert tree(root) == set()


def test_archive_that_was_put_there(tmp_path, server, archive):
    root = tmp_path / "new"
    root.mkdir()
    shutil.copy(server.folder / "some.zip", root)
    fetch(root, [archive])
    assert tree(root) == {"images/a.txt"}
    assert server.asked == []


def test_wrong_archive_that_was_put_there_stays(tmp_path, archive):
    root = tmp_path / "new"
    root.mkdir()
    (root / "some.zip").write_bytes(b"something")
    with pytest.raises(
        ValueError, match=r"not the expected file .*remove '.*new/some\.zip' and start again"
    ):
        fetch(root, [archive])
    with pytest.raises(ValueError, match=r"cannot be unpacked \(File is not a zip file\)"):
        fetch(root, [archive._replace(checksum=None)])
    assert tree(root) == {"some.zip"}


def test_archive_without_the_folder(tmp_path, archive):
    with pytest.raises(ValueError, match=r"cannot be unpacked \(it holds no 'photos'\)"):
        fetch(tmp_path / "new", [archive._replace(folders={"pictures": "a", "photos": "b"})])
    assert not (tmp_path / "new" / "a").exists()


def test_archive_that_points_outside(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / "evil.zip", "w") as archive:
        archive.writestr("pictures/a.txt", "a")
        archive.writestr("pictures/../../../evil.txt", "evil")
        archive.writestr("/etc/evil.txt", "evil")
    fetch(root, [Archive("http://nowhere/evil.zip", None, {"pictures": "images"})])
    assert tree(tmp_path) == {"root/images/a.txt"}


def test_file_address(tmp_path, server, archive):
    """A mirror on a disk."""
    fetch(tmp_path / "new", [archive._replace(url=(server.folder / "some.zip").as_uri())])
    assert tree(tmp_path / "new") == {"images/a.txt"}
