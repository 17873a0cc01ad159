"""Does a few-shot run look at its supports? Its test episodes, and the same with supports of another class.

    python experiments/msrc/wrong_support.py runs/msrc/cgmgm/fold0

The run's own data paths are used. Prints the mIoU over the classes of both, scored at the size of the network's input.
"""

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_genseg import CGMGM
from lightning_genseg.datamodules import EpisodesDataModule, FolderDataModule
from lightning_genseg.metrics.few_shot import FewShotMeanIoU


def miou(model: CGMGM, episodes: Iterable[dict[str, Any]]) -> float:
    """As few-shot tests count it, at the size of the network's input."""
    metric = FewShotMeanIoU()
    for episode in episodes:
        with torch.no_grad():
            logits = model.to_image(model.episode_outputs(episode)["logits"], episode["image"])
        found = logits[:, 1] > logits[:, 0]
        metric.update(found, episode["mask"], episode["class_index"], episode["candidates"])
    return float(metric.compute())


def main() -> None:
    """Print both numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--episodes", type=int, default=60)
    args = parser.parse_args()
    options = yaml.safe_load((args.run / "config.yaml").read_text())["data"]["init_args"]
    images = FolderDataModule(**options.pop("data")["init_args"])
    data = EpisodesDataModule(images, **options)
    data.prepare_data()
    data.setup("test")
    model = CGMGM.load_from_checkpoint(
        args.run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    ).eval()
    episodes = list(islice(data.test_dataloader(), args.episodes))
    print(f"supports of the class    {miou(model, episodes):.3f}")
    swapped = []
    for i, episode in enumerate(episodes):
        others = episodes[i + 1 :] + episodes[:i]
        other = next(x for x in others if x["class_index"] != episode["class_index"])
        supports = {key: value for key, value in other.items() if key.startswith("support")}
        swapped.append({**episode, **supports})
    print(f"supports of another one  {miou(model, swapped):.3f}")


if __name__ == "__main__":
    main()
