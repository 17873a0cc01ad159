"""Prediction on images of any size: sliding windows, several scales, mirror images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_genseg.errors import GenSegError
from lightning_genseg.ops.inference_options import (
    InferenceOptions,
    check_options,
    graph_options,
    input_size,
)
from lightning_genseg.ops.resize import crop, is_exporting, resize_maps, resize_rows

Activation: TypeAlias = Callable[[Tensor], Tensor]
Scores = TypeVar("Scores", Tensor, dict[str, Tensor])


def softmax(scores: Tensor) -> Tensor:
    """Class probabilities of scores (B x C x H x W), in float32."""
    return scores.float().softmax(dim=1)


def infer(
    forward: Callable[[Tensor], Scores],
    image: Tensor,
    options: InferenceOptions | None = None,
    activation: Activation | Mapping[str, Activation | None] | None = softmax,
) -> Scores:
    """Score maps of an image at its own size, as `options` ask for.

    Windows are averaged where they overlap, on raw scores. Scales and mirror images ("views") are
    averaged after `activation`, as mmsegmentation averages probabilities. With a single view the
    scores come back raw. An image smaller than the window in a direction is not padded: there the
    window shrinks to the image.

    Args:
        forward: image (B x 3 x h x w) -> scores (B x C x h x w), or a dict of such maps.
        image: B x 3 x H x W.
        options: see `InferenceOptions`; None predicts the whole image once.
        activation: applied to each view before averaging, None for none. For a dict of maps, a
            mapping from their names; a name left out has none.

    Returns:
        maps of H x W, of the type that `forward` returns.

    Raises:
        GenSegError: an option is wrong.
        ValueError: `forward` does not return maps of its input's size.
    """
    size = (image.shape[-2], image.shape[-1])
    return merge_rows(infer_rows(forward, image, options, activation, size[0]), size[0])


def infer_rows(
    forward: Callable[[Tensor], Scores],
    image: Tensor,
    options: InferenceOptions | None = None,
    activation: Activation | Mapping[str, Activation | None] | None = softmax,
    most: int = 64,
    progress: bool = False,
) -> Iterator[tuple[slice, Scores]]:
    """`infer` from top to bottom, so that memory follows the window and not the picture.

    Only rows are kept that a later window covers, and the network sees only one window. Views of
    another size than the image, or with a margin, are kept at their own size.

    Args:
        forward: as in `infer`.
        image: B x 3 x H x W, in [0, 1], or bytes from 0 to 255.
        options: as in `infer`.
        activation: as in `infer`.
        most: rows of a piece at most.
        progress: whether to show a bar where there are many windows.

    Yields:
        rows, and the score maps of these rows.
    """
    check_options(options)
    options = options or {}
    size = (image.shape[-2], image.shape[-1])
    views = [
        (input_size(size, options, scale), flip)
        for scale in options.get("scales") or [1.0]
        for flip in ((False, True) if options.get("flip") else (False,))
    ]
    single = False
    window, stride = options.get("window"), options.get("stride")
    margin = options.get("margin") or 0
    count = sum(
        len(list(window_positions((h + 2 * margin, w + 2 * margin), window, stride)))
        if window and stride
        else 1
        for (h, w), _ in views
    )
    bar = tqdm(
        total=count, desc="windows", unit="window", leave=False, disable=not progress or count < 50
    )

    def counted(crop: Tensor) -> dict[str, Tensor]:
        nonlocal single
        output = forward(as_float(crop))
        single = isinstance(output, Tensor)
        bar.update(1)
        return _named(output)

    def of_view(shape: tuple[int, int], flip: bool) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        scaled = image if shape == size else resize_maps(as_float(image), shape)
        above, beside = (min(margin, side - 1) for side in shape)  # reflection needs more pixels
        if margin:
            sides = (beside, beside, above, above)
            scaled = F.pad(as_float(scaled), sides, mode="reflect")
        pieces = _window_rows(counted, scaled.flip(-1) if flip else scaled, options, most)
        if shape == size and not margin:
            yield from pieces
            return
        maps = merge_rows(pieces, shape[0] + 2 * above)
        maps = {
            name: x[..., above : above + shape[0], beside : beside + shape[1]]
            for name, x in maps.items()
        }
        for rows in driving or _strips(0, size[0], most):
            yield rows, {name: resize_rows(x, size, rows) for name, x in maps.items()}

    # Windows of the image's own size decide on the rows of the pieces, the same for each view.
    driving: list[slice] = []
    if not margin and any(shape == size for shape, _ in views):
        driving = list(_pieces(size, window, stride, most))
    with bar:
        for parts in zip(*(of_view(*view) for view in views), strict=True):
            total: dict[str, Tensor] = {}
            for (_, flip), (_, maps) in zip(views, parts, strict=True):
                for name, scores in maps.items():
                    function = _activation(activation, name, single)
                    if flip:
                        scores = scores.flip(-1)
                    if len(views) > 1:
                        scores = (function(scores) if function else scores) / len(views)
                    total[name] = total[name] + scores if name in total else scores
            yield parts[0][0], cast(Scores, total[""] if single else total)


def infer_once(
    forward: Callable[[Tensor], dict[str, Tensor]], image: Tensor, options: InferenceOptions
) -> dict[str, Tensor]:
    """`infer` of `graph_options`, by what an exported graph holds for images of any size.

    Args:
        forward: image (B x 3 x h x w) -> maps by name.
        image: B x 3 x H x W in [0, 1].
        options: of these, windows, scales and mirror images are left out.

    Returns:
        maps of H x W.
    """
    options = graph_options(options)
    size = (image.shape[-2], image.shape[-1])
    resized, margin = options.keys() & {"short_side", "multiple"}, options.get("margin")
    rows, columns = input_size(size, options) if resized else size
    scaled = resize_maps(image, (rows, columns)) if resized else image
    if margin:
        above, beside = (cast(int, torch.sym_min(margin, n - 1)) for n in (rows, columns))
        scaled = _mirrored(_mirrored(scaled, above, -2), beside, -1)
    maps = forward(scaled)
    if margin:
        maps = {name: crop(x, rows, columns, above, beside) for name, x in maps.items()}
    return {name: resize_maps(x, size) for name, x in maps.items()} if resized else maps


def merge_rows(pieces: Iterable[tuple[slice, Scores]], height: int) -> Scores:
    """Maps of `height` rows from pieces of rows; the rows are the last dimension but one."""
    whole: dict[str, Tensor] = {}
    single = False
    for rows, piece in pieces:
        single = isinstance(piece, Tensor)
        for name, part in _named(piece).items():
            if part.shape[-2] == height:
                whole[name] = part
                continue
            if name not in whole:
                whole[name] = part.new_empty(*part.shape[:-2], height, part.shape[-1])
            whole[name][..., rows, :] = part
    return cast(Scores, whole[""] if single else whole)


def as_float(image: Tensor) -> Tensor:
    """An image in [0, 1], from bytes too."""
    return image if image.is_floating_point() else image.float() / 255


def unit_image(image: Tensor, name: str) -> Tensor:
    """As `as_float`, of an image that somebody gives.

    Raises:
        GenSegError: values outside [0, 1], or NaN.
    """
    if image.dtype == torch.uint8:
        return as_float(image)
    if not ((image >= 0) & (image <= 1)).all():
        raise GenSegError(
            f"{name} has values from {float(image.min()):g} to {float(image.max()):g}: divide it "
            "by its white, so that they lie in [0, 1]."
        )
    return image.float()


def window_positions(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of windows that cover an image of `size`, each inside it.

    The last window of a direction is moved back to end at the image's edge, as in mmsegmentation.
    """
    for top in _starts(size[0], window[0], stride[0]):
        for left in _starts(size[1], window[1], stride[1]):
            yield (
                slice(top, min(top + window[0], size[0])),
                slice(left, min(left + window[1], size[1])),
            )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """`module.eval()` for a while; then every part is as it was, also those that were frozen."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = 0) -> Tensor:
    """Pad an image (B x 3 x H x W) with zeros at the bottom and the right.

    Both sides become multiples of `multiple` and at least `minimum`, itself such a multiple.
    """
    height, width = image.shape[-2:]
    # Not -(-a // b): ONNX rounds the negative towards zero.
    rows, columns = ((side + multiple - 1) // multiple * multiple for side in (height, width))
    if minimum > multiple:
        rows, columns = (cast(int, torch.sym_max(side, minimum)) for side in (rows, columns))
    # An exported graph pads always, for images of any size.
    if not is_exporting() and (rows, columns) == (height, width):
        return image
    return F.pad(image, (0, columns - width, 0, rows - height))


def _mirrored(image: Tensor, margin: int, axis: int) -> Tensor:
    """Continued by its mirror image on both sides of an axis: `F.pad`'s for sizes of a graph."""
    last = image.shape[axis] - 1
    place = torch.arange(image.shape[axis] + 2 * margin, device=image.device) - margin
    return image.index_select(axis, last - (last - place.abs()).abs())


