"""When EM takes its steps in a run of a Trainer."""

from lightning.pytorch import Callback, LightningModule, Trainer


class StepCallback(Callback):
    """What EM asks of a run: whether a batch has ended a step of the optimiser, and which one."""

    def __init__(self) -> None:
        self._before = self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run begins, perhaps with a checkpoint."""
        self._before = self._steps = trainer.global_step

    def took_step(self, trainer: Trainer) -> bool:
        """Whether the optimiser has gone on since the last call; called once a batch."""
        self._before, self._steps = self._steps, trainer.global_step
        return self._steps > self._before

    def is_due(self, trainer: Trainer, interval: int, to_the_end: bool) -> bool:
        """Whether the batch took one of every `interval` steps, from the first.

        With several optimisers, which a batch may step in turn, each counts.

        Args:
            trainer: of the run.
            interval: between two M-steps, in steps of the optimiser.
            to_the_end: whether the last step of the training counts as well: a post-hoc mixture is
                all that is learned, and no batch may be left over.
        """
        if (self._steps - 1) // interval > (self._before - 1) // interval:
            return True
        return to_the_end and self._steps > self._before and _is_last(trainer)


def _is_last(trainer: Trainer) -> bool:
    """Whether training ends with this batch."""
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
