"""What EM remembers of past batches: moments of the last features of every component.

A memory is training state, not part of the model: it is no `nn.Module`, appears in no `state_dict`
of one, is not broadcast by DDP, and follows the device of the features that it is given.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.ops.processes import Processes

# An outer product per feature is D x D; this bounds how many are held at once.
_MAX_OUTER_ELEMENTS = 2**24


class Estimate(NamedTuple):
    """Gaussians of groups of features: their weights, means and (co)variances.

    `counts` ...; `means` ... x D; `covariances` ... x D variances, or full ... x D x D.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor


def central(second: Tensor, means: Tensor) -> Tensor:
    """(Co)variances about the means, from mean squares ... x D or mean products ... x D x D."""
    if second.ndim > means.ndim:
        return second - means[..., :, None] * means[..., None, :]
    return (second - means.square()).clamp_min(0)


class Moments(NamedTuple):
    """Weight, sum and sum of squares of the features of each of G groups.

    `counts` G; `first` G x D; `second` G x D, or G x D x D for full covariances.
    """

    counts: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, groups: int, dim: int, full: bool, device: torch.device) -> "Moments":
        """Nothing seen yet, in float64: sums are added to for hours."""
        shapes = (groups,), (groups, dim), (groups, dim, dim) if full else (groups, dim)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """Moments of both together (not the longer tuple)."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def estimate(self) -> Estimate:
        """Means and covariances of the groups; zeros where a group is empty."""
        # Half a feature is less than a group may hold, and more than subtractions leave of none.
        counts = self.counts.clamp_min(0.5)
        means = self.first / counts[:, None]
        second = self.second / counts.view(-1, *[1] * (self.second.ndim - 1))
        return Estimate(self.counts, means, central(second, means))

    def add_(self, features: Tensor, groups: Tensor, weights: Tensor) -> None:
        """Add P x D features with weights P (negative takes away) to their groups, in place."""
        x = features.to(self.first.dtype)
        weights = weights.to(x.dtype)
        weighted = x * weights[:, None]
        self.counts.index_add_(0, groups, weights)
        self.first.index_add_(0, groups, weighted)
        if self.second.ndim == 2:
            self.second.index_add_(0, groups, weighted * x)
            return
        rows = max(1, _MAX_OUTER_ELEMENTS // x.shape[1] ** 2)
        parts = (tensor.split(rows) for tensor in (x, weighted, groups))
        for part, scaled, index in zip(*parts, strict=True):
            self.second.index_add_(0, index, scaled[:, :, None] * part[:, None, :])


def count_groups(groups: Tensor, num_groups: int) -> Tensor:
    """How many entries each group has (int64); unlike `bincount` it never waits for the GPU."""
    counts = torch.zeros(num_groups, dtype=torch.long, device=groups.device)
    return counts.index_add_(0, groups, torch.ones_like(groups))


def ranks_in_group(groups: Tensor, num_groups: int) -> Tensor:
    """Position of each entry among the earlier entries of its own group: 0, 1, 2, ..."""
    order = groups.argsort(stable=True)
    counts = count_groups(groups, num_groups)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(groups), device=groups.device)
    ranks = torch.empty_like(place)
    ranks[order] = place - starts[groups[order]]
    return ranks


def spread_evenly(
    groups: Tensor, num_groups: int, most: int, processes: Processes | None = None
) -> Tensor:
    """Choose at most `most` entries of every group, spread evenly over its entries: booleans, P.

    With several processes the group's entries are those of all, in the order of the processes, so
    that together they choose what one process would. Of group `num_groups` none is chosen.
    """
    counts = count_groups(groups, num_groups + 1)
    before, total = torch.zeros_like(counts), counts
    if processes is not None:
        everyone = processes.gather(counts)
        before, total = everyone[: processes.rank].sum(0), everyone.sum(0)
    place = ranks_in_group(groups, num_groups + 1) + before[groups]
    size = total[groups]
    # Place p of n is one of linspace(0, n - 1, most), cut to whole numbers, as in GMMSeg's code.
    step = max(most - 1, 1)
    nearest = -(-place * step // (size - 1).clamp_min(1))  # the first that is not below p
    chosen = (nearest * (size - 1) // step == place) & (nearest < most)
    return (chosen | (size <= most)) & (groups < num_groups)


def _finite(features: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Leave out what is NaN or infinite (or overflows the storage): a sum would never forget it."""
    groups = torch.where(features.isfinite().all(1), groups, num_groups)
    return features.nan_to_num(0, 0, 0), groups


