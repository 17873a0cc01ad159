"""Checks of arguments: unknown choices, wrong types, NaN and numbers out of range."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from lightning_genseg.errors import GenSegError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def check_arguments(owner: Callable[..., Any], values: Mapping[str, Any], **ranges: str) -> None:
    """Refuse arguments that their annotations or ranges forbid, in Python as on the command line.

    Checked are choices (`Literal`), `int`, `float` and `bool`, also where they are optional, one of
    several types, or entries of a list or tuple. Other types are left alone.

    Args:
        owner: function or dataclass whose annotations are read.
        values: arguments by name; those without an annotation are left alone, so that `locals()`
            will do.
        ranges: intervals by name: `"[1, inf)"`, `"(0, 1]"`; of a list or tuple for each entry.

    Raises:
        GenSegError: naming the argument, what it is and what it may be.

    Example:
        >>> def fit(components: int = 5, assignment: Literal["sinkhorn", "em"] = "em") -> None:
        ...     check_arguments(fit, locals(), components="[1, inf)")
        >>> fit(components=0)
        Traceback (most recent call last):
        lightning_genseg.errors.GenSegError: components is 0; it must be at least 1.
    """
    if torch.compiler.is_compiling():
        return  # torch.compile cannot trace annotations; what it compiles has been built already
    for name, hint in _hints(owner).items():
        if name in values:
            _check_type(name, values[name], hint)
    for name, interval in ranges.items():
        value = values[name]
        if hasattr(value, "tolist"):  # an array or a tensor
            value = value.tolist()
        if value is not None:
            for number in value if isinstance(value, tuple | list) else (value,):
                _check_range(name, number, interval)


@cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(owner).items() if name != "return"}


def _check_type(name: str, value: object, hint: Any) -> None:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        _check_union(name, value, parts)
    elif origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in parts):
            raise GenSegError(
                f"{name} is {value!r}; it must be one of {', '.join(map(str, parts))}."
            )
    elif origin in (list, tuple, Sequence):
        _check_entries(name, value, parts, fixed=origin is tuple and Ellipsis not in parts)
    elif hint is str and value is None:
        raise GenSegError(f"{name} is null; it must be a word.")
    elif hint is bool and not isinstance(value, bool):
        raise GenSegError(f"{name} is {value!r}; it must be true or false.")
    elif hint is int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise GenSegError(f"{name} is {value!r}; it must be a whole number.")
    elif hint is float and (
        isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value)
    ):
        raise GenSegError(f"{name} is {value!r}; it must be a number.")


def _check_union(name: str, value: object, parts: tuple[Any, ...]) -> None:
    if value is None and type(None) in parts:
        return
    first = None
    for part in parts:
        if part is not type(None):
            try:
                return _check_type(name, value, part)
            except GenSegError as error:
                first = first or error
    if first is not None:
        raise first


def _check_entries(name: str, value: object, parts: tuple[Any, ...], fixed: bool) -> None:
    if isinstance(value, Real | str):
        raise GenSegError(f"{name} is {value!r}; it must be a list.")
    if isinstance(value, list | tuple):
        if fixed and len(value) != len(parts):
            raise GenSegError(f"{name} is {value!r}; it must have {len(parts)} entries.")
        for item, part in zip(value, parts if fixed else parts[:1] * len(value), strict=True):
            _check_type(name, item, part)


def _check_range(name: str, value: Any, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if not (above and below):  # NaN is neither
        limits = "finite" if value == math.inf == high else _in_words(interval, low, high)
        raise GenSegError(f"{name} is {value}; it must be {limits}.")


def _in_words(interval: str, low: float, high: float) -> str:
    least = "positive" if interval[0] == "(" and low == 0 else f"more than {low:g}"
    least = f"at least {low:g}" if interval[0] == "[" else least
    if math.isinf(high):
        return least
    if interval[0] + interval[-1] == "[]":
        return f"between {low:g} and {high:g}"
    return f"{least} and {'at most' if interval[-1] == ']' else 'less than'} {high:g}"


def check_ignored(num_classes: int, ignore_index: int) -> None:
    """Refuse a label that stands both for a class and for pixels that do not count."""
    if 0 <= ignore_index < num_classes:
        raise GenSegError(
            f"ignore_index is {ignore_index}, which is one of the {num_classes} classes and would "
            "never be learned: set ignore_index to -1, and to -1 the pixels without a label."
        )


def check_device(device: torch.device) -> None:
    """Refuse a device without float64, in which scores and EM count."""
    if device.type == "mps":
        raise GenSegError(
            "the device is mps, but an Apple GPU has no float64, in which scores and mixtures "
            "count: take the CPU (trainer.accelerator cpu)."
        )


def arguments_of(kind: type) -> dict[str, Parameter]:
    """A class's arguments by name, and those that it passes on to its bases (`**kwargs`)."""
    found: dict[str, Parameter] = {}
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            own = list(signature(vars(cls)["__init__"]).parameters.values())[1:]  # without self
            several = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
            found |= {p.name: p for p in own if p.kind not in several and p.name not in found}
            if not any(p.kind is Parameter.VAR_KEYWORD for p in own):
                break
    return found


def unknown_argument(kind: type, name: str) -> str:
    """Sentence on an argument that a class does not have; fields of groups may be meant."""
    known = arguments_of(kind)
    groups = {key: p.default for key, p in known.items() if is_dataclass(p.default)}
    inside = [f"{key}.{field.name}" for key, group in groups.items() for field in fields(group)]
    return f"{kind.__name__} has no argument '{name}'{did_you_mean(name, [*known, *inside])}"


def as_options(kind: type[Options], value: Options | Mapping[str, Any]) -> Options:
    """A group of arguments, from itself or from the mapping that a checkpoint holds.

    Raises:
        GenSegError: the mapping has a key that the group does not know.
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise GenSegError(f"{value!r} is no {kind.__name__}: give one, or a mapping of its fields.")
    for key in value.keys() - arguments_of(kind):
        raise GenSegError(unknown_argument(kind, str(key)))
    return kind(**value)
