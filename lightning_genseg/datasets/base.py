"""Reading samples: images, masks, and what to say when something is wrong with them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from lightning_genseg.transforms import Transform, apply, apply_all, compose

__all__ = [
    "IGNORE",
    "ImageFolder",
    "MissingFiles",
    "Sample",
    "SegmentationDataset",
    "find_images",
    "read_image",
    "read_mask",
]

IGNORE = 255
Color = tuple[int, int, int]


class Sample(NamedTuple):
    """Where one sample lies; `name` is unique in its data set, `anomaly` a file of its own where there is one."""

    name: str
    image: Path
    mask: Path
    anomaly: Path | None = None


class MissingFiles(ValueError):
    """Files that a data set consists of do not exist; raise it at the end of its constructor.

    Args:
        message: one sentence.
        dataset: complete, the missing files in its `samples` as well, so that `genseg check` can read all the others.
    """

    def __init__(self, message: str, dataset: Any) -> None:
        super().__init__(message)
        self.dataset = dataset


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Images with masks; a sample is `image` float32 3xHxW in [0, 1], `mask` int64 HxW (255 = ignore), `name`.

    An index is an int, or a pair (int, seed): the seed decides the augmentation, so that it does not depend on the
    worker that happens to read the sample.

    With `anomaly_ids`, or after `hold_out`, a sample also has `anomaly` int64 HxW: 1 anomalous, 0 known, 255 not
    evaluated. `mask` is 255 where it is 1.

    Args:
        samples: where the files lie.
        class_names: one per class, at most 255.
        palette: one RGB colour per class; default: the colours of PASCAL VOC.
        ids: value in the mask files -> class (or 255); None: the files hold classes. 255 always means ignore.
        transform: albumentations transforms.
        anomaly_ids: value in the anomaly files, or without these in the mask files -> 1, 0 or 255.

    Raises:
        ValueError: no sample, wrong lengths or a wrong table; on reading: an unreadable file, sizes that differ, a
            label that is not in the table.
        FileNotFoundError: on reading: a file does not exist.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        ids: Mapping[int, int] | None = None,
        transform: Sequence[Transform] | None = None,
        anomaly_ids: Mapping[int, int] | None = None,
    ) -> None:
        if not samples:
            raise ValueError("the data set has no samples: give it at least one image.")
        self.samples = list(samples)
        self.class_names = list(class_names)
        # Before `hold_out`: names, and what has become of the classes.
        self.file_class_names = list(class_names)
        self.class_of = np.arange(IGNORE + 1)
        self.palette = check_palette(palette, len(self.class_names))
        self.transform = compose(transform)
        self._table = label_table(ids, len(self.class_names))
        self._anomaly_table = None if anomaly_ids is None else anomaly_table(anomaly_ids)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def sample_name(self, index: int) -> str:
        """Name of a sample, without reading it."""
        return self.samples[index].name

    def label_values(self) -> dict[int, int]:
        """Value in the mask files -> class or 255, all that may occur."""
        known = np.flatnonzero(self._table != _UNKNOWN)
        return dict(zip(known.tolist(), self._table[known].tolist(), strict=True))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Read and transform one sample."""
        position, seed = index if isinstance(index, tuple) else (index, index)
        sample = self.samples[position]
        image, (labels, anomaly) = self.read_pixels(position), self.read_labels(position)
        check_sizes(image.shape, labels.shape, sample)
        masks = {"mask": labels} if anomaly is None else {"mask": labels, "anomaly": anomaly}
        return {**apply_all(self.transform, image, masks, seed, sample.name), "name": sample.name}

    def hold_out(self, unknown: Sequence[str]) -> None:
        """Make classes unknown: 255 in `mask`, 1 in `anomaly`; the others keep their order and are numbered anew.

        ValueError if a name is no class, none remains, or the data have anomalies already.
        """
        if self._anomaly_table is not None:
            raise ValueError(
                f"{type(self).__name__} has anomalies already: leave unknown_classes out, or call hold_out once."
            )
        known = known_classes(self.class_names, unknown)
        classes, anomalies = np.full((2, _UNKNOWN + 1), IGNORE, np.uint16)
        classes[_UNKNOWN] = anomalies[_UNKNOWN] = _UNKNOWN
        anomalies[: self.num_classes] = 1
        anomalies[known], classes[known] = 0, range(len(known))
        self._anomaly_table, self._table = anomalies[self._table], classes[self._table]
        self.class_of = classes[self.class_of].astype(np.intp)
        self.class_names = [self.class_names[c] for c in known]
        self.palette = [self.palette[c] for c in known]

    def read_pixels(self, index: int) -> NDArray[np.uint8]:
        """Read an image as HxWx3, without transforms."""
        return read_image(self.samples[index].image)

    def read_mask_labels(self, index: int) -> NDArray[np.uint8]:
        """Read the labels of an image as HxW classes (255 = ignore), without transforms."""
        return self.read_labels(index)[0]

    def read_labels(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Read classes (255 = ignore) and, where the data have them, anomalies (1, 0, 255), both HxW."""
        sample, values = self.samples[index], self.read_mask_values(index)
        expected = None if (self._table < IGNORE).any() else _ANOMALY  # without classes
        labels = map_labels(values, self._table, sample.mask, expected)
        if self._anomaly_table is None:
            return labels, None
        if sample.anomaly is None:
            return labels, map_labels(values, self._anomaly_table, sample.mask, expected)
        anomaly = map_labels(
            read_mask(sample.anomaly), self._anomaly_table, sample.anomaly, _ANOMALY
        )
        if anomaly.shape != labels.shape:
            raise ValueError(
                f"anomaly mask '{sample.anomaly}' is {anomaly.shape[0]}x{anomaly.shape[1]} but mask '{sample.mask}' is "
                f"{labels.shape[0]}x{labels.shape[1]} (height x width): give both the size of the image."
            )
        return np.where(anomaly == 1, np.uint8(IGNORE), labels), anomaly

    def read_mask_values(self, index: int) -> NDArray[np.integer[Any]]:
        """Read what the file of a mask holds, HxW, before the table of labels; override it for other formats."""
        return read_mask(self.samples[index].mask)


class ImageFolder(Dataset[dict[str, Any]]):
    """Images to predict: every image under a folder, or one file; a sample is `image`, `name`, `path` (str).

    `name` is the path relative to `root` without its suffix; where two files share it (a.jpg, a.png) the suffix
    stays: `a_jpg`, `a_png`.

    Args:
        root: folder, searched recursively, or an image file.
        transform: albumentations transforms.

    Raises:
        FileNotFoundError: `root` does not exist.
        ValueError: no image in it; on reading: an unreadable file.
    """

    def __init__(self, root: Path | str, transform: Sequence[Transform] | None = None) -> None:
        root = Path(root)
        paths = [root] if root.is_file() else find_images(root)
        base = root.parent if root.is_file() else root
        self.transform = compose(transform)
        self.samples = list(zip(unique_names(paths, base), paths, strict=True))

    def skip(self, names: set[str]) -> None:
        """Leave out the images of these names, for instance those already predicted."""
        self.samples = [sample for sample in self.samples if sample[0] not in names]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read and transform one image."""
        name, path = self.samples[index]
        image, _ = apply(self.transform, read_image(path), None, index, name)
        return {"image": image, "name": name, "path": str(path)}


def check_sizes(image: Sequence[int], mask: Sequence[int], sample: Sample) -> None:
    """Compare the shapes HxWx3 and HxW; ValueError naming both files if they differ."""
    if image[0] != mask[0] or image[1] != mask[1]:
        raise ValueError(
            f"mask '{sample.mask}' is {mask[0]}x{mask[1]} but image '{sample.image}' is "
            f"{image[0]}x{image[1]} (height x width, after EXIF rotation): give both the same size."
        )


def find_images(root: Path) -> list[Path]:
    """All files under a folder that PIL can read by their suffix, sorted; hidden files and folders are left out.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder '{root}' does not exist: check the path.")
    suffixes = readable_suffixes()
    paths = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )
    if not paths:
        raise ValueError(
            f"no image in folder '{root}': put images (png, jpg, tif ...) there or give another folder."
        )
    return paths


@cache
def readable_suffixes() -> set[str]:
    """Lower-case suffixes (with dot) of the image formats that PIL reads."""
    # PIL also registers documents and films (.pdf, .mpg, .hdf ...), some of which it can only write or not decode.
    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
    }


def unique_names(paths: Sequence[Path], root: Path) -> list[str]:
    """Path relative to `root` without suffix, with `_suffix` appended where two files would share it."""
    plain = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    count: dict[str, int] = {}
    for name in plain:
        count[name] = count.get(name, 0) + 1
    names: list[str] = []
    taken = {name for name in plain if count[name] == 1}
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
        FileNotFoundError: no such file.
        ValueError: unreadable, or pixels of more than 16 bits.
    """
    image = _open(path, "image")
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"image '{path}' has 32-bit pixels, whose range is not known: save it with 8 bits a channel."
        )
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: Path) -> NDArray[np.integer[Any]]:
    """Read a mask file as HxW integers: grey values of 1 to 32 bits, or the indices of a palette image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or a colour or floating-point image.
    """
    mask = _open(path, "mask")
    if mask.mode not in ("1", "L", "P", "I") and not mask.mode.startswith("I;16"):
        raise ValueError(
            f"mask '{path}' is a {mask.mode} image but must hold one class number per pixel (grey or palette PNG, "
            "255 = ignore): convert its colours to class numbers first."
        )
    array = np.array(mask)
    return array.astype(np.uint8) if array.dtype == bool else array


