"""How an image is predicted: the options, what they may be, and the size that follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

import torch

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError, did_you_mean


class InferenceOptions(TypedDict, total=False):
    """How an image is predicted; without any key, whole and once.

    Args:
        short_side: pixels of the shorter side of the image as the network sees it; aspect kept.
        long_side: most pixels of the longer side after that; the shorter one gives way.
        multiple: sides are then rounded up to multiples of this, which changes the aspect a little.
        window: height and width in pixels of a sliding window.
        stride: steps in pixels, down and right, between windows; at most the window.
        scales: factors by which the image is resized, relative to `short_side` and `long_side`
            where they are given; the predictions are averaged.
        flip: whether the mirror image of every scale joins the average.
        margin: pixels of its mirror image around the image, cut off again. Networks pad with zeros,
            which makes the border strange: anomaly scores rise there.
    """

    short_side: int
    long_side: int
    multiple: int
    window: tuple[int, int]
    stride: tuple[int, int]
    scales: list[float]
    flip: bool
    margin: int


_PIXELS = ("short_side", "long_side", "multiple", "window", "stride")
_RANGES = {**dict.fromkeys(_PIXELS, "[1, inf)"), "scales": "(0, inf)", "margin": "[0, inf)"}


def check_options(options: Mapping[str, Any] | None) -> None:
    """Refuse options that `infer` cannot follow.

    Raises:
        GenSegError: naming the option, as ``inference.<key>``, and what it must be.
    """
    known = InferenceOptions.__annotations__
    for key in options or {}:
        if key not in known:
            raise GenSegError(f"inference.{key} is not an option{did_you_mean(str(key), known)}")
    given = {key: value for key, value in (options or {}).items() if value is not None}
    ranges = {key: interval for key, interval in _RANGES.items() if key in given}
    try:
        check_arguments(InferenceOptions, given, **ranges)
    except GenSegError as error:
        raise GenSegError(f"inference.{error}") from None
    if given.get("scales") in ([], ()):
        raise GenSegError("inference.scales is empty: give at least one factor, or leave it out.")
    short, long = given.get("short_side"), given.get("long_side")
    if long is not None and short is None:
        raise GenSegError(
            "inference.long_side limits what inference.short_side enlarges: give that as well."
        )
    if long is not None and long < short:
        raise GenSegError(
            f"inference.long_side {long} is smaller than inference.short_side {short}: exchange "
            "them."
        )
    window, stride = given.get("window"), given.get("stride")
    if (window is None) != (stride is None):
        present, missing = ("stride", "window") if window is None else ("window", "stride")
        raise GenSegError(f"inference.{present} needs inference.{missing} as well.")
    if window and stride and any(s > w for s, w in zip(stride, window, strict=True)):
        raise GenSegError(
            f"inference.stride {stride} is larger than inference.window {window}: pixels between "
            "the windows would have no prediction."
        )


def plain_options(options: InferenceOptions | None) -> dict[str, Any]:
    """Options as a checkpoint may hold them: lists for tuples, nothing that is None or false."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in (options or {}).items()
        if value is not None and value is not False
    }


def graph_options(options: InferenceOptions | None) -> InferenceOptions:
    """Those options that an exported graph follows."""
    kept = {"short_side", "long_side", "multiple", "margin"}
    plain = plain_options(options)
    return cast(InferenceOptions, {key: plain[key] for key in plain if key in kept})


def has_several_views(options: InferenceOptions | None) -> bool:
    """Whether `infer` averages scales or mirror images, so that its scores are probabilities."""
    options = options or {}
    return bool(options.get("flip")) or len(options.get("scales") or [1.0]) > 1


def input_size(
    size: tuple[int, int], options: InferenceOptions, scale: float = 1.0
) -> tuple[int, int]:
    """Height and width at which an image of `size` is predicted, as mmsegmentation rounds them.

    Args:
        size: height and width of the image.
        options: only ``short_side``, ``long_side`` and ``multiple`` are used.
        scale: one of ``scales``.
    """
    height, width = size
    limits: list[tuple[int, int | torch.SymInt]] = [(1, 1)]  # pixels to be, of pixels that are
    if short := options.get("short_side"):
        limits = [(short, torch.sym_min(height, width))]
        if long := options.get("long_side"):
            limits.append((long, torch.sym_max(height, width)))
    multiple = options.get("multiple") or 1
    whole = int(scale) if scale == int(scale) else scale

    def seen(pixels: int) -> int:
        # Half a pixel counts as one. Whole numbers stay such: an exported graph computes them.
        sides = [(2 * whole * pixels * most + side) // (2 * side) for most, side in limits]
        side = sides[0] if len(sides) == 1 else torch.sym_min(*sides)
        side = torch.sym_max(int(side) if isinstance(side, float) else side, 1)
        return cast(int, (side + multiple - 1) // multiple * multiple)

    return seen(height), seen(width)