def _window_rows(
    forward: Callable[[Tensor], dict[str, Tensor]],
    image: Tensor,
    options: InferenceOptions,
    most: int,
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Raw score maps of a sliding window, averaged where windows overlap, from top to bottom.

    Without ``window`` and ``stride`` `forward` sees the whole image.
    """
    height, width = image.shape[-2:]
    window, stride = options.get("window"), options.get("stride")
    if window is None or stride is None or (height <= window[0] and width <= window[1]):
        whole = forward(image)
        _check_size(whole, height, width)
        for rows in _strips(0, height, most):
            yield rows, {name: x[..., rows, :] for name, x in whole.items()}
        return
    high, wide = min(window[0], height), min(window[1], width)
    total: dict[str, Tensor] = {}
    count = torch.zeros(high, width, device=image.device)
    tops = _starts(height, window[0], stride[0])
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        for left in _starts(width, window[1], stride[1]):
            columns = slice(left, left + wide)
            output = forward(image[..., top : top + high, columns])
            _check_size(output, high, wide)
            for name, scores in output.items():
                if name not in total:
                    # Half precision would lose what many windows add.
                    dtype = scores.dtype if scores.dtype.itemsize > 2 else count.dtype
                    total[name] = scores.new_zeros(*scores.shape[:2], high, width, dtype=dtype)
                total[name][..., columns] += scores
            count[:, columns] += 1
        done = following - top  # rows that no later window covers
        for rows in _strips(0, done, most):
            maps = {name: x[..., rows, :] / count[rows].to(x.dtype) for name, x in total.items()}
            yield slice(top + rows.start, top + rows.stop), maps
        for sums in (*total.values(), count):
            for rows in _strips(0, high - done, done):  # without a copy of all
                sums[..., rows, :] = sums[..., rows.start + done : rows.stop + done, :]
            sums[..., high - done :, :] = 0


def _pieces(
    size: tuple[int, int], window: tuple[int, int] | None, stride: tuple[int, int] | None, most: int
) -> Iterator[slice]:
    """Rows of the pieces that `_window_rows` yields."""
    if window is None or stride is None or (size[0] <= window[0] and size[1] <= window[1]):
        yield from _strips(0, size[0], most)
        return
    tops = _starts(size[0], window[0], stride[0])
    for top, following in zip(tops, [*tops[1:], size[0]], strict=True):
        yield from _strips(top, following, most)


def _strips(start: int, stop: int, most: int) -> Iterator[slice]:
    for first in range(start, stop, most):
        yield slice(first, min(first + most, stop))


def _starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows of `window` pixels, `stride` apart, over `length` pixels."""
    last = max(length - window, 0)
    return [min(index * stride, last) for index in range(-(-last // stride) + 1)]


def _named(output: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": output} if isinstance(output, Tensor) else output


def _check_size(maps: Mapping[str, Tensor], height: int, width: int) -> None:
    for name, scores in maps.items():
        if scores.ndim != 4 or tuple(scores.shape[-2:]) != (height, width):
            raise ValueError(
                f"forward must return maps of its input's size, B x C x {height} x {width}, but "
                f"{name or 'its output'} is {tuple(scores.shape)}."
            )


def _activation(
    activation: Activation | Mapping[str, Activation | None] | None, name: str, single: bool
) -> Activation | None:
    if activation is None:
        return None
    if isinstance(activation, Mapping) == single:
        raise ValueError(
            "activation must be a function where forward returns one tensor, and a mapping from "
            "map names to functions where it returns a dict of maps."
        )
    return activation.get(name) if isinstance(activation, Mapping) else activation
