"""What a trained GMMSeg learns of one more class from 1, 5 and 20 images, without training.

    python experiments/voc_animals/add_class.py runs/voc_animals/gmmseg_without_horse/seed0 horse

The run was trained with `--data.unknown_classes '[horse]'` (`run.sh`). For each number of images
the class is added by `GMMSeg.add_class` in three draws of training images that show it, and all
are scored on the validation images: IoU of the new class, and the mean over the old ones before
and after. Prints a line of JSON for each.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import yaml

from lightning_genseg import GMMSeg
from lightning_genseg.data import FolderDataModule
from lightning_genseg.metrics import segmentation_metrics


def score(model, batches, classes):
    """IoU of each class on masks whose numbers are positions in `classes`; 255 if none."""
    table = torch.full((256,), 255)
    for number, name in enumerate(classes):
        if name in model.all_class_names:
            table[number] = model.all_class_names.index(name)
    metrics = segmentation_metrics(model.num_classes, 255)
    for batch in batches:
        batch = {**batch, "mask": table[batch["mask"]]}
        with torch.no_grad():
            metrics.update(model.maps_at_labels(batch)["scores"].argmax(1), batch["mask"])
    return dict(zip(model.all_class_names, metrics.compute()["IoU"].tolist(), strict=True))


def mean(values):
    """Of those that are numbers: classes that do not occur have none."""
    kept = [value for value in values if value == value]
    return sum(kept) / len(kept)


def main():
    """Print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    args = parser.parse_args()
    options = yaml.safe_load((args.run / "config.yaml").read_text())["data"]["init_args"]
    options |= {"unknown_classes": None, "sparse": None}
    data = FolderDataModule(**options)
    data.setup("fit")
    train = data.split_dataset("train", data.eval_transform)
    batches = list(data.val_dataloader())
    new = data.class_names.index(args.name)
    shown = [i for i in range(len(train)) if new in train[i]["mask"].unique()]
    checkpoint = args.run / "checkpoints" / "last.ckpt"
    before = score(GMMSeg.load_from_checkpoint(checkpoint).eval(), batches, data.class_names)
    old = mean(before.values())
    print(json.dumps({"images": 0, "old": old}), flush=True)
    for count in (1, 5, 20):
        for draw in range(3):
            model = GMMSeg.load_from_checkpoint(checkpoint).eval()
            samples = [train[i] for i in random.Random(draw).sample(shown, count)]
            masks = [(sample["mask"] == new).long() for sample in samples]
            model.add_class([sample["image"] for sample in samples], masks, args.name, draw)
            after = score(model, batches, data.class_names)
            found = {"new": after.pop(args.name), "old": mean(after.values())}
            print(json.dumps({"images": count, "draw": draw, **found}), flush=True)


if __name__ == "__main__":
    main()
