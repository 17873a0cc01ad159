"""What one, two or three gloo processes find: `python -m tests.methods.processes_run FOLDER N`.

With `spawn` in place of N: the weights of two processes that `ddp_spawn` starts.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_genseg import AGMM, CGMGM, GMMSeg, SoftmaxSegmenter
from lightning_genseg.data import SyntheticScenes, SyntheticScenesDataModule
from lightning_genseg.data.loaders import CheckedLoader, collate
from lightning_genseg.methods.fewshot.options import DecoderOptions
from lightning_genseg.ops.processes import true_anywhere
from tests.contract import NUM_CLASSES, in_groups, with_sparse_keys
from tests.methods.ddp_run import Features

IMAGES = 5  # neither two nor three processes share them equally


def make(method: type, **arguments: Any) -> Any:
    seed_everything(0, verbose=False)
    arguments = {"num_classes": NUM_CLASSES, "features": Features(), **arguments}
    return method(optimizer=partial(torch.optim.SGD, lr=0.1), **arguments)


def trainer(folder: Path, processes: int, strategy: str = "ddp", **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **arguments,
    )


def scores(folder: Path, processes: int, batch_size: int) -> dict[str, float]:
    """Of fit's validation, `validate` and `test`, the last with anomalies."""
    data = SyntheticScenesDataModule(
        size=(48, 64),
        crop_size=(48, 64),
        train_length=6,
        val_length=IMAGES,
        test_length=IMAGES,
        batch_size=1,
        eval_batch_size=batch_size,
        num_workers=0,
        held_out=True,
    )
    model = make(SoftmaxSegmenter, anomaly_score="energy")
    run = trainer(folder, processes, max_epochs=1, limit_train_batches=1)
    model.optimizer = partial(torch.optim.SGD, lr=0.0)
    run.fit(model, data)
    found = {f"fit {name}": float(x) for name, x in run.callback_metrics.items() if "val_" in name}
    for verb in ("validate", "test"):
        result = getattr(trainer(folder, processes), verb)(model, data, verbose=False)[0]
        found |= {f"{verb} {name}": value for name, value in result.items()}
    return {name: value for name, value in found.items() if value == value}


class Episodes(Dataset[dict[str, Any]]):
    """Queries whose support is the image before."""

    def __init__(self, count: int) -> None:
        self.scenes = [SyntheticScenes(count, (64, 64), 0)[i] for i in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        query, support = self.scenes[index], self.scenes[index - 1]
        whole = torch.ones(64, 64, dtype=torch.bool)
        return {
            **query,
            "mask": (query["mask"] == 1).long(),
            "valid": whole,
            "support_image": support["image"][None],
            "support_mask": (support["mask"] == 1).long()[None],
            "support_valid": whole[None],
            "class_index": 1 + index % 2,
        }


def episodes(folder: Path, processes: int) -> dict[str, float]:
    seed_everything(0, verbose=False)
    model = CGMGM(encoder="tu-test_resnet", ensemble=False, decoder=DecoderOptions(width=8))
    loader = CheckedLoader(Episodes(IMAGES), batch_size=1, collate_fn=collate)
    run = trainer(folder, processes)
    return dict(run.test(model, loader, verbose=False)[0])


class Uneven(LightningDataModule):
    """Batches of two images, of which the second has few labels, and none in every other batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        samples = [with_sparse_keys(SyntheticScenes(8, (64, 64), 0)[i]) for i in range(8)]
        for number, sample in enumerate(samples):
            labelled = torch.zeros(64, 64, dtype=torch.bool)
            if number % 2 == 0:
                labelled[::3, ::3] = True
            elif number % 4 == 1:
                labelled[::16, ::16] = True
            sample["unlabelled"] = ~labelled
            sample["mask"] = sample["mask"].masked_fill(~labelled, 255)
            sample["image_classes"][:] = labelled.any()
        mine = samples[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=2 // self.trainer.world_size, collate_fn=collate)


SPARSE: dict[str, Any] = {
    "softmax": lambda: make(SoftmaxSegmenter, dropout=0.0),
    "agmm": lambda: make(AGMM, dropout=0.0, contrast_weight=0.0),
    "gmmseg": lambda: make(
        GMMSeg,
        **in_groups(
            components=1,
            embedding_dim=None,
            dropout=0.0,
            memory_size=50,
            label_reduction="labelled",
        ),
    ),
}


def weights(
    folder: Path, processes: int, name: str, strategy: str = "ddp"
) -> dict[str, torch.Tensor]:
    model = SPARSE[name]()
    whole = {"max_epochs": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    run = trainer(folder, processes, strategy, **whole)
    run.fit(model, Uneven())
    return {key: value.clone() for key, value in model.state_dict().items()}


def own_project(folder: Path) -> dict[str, torch.Tensor]:
    """The ten lines of docs/in_your_project.md, in every process of a group."""
    from lightning_genseg import EMOptions, GMMHead, MixtureOptions

    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    em = EMOptions(memory="ring", memory_size=50, interval=1, memory_start="random")
    torch.manual_seed(0)
    head = GMMHead(8, num_classes=3, mixture=MixtureOptions(2, 8), em=em)
    wrapped = nn.parallel.DistributedDataParallel(Loss(head))
    torch.manual_seed(rank)  # from here on each process has its own
    ring = GMMHead(8, num_classes=3, mixture=MixtureOptions(2, 8), em=em).memory
    assert ring is not None
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        features, mask = torch.randn(2, 8, 8, 8), torch.randint(3, (2, 32, 32))
        losses = wrapped(features, mask)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        head.update_mixture(losses["embedding"], mask, losses["assignment"])
    return {**head.mixture.state_dict(), "ring": ring.features}


class Loss(nn.Module):
    """DDP calls `forward`."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *arguments: Any) -> Any:
        return self.head.compute_loss(*arguments)


def run(folder: Path, processes: int) -> None:
    folder.mkdir(exist_ok=True)
    found = {f"batches of {n}": scores(folder, processes, n) for n in (1, 2)}
    found["episodes"] = episodes(folder, processes)
    rank = torch.distributed.get_rank() if processes > 1 else 0
    states = {name: weights(folder, processes, name) for name in SPARSE if processes < 3}
    if processes > 1:
        states["own project"] = own_project(folder)
        states["flags"] = {"anywhere": true_anywhere(torch.arange(3) == rank)}
    torch.save(states, folder / f"{processes}_{rank}.pt")
    (folder / f"{processes}_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, task = Path(sys.argv[1]), sys.argv[2]
    if task == "spawn":
        torch.save(weights(place, 2, "gmmseg", "ddp_spawn"), place / "spawn.pt")
    else:
        run(place, int(task))
