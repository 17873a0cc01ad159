"""Optimiser and learning-rate schedule: a module's arguments, and the defaults."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_genseg.arguments import check_arguments, unknown_argument
from lightning_genseg.errors import GenSegError
from lightning_genseg.metrics.segmentation import better

# timm's, smp's and mmsegmentation's names: absolute_pos_embed, relative_position_bias_table,
# rel_pos_h, attention_biases, pos_block, ...
_POSITION = re.compile(
    r"(^|[._])(pos_(emb|block)|rel_pos|relative_pos|position_(bias|emb)|attention_biases)"
)

_SCHEDULE = {"last_epoch", "lr_lambdas", "_schedulers"}  # what PyTorch's cannot be restored without


class OptimisedModule(LightningModule):
    """A LightningModule whose optimiser and schedule are arguments.

    A schedule that waits for a plateau follows our scores in the direction that is better, whatever
    its `mode`. A resumed run goes on with the checkpoint's optimiser and its own schedule.

    Args:
        optimizer: makes the optimiser from parameter groups; AdamW with lr 1e-4 when left out.
        lr_scheduler: makes the schedule, stepped every iteration (for a plateau, every epoch);
            polynomial decay with power 0.9 to the end of the run when left out.
        head_lr_factor: learning rate of everything but the encoder, as a multiple of the encoder's.
        decay_norms: whether weight decay also applies to vectors (norms and biases) and to position
            parameters (embeddings of positions, tables of relative position biases).
    """

    def __init__(
        self,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        head_lr_factor: float = 1.0,
        decay_norms: bool = True,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise TypeError(unknown_argument(type(self), name))
        check_arguments(OptimisedModule.__init__, locals(), head_lr_factor="[0, inf)")
        super().__init__()
        # The subclass that saves the other arguments does not see these two where nobody gave them.
        self.save_hyperparameters("head_lr_factor", "decay_norms")
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.head_lr_factor, self.decay_norms = head_lr_factor, decay_norms
        self._resumed: dict[str, Any] | None = None  # what the checkpoint says of its optimiser
        self._schedule: dict[str, Any] = {}  # arguments of the schedule
        self._scheduled: int | None = None  # groups of the optimiser that it sets the rates of

    def encoder_parameters(self) -> set[nn.Parameter]:
        """Parameters that learn at the optimiser's own rate; all others belong to the head."""
        return set()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by encoder or head and by decayed or not; no empty group."""
        inside = self.encoder_parameters()
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decayed = self.decay_norms or (parameter.ndim > 1 and not _POSITION.search(name))
                groups.setdefault((parameter in inside, decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "name": f"{'encoder' if encoder else 'head'}{'' if decayed else '_no_decay'}",
                **({} if decayed else {"weight_decay": 0.0}),
            }
            for (encoder, decayed), parameters in groups.items()
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The given optimiser and schedule, or the defaults of the class docstring."""
        groups = self.parameter_groups()
        if self.optimizer is None:
            optimizer: Optimizer = AdamW(groups, lr=1e-4, weight_decay=0.01)
        else:
            with _sentence("optimizer"):
                optimizer = self.optimizer(groups)
                for name, value in (pair for g in optimizer.param_groups for pair in g.items()):
                    if isinstance(value, float) and not math.isfinite(value):  # SGD takes NaN
                        raise GenSegError(f"optimizer.{name} is {value}; it must be finite.")
        for group in optimizer.param_groups:
            if group["name"].startswith("head"):
                group["lr"] = group["lr"] * self.head_lr_factor
        if self.lr_scheduler is None:
            scheduler: LRScheduler | ReduceLROnPlateau = LambdaLR(optimizer, self._remaining)
        else:
            with _sentence("lr_scheduler"):
                scheduler = self.lr_scheduler(optimizer)
        how: dict[str, Any] = {"interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):  # Lightning's own class has a monitor
            how = {"monitor": getattr(scheduler, "monitor", "val_mIoU")}
            mode = better(how["monitor"])
            if mode is not None and mode != scheduler.mode:
                scheduler.mode = mode
                scheduler.best = scheduler.mode_worse = math.inf if mode == "min" else -math.inf
        names = signature(type(scheduler)).parameters.keys() - {"optimizer", "last_epoch"}
        self._schedule = {key: vars(scheduler)[key] for key in names & vars(scheduler).keys()}
        self._scheduled = len(optimizer.param_groups)
        schedule = {"scheduler": scheduler, **how}
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # type: ignore[return-value]

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """As Lightning's, with a sentence where a schedule has an end and the run goes on.

        Groups that a callback has added to the optimiser (`BackboneFinetuning`) are the callback's:
        most schedules would stumble over them, or set their rates a second time.
        """
        optimizer = scheduler.optimizer
        groups = optimizer.param_groups
        optimizer.param_groups = groups[: self._scheduled]
        try:
            with _sentence("lr_scheduler"):
                super().lr_scheduler_step(scheduler, metric)
        finally:
            optimizer.param_groups = groups

    def on_fit_start(self) -> None:
        """Compare the optimiser with the checkpoint's, before its state is restored.

        Not earlier: `BackboneFinetuning` restores its groups only now, and leaves them frozen.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups[self._scheduled or 0 :]:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        _compare(optimizer, resumed)
        configs = self.trainer.lr_scheduler_configs
        for config, state in zip(configs, resumed["schedules"], strict=False):
            if lacking := config.scheduler.state_dict().keys() & _SCHEDULE - state.keys():
                raise GenSegError(
                    f"'{self.trainer.ckpt_path}' holds no {', '.join(sorted(lacking))} of a "
                    f"{type(config.scheduler).__name__}, this run's schedule: give the "
                    "lr_scheduler that it was trained with."
                )

    def on_train_start(self) -> None:
        """Let a resumed schedule have the arguments of this run, and its rate at this step."""
        for config in () if self._trainer is None else self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            kept = vars(scheduler)
            changed = any(kept[key] != value for key, value in self._schedule.items())
            kept.update(self._schedule)
            if not self.trainer.global_step:
                continue
            # The rates in the checkpoint are those of its own end, perhaps 0.
            rates: list[float | Tensor] = []
            if type(scheduler) is LambdaLR:
                functions = zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True)
                rates = [rate * function(scheduler.last_epoch) for function, rate in functions]
            elif changed and isinstance(scheduler, WarmupPolynomialLR):
                rates = scheduler.get_lr()
            elif changed and hasattr(scheduler, "_get_closed_form_lr"):
                rates = scheduler._get_closed_form_lr()
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate
            going = self.trainer.global_step < self.trainer.estimated_stepping_batches
            if going and not any(group["lr"] for group in scheduler.optimizer.param_groups):
                rank_zero_warn(
                    f"the run goes on at step {self.trainer.global_step} with a learning rate of "
                    "0: the schedule has ended; give an lr_scheduler for all steps."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the optimiser's class."""
        if checkpoint.get("optimizer_states"):
            checkpoint["optimizer"] = type(self.trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a run that goes on has to compare."""
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self._resumed = None
        if fitting and checkpoint.get("optimizer_states"):
            self._resumed = {
                "optimizer": checkpoint.get("optimizer"),
                "groups": checkpoint["optimizer_states"][0]["param_groups"],
                "schedules": checkpoint["lr_schedulers"],
            }

    def _remaining(self, step: int) -> float:
        # Only asked for when training has begun: the number of steps makes Lightning build the
        # training loader, and one built before a checkpoint is restored never hears where it was.
        if step == 0:
            return 1.0
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise GenSegError(
                "The default schedule decays to the end of the run, and this run has none; set "
                "trainer.max_epochs or trainer.max_steps, or give an lr_scheduler."
            )
        return float(max(0.0, 1 - step / steps) ** 0.9)


@contextmanager
def _sentence(argument: str) -> Iterator[None]:
    """What PyTorch has to say of an optimiser's or a schedule's arguments."""
    try:
        yield
    except GenSegError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise GenSegError(
            f"{argument} cannot be used ({error}): correct its arguments, model.{argument}."
        ) from error


def _compare(optimizer: Optimizer, resumed: dict[str, Any]) -> None:
    """Refuse the state of another optimiser; tell which options of the checkpoint's go on."""
    name, theirs, mine = type(optimizer).__name__, resumed["optimizer"], optimizer.param_groups
    if theirs is None and mine[0].keys() - resumed["groups"][0].keys():  # of an older version
        theirs = "another optimizer"
    if theirs not in (None, name):
        raise GenSegError(
            f"the checkpoint was trained with {theirs} and this run has {name}: give the same "
            "optimizer to go on."
        )
    ours, saved = ([len(group["params"]) for group in x] for x in (mine, resumed["groups"]))
    if ours != saved:
        raise GenSegError(
            f"the checkpoint's optimizer has groups of {saved} parameters, this run's of {ours}: "
            "give decay_norms and the network as in the checkpoint."
        )
    for group, old in zip(mine, resumed["groups"], strict=True):
        for key in ("initial_lr", "weight_decay"):
            if key in group and old.get(key, group[key]) != group[key]:
                rank_zero_warn(
                    f"the run goes on with {key} {old[key]} of {group.get('name', 'a group')} as "
                    f"in the checkpoint, not with {group[key]}."
                )


class WarmupPolynomialLR(LRScheduler):
    """Linear warm-up times polynomial decay, stepped every iteration.

    lr(t) = (min_lr + (lr - min_lr) (1 - t / total_iters)^power) * (r + (1 - r) min(t /
    warmup_iters, 1)) with r = `warmup_start_factor`: the "poly" policy of mmcv 1, which
    mmsegmentation's recipes before version 1.0 follow. The decay does not wait for the warm-up.

    Args:
        optimizer: whose learning rates (lr) are set.
        total_iters: iterations until the decay has ended.
        power: 1 is linear.
        warmup_iters: iterations of the warm-up; 0 has none.
        warmup_start_factor: r, share of the learning rate that the first iteration gets.
        min_lr: what remains at the end, the same for all groups of the optimiser.
        last_epoch: last iteration done; -1 starts anew.

    Raises:
        GenSegError: names the argument and its limits.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iters: int,
        power: float = 1.0,
        warmup_iters: int = 0,
        warmup_start_factor: float = 1e-6,
        min_lr: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        check_arguments(
            WarmupPolynomialLR.__init__,
            locals(),
            total_iters="[1, inf)",
            power="[0, inf)",
            warmup_iters="[0, inf)",
            warmup_start_factor="[0, 1]",
            min_lr="[0, inf)",
        )
        self.total_iters, self.power, self.min_lr = total_iters, power, min_lr
        self.warmup_iters, self.warmup_start_factor = warmup_iters, warmup_start_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the groups at iteration `last_epoch`, whatever they were before."""
        decay = max(0.0, 1 - self.last_epoch / self.total_iters) ** self.power
        warmup = 1.0
        if self.last_epoch < self.warmup_iters:
            start = self.warmup_start_factor
            warmup = start + (1 - start) * self.last_epoch / self.warmup_iters
        return [warmup * (self.min_lr + (lr - self.min_lr) * decay) for lr in self.base_lrs]
