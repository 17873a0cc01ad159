"""Tiny generated copies of public data sets in their official folder layouts.

Every function fills `root` and returns the folder that the data set's `root` argument asks for.
Scenes are made of a few coloured regions, one colour per class, so that a small network learns
them; `size` is (height, width).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import maximum_filter, minimum_filter

# Ids that never occur in COCO-Stuff (1 to 182): things of COCO that have a number but no masks.
UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
Size = tuple[int, int]


def make_cityscapes(
    root: Path, size: Size = (96, 128), images: int = 2, train_ids: bool = False
) -> Path:
    """leftImg8bit and gtFine, `images` per city, and the clicks that GatedCRFLoss publishes.

    `train_ids` adds what cityscapesScripts makes of the labels.
    """
    rng = np.random.default_rng(0)
    to_train = {7: 0, 8: 1, 11: 2, 17: 5, 21: 8, 23: 10, 24: 11, 26: 13, 33: 18}
    cities = {"train": ("aachen", "zurich"), "val": ("frankfurt", "munster"), "test": ("berlin",)}
    clicks = {}
    for split, names in cities.items():
        for city in names:
            for number in range(images):
                stem = f"{city}_{number:06d}_000019"
                image, ids = scene(rng, size, [*to_train, 9])  # 9: parking, which is not scored
                ids[-size[0] // 12 :] = 1  # ego vehicle
                ids[:2] = 3  # out of roi
                if split == "test":
                    ids[(ids != 1) & (ids != 3)] = 0  # the labels stay on the server
                save(image, root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
                truth = root / "gtFine" / split / city
                save(ids, truth / f"{stem}_gtFine_labelIds.png")
                save(ids.astype(np.uint16), truth / f"{stem}_gtFine_instanceIds.png")
                save(np.stack([ids] * 3, 2), truth / f"{stem}_gtFine_color.png")
                if train_ids:
                    save(lookup(ids, to_train, 255), truth / f"{stem}_gtFine_labelTrainIds.png")
                if split == "train":
                    clicks[stem] = [click(ids, value) for value in to_train if value in ids]
    (root / "cityscapes_synthetic_clicks.json").write_text(json.dumps(clicks))
    return root


def make_camvid(root: Path, size: Size = (96, 128), images: int = 4) -> Path:
    """CamVid in SegNet's layout: images and masks (0 to 10, 11 = unlabelled) of three splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for number in range(images):
            image, ids = scene(rng, size, [*range(11), 11])
            save(image, root / split / f"{split}_{number}.png")
            save(ids, root / f"{split}annot" / f"{split}_{number}.png")
    return root


