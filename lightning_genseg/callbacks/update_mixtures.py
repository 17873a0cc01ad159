"""EM in a Trainer whose module knows nothing of mixtures."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_genseg.errors import GenSegError, listed
from lightning_genseg.methods.gmmseg.head import GMMHead
from lightning_genseg.methods.gmmseg.module import GMMSeg
from lightning_genseg.methods.gmmseg.steps import StepCallback


class UpdateMixtures(StepCallback):
    """Take the EM step of every `GMMHead` in any LightningModule, after each training batch.

    What a head has seen last in the batch is taken, whoever called it, and the labels from the
    batch: call it on labelled images last, and where `training_step` changes the images, as by
    mirroring, give `labels` as a function. With gradient accumulation EM runs once a step of the
    optimiser (of each, where there are several); the batches before are remembered. EM's memory is
    in the checkpoints. `head.eval()` leaves its mixture as it is. `GMMSeg` itself does not need the
    callback, but a GMMSeg inside another module does.

    Args:
        labels: where the masks B x H x W are in a batch: a key, the position in a tuple, or a
            function of what `training_step` has returned and the batch.

    Raises:
        GenSegError: while training: there is no head with EM, or no such labels.

    Example:
        >>> trainer = Trainer(callbacks=[UpdateMixtures(labels=1)], logger=False)  # (image, mask)
    """

    def __init__(self, labels: str | int | Callable[[Any, Any], Tensor] = "mask") -> None:
        super().__init__()
        self.labels = labels
        self._owners: dict[str, GMMHead | GMMSeg] = {}
        self._seen: dict[str, Tensor] = {}
        self._idle: set[str] = set()  # heads that no batch of the epoch has called
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the heads; they forget what a run before has left."""
        if isinstance(pl_module, GMMSeg):
            raise GenSegError("GMMSeg runs EM itself: leave the callback UpdateMixtures out.")
        if stage != "fit":
            return
        inside = {
            id(module.head): module for module in pl_module.modules() if isinstance(module, GMMSeg)
        }
        self._owners = {
            name: inside.get(id(module), module)
            for name, module in pl_module.named_modules()
            if isinstance(module, GMMHead) and module.memory is not None
        }
        if not self._owners:
            raise GenSegError(
                f"{type(pl_module).__name__} has no GMMHead that learns by EM: build one into it, "
                "or leave the callback UpdateMixtures out."
            )
        for name in self._owners:  # before a checkpoint brings its own
            self._head(name).forget_batches()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what the heads see."""
        super().on_train_start(trainer, pl_module)
        for name in self._owners:
            projection = self._head(name).projection
            self._hooks.append(projection.register_forward_hook(partial(self._see, name)))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:
            with torch.no_grad():  # now: the optimiser is about to change the normalisation
                self._seen[name] = self._head(name).normalized(output.detach())

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """EM, on all processes together."""
        mask = self._mask(outputs, batch)
        stepped = self.took_step(trainer)
        for name, owner in self._owners.items():
            if name in self._seen:
                self._idle.discard(name)
                to_the_end = isinstance(owner, GMMSeg) and owner.posthoc
                due = self.is_due(trainer, self._head(name).em.interval, to_the_end)
                owner.update_mixture(
                    self._seen.pop(name),
                    mask,
                    remember_only=not due,
                    accumulating=not stepped,
                )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See which heads are called."""
        self._idle = {name for name in self._owners if self._head(name).training}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of heads whose mixtures could not learn."""
        for name in sorted(self._idle):
            rank_zero_warn(
                f"no training batch has gone through the projection of the head '{name}', so that "
                "its mixture did not learn: call head(features), head.embed or head.compute_loss "
                "(and compile the network, not the head)."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look no longer."""
        self._look_away()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Look no longer."""
        self._look_away()

    def _look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """EM's memory, which no state dict of the heads holds."""
        return {name: self._head(name).memory_state() for name in self._owners}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        for name, state in state_dict.items():
            if name in self._owners:
                self._head(name).load_memory_state(state)

    def _head(self, name: str) -> GMMHead:
        owner = self._owners[name]
        return owner if isinstance(owner, GMMHead) else owner.head

    def _mask(self, outputs: Any, batch: Any) -> Tensor:
        if callable(self.labels):
            return self.labels(outputs, batch)
        known = batch.keys() if isinstance(batch, Mapping) else range(len(batch))
        if self.labels not in known or not isinstance(batch[self.labels], Tensor):
            raise GenSegError(
                f"UpdateMixtures looks for the masks at {self.labels!r} of the batch, which has "
                f"{listed(known)}: set labels to where they are."
            )
        mask: Tensor = batch[self.labels]
        return mask