def _open(path: Path, kind: str) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(
            f"{kind} '{path}' does not exist: restore it or take it out of the data set."
        )
    try:
        with Image.open(path) as file:
            file.load()
            if kind == "image":
                ImageOps.exif_transpose(file, in_place=True)
            return file
    except (
        Exception
    ) as error:  # PIL raises a dozen types on broken files: OSError, SyntaxError, struct.error ...
        raise ValueError(
            f"{kind} '{path}' cannot be read ({' '.join(str(error).split())}): replace it or take it out of the data set."
        ) from error


def from_worker(error: ValueError | FileNotFoundError) -> ValueError | FileNotFoundError:
    """Undo what DataLoader does to the message of an exception in its worker process."""
    # It arrives with its whole traceback as message; the last line is the sentence we wrote.
    message = str(error)
    if not message.startswith("Caught "):
        return error
    return type(error)(message.strip().splitlines()[-1].partition(": ")[2])


def known_classes(class_names: Sequence[str], unknown: Sequence[str]) -> list[int]:
    """Positions of the classes that are not in `unknown`; ValueError if a name is no class or none remains."""
    wrong = [name for name in unknown if name not in class_names]
    if wrong:
        end = " ..." if len(class_names) > 40 else "."
        raise ValueError(
            f"unknown_classes holds '{wrong[0]}', which is no class: choose among {', '.join(class_names[:40])}{end}"
        )
    known = [index for index, name in enumerate(class_names) if name not in unknown]
    if not known:
        raise ValueError("unknown_classes holds all classes: leave some to be known.")
    return known