def total_over(processes: Processes | None, tensor: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    return tensor if processes is None else processes.gather(tensor).sum(0)


@torch.no_grad()
def batch_moments(
    features: Tensor,
    groups: Tensor,
    num_groups: int,
    full: bool,
    processes: Processes | None = None,
) -> Moments:
    """Moments of a batch of P x D features; of several processes only moments are exchanged."""
    features, groups = _finite(features, groups, num_groups)
    batch = Moments.zeros(num_groups + 1, features.shape[1], full, features.device)
    batch.add_(features, groups, torch.ones_like(groups))
    return Moments(*(total_over(processes, tensor[:num_groups]) for tensor in batch))


def gather_features(
    features: Tensor, groups: Tensor, num_groups: int, processes: Processes | None = None
) -> tuple[Tensor, Tensor]:
    """The features that belong to a group, of all processes, in the order of the processes.

    Only they travel. On one GPU nothing is dropped: the CPU would have to wait for their number.
    """
    if processes is None and features.device.type != "cpu":
        return features, groups
    kept = (groups < num_groups).nonzero().squeeze(1)
    features, groups = features[kept], groups[kept]
    if processes is None:
        return features, groups
    lengths = processes.gather(torch.tensor(len(kept), device=features.device))
    padding = int(lengths.max()) - len(kept)
    features = processes.gather(F.pad(features, (0, 0, 0, padding))).flatten(0, 1)
    groups = processes.gather(F.pad(groups, (0, padding), value=num_groups)).flatten(0, 1)
    return features, groups


class _Memory:
    """Running moments of groups of features; a subclass decides which features they are of."""

    def __init__(self, groups: int, dim: int, size: int = 32_000, full: bool = False) -> None:
        check_arguments(_Memory.__init__, locals(), size="[1, inf)")
        self.groups, self.dim, self.size, self.full = groups, dim, size, full
        self._moments = Moments.zeros(groups, dim, full, torch.device("cpu"))

    def moments(self) -> Moments:
        """Moments of what is remembered now."""
        return Moments(*(tensor[: self.groups] for tensor in self._moments))

    def to(self, device: torch.device) -> None:
        """Move to a device, out of memory that processes share (`ddp_spawn`), or do nothing."""
        self._moments = Moments(*(_own(tensor, device) for tensor in self._moments))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for a checkpoint."""
        return {name: value.clone() for name, value in self._moments._asdict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; that of a memory of another kind or shape is refused."""
        _check_shape("the moments", self._moments.second.shape, state["second"].shape)
        self.to(self._moments.counts.device)
        for name, value in self._moments._asdict().items():
            value.copy_(state[name])


class FeatureRing(_Memory):
    """The last `size` features of every group, first in, first out, with running moments.

    GMMSeg, Section 3.3 ("external memory"). EM needs sums over the ring only, so an update costs
    the number of new features, not the size of the ring. Only the filled part counts (the authors'
    code starts from random unit vectors instead).

    Args:
        groups: G, here classes x components.
        dim: D.
        size: K, features per group; the storage takes G x K x D elements, 7 GB for 171 classes.
        full: keep second moments as D x D matrices, for full covariances.
        dtype: of the stored features; moments are those of the rounded features, exactly.
    """

    def __init__(
        self,
        groups: int,
        dim: int,
        size: int = 32_000,
        full: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groups, dim, size, full)
        # The last row of each tensor takes what belongs to no group, so that shapes stay fixed.
        self.features = torch.zeros(groups * size + 1, dim, dtype=dtype)
        self.entered = torch.zeros(groups + 1, dtype=torch.long)
        self._moments = Moments.zeros(groups + 1, dim, full, torch.device("cpu"))

    @torch.no_grad()
    def push(self, features: Tensor, groups: Tensor) -> None:
        """Let P x D features enter, oldest first; `groups` P in 0..G-1, G to leave one out."""
        self.to(features.device)
        new, groups = _finite(features.to(self.features.dtype), groups, self.groups)
        incoming = count_groups(groups, self.groups + 1)
        rank = ranks_in_group(groups, self.groups + 1)
        # Of more newcomers than the ring holds, the first would be overwritten at once.
        kept = (groups < self.groups) & (rank >= incoming[groups] - self.size)
        slot = (self.entered[groups] + rank) % self.size
        occupied = kept & (slot < self.entered[groups])
        place = torch.where(kept, groups * self.size + slot, self.groups * self.size)
        old = self.features[place]
        self._moments.add_(old, groups, -occupied.to(torch.float32))
        self._moments.add_(new, groups, kept.to(torch.float32))
        self.features[place] = new
        self.entered += incoming

    def to(self, device: torch.device) -> None:
        """As in the base."""
        super().to(device)
        self.features, self.entered = _own(self.features, device), _own(self.entered, device)

    def _slots(self) -> Tensor:
        return self.features[:-1].view(self.groups, self.size, self.dim)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, for a checkpoint; only the filled part of the ring."""
        filled = min(self.size, int(self.entered[: self.groups].max()))
        stored = self._slots()[:, :filled].clone()
        return {"features": stored, "entered": self.entered.clone(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; that of a memory of another kind or shape is refused."""
        stored = state.get("features")
        if stored is None:
            raise GenSegError("The checkpoint's memory is no ring; set em.memory to decay.")
        _check_shape("the ring", (self.groups, self.dim), (stored.shape[0], stored.shape[2]))
        if stored.dtype != self.features.dtype:  # the moments are those of the rounded features
            dtype = str(stored.dtype).removeprefix("torch.")
            raise GenSegError(
                f"The checkpoint's memory holds {dtype}; set em.memory_dtype to {dtype}."
            )
        # Once it has gone round, its oldest feature is anywhere: no other size can go on with it.
        wrapped = int(state["entered"][: self.groups].max()) > stored.shape[1]
        if stored.shape[1] > self.size or (wrapped and stored.shape[1] < self.size):
            raise GenSegError(
                f"The checkpoint's memory holds {stored.shape[1]} features per component and this "
                f"one {self.size}; set memory_size as in the checkpoint."
            )
        super().load_state_dict(state)
        self.features.zero_()
        self._slots()[:, : stored.shape[1]] = stored.to(self.features)
        self.entered.copy_(state["entered"])


class DecayedMoments(_Memory):
    """Moments that forget exponentially, with an effective length of `size` features.

    A memory without stored features: megabytes where the ring takes gigabytes. A group that gets n
    new features first keeps (1 - 1/size)**n of its weight, so that its count settles near `size`.
    Ours; neither in the paper nor in the authors' code.

    Args:
        groups: G, here classes x components.
        dim: D.
        size: K, effective number of features.
        full: keep second moments as D x D matrices, for full covariances.
    """

    def push(self, features: Tensor, groups: Tensor) -> None:
        """Let P x D features enter; `groups` P in 0..G-1, G to leave one out."""
        self.absorb(batch_moments(features, groups, self.groups, self.full))

    @torch.no_grad()
    def absorb(self, batch: Moments) -> None:
        """Forget a little, then add the moments of a batch."""
        self.to(batch.counts.device)
        keep = (1.0 - 1.0 / self.size) ** batch.counts
        for mine, new in zip(self._moments, batch, strict=True):
            mine.mul_(keep.view(-1, *[1] * (mine.ndim - 1))).add_(new)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; that of a memory of another kind or shape is refused."""
        if "features" in state:
            raise GenSegError("The checkpoint's memory is a ring; set em.memory to ring.")
        super().load_state_dict(state)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    shared = tensor.device.type == "cpu" and tensor.is_shared()
    return tensor.clone() if shared and device == tensor.device else tensor.to(device)


def _check_shape(what: str, mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    if tuple(mine) != tuple(theirs):
        raise GenSegError(
            f"In the checkpoint {what} of the mixture's memory has shape {tuple(theirs)}, here "
            f"{tuple(mine)}; set components, embedding_dim and covariance as in the checkpoint."
        )