def make_ade20k(root: Path, size: Size = (96, 128), images: int = 4) -> Path:
    """ADEChallengeData2016: images, annotations (0 = other objects, 1 to 150) and a list."""
    rng = np.random.default_rng(0)
    root = root / "ADEChallengeData2016"
    for split, short in (("training", "train"), ("validation", "val")):
        for number in range(1, images + 1):
            image, ids = scene(rng, varied(rng, size), [1, 2, 3, 4, 5, 7, 13, 21, 150, 0])
            stem = f"ADE_{short}_{number:08d}"
            save(image, root / "images" / split / f"{stem}.jpg")
            save(ids, root / "annotations" / split / f"{stem}.png")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def make_coco_stuff_10k(
    root: Path, size: Size = (96, 128), images: int = 4, mat: bool = True
) -> Path:
    """COCO-Stuff 10k v1.1: images, annotations (.mat with S, 0 = unlabelled, 1 to 182), imageLists.

    With `mat=False` the masks are what mmsegmentation's converter makes of them: in train2014 and
    test2014, beside copies of the images, `_labelTrainIds.png` of 1 to 171, 0 = unlabelled.
    """
    rng = np.random.default_rng(0)
    ids = [1, 3, 13, 17, 92, 106, 124, 149, 169, 182, 0]
    (root / "imageLists").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, first in (("train", 9), ("test", 9 + images)):
        stems = [f"COCO_train2014_{first + number:012d}" for number in range(images)]
        (root / "imageLists" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            image, raw = scene(rng, varied(rng, size), ids)
            save(image, root / "images" / f"{stem}.jpg")
            if mat:
                contents = {"S": raw, "regionMapStuff": raw.astype(np.uint16)}
                savemat(root / "annotations" / f"{stem}.mat", contents, do_compression=True)
            else:
                save(image, root / "images" / f"{split}2014" / f"{stem}.jpg")
                folder = root / "annotations" / f"{split}2014"
                save(lookup(raw, compact(ids), 0), folder / f"{stem}_labelTrainIds.png")
    return root


def make_coco_stuff_164k(
    root: Path, size: Size = (96, 128), images: int = 4, train_ids: bool = False
) -> Path:
    """Images and stuffthingmaps of COCO 2017 (0 to 181, 255 = unlabelled).

    `train_ids` adds mmsegmentation's masks.
    """
    rng = np.random.default_rng(0)
    ids = [0, 2, 12, 16, 91, 105, 123, 148, 168, 181, 255]
    for number in range(9, 9 + 2 * images):
        split = "train2017" if number < 9 + images else "val2017"
        image, raw = scene(rng, varied(rng, size), ids)
        save(image, root / "images" / split / f"{number:012d}.jpg")
        save(raw, root / "annotations" / split / f"{number:012d}.png")
        if train_ids:
            masks = root / "annotations" / split
            classes = lookup(raw, compact(ids[:-1], 1), 255)
            save(classes, masks / f"{number:012d}_labelTrainIds.png")
    return root


def compact(ids: list[int], first: int = 0) -> dict[int, int]:
    """Ids without the gaps of the unused ones; `first` is what their numbers are lowered by."""
    return {raw: raw - sum(unused - first < raw for unused in UNUSED_COCO_IDS) for raw in ids}


def make_voc(root: Path, size: Size = (96, 128), images: int = 4, augmented: bool = True) -> Path:
    """VOCdevkit/VOC2012 with palette masks (255 = boundary).

    `augmented` adds SegmentationClassAug and trainaug.txt. Also points and scribbles on training
    images, as GatedCRFLoss publishes them; the first image has no background point.
    """
    rng = np.random.default_rng(0)
    root = root / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    splits = {"train": 2007, "val": 2009} | ({"aug": 2011} if augmented else {})
    stems = {
        split: [f"{year}_{number:06d}" for number in range(1, images + 1)]
        for split, year in splits.items()
    }
    (root / "voc_scribbles").mkdir()
    objects, background = {}, {}
    for split, names in stems.items():
        for stem in names:
            image, ids = scene(rng, varied(rng, size), [0, 0, 0, 2, 7, 8, 12, 15, 20])
            save(image, root / "JPEGImages" / f"{stem}.jpg")
            if split != "aug":
                edge = maximum_filter(ids, 3) != minimum_filter(ids, 3)
                bounded = np.where(edge, 255, ids).astype(np.uint8)
                save(bounded, root / "SegmentationClass" / f"{stem}.png", palette=True)
            if augmented:  # the augmented masks have no boundary
                save(ids, root / "SegmentationClassAug" / f"{stem}.png")
            if split != "val":
                present = [value for value in np.unique(ids).tolist() if value]
                objects[stem] = [{**click(ids, value), "rank": 1} for value in present]
                background[stem] = [click(ids, 0)] if background or objects.keys() != {stem} else []
                (root / "voc_scribbles" / f"{stem}.xml").write_text(scribbles(ids))
    (root / "voc_whats_the_point.json").write_text(json.dumps(objects))
    (root / "voc_whats_the_point_bg_from_scribbles.json").write_text(json.dumps(background))
    stems["trainval"] = stems["train"] + stems["val"]
    if augmented:
        stems["trainaug"] = sorted(stems["train"] + stems["aug"])
    for split, names in stems.items():
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / "Annotations").mkdir()
    return root


