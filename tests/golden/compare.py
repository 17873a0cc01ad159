"""How a result is compared with the authors'."""

from collections.abc import Mapping

import torch
from torch import Tensor


def close(mine: Tensor, theirs: Tensor, tolerance: float = 5e-6) -> None:
    """Differences relative to the largest number of theirs, which may be a corner of the whole."""
    mine = mine[tuple(slice(size) for size in theirs.shape)]
    assert mine.shape == theirs.shape
    difference = float((mine.detach() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3))
    assert difference <= tolerance, f"{difference:.1e} is more than {tolerance:.0e}"


def close_all(
    golden: Mapping[str, Tensor],
    prefix: str,
    mine: Mapping[str, Tensor],
    tolerance: float = 5e-6,
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """All of theirs below a prefix with ours by the rest of the name, each of which must be there.

    `tolerances` are those of some names; what is no float must be equal.
    """
    there = {name: value for name, value in golden.items() if name.startswith(prefix)}
    assert there, f"nothing is golden below {prefix}"
    for name, theirs in there.items():
        name = name.removeprefix(prefix)
        ours = mine[name].detach()
        if theirs.is_floating_point():
            close(ours, theirs, (tolerances or {}).get(name, tolerance))
            continue
        ours = ours[tuple(slice(size) for size in theirs.shape)]
        assert torch.equal(ours.long(), theirs.long()), name
