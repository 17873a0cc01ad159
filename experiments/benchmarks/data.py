"""What starting costs, what a cache of decoded images saves, and what the anomaly metrics do."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, peak
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from lightning_genseg.data import FolderDataModule, SyntheticScenes
from lightning_genseg.metrics import AnomalyMetrics

# --- start ---------------------------------------------------------------------------------------


def start(repeats: int) -> Iterator[Row]:
    """Processor time of imports and of the help over that of importing Lightning."""
    commands = {
        "import lightning.pytorch": ["-c", "import lightning.pytorch"],
        "import lightning_genseg": ["-c", "import lightning_genseg"],
        "genseg --help": ["-m", "lightning_genseg", "--help"],
    }
    least = dict.fromkeys(commands, float("inf"))
    for _ in range(repeats + 1):  # the first fills the caches of compiled code
        for name, command in commands.items():
            before = os.times()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            spent = after.children_user + after.children_system
            spent -= before.children_user + before.children_system
            least[name] = min(least[name], spent)
    base = least.pop("import lightning.pytorch")
    for (name, seconds), goal in zip(least.items(), ("≤ 1.05", "≤ 1.1"), strict=True):
        detail = f"{seconds:.2f} and {base:.2f} s"
        obstacle = "cv2, huggingface_hub and jsonargparse, and the parsers of all commands"
        yield Row(f"{name} over import lightning.pytorch", seconds / base, goal, detail, obstacle)


# --- loaders -------------------------------------------------------------------------------------


def cache(repeats: int, images: int = 8) -> Iterator[Row]:
    """A second epoch over Cityscapes-sized PNGs, in one process, from files and from the cache."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        scenes = SyntheticScenes(images, (1024, 2048))
        for folder in ("images/train", "masks/train", "images/val", "masks/val"):
            (root / folder).mkdir(parents=True)
        for index in range(images):
            for split in ("train", "val"):
                image = Image.fromarray(scenes.read_pixels(index))
                image.save(root / f"images/{split}/{index}.png")
                mask = Image.fromarray(scenes.read_mask_labels(index))
                mask.save(root / f"masks/{split}/{index}.png")
        least = {}
        for kind in ("none", "memmap"):
            data = FolderDataModule(
                root=root,
                num_classes=scenes.num_classes,
                crop_size=(768, 768),
                batch_size=2,
                num_workers=0,
                cache=kind,
                cache_dir=root / "cache",
            )
            data.setup("fit")
            loader, times = data.train_dataloader(), []
            for _ in range(max(2, repeats // 2) + 1):
                began = time.process_time()
                for _ in loader:
                    pass
                times.append(time.process_time() - began)
            least[kind] = min(times[1:])
        what = (
            "second epoch over 1024 x 2048 PNGs, crops of 768 x 768: files over data.cache memmap"
        )
        detail = f"{images / least['none']:.0f} and {images / least['memmap']:.0f} images a second"
        yield Row(what, least["none"] / least["memmap"], "≥ 3", f"{detail} of one core")


# --- anomaly metrics -----------------------------------------------------------------------------


def anomaly(images: int = 3) -> Iterator[Row]:
    """Error against scikit-learn's exact values, and memory, on images of 1024 x 2048 pixels."""

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        labels = (torch.rand(1024, 2048, generator=generator) < 0.003).long()
        noise = torch.randn(1024, 2048, generator=generator) + 2 * labels
        return torch.sigmoid(4 * noise - 8), labels  # one minus p: most crowd at 0, some at 1

    pairs, metrics = [draw(seed) for seed in range(images)], AnomalyMetrics()
    metrics.update(*pairs[0])

    def rest() -> None:
        for pair in pairs[1:]:
            metrics.update(*pair)

    added = peak(rest, "cpu")
    found = {name: value.item() for name, value in metrics.compute().items()}
    scores, labels = (torch.cat([p[i].flatten() for p in pairs]).numpy() for i in (0, 1))
    exact = {
        "AUROC": roc_auc_score(labels, scores),
        "AP": average_precision_score(labels, scores),
    }
    for name, value in exact.items():
        what = f"error of {name} by bins, {scores.size / 1e6:.0f} million pixels"
        detail = f"{found[name]:.5f} and exactly {value:.5f}; {added:.0f} MB a pass"
        yield Row(what, abs(found[name] - value), "≤ 0.002", detail, "the width of the bins")
