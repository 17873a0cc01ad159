r"""Does a few-shot run look at its supports? Its test, also with supports of another class.

    python experiments/wrong_support.py runs/msrc/cgmgm/fold0
    python experiments/wrong_support.py runs/voc_animals/cgmgm/fold0/seed0 \
        --keep voc_animals/cgmgm/fold0

The run's own data paths are used. The other class is one of the same fold, or of the next where
the fold has but one. Prints the mIoU over the classes of both, scored at the size of the network's
input: of the final answer, of the decoder's own before the base learner takes part, and of the
guidance alone. `--keep NAME` writes them to ``results/NAME/wrong_support/seedN.json`` as well.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from make_results import RESULTS, keep, origin

from lightning_genseg import CGMGM
from lightning_genseg.data import EpisodesDataModule, FolderDataModule
from lightning_genseg.metrics import FewShotMeanIoU

OUTPUTS = {"final": "scores", "decoder": "meta", "guidance": "guidance"}


def first_episodes(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Of the test."""
    images = FolderDataModule(**options["data"]["init_args"])
    data = EpisodesDataModule(images, **{k: v for k, v in options.items() if k != "data"})
    data.prepare_data()
    data.setup("test")
    return list(islice(data.test_dataloader(), count))


def miou(model: CGMGM, episodes: list[dict[str, Any]]) -> dict[str, float]:
    """As few-shot tests count it, at the size of the network's input."""
    metrics = {name: FewShotMeanIoU() for name in OUTPUTS}
    for episode in episodes:
        with torch.no_grad():
            outputs = model.episode_outputs(episode)
        for name, metric in metrics.items():
            maps = model.to_image(outputs[OUTPUTS[name]], episode["image"])
            found = maps[:, 0] > 0.5 if name == "guidance" else maps[:, 1] > maps[:, 0]
            metric.update(found, episode["mask"], episode["class_index"], episode["candidates"])
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def main() -> None:
    """Print the numbers of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--keep", metavar="NAME")
    args = parser.parse_args()
    config = yaml.safe_load((args.run / "config.yaml").read_text())
    options = config["data"]["init_args"]
    model = CGMGM.load_from_checkpoint(
        args.run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    ).eval()
    episodes = first_episodes(options, args.episodes)
    if len({int(episode["class_index"]) for episode in episodes}) > 1:
        others = [
            next(x for x in episodes[i:] + episodes if x["class_index"] != own["class_index"])
            for i, own in enumerate(episodes)
        ]
    else:
        folds = json.loads(Path(options["folds"]).read_text())["folds"]
        following = (options["fold"] + 1) % len(folds)
        others = first_episodes({**options, "fold": following}, args.episodes)
    swapped = [
        {**episode, **{key: value for key, value in other.items() if key.startswith("support")}}
        for episode, other in zip(episodes, others, strict=True)
    ]
    found = {"own": miou(model, episodes), "another": miou(model, swapped)}
    for whose, scores in found.items():
        print(f"supports of {whose} class: {scores}")
    if args.keep:
        seed = config["seed_everything"]
        path = RESULTS / args.keep / "wrong_support" / f"seed{seed}.json"
        keep(path, {"seed": seed, "episodes": len(episodes), **origin(), **found})


if __name__ == "__main__":
    main()