def make_pascal5i(root: Path, size: Size = (96, 128), images: int = 6) -> Path:
    """VOC2012 with the list of few-shot segmentation: `images` per fold with its five classes."""
    rng = np.random.default_rng(0)
    root = root / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    stems: dict[str, list[str]] = {"voc_sbd_merge_noduplicate": [], "val": []}
    for (name, names), year in zip(stems.items(), (2007, 2009), strict=True):
        for number in range(4 * images):
            stem = f"{year}_{number + 1:06d}"
            names.append(stem)
            novel = range(5 * (number % 4) + 1, 5 * (number % 4) + 6)
            image, ids = tiled_scene(rng, varied(rng, size), list(novel))
            save(image, root / "JPEGImages" / f"{stem}.jpg")
            save(ids, root / "SegmentationClassAug" / f"{stem}.png")
            save(ids, root / "SegmentationClass" / f"{stem}.png", palette=True)
        lines = [f"JPEGImages/{stem}.jpg SegmentationClassAug/{stem}.png" for stem in names]
        (lists / f"{name}.txt").write_text("\n".join(lines) + "\n")
    train = stems["voc_sbd_merge_noduplicate"][::2]  # the other masks are SBD's
    (lists / "train.txt").write_text("\n".join(train) + "\n")
    return root


def make_coco(root: Path, size: Size = (96, 128), images: int = 6, instances: bool = False) -> Path:
    """COCO 2014 for few-shot segmentation: `images` per fold and split with its twenty classes.

    The masks are 0 to 80 as PNG files; with `instances` polygons in instances_{train,val}2014.json
    instead, and the masks that they mean in `expected`.
    """
    rng = np.random.default_rng(0)
    categories = [number for number in range(1, 91) if number not in UNUSED_COCO_IDS]
    number = 9
    for split in ("train2014", "val2014"):
        content: dict[str, list] = {"images": [], "annotations": []}
        content["categories"] = [{"id": c, "name": f"kind {c}"} for c in categories]
        for index in range(4 * images):
            image, ids = tiled_scene(rng, varied(rng, size), list(range(index % 4 + 1, 81, 4)))
            stem, number = f"COCO_{split}_{number:012d}", number + 1
            save(image, root / split / f"{stem}.jpg")
            folder = "expected" if instances else "annotations"
            save(ids, root / folder / split / f"{stem}.png")
            height, width = ids.shape
            entry = {"id": number, "file_name": f"{stem}.jpg", "height": height, "width": width}
            content["images"].append(entry)
            # A part of another class under every tile must be painted over, a group left out.
            content["annotations"] += [
                instance(number, categories[0], (0, 0, width, height), iscrowd=1),
                *(
                    instance(number, categories[label - 1], box(ids == label))
                    for label in np.unique(ids[ids > 0]).tolist()
                ),
            ]
        (root / "annotations").mkdir(exist_ok=True)
        if instances:
            path = root / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(content))
    return root


def instance(image: int, category: int, box: tuple[int, ...], iscrowd: int = 0) -> dict:
    """An annotation of COCO: a rectangle (left, top, right, bottom) as a polygon."""
    left, top, right, bottom = box
    return {
        "image_id": image,
        "category_id": category,
        "area": float((right - left) * (bottom - top)),
        "iscrowd": iscrowd,
        "segmentation": {"counts": [0, 9], "size": [bottom, right]}
        if iscrowd
        else [[left, top, right, top, right, bottom, left, bottom]],
    }


