"""Checkpoints: read without running what they name, written beside the old one."""

import io
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from numbers import Number
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_genseg.arguments import arguments_of
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.files import is_address, load_tensors, local_copy, replace_file

_PACKAGE = __name__.partition(".")[0]
_LISTS = (list, tuple, Sequence)
_WORDS = (str, Path)
_NAMED = {str: object}
# What stands in a checkpoint: a type, a pattern of a word, what the parts of a list are, all (list)
# or in their order (tuple), or those of a mapping: by name, and the others by the type of the key.
_CONTENT: dict[str, Any] = {
    "pytorch-lightning_version": re.compile(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?"),
    **dict.fromkeys(("epoch", "global_step", "num_classes"), int),
    **dict.fromkeys(("method", "own_features", "optimizer", "hparams_name"), str),
    **dict.fromkeys(("state_dict", "hyper_parameters", "fingerprints", "tokenizer"), _NAMED),
    "facts": {str: object, "scores": {str: Mapping}},
    "mixture_memory": {str: torch.Tensor},
    "callbacks": {
        str: Mapping,
        "RandomStates": {"processes": [{"python": list, "numpy": list, "torch": torch.Tensor}]},
    },
    "loops": {str: {str: {"total": {str: int}, "current": {str: int}}}},
    "optimizer_states": [{"state": {object: Mapping}, "param_groups": [{"params": list}]}],
    "lr_schedulers": [{str: object, "last_epoch": int, "base_lrs": list, "lr_lambdas": list}],
    "base_classes": [object],
    "anomaly": {
        "statistics": {str: torch.Tensor},
        "thresholds": {str: (Number, Number, str, Number, int)},
        "inference": _NAMED,
        "ranges": {str: (Number, Number)},
    },
}
_INSTANTIATORS = (
    "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, where neither can do harm.

    Only tensors and plain values are read, also from `https://` and other addresses. What is
    written lies beside the old file until it is complete and on the disk.
    """

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Content of a checkpoint; errors as `read_run`, and `weights_only=False` is refused."""
        need_weights_only(weights_only)
        return read_run(path, mmap=False)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; after an `UnwritableError` the old one is as it was."""
        if is_address(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        target = local_copy(path)
        assert isinstance(target, Path)
        replace_file(target, content.getbuffer())


def plain(value: Any) -> Any:
    """A value as a checkpoint may hold it: groups as dicts, NumPy's numbers as Python's."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def guard_checkpoints(trainer: Trainer) -> None:
    """Let a Trainer read and write by `SafeCheckpointIO` where it would by Lightning's own."""
    plugin = trainer.strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = SafeCheckpointIO()
    elif (
        isinstance(plugin, _WrappingCheckpointIO)
        and type(plugin.checkpoint_io) is TorchCheckpointIO
    ):
        plugin._checkpoint_io = SafeCheckpointIO()  # that it wraps; its setter replaces nothing


def need_weights_only(weights_only: bool | None) -> None:
    """Refuse to read a checkpoint in the way that runs its code."""
    if weights_only is False:
        raise GenSegError(
            "weights_only is false, and a checkpoint that is read so can run code: leave it out."
        )


def read_run(source: str | Path | io.BytesIO, name: str = "", mmap: bool = True) -> dict[str, Any]:
    """Content of a Trainer's checkpoint, as `load_tensors` reads it.

    Raises:
        GenSegError: it is something else, such as a bare state dict, or lacks a key.
    """
    name = name or f"'{source}'"
    content = load_tensors(source, name, mmap)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        values = content.values() if isinstance(content, Mapping) else [None]
        bare = all(isinstance(value, torch.Tensor) for value in values)
        what = "a bare state dict" if bare else "no checkpoint of a run"
        raise GenSegError(
            f"{name} is {what}: give a .ckpt file that `genseg fit` or a Trainer has written."
        )
    for key, form in _CONTENT.items():
        needed = key == "pytorch-lightning_version"
        if (needed or key in content) and not _has_form(content.get(key), form):
            raise GenSegError(
                f"{name} has no '{key}' as a Trainer writes it: it was changed or is no "
                "checkpoint of a run. Give another one."
            )
    return content


def _has_form(value: object, form: Any) -> bool:
    """Whether a value is what `_CONTENT` says."""
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, list):
        return isinstance(value, list | tuple) and all(_has_form(part, form[0]) for part in value)
    if isinstance(form, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(form):
            return False
        return all(map(_has_form, value, form))
    if not isinstance(form, dict):
        return isinstance(value, form)
    kind = next((key for key in form if isinstance(key, type)), object)
    rest = form.get(kind, object)
    return isinstance(value, Mapping) and all(
        isinstance(key, kind) and _has_form(part, form.get(key, rest))
        for key, part in value.items()
    )


def read_checkpoint(
    path: str | Path, argument: str, kind: str, fits: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Content of the checkpoint of one module that another one builds on.

    Args:
        path: of the file.
        argument: that it was given as, for messages.
        kind: name of the module that wrote it, likewise.
        fits: whether a content is of that kind; look-ups in it may fail.

    Raises:
        MissingFileError: there is no such file.
        GenSegError: it cannot be read, or is not of that kind.
    """
    path = Path(path)  # in Python it may be a string
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise MissingFileError(
            f"{argument} '{path}' {problem}: give the checkpoint of a {kind} run."
        )
    content = load_tensors(path, f"{argument} '{path}'")
    try:
        if isinstance(content, dict) and fits(content):
            return content
    except (KeyError, TypeError, AttributeError):  # what `fits` looks for is not there
        pass
    raise GenSegError(
        f"{argument} '{path}' is no checkpoint of a {kind}: give the .ckpt file that `genseg fit "
        f"--model {kind}` has written."
    )


def check_loading(content: Mapping[str, Any], kind: type, given: Collection[str]) -> None:
    """Refuse a checkpoint with which `load_from_checkpoint` would run more than `kind`.

    Lightning builds a module from the hyper-parameters by a parser of command lines where a command
    has written them, and by a plain call where a script has.
    """
    network = content.get("own_features")
    if network is not None and "features" not in given:
        raise GenSegError(
            f"the checkpoint is of a network of somebody's own, {network}, which is not imported: "
            "build it and give it as features."
        )
    saved = dict(content.get("hyper_parameters", {}))
    instantiator = saved.pop("_instantiator", None)
    if instantiator is None:
        return
    if instantiator not in _INSTANTIATORS:
        raise GenSegError(
            f"the checkpoint names the function {instantiator} to build its module, which is "
            "not Lightning's: it is not called."
        )
    named = saved.pop("_class_path", None)
    refuse_foreign_arguments(kind if named is None else class_named(named, kind), saved, given)


def class_named(class_path: object, allowed: type) -> type:
    """The class that a checkpoint names: of this package, or `allowed` and what derives from it.

    Nothing is imported for it.

    Raises:
        GenSegError: it is another, or no class.
    """
    module, _, name = str(class_path).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and (kind.__module__.startswith(f"{_PACKAGE}.") or kind is allowed):
        return kind
    raise GenSegError(
        f"the checkpoint names the class {class_path}, which is neither of {_PACKAGE} nor named by "
        "you: it is not imported. If you trust it, name it yourself as the model's class."
    )


def refuse_foreign_arguments(kind: type, saved: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse hyper-parameters of a checkpoint that could make a class be imported or built.

    A command line's parser takes more than data: a string or a mapping may name a class. From a
    checkpoint only numbers, words and paths are taken, where the class asks for such.

    Args:
        kind: class that is going to be built.
        saved: the hyper-parameters.
        given: names of those that the user gives likewise, which may be anything.

    Raises:
        GenSegError: names the argument and what it holds.
    """
    hints: dict[str, Any] = {}
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            with suppress(NameError):  # imported for type checkers only
                hints = get_type_hints(vars(cls)["__init__"]) | hints
    known = arguments_of(kind)
    for name, value in saved.items():
        if name in given:
            continue
        if name not in known:
            raise GenSegError(
                f"the checkpoint has an argument '{name}' ({value!r}), which {kind.__name__} does "
                "not know: it was changed, or is of another version."
            )
        if is_dataclass(hints.get(name)) and not isinstance(value, Mapping):
            raise GenSegError(
                f"the checkpoint gives '{name}' the value {value!r}, but it is a group of "
                "arguments: it was changed."
            )
        for part in _suspicious(value, hints.get(name, object)):
            raise GenSegError(
                f"the checkpoint gives '{name}' the value {part!r}, which may name a class or "
                f"function: it is not used. If you trust it, give {name} yourself."
            )


def _suspicious(value: Any, hint: Any) -> Iterator[Any]:
    """Parts of a value that jsonargparse could take for a class or function to import."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for kind in options if kind is not NoneType]
    inner = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in _LISTS), Any)
    if value is None or isinstance(value, Number):
        return
    if not all(map(_is_data, kinds)):
        yield value
    elif isinstance(value, str):
        words = [kind for kind in kinds if kind in _WORDS or get_origin(kind) is Literal]
        parsed = any(kind not in words and get_origin(kind) not in _LISTS for kind in kinds)
        if not (words or Any in kinds) or (parsed and not _is_word(value)):
            yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if "class_path" in str(key) or "init_args" in str(key):
                yield part
            yield from _suspicious(part, Any)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _suspicious(part, inner)
    else:
        yield value


def _is_word(text: str) -> bool:
    """Whether a string stays one where a parser of command lines reads it."""
    try:
        return isinstance(yaml.safe_load(text), str | int | float | None)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def _is_data(kind: Any) -> bool:
    """Whether values of a type are numbers, words, paths, and groups of these."""
    if get_origin(kind) in (*_LISTS, dict, Mapping, Union, UnionType):
        return all(_is_data(part) for part in get_args(kind) if part is not Ellipsis)
    simple = (bool, int, float, NoneType, Any, list, dict, tuple, *_WORDS)
    return kind in simple or get_origin(kind) is Literal or is_dataclass(kind) or is_typeddict(kind)
