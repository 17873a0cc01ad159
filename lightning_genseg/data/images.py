"""Image and mask files: finding, naming and reading them."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lightning_genseg.errors import GenSegError, MissingFileError, listed

# Formats of grey images that change values; TIFF can hold JPEG too, as its `compression` says.
_ORIENTATION = 0x0112  # EXIF
# Suffixes of pictures, of which some need a plugin of PIL.
_PICTURES = (
    "heic heif hif avif jxl raw dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f "
    "3fr iiq erf mrw svg eps exr hdr xcf djvu fits"
)
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


def find_images(root: Path) -> list[Path]:
    """All files under a folder that PIL can read by their suffix, sorted, hidden ones left out.

    Raises:
        MissingFileError: the folder does not exist.
        GenSegError: no image in it.
    """
    paths = _find(root, readable_suffixes())
    if not paths:
        others = listed(path.name for path in find_unsupported(root))
        found = f" (found: {others}, which cannot be read)" if others else ""
        raise GenSegError(
            f"no image in folder '{root}'{found}: put images (png, jpg, tif ...) there or give "
            "another folder."
        )
    return paths


def find_unsupported(root: Path) -> list[Path]:
    """Pictures under a folder of types that PIL cannot read, such as HEIC and cameras' raw files.

    Raises:
        MissingFileError: the folder does not exist.
    """
    return _find(root, {f".{suffix}" for suffix in _PICTURES.split()} - readable_suffixes())


def _find(root: Path, suffixes: Collection[str]) -> list[Path]:
    if not root.is_dir():
        raise MissingFileError(f"folder '{root}' does not exist: check the path.")
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )


@cache
def _formats() -> list[str]:
    """Formats that PIL reads by itself."""
    # PIL also opens documents and films, some by a program such as Ghostscript, whatever the suffix
    # of the file: a stranger's picture would run it.
    Image.init()
    return sorted(
        set(Image.OPEN) - {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "STUB", "WMF"}
    )


@cache
def readable_suffixes() -> set[str]:
    """Lower-case suffixes (with dot) of the image formats that PIL reads."""
    formats = _formats()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def without_suffix(name: str) -> str:
    """Cut off the suffix of an image; that of `frame.0001` belongs to the name."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix.lower() in readable_suffixes() else path).as_posix()


def unique_names(paths: Sequence[Path], root: Path) -> list[str]:
    """Paths relative to `root` without suffix; where files would share one, with `_suffix`."""
    plain = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    count = Counter(plain)
    taken = {name for name in plain if count[name] == 1}
    names: list[str] = []
    for name, path in zip(plain, paths, strict=True):
        if count[name] > 1:
            name = f"{name}_{path.suffix[1:]}"
            while name in taken:  # a.png and a.jpg beside a file that is itself called a_png.bmp
                name += "_"
            taken.add(name)
        names.append(name)
    return names


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file of any format as HxWx3 uint8, turned as its EXIF orientation says.

    Raises:
        MissingFileError: no such file.
        GenSegError: unreadable, or pixels of more than 16 bits.
    """
    image = _open(path, "image")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise GenSegError(
            f"image '{path}' has 32-bit pixels, whose range is not known: save it with 8 bits a "
            "channel."
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: Path) -> NDArray[np.integer[Any]]:
    """Read a mask file as HxW integers: grey values of 1 to 32 bits, or indices of a palette image.

    Raises:
        MissingFileError: no such file.
        GenSegError: unreadable, compressed with loss, or a colour or floating-point image.
    """
    mask = _open(path, "mask")
    if mask.format in _LOSSY or mask.info.get("compression") == "jpeg":
        raise GenSegError(
            f"mask '{path}' is compressed with loss ({mask.format}), which changes class numbers "
            "along every border: export the masks again as PNG; converting this file is too late."
        )
    if mask.mode not in ("1", "L", "P", "I") and not mask.mode.startswith("I;16"):
        raise GenSegError(
            f"mask '{path}' is a {mask.mode} image but must hold one class number per pixel (grey "
            "or palette PNG, 255 = ignore): convert its colours to class numbers first."
        )
    array = np.array(mask)
    return array.astype(np.uint8) if array.dtype == bool else array


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of what `read_image` gives, from the head of a file; GenSegError if bad."""
    check_exists(path, "image")
    try:
        with Image.open(path, formats=_formats()) as file:
            turned = file.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return file.size if turned else file.size[::-1]
    except Exception as error:  # PIL raises a dozen types on broken files
        raise GenSegError(_unreadable(path, "image", error)) from error


def _unreadable(path: Path, kind: str, error: Exception) -> str:
    return (
        f"{kind} '{path}' cannot be read ({' '.join(str(error).split())}): replace it or take it "
        "out of the data set."
    )


def check_exists(path: Path, kind: str) -> None:
    """Refuse a file of a data set that does not exist, as the `kind` of file it is."""
    if not path.is_file():
        raise MissingFileError(
            f"{kind} '{path}' does not exist: restore it or take it out of the data set."
        )


def _open(path: Path, kind: str) -> Image.Image:
    check_exists(path, kind)
    try:
        with Image.open(path, formats=_formats()) as file:
            file.load()
            if kind == "image":
                ImageOps.exif_transpose(file, in_place=True)
            return file
    except Exception as error:  # PIL raises a dozen types on broken files
        raise GenSegError(_unreadable(path, kind, error)) from error
