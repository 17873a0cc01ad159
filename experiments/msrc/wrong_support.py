"""Does a few-shot run look at its supports? Its test, also with supports of another class.

    python experiments/msrc/wrong_support.py runs/msrc/cgmgm/fold0

The run's own data paths are used. Prints the mIoU over the classes of both, scored at the size of
the network's input: of the final answer, of the decoder's own before the base learner takes part,
and of the guidance alone.
"""

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_genseg import CGMGM
from lightning_genseg.data import EpisodesDataModule, FolderDataModule
from lightning_genseg.metrics import FewShotMeanIoU


def miou(model: CGMGM, episodes: Iterable[dict[str, Any]]) -> str:
    """As few-shot tests count it, at the size of the network's input."""
    metrics = {name: FewShotMeanIoU() for name in ("logits", "meta", "guidance")}
    for episode in episodes:
        with torch.no_grad():
            outputs = model.episode_outputs(episode)
        for name, metric in metrics.items():
            maps = model.to_image(outputs[name], episode["image"])
            found = maps[:, 0] > 0.5 if name == "guidance" else maps[:, 1] > maps[:, 0]
            metric.update(found, episode["mask"], episode["class_index"], episode["candidates"])
    final, decoder, guidance = (float(metric.compute()) for metric in metrics.values())
    return f"final {final:.3f}, decoder {decoder:.3f}, guidance {guidance:.3f}"


def main() -> None:
    """Print the numbers of both."""
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
    print(f"supports of the class    {miou(model, episodes)}")
    swapped = []
    for i, episode in enumerate(episodes):
        others = episodes[i + 1 :] + episodes[:i]
        other = next(x for x in others if x["class_index"] != episode["class_index"])
        supports = {key: value for key, value in other.items() if key.startswith("support")}
        swapped.append({**episode, **supports})
    print(f"supports of another one  {miou(model, swapped)}")


if __name__ == "__main__":
    main()