_UNKNOWN = 256  # in a label table: no class has this raw value
_ANOMALY = "an anomaly mask holds 1 (anomalous), 0 (known) and 255 (not evaluated): correct it, or list its values in anomaly_ids"


def anomaly_table(
    ids: Mapping[int, int],
    name: str = "anomaly_ids",
    values: str = "1 (anomalous), 0 (known) or 255",
) -> NDArray[np.uint16]:
    """Lookup table raw value -> 1, 0, 255 or 'unknown' (256); 255 stays 255 unless it is listed.

    `name` and `values` are for the message: what the table is called and may lead to.

    Raises:
        ValueError: keys that no mask can hold, or values other than 1, 0 and 255.
    """
    if not ids or not all(0 <= key <= 2**24 for key in ids) or set(ids.values()) - {0, 1, IGNORE}:
        raise ValueError(
            f"{name} is {dict(ids)} but must lead from values of the masks to {values}."
        )
    table = np.full(max(256, max(ids) + 1), _UNKNOWN, np.uint16)
    table[IGNORE] = IGNORE
    table[list(ids)] = list(ids.values())
    return table


def label_table(ids: Mapping[int, int] | None, num_classes: int) -> NDArray[np.uint16]:
    """Lookup table raw value -> class, 255 or 'unknown' (256), with at least 256 entries.

    Raises:
        ValueError: the table is empty, has keys that no mask can hold, or leads to something that is not a class.
    """
    if not 0 < num_classes <= IGNORE:
        raise ValueError(
            f"num_classes is {num_classes} but must be 1 to 255, because 255 means ignore."
        )
    pairs = {value: value for value in range(num_classes)} if ids is None else dict(ids)
    if not pairs:
        raise ValueError(
            "ids is empty: list every value that occurs in the masks, or leave ids out."
        )
    if min(pairs) < 0 or max(pairs) > 2**24:
        raise ValueError(
            f"ids has the keys {min(pairs)} to {max(pairs)} but masks hold values from 0 to {2**24}."
        )
    wrong = sorted(
        value for value in pairs.values() if not (0 <= value < num_classes or value == IGNORE)
    )
    if wrong:
        raise ValueError(
            f"ids leads to {wrong[:5]} but there are {num_classes} classes: use 0 to {num_classes - 1}, or 255 for ignore."
        )
    if pairs.get(IGNORE, IGNORE) != IGNORE:
        raise ValueError(
            f"ids maps 255 to {pairs[IGNORE]} but 255 always means ignore: renumber that class in the masks."
        )
    table = np.full(max(256, max(pairs) + 1), _UNKNOWN, np.uint16)
    table[list(pairs)] = list(pairs.values())
    table[IGNORE] = IGNORE
    return table


