"""Image and mask files: finding, naming and reading them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lightning_genseg.data.labels import Color
from lightning_genseg.errors import GenSegError, MissingFileError, listed

_ORIENTATION = 0x0112  # EXIF
# Suffixes of pictures, of which some need a plugin of PIL.
_PICTURES = (
    "heic heif hif avif jxl raw dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef srw x3f "
    "3fr iiq erf mrw svg eps exr hdr xcf djvu fits"
)
_STACKS = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")  # formats of pages or frames
# Formats of grey images that change values; TIFF can hold JPEG too, as its `compression` says.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


def find_images(root: Path, arrays: bool = False) -> list[Path]:
    """All files under a folder that PIL can read by their suffix, sorted, hidden ones left out.

    Args:
        root: the folder.
        arrays: whether ``.npy`` files count as well, as they do for masks.

    Raises:
        MissingFileError: the folder does not exist.
        GenSegError: no image in it.
    """
    files = find_files(root)
    suffixes = readable_suffixes() | ({".npy"} if arrays else set())
    paths = [path for path in files if path.suffix.lower() in suffixes]
    if not paths:
        others = Counter(path.suffix.lower() or "nameless" for path in files).most_common(3)
        instead = ", ".join(f"{count} {suffix} files" for suffix, count in others)
        found = f", but {instead} ({listed([path.name for path in files], 3)})" if files else ""
        remedy = "put images (png, jpg, tif ...) there or give another folder"
        if arrays and any(suffix == ".json" for suffix, _ in others):
            remedy = "make masks of them with `genseg convert-masks`"
        raise GenSegError(f"no image in folder '{root}'{found}: {remedy}.")
    return paths


def find_unsupported(root: Path) -> list[Path]:
    """Pictures under a folder of types that PIL cannot read, such as HEIC and cameras' raw files.

    Raises:
        MissingFileError: the folder does not exist.
    """
    suffixes = {f".{suffix}" for suffix in _PICTURES.split()} - readable_suffixes()
    return [path for path in find_files(root) if path.suffix.lower() in suffixes]


def find_files(root: Path) -> list[Path]:
    """All files under a folder, sorted, hidden ones left out; links are followed.

    A link that leads nowhere is a file that reading will not find.

    Raises:
        MissingFileError: the folder does not exist.
    """
    if not root.is_dir():
        raise MissingFileError(f"folder '{root}' does not exist: check the path.")
    return sorted(_walk(root, frozenset()))


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link that leads in a circle
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


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


def read_image(source: Path | str | Image.Image) -> NDArray[np.uint8]:
    """Read an image file of any format, or a PIL image, as HxWx3 uint8, turned as its EXIF says.

    Raises:
        MissingFileError: no such file.
        GenSegError: unreadable, several pictures in one file, or pixels of more than 16 bits.
    """
    if isinstance(source, Image.Image):
        name, image = "the image", ImageOps.exif_transpose(source)
    else:
        name, image = f"image '{source}'", _open(Path(source), "image")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise GenSegError(
            f"{name} has 32-bit pixels, whose range is not known: save it with 8 bits a channel."
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: Path, colors: Sequence[Color] | None = None) -> NDArray[np.integer[Any]]:
    """Read a mask file as HxW integers.

    It holds grey values of 1 to 32 bits, indices of a palette image, three equal channels, or an
    array of NumPy (``.npy``).

    Args:
        path: of the file.
        colors: read the colours of the pixels instead: the result holds their positions here.

    Raises:
        MissingFileError: no such file.
        GenSegError: unreadable, compressed with loss, a floating-point image, other colours or,
            without `colors`, any.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path)
    mask = _open(path, "mask")
    lossy = mask.format in _LOSSY and not _is_lossless_webp(path)
    if lossy or mask.info.get("compression") == "jpeg":
        raise GenSegError(
            f"mask '{path}' is compressed with loss ({mask.format}), which changes class numbers "
            "along every border: export the masks again as PNG; converting this file is too late."
        )
    if colors is not None:
        return _positions(np.array(mask.convert("RGB")), colors, path)
    if mask.mode in ("LA", "RGB", "RGBA"):
        pixels = np.array(mask)[..., : 1 if mask.mode == "LA" else 3]
        if (pixels == pixels[..., :1]).all():
            return np.ascontiguousarray(pixels[..., 0])
    if mask.mode not in ("1", "L", "P", "I") and not mask.mode.startswith("I;16"):
        raise GenSegError(
            f"mask '{path}' is a {mask.mode} image but must hold one class number per pixel (grey "
            "or palette PNG, 255 = ignore): list the colours of the classes in colors "
            "(FolderDataModule), or use `genseg convert-masks`."
        )
    array = np.array(mask)
    return array.astype(np.uint8) if array.dtype == bool else array


def _is_lossless_webp(path: Path) -> bool:
    """Whether a WebP has the chunk of lossless pictures, first or behind that of extensions."""
    with path.open("rb") as file:
        head = file.read(48)
    return head[8:12] == b"WEBP" and b"VP8L" in head[12:]


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


def _read_array(path: Path) -> NDArray[np.integer[Any]]:
    check_exists(path, "mask")
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen types on broken files
        raise GenSegError(_unreadable(path, "mask", error)) from error
    array = array.astype(np.uint8) if array.dtype == bool else array
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(0 if array.shape[0] == 1 else 2)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
        raise GenSegError(
            f"mask '{path}' is {array.shape} of {array.dtype} but must be height x width of "
            "integers: save class numbers."
        )
    return array


def _positions(
    pixels: NDArray[np.uint8], colors: Sequence[Color], path: Path
) -> NDArray[np.integer[Any]]:
    """Positions in `colors` of the colours HxWx3."""

    def code(rgb: NDArray[Any]) -> NDArray[np.int32]:
        red, green, blue = np.moveaxis(rgb.astype(np.int32), -1, 0)
        codes: NDArray[np.int32] = (red << 16) | (green << 8) | blue
        return codes

    known, wanted = code(np.asarray(colors)), code(pixels)
    order = np.argsort(known, kind="stable")  # of a colour that is there twice, the first counts
    place = np.searchsorted(known[order], wanted).clip(max=len(known) - 1)
    wrong = known[order][place] != wanted
    if wrong.any():
        odd, count = np.unique(pixels[wrong], axis=0, return_counts=True)
        found = listed((tuple(odd[i].tolist()) for i in np.argsort(-count)), 3)
        raise GenSegError(
            f"mask '{path}' holds {len(odd)} colours that are not in colors ({found}): correct "
            "colors, or list them after those of the classes, where they mean ignore."
        )
    positions: NDArray[np.integer[Any]] = order[place]
    return positions.astype(np.uint8) if len(known) <= 256 else positions


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
            # Other formats keep a thumbnail or layers beside the picture.
            count = getattr(file, "n_frames", 1) if file.format in _STACKS else 1
            if count > 1:
                raise GenSegError(
                    f"{kind} '{path}' holds {count} pictures: save each as a file of its own."
                )
            file.load()
            if kind == "image":
                ImageOps.exif_transpose(file, in_place=True)
            return file
    except GenSegError:
        raise
    except Exception as error:  # PIL raises a dozen types on broken files
        raise GenSegError(_unreadable(path, kind, error)) from error