def box(region: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels of a region, the last two exclusive."""
    rows, columns = region.any(1).nonzero()[0], region.any(0).nonzero()[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


CITYSCAPES_IDS = [7, 8, 11, 17, 21, 23, 24, 26, 33]  # so that the scenes look like make_cityscapes


def make_fishyscapes(root: Path, size: Size = (96, 128), images: int = 4) -> Path:
    """fishyscapes_lostandfound (0, 1, 255) and leftImg8bit of Lost and Found, which has more."""
    rng = np.random.default_rng(0)
    for number in range(images):
        street = ("04_Maurener_Weg_8", "13_Elly_Beinhorn_Str")[number % 2]
        frame = f"{street}_{number:06d}_000030"
        image, _ = scene(rng, size, CITYSCAPES_IDS)
        labels = add_anomaly(rng, image)
        labels[-size[0] // 12 :] = 255  # ego vehicle
        folder = root / "leftImg8bit" / ("train", "test")[number % 2] / street
        save(image, folder / f"{frame}_leftImg8bit.png")
        save(image, folder / f"{street}_{number:06d}_000040_leftImg8bit.png")
        save(labels, root / "fishyscapes_lostandfound" / f"{number:04d}_{frame}_labels.png")
    return root


def make_road_anomaly(root: Path, size: Size = (96, 128), images: int = 4) -> Path:
    """RoadAnomaly_jpg: frames with folders of labels (0 background, 1 road, 2 anomaly)."""
    rng = np.random.default_rng(0)
    root = root / "RoadAnomaly_jpg"
    names = [f"animals{number:02d}_cow" for number in range(images)]
    for number, name in enumerate(names):
        image, ids = scene(rng, size, CITYSCAPES_IDS)
        anomaly = add_anomaly(rng, image)
        road = (ids == 7) if number % 2 else np.zeros_like(anomaly)  # seldom labelled apart
        labels = np.where(anomaly == 1, 2, road).astype(np.uint8)
        save(image, root / "frames" / f"{name}.jpg")
        folder = root / "frames" / f"{name}.labels"
        save(labels, folder / "labels_semantic.png")
        save(np.stack([labels] * 3, 2), folder / "labels_semantic_color.png")
    (root / "frame_list.json").write_text(json.dumps([f"{name}.jpg" for name in names]))
    return root


def make_road_anomaly21(root: Path, size: Size = (96, 128), images: int = 3) -> Path:
    """dataset_AnomalyTrack: `images` with labels_masks (0, 1, 255), and two test images without."""
    rng = np.random.default_rng(0)
    root = root / "dataset_AnomalyTrack"
    for number in range(images + 2):
        image, _ = scene(rng, varied(rng, size), CITYSCAPES_IDS)
        labels = add_anomaly(rng, image)
        labels[:4] = 255
        name = f"validation{number:04d}" if number < images else f"cow{number:04d}"
        save(image, root / "images" / f"{name}.jpg")
        if number < images:
            save(labels, root / "labels_masks" / f"{name}_labels_semantic.png")
            save(image, root / "labels_masks" / f"{name}_labels_semantic_color.png")
    return root


def make_street_hazards(root: Path, size: Size = (96, 128), images: int = 2) -> Path:
    """Images and annotations (1 unlabelled, 2 to 13, 14 anomaly), `images` per town."""
    rng = np.random.default_rng(0)
    splits = {"training": ("t1-3",), "validation": ("t4",), "test": ("t5", "t6")}
    for split, towns in splits.items():
        part = root / ("test" if split == "test" else "train")
        for town in towns:
            # Numbered anew in each.
            for number in range(images * (2 if split == "training" else 1)):
                image, ids = scene(rng, size, [1, 2, 7, 8, 9, 10, 11, 13])
                if split == "test":
                    ids[add_anomaly(rng, image) == 1] = 14
                save(image, part / "images" / split / town / f"{number}.png")
                save(ids, part / "annotations" / split / town / f"{number}.png")
    return root


def make_anomaly_folder(root: Path, size: Size = (96, 128), images: int = 4) -> Path:
    """images, masks (0, 1, 255), class_masks (0 to 4, 255) and masks in black and white."""
    rng = np.random.default_rng(0)
    for number in range(images):
        image, ids = scene(rng, varied(rng, size), [0, 1, 2, 3, 4])
        anomaly = add_anomaly(rng, image)
        name = f"street/{number}"
        save(image, root / "images" / f"{name}.jpg")
        save(ids, root / "class_masks" / f"{name}.png")
        save(255 * anomaly, root / "white" / f"{name}.png")
        anomaly[:3] = 255
        save(anomaly, root / "masks" / f"{name}.png")
    return root


def add_anomaly(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draw an ellipse striped in black and white into the image; its mask HxW uint8, 1 there."""
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width]
    middle, radius = rng.uniform((0.4, 0.2), (0.7, 0.8)) * (height, width), rng.uniform(0.1, 0.2, 2)
    down, right = (y - middle[0]) / (radius[0] * height), (x - middle[1]) / (radius[1] * width)
    inside = down**2 + right**2 < 1
    image[inside] = np.where(x // 6 % 2 == 0, 255, 0)[inside][:, None]
    return inside.astype(np.uint8)


def scene(rng: np.random.Generator, size: Size, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """An image HxWx3 of six regions in the colours of their ids and its mask HxW; both uint8."""
    height, width = size
    points = rng.uniform((0, 0), size, (6, 2))
    # The first id is always there and the last often, whatever the draw.
    drawn = np.array([ids[0], ids[-1], *rng.choice(ids, 4)])
    y, x = np.mgrid[:height, :width]
    nearest = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(2)
    return painted(rng, drawn[nearest].astype(np.uint8))


def painted(rng: np.random.Generator, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image in the colours of a mask, the same in every data set, with noise; and the mask."""
    colors = np.random.default_rng(7).integers(20, 236, (256, 3))
    image = colors[mask] + rng.normal(0, 12, (*mask.shape, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def click(ids: np.ndarray, value: int) -> dict:
    """A point in the middle of the largest run of a value, as the published JSON files hold it."""
    inside = minimum_filter(ids == value, 5)
    rows, columns = np.nonzero(inside if inside.any() else ids == value)
    middle = len(rows) // 2
    return {"x": float(columns[middle]), "y": float(rows[middle]), "cls": int(value)}


def scribbles(ids: np.ndarray) -> str:
    """An XML file of ScribbleSup: for each value a line of three points along one row."""
    names = {0: "background", 2: "bike", 7: "car", 8: "cat", 12: "dog", 15: "person", 20: "monitor"}
    lines = []
    for value in np.unique(ids).tolist():
        rows, columns = np.nonzero(ids == value)
        row = np.bincount(rows).argmax()
        along = columns[rows == row]
        stop = np.flatnonzero(np.diff(along) != 1)
        along = along[: stop[0] + 1] if stop.size else along
        points = "".join(
            f"<point><X>{x}</X><Y>{row}</Y></point>"
            for x in (along[0], along[len(along) // 2], along[-1])
        )
        lines.append(f"<polygon><tag>{names[value]}</tag>{points}</polygon>")
    size = f"<size><width>{ids.shape[1]}</width><height>{ids.shape[0]}</height></size>"
    return f"<annotation>{size}{''.join(lines)}</annotation>"


def tiled_scene(
    rng: np.random.Generator, size: Size, ids: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """As `scene`, with a rectangle of every id in random order, separated by background (0)."""
    height, width = size
    columns = int(np.ceil(np.sqrt(len(ids))))
    rows = -(-len(ids) // columns)
    mask = np.zeros(size, np.uint8)
    for index, label in enumerate(rng.permutation(ids)):
        row, column = divmod(index, columns)
        top, left = row * height // rows, column * width // columns
        bottom, right = (row + 1) * height // rows - 2, (column + 1) * width // columns - 2
        mask[top:bottom, left:right] = label
    return painted(rng, mask)


def varied(rng: np.random.Generator, size: Size) -> Size:
    """A size up to a quarter larger: photographs do not share one."""
    return size[0] + int(rng.integers(size[0] // 4)), size[1] + int(rng.integers(size[1] // 4))


def lookup(ids: np.ndarray, table: dict[int, int], rest: int) -> np.ndarray:
    """Replace ids by a table, those that are not in it by `rest`."""
    values = np.full(256, rest, np.uint8)
    values[list(table)] = list(table.values())
    return values[ids]


def save(array: np.ndarray, path: Path, palette: bool = False) -> None:
    """Write an image file, with the folders on its way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = Image.frombytes("P", (array.shape[1], array.shape[0]), array.tobytes())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
