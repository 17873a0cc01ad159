"""Where GMMSeg's means begin: frames at half size, and k-means as a start; `starts.sh` runs it all.

    python experiments/idd_lite/starts.py PATH/idd_lite runs/idd_lite_half/frames

writes images and masks at half their size, with the two lists.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from lightning_genseg.mixtures.em import fit


class KMeansStart(Callback):
    """The means of the first batch's classes, by k-means, before the first EM.

    `apart` takes the mean over all classes away first: early on all classes lie together.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first update of the mixture."""
        head = pl_module.head
        update = head.update_mixture

        def begin(embedding: torch.Tensor, mask: torch.Tensor, *_: Any, **kwargs: Any) -> None:
            head.update_mixture = update
            x, labels = embedding.movedim(1, -1).flatten(0, 2), head.labels(mask, embedding)
            options = head.options
            found = fit(
                x,
                labels,
                num_classes=head.num_classes,
                components=options.components,
                covariance=options.covariance,
                assignment=head.em.assignment,
                variance_floor=options.variance_floor,
                unit_means=False,
                seed=0,
            ).means.float()
            counts = torch.bincount(labels[labels < head.num_classes], minlength=head.num_classes)
            present = counts > options.components
            if self.apart:
                found = found - found[present].flatten(0, 1).mean(0)
            head.mixture.means.data[present] = F.normalize(found, dim=-1)[present]
            update(embedding, mask, **kwargs)  # assigned anew, by these means

        head.update_mixture = begin


def halve(source: Path, target: Path) -> None:
    """Write the frames and masks of `source` at half their size."""
    for kind, how in (("images", Image.Resampling.LANCZOS), ("masks", Image.Resampling.NEAREST)):
        (target / kind).mkdir(parents=True, exist_ok=True)
        for path in (source / kind).iterdir():
            image = Image.open(path)
            half = image.resize((image.width // 2, image.height // 2), how)
            half.save(target / kind / f"{path.stem}.png")
    for name in ("train.txt", "val.txt"):
        (target / name).write_text((source / name).read_text())


if __name__ == "__main__":
    halve(Path(sys.argv[1]), Path(sys.argv[2]))
