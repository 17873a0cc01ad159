"""One check of arguments: choices, types, NaN and ranges; groups from mappings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from lightning_genseg.arguments import arguments_of, as_options, check_arguments, unknown_argument
from lightning_genseg.errors import GenSegError, did_you_mean


def function(
    choice: Literal["a", "b", 3] = "a",
    maybe: Literal["a", "b"] | None = None,
    choices: list[Literal["a", "b"]] | None = None,
    count: int = 1,
    share: float = 0.5,
    flag: bool = True,
    pair: tuple[int, int] = (1, 2),
    scales: tuple[float, ...] = (1.0,),
    mean: Sequence[float] = (0.5,),
    either: int | Literal["auto"] = "auto",
    path: str | Path | None = None,
    anything: Any = None,
) -> None:
    """Arguments of every kind."""


RIGHT = [
    ("choice", "b"), ("choice", 3), ("maybe", None), ("maybe", "b"), ("choices", ["a", "b", "a"]),
    ("choices", []), ("choices", None), ("count", -7), ("count", np.int64(3)), ("share", 2),
    ("share", -1.5), ("share", np.float32(0.5)), ("share", np.int8(1)), ("share", math.inf),
    ("flag", False), ("pair", [3, 4]), ("scales", ()), ("scales", [1, 2.5, np.float64(3)]),
    ("mean", [0.1, 0.2, 0.3]), ("mean", np.ones(3)), ("either", 4), ("either", "auto"),
    ("path", 3), ("anything", Path),
]  # fmt: skip

WRONG = [
    ("choice", "c", "choice is 'c'; it must be one of a, b, 3."),
    ("choice", 3.0, "choice is 3.0; it must be one of a, b, 3."),
    ("choice", True, "choice is True; it must be one of"),
    ("choice", None, "choice is None; it must be one of"),
    ("maybe", "A", "maybe is 'A'; it must be one of a, b."),
    ("choices", ["a", "c"], "choices is 'c'; it must be one of a, b."),
    ("choices", "a", "choices is 'a'; it must be a list."),
    ("count", 1.0, "count is 1.0; it must be a whole number."),
    ("count", True, "count is True; it must be a whole number."),
    ("count", np.bool_(1), "; it must be a whole number."),
    ("count", "1", "count is '1'; it must be a whole number."),
    ("count", None, "count is None; it must be a whole number."),
    ("count", math.nan, "count is nan; it must be a whole number."),
    ("share", math.nan, "share is nan; it must be a number."),
    ("share", np.float32("nan"), "it must be a number."),
    ("share", False, "share is False; it must be a number."),
    ("share", "0.5", "share is '0.5'; it must be a number."),
    ("flag", "false", "flag is 'false'; it must be true or false."),
    ("flag", 0, "flag is 0; it must be true or false."),
    ("pair", (1, 2, 3), r"pair is \(1, 2, 3\); it must have 2 entries."),
    ("pair", (1, 2.5), "pair is 2.5; it must be a whole number."),
    ("pair", 4, "pair is 4; it must be a list."),
    ("scales", [1.0, math.nan], "scales is nan; it must be a number."),
    ("mean", (0.1, math.nan), "mean is nan; it must be a number."),
    ("mean", 0.5, "mean is 0.5; it must be a list."),
    ("either", "car", "either is 'car'; it must be a whole number."),
    ("either", 1.5, "either is 1.5; it must be a whole number."),
]


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=repr)
def test_what_fits_its_type(name, value):
    check_arguments(function, {name: value, "self": 1, "unknown": "x"})


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG, ids=repr)
def test_what_does_not_fit_its_type(name, value, sentence):
    with pytest.raises(GenSegError, match=f"^{sentence}" if name in sentence else sentence):
        check_arguments(function, {name: value})


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 10**9], [0, -5, 0.999], "at least 1."),
        ("[1, inf)", [], [math.inf], "finite."),
        ("(0, inf)", [1e-9], [0, -1], "positive."),
        ("(2, inf)", [2.1], [2, -math.inf], "more than 2."),
        ("[0, 1]", [0, 0.5, 1], [-1e-9, 1.001, math.inf], "between 0 and 1."),
        ("(0, 1]", [1e-9, 1], [0, 2], "positive and at most 1."),
        ("[0, 1)", [0, 0.99], [1, -1], "at least 0 and less than 1."),
        ("[0.5, 2]", [0.5, 2], [0.4], "between 0.5 and 2."),
    ],
)
def test_intervals(interval, inside, outside, words):
    for value in (None, *inside, [], inside, tuple(inside)):
        check_arguments(function, {"anything": value}, anything=interval)
    for value in outside:
        for given in (value, [*inside, value], (value, *inside)):
            with pytest.raises(GenSegError, match=f"^anything is {value}; it must be {words}$"):
                check_arguments(function, {"anything": given}, anything=interval)


def test_nan_lies_in_no_interval():
    with pytest.raises(GenSegError, match="anything is nan"):
        check_arguments(function, {"anything": math.nan}, anything="[0, inf)")


@dataclass(frozen=True)
class Group:
    components: int = 5
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self), components="[1, inf)")


class Base:
    def __init__(self, size: int = 1, *, depth: int = 2, **unknown: Any) -> None:
        pass


class Method(Base):
    def __init__(self, width: int, size: int = 3, group: Group = Group(), **kwargs: Any) -> None:
        super().__init__(size, **kwargs)


def test_options_are_a_group_or_a_mapping():
    assert as_options(Group, {"components": 3}) == Group(3)
    group = Group(kind="b")
    assert as_options(Group, group) is group
    assert as_options(Group, {}) == Group()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"componets": 3}, "Group has no argument 'componets'; did you mean components?"),
        ({"x": 3}, "Group has no argument 'x'; known are components, kind."),
        ({"components": 0}, "components is 0; it must be at least 1."),
        ({"kind": "c"}, "kind is 'c'; it must be one of a, b."),
        (7, "7 is no Group: give one, or a mapping of its fields."),
        (None, "None is no Group"),
    ],
)
def test_options_that_are_none(value, sentence):
    with pytest.raises(GenSegError, match=sentence):
        as_options(Group, value)


def test_arguments_of_a_class_and_of_what_it_passes_on():
    assert set(arguments_of(Method)) == {"width", "size", "group", "depth"}
    assert arguments_of(Method)["size"].default == 3
    assert list(arguments_of(Group)) == ["components", "kind"]
    for name, meant in {
        "witdh": "width",
        "dept": "depth",
        "components": "group.components",
    }.items():
        sentence = f"Method has no argument '{name}'; did you mean {meant}?"
        assert unknown_argument(Method, name) == sentence


def test_the_nearest_of_what_is_known():
    assert did_you_mean("fnp", ["fpn", "unet"]) == "; did you mean fpn?"
    assert did_you_mean("x", ["fpn", "unet"]) == "; known are fpn, unet."
    assert did_you_mean("x", map(str, range(100))) == "."
