"""Image and mask files: formats, names, and the sentence for everything that can be wrong."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

from lightning_genseg.data import ImageFolder
from lightning_genseg.data.images import find_images, read_image, read_mask
from lightning_genseg.data.labels import label_table, map_labels, read_colors, voc_palette
from lightning_genseg.data.layout import list_files
from lightning_genseg.errors import GenSegError, MissingFileError

# --- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_every_image_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode in ("CMYK", "YCbCr") else "x.png")
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8
    assert image.min() >= 250


def test_special_images(tmp_path):
    Image.new("P", (5, 4)).save(tmp_path / "clear.png", transparency=bytes([0, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "clear.png").shape == (4, 5, 3)
    # 16 bits are scaled, not clipped.
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (6, 4, 3)
    for dtype in (np.int32, np.float32):
        Image.fromarray(np.zeros((2, 2), dtype)).save(tmp_path / "x.tif")
        with pytest.raises(GenSegError, match=r"x\.tif' has 32-bit pixels.*save it with 8 bits"):
            read_image(tmp_path / "x.tif")


def test_no_picture_runs_a_program(tmp_path, monkeypatch):
    """PIL gives PostScript to Ghostscript, also where a file calls itself a PNG."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png", "EPS")
    for read in (read_image, read_mask):
        with pytest.raises(GenSegError, match=r"picture\.png' cannot be read"):
            read(tmp_path / "picture.png")
    assert not (tmp_path / "ran").exists()
    with Image.open(tmp_path / "picture.png") as file, pytest.raises(OSError):  # noqa: PT011
        file.load()
    assert (tmp_path / "ran").exists()  # what PIL would do


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_integer_masks(tmp_path, dtype):
    array = np.array([[0, 1, 2, 255]], dtype)
    Image.fromarray(array).save(tmp_path / "m.tif")
    assert np.array_equal(read_mask(tmp_path / "m.tif"), array)


def test_special_masks(tmp_path):
    mask = Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8))
    mask.putpalette([value for color in voc_palette(256) for value in color])
    mask.save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as file:
        assert file.mode == "P"
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1, 2, 255]]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 1]]
    for mode in ("RGB", "RGBA", "LA"):  # equal channels are one
        Image.new(mode, (3, 1), {"LA": (7, 0)}.get(mode, (7, 7, 7))).save(tmp_path / "m.tif")
        assert read_mask(tmp_path / "m.tif").tolist() == [[7, 7, 7]]
    for mode in ("RGB", "RGBA", "F"):
        color = 0.5 if mode == "F" else (7, 7, 8)
        Image.new(mode, (12, 8), color).save(tmp_path / "m.tif")
        with pytest.raises(
            GenSegError, match=rf"m\.tif' is a {mode} image but must hold one class"
        ):
            read_mask(tmp_path / "m.tif")


def test_several_pictures_in_one_file(tmp_path):
    pages = [Image.new("L", (5, 4), gray) for gray in (0, 1)]
    for suffix in ("tif", "gif"):
        pages[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=pages[1:])
        for read in (read_image, read_mask):
            with pytest.raises(GenSegError, match=rf"x\.{suffix}' holds 2 pictures: save each"):
                read(tmp_path / f"x.{suffix}")


def test_masks_that_cannot_be(tmp_path):
    np.save(tmp_path / "m.npy", np.zeros((0, 0), np.uint8))
    with pytest.raises(GenSegError, match=r"m\.npy' is \(0, 0\) of uint8 but must be"):
        read_mask(tmp_path / "m.npy")
    table = label_table(None, 2)
    with pytest.raises(GenSegError, match="holds the values -1, and labels are not negative"):
        map_labels(np.array([[0, -1]]), table, tmp_path / "m.npy")


