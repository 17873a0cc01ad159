"""Learning rate schedules."""

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_genseg.errors import GenSegError


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
        ValueError: names the argument and its limits.
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
        if total_iters < 1:
            raise GenSegError(f"total_iters is {total_iters}; it must be at least 1.")
        for name, value in (("power", power), ("warmup_iters", warmup_iters), ("min_lr", min_lr)):
            if value < 0:
                raise GenSegError(f"{name} is {value}; it must not be negative.")
        if not 0 <= warmup_start_factor <= 1:
            raise GenSegError(
                f"warmup_start_factor is {warmup_start_factor}; it must be between 0 and 1."
            )
        self.total_iters, self.power, self.min_lr = total_iters, power, min_lr
        self.warmup_iters, self.warmup_start_factor = warmup_iters, warmup_start_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the groups at iteration `last_epoch`; none of them depends on the rate before."""
        decay = max(0.0, 1 - self.last_epoch / self.total_iters) ** self.power
        warmup = 1.0
        if self.last_epoch < self.warmup_iters:
            start = self.warmup_start_factor
            warmup = start + (1 - start) * self.last_epoch / self.warmup_iters
        return [warmup * (self.min_lr + (lr - self.min_lr) * decay) for lr in self.base_lrs]
