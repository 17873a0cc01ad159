"""GMMSeg on two gloo processes: `python -m tests.methods.ddp_run FOLDER CASE ...`."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_genseg import GMMSeg
from lightning_genseg.data import SyntheticScenes
from lightning_genseg.data.loaders import collate
from lightning_genseg.mixtures import Processes
from tests.contract import in_groups

STEPS, BATCH = 6, 4  # images per step, of all processes together
CASES: dict[str, dict[str, Any]] = {
    "ring": {"memory": "ring"},
    "decay": {"memory": "decay"},
    "loops": {"assignment": "em", "loops": 2, "memory_filter": "correct", "interval": 2},
    "posthoc": {"train": "posthoc"},
}


class Features(nn.Module):
    """No batch statistics, which would differ between processes; stride 4, 16 channels."""

    out_channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


class Recorded(GMMSeg):
    """Keeps the mixture after every update, and how many numbers were exchanged for it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.record: dict[str, list[Any]] = {"mixtures": [], "exchanged": [], "losses": []}
        self.numbers = 0

    def update_mixture(self, *arguments: Any, **keywords: Any) -> None:
        self.numbers, processes = 0, Processes.found()

        def counted(tensor: Tensor) -> Tensor:
            self.numbers += tensor.numel()
            assert processes is not None
            return processes.gather(tensor)

        if processes is not None:
            keywords["processes"] = Processes(counted, processes.rank)
        super().update_mixture(*arguments, **keywords)
        state = {name: value.clone() for name, value in self.head.mixture.state_dict().items()}
        self.record["mixtures"].append(state)
        self.record["exchanged"].append(self.numbers)


class Scenes(LightningDataModule):
    """Batch k of W processes holds, in the order of the ranks, batch k of one process."""

    def part(self, seed: int, count: int) -> DataLoader[Any]:
        assert self.trainer is not None
        dataset = SyntheticScenes(count, (64, 64), seed)
        share = BATCH // self.trainer.world_size
        mine = [i for i in range(count) if i % BATCH // share == self.trainer.global_rank]
        samples = [dataset[i] for i in mine]
        for sample in samples:  # with equally many labels everywhere, the mean of means is the mean
            sample["mask"][sample["mask"] == 255] = 0
        return DataLoader(samples, batch_size=share, collate_fn=collate)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.part(0, STEPS * BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.part(1, 2 * BATCH)


def run(case: str, folder: Path, processes: int) -> None:
    seed_everything(0, verbose=False)
    model = Recorded(
        **in_groups(
            **{
                "num_classes": 6,
                "features": Features(),
                "components": 2,
                "embedding_dim": None,
                "dropout": 0.0,
                "component_loss_weight": 0.0,  # its targets are each process's own
                "interval": 1,
                "mean_momentum": 0.5,
                "memory_size": 40,
                "samples_per_component": 7,
                "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
                **CASES[case],
            }
        )
    )
    monitor = ModelCheckpoint(folder / case, f"{processes}", monitor="val_mIoU", mode="max")
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(model, Scenes())
    assert model.head.memory is not None
    broadcast = sum(buffer.numel() for buffer in trainer.strategy.model.buffers())
    torch.save(
        {
            **model.record,
            "moments": tuple(model.head.memory.moments()),
            "parameters": dict(model.named_parameters()),
            "val_mIoU": trainer.callback_metrics["val_mIoU"],
            "broadcast": broadcast,
        },
        folder / f"{case}_{processes}_{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]), 2)
