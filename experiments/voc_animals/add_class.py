"""What a trained GMMSeg learns of one more class from 1, 5 and 20 images, without training.

    python experiments/voc_animals/add_class.py runs/voc_animals/gmmseg_nohorse/seed0 horse

The run was trained with `--data.unknown_classes '[horse]'` (`run.sh`). For each number of images
the class is added by `GMMSeg.add_class` from training images that show it, drawn by the run's seed,
and scored on the validation images: IoU of every class before and after. Keeps the scores in
``experiments/results/voc_animals/add_class/gmmseg_nohorse/seedN.json``, and draws four validation
images with the class before and after as ``add_class.png`` in the run's folder.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_results import RESULTS, keep, origin

from lightning_genseg import GMMSeg
from lightning_genseg.data import FolderDataModule
from lightning_genseg.metrics import segmentation_metrics
from lightning_genseg.plots.pictures import grid, overlay

IGNORED = 255


def score(model, batches, classes):
    """IoU of each of the model's classes; the masks number `classes`."""
    table = torch.full((256,), IGNORED)
    for number, name in enumerate(classes):
        if name in model.all_class_names:
            table[number] = model.all_class_names.index(name)
    metrics = segmentation_metrics(model.num_classes, IGNORED)
    for batch in batches:
        with torch.no_grad():
            scores = model.maps_at_labels(batch)["scores"]
        metrics.update(scores.argmax(1), table[batch["mask"]])
    found = metrics.compute()["IoU"].tolist()
    return {
        name: iou if iou == iou else None
        for name, iou in zip(model.all_class_names, found, strict=True)
    }


def picture(samples, models, data):
    """Image, labels, and what each model says, in the data's colours."""
    rows = []
    for sample in samples:
        image = (sample["image"].permute(1, 2, 0) * 255).round().byte().numpy()
        masks = [sample["mask"]]
        for model in models.values():
            with torch.no_grad():
                batch = {key: sample[key][None] for key in ("image", "mask")}
                found = model.maps_at_labels(batch)["scores"]
            numbers = torch.tensor([data.class_names.index(n) for n in model.all_class_names])
            masks.append(numbers[found[0].argmax(0)])
        rows.append([image, *(overlay(image, mask.numpy(), data.palette) for mask in masks)])
    return grid(rows, ["image", "labels", *models])


def main():
    """Score, keep and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--shrinkage", type=float, default=0.5)
    parser.add_argument("--draws", type=int, default=1)
    args = parser.parse_args()
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    seed = config["seed_everything"]
    data = FolderDataModule(
        **config["data"]["init_args"]
        | {"unknown_classes": None, "sparse": None, "train_transform": None}
    )
    data.setup("fit")
    train = data.split_dataset("train", data.eval_transform)
    batches = list(data.val_dataloader())
    new = data.class_names.index(args.name)
    shown = [i for i in range(len(train)) if new in train[i]["mask"]]
    checkpoint = args.run / "checkpoints" / "last.ckpt"
    before = GMMSeg.load_from_checkpoint(checkpoint).eval()
    rows = [{"images": 0, "IoU": score(before, batches, data.class_names)}]
    for count in (1, 5, 20):
        for draw in range(args.draws):
            model = GMMSeg.load_from_checkpoint(checkpoint).eval()
            samples = [train[i] for i in random.Random(f"{seed}.{draw}").sample(shown, count)]
            masks = [(sample["mask"] == new).long() for sample in samples]
            images = [sample["image"] for sample in samples]
            model.add_class(images, masks, args.name, draw, args.shrinkage)
            rows.append(
                {"images": count, "draw": draw, "IoU": score(model, batches, data.class_names)}
            )
            print(f"{count} images, draw {draw}: {rows[-1]['IoU'][args.name]:.3f}", flush=True)
    known = args.run.parent.name + f"_{args.shrinkage}" * (args.shrinkage != 0.5)
    folder = RESULTS / "voc_animals" / "add_class" / known
    result = {"seed": seed, "class": args.name, "shrinkage": args.shrinkage}
    result |= {**origin(), "rows": rows}
    keep(folder / f"seed{seed}.json", result)
    val = data.split_dataset("val", data.eval_transform)
    drawn = [val[i] for i in range(len(val)) if new in val[i]["mask"]][:4]
    models = {"without it": before, f"with it, from {count} images": model}
    picture(drawn, models, data).save(args.run / "add_class.png")
    print(f"drawn as {args.run / 'add_class.png'}")


if __name__ == "__main__":
    main()