def test_more_colours_than_a_byte_counts(tmp_path):
    colors = [(index // 256, index % 256, 7) for index in range(300)]
    Image.fromarray(np.array([[colors[1], colors[257]]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", colors).tolist() == [[1, 257]]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Truck 2,128,64,3", "Truck 2"),
        ("lane 1\t128\t64\t3", "lane 1"),
        ("4,road,128,64,3", "road"),
        ("4 road 128 64 3", "road"),
        ("128 64 3\t\tAnimal", "Animal"),
        ('"traffic light"; 128; 64; 3', "traffic light"),
    ],
)
def test_tables_of_colours(tmp_path, line, name):
    path = tmp_path / "colors.csv"
    path.write_text(f"name,r,g,b\n{line}\n")
    assert read_colors(path) == {name: (128, 64, 3)}
    path.write_bytes("Stra\xdfe,1,2,3".encode("latin-1"))
    with pytest.raises(GenSegError, match=r"the table of colours '.*colors\.csv' is not in UTF-8"):
        read_colors(path)


def test_links_are_followed_once(tmp_path):
    (tmp_path / "far").mkdir()
    Image.new("L", (5, 4)).save(tmp_path / "far" / "b.png")
    root = tmp_path / "images"
    root.mkdir()
    Image.new("L", (5, 4)).save(root / "a.png")
    (root / "linked").symlink_to(tmp_path / "far")
    (root / "circle").symlink_to(root)
    (root / "lost.png").symlink_to("nowhere.png")
    found = [path.relative_to(root).as_posix() for path in find_images(root)]
    assert found == ["a.png", "linked/b.png", "lost.png"]
    with pytest.raises(MissingFileError, match=r"lost\.png' does not exist"):
        read_image(root / "lost.png")


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=["empty", "text", "truncated"])
def test_unreadable_file(tmp_path, read, content):
    kind, path = read.__name__.removeprefix("read_"), tmp_path / "x.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(GenSegError, match=rf"{kind} '.*x\.jpg' cannot be read .*replace it"):
        read(path)
    path.unlink()
    with pytest.raises(MissingFileError, match=rf"{kind} '.*x\.jpg' does not exist: restore"):
        read(path)


# --- images to predict -------------------------------------------------------------------------


def test_image_folder(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "a.jpg", "sub/a.png", "c.bmp", "d.gif", "e.webp"):
        Image.new("RGB", (6, 4)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.png").write_text("no image")
    dataset = ImageFolder(tmp_path / "in")
    assert [item["name"] for item in dataset] == ["a_jpg", "a_png", "b", "c", "d", "e", "sub/a"]
    assert dataset[6].keys() == {"image", "name", "path"}
    assert dataset[6]["image"].shape == (3, 4, 6)
    assert dataset[6]["path"] == str(tmp_path / "in" / "sub" / "a.png")
    dataset.skip({"a_png", "sub/a", "unknown"})
    assert [item["name"] for item in dataset] == ["a_jpg", "b", "c", "d", "e"]
    assert [item["name"] for item in ImageFolder(tmp_path / "in" / "b.jpg")] == ["b"]
    assert list(list_files(tmp_path / "in", ".png")) == ["a"]  # hidden files are no images


def test_image_folder_names_stay_distinct(tmp_path):
    for name in ("a.jpg", "a.png", "a_png.png"):
        Image.new("RGB", (6, 4)).save(tmp_path / name)
    names = [item["name"] for item in ImageFolder(tmp_path)]
    assert sorted(names) == ["a_jpg", "a_png", "a_png_"]


def test_wrong_image_folders(tmp_path):
    with pytest.raises(GenSegError, match=f"no image in folder '{re.escape(str(tmp_path))}'"):
        ImageFolder(tmp_path)
    with pytest.raises(MissingFileError, match=r"'.*nowhere' does not exist"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(GenSegError, match=r"image '.*x\.png' cannot be read"):
        ImageFolder(tmp_path)[0]


def test_a_lossless_webp_is_a_mask_and_a_lossy_one_is_not(tmp_path):
    values = np.random.default_rng(0).integers(0, 19, (20, 30)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.webp", lossless=True)
    assert np.array_equal(read_mask(tmp_path / "a.webp"), values)
    Image.fromarray(values).save(tmp_path / "b.webp")
    with pytest.raises(GenSegError, match="compressed with loss"):
        read_mask(tmp_path / "b.webp")
