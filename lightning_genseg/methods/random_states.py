"""The random numbers of training, which go on where an interrupted run has left them."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

State = dict[str, Any]


class RandomStates(Callback):
    """Keeps the states of Python's, NumPy's and torch's generators, of every process.

    They are in each checkpoint that training can go on from, and are set before its next batch.
    After validation they are what they were before: whether a checkpoint is written earlier or
    later makes no difference. A run that goes on with another number of processes draws anew.
    """

    def __init__(self) -> None:
        self._loaded: list[State] | None = None
        self._after_batch: State | None = None

    def state_dict(self) -> State:
        """States of all processes, which call this together."""
        mine = _get()
        version, numbers, gauss = mine["python"]
        name, keys, *rest = mine["numpy"]
        # As a checkpoint that is loaded safely may hold them.
        mine |= {"python": [version, list(numbers), gauss], "numpy": [name, keys.tolist(), *rest]}
        states: list[Any] = [mine]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, mine)
        return {"processes": states}

    def load_state_dict(self, state_dict: State) -> None:
        """Keep what is to be set when training goes on."""
        self._loaded = state_dict["processes"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the states that were loaded: what has started the loaders has drawn as well."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and len(loaded) == trainer.world_size:
            _set(loaded[trainer.global_rank])

    def on_train_batch_end(self, *_: Any) -> None:
        """Remember the states."""
        self._after_batch = _get()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to them."""
        if self._after_batch is not None:
            _set(self._after_batch)


def _get() -> State:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 - the global one
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set(state: State) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