def map_labels(
    raw: NDArray[np.integer[Any]],
    table: NDArray[np.uint16],
    path: Path,
    expected: str | None = None,
) -> NDArray[np.uint8]:
    """Turn raw mask values into classes; ValueError naming the file and the values that are not in the table.

    `expected` ends the message in place of a list of the classes.
    """
    if raw.dtype == np.uint8:  # nearly all masks: ten times as fast as below
        values = cv2.calcHist([raw], [0], None, [256], [0, 256]).ravel() > 0
        if not (table[:256][values] == _UNKNOWN).any():
            quick = cv2.LUT(raw, table[:256].astype(np.uint8))
            return np.asarray(quick, np.uint8)
    inside = raw if raw.dtype == np.uint8 else np.clip(raw, 0, len(table) - 1)
    classes = table[inside]
    unknown = classes == _UNKNOWN
    if inside is not raw:
        unknown |= inside != raw
    if unknown.any():
        values = np.unique(raw[unknown]).tolist()
        shown = ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")
        if expected is not None:
            raise ValueError(f"mask '{path}' holds the values {shown}, but {expected}.")
        known = np.flatnonzero(table < IGNORE).tolist()
        listed = (
            f"{known[0]} to {known[-1]}"
            if known and known == list(range(known[0], known[-1] + 1))
            else str(known)
        )
        raise ValueError(
            f"mask '{path}' holds the values {shown}, which are no classes (known: {listed}, and 255 for ignore): "
            "correct num_classes, or list these values in ids (raw value: class, or 255)."
        )
    labels: NDArray[np.uint8] = classes.astype(np.uint8)
    return labels


def check_palette(palette: Sequence[Color] | None, num_classes: int) -> list[Color]:
    """Return the palette, by default PASCAL VOC's; ValueError if it has not one colour 0..255 per class."""
    if palette is None:
        return voc_palette(num_classes)
    if len(palette) != num_classes:
        raise ValueError(
            f"the palette has {len(palette)} colours but there are {num_classes} classes: give one per class."
        )
    colors = [tuple(color) for color in palette]
    if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in colors):
        raise ValueError("the palette must hold (red, green, blue) with values from 0 to 255.")
    return [(color[0], color[1], color[2]) for color in colors]


def voc_palette(num_classes: int) -> list[Color]:
    """Colours of PASCAL VOC for any number of classes: the bits of the class number spread over red, green, blue."""
    palette = []
    for index in range(num_classes):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append((color[0], color[1], color[2]))
    return palette
