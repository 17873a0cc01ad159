"""How a result is compared with the authors'."""

from torch import Tensor


def close(mine: Tensor, theirs: Tensor, tolerance: float = 5e-6) -> None:
    """Differences relative to the largest number of theirs, which may be a corner of the whole."""
    mine = mine[tuple(slice(size) for size in theirs.shape)]
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-3)
