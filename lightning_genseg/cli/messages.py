"""What users are told: one sentence on standard error for what they can mend."""

import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from errno import EDQUOT, EFBIG, ENOSPC
from importlib import import_module
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_genseg import data, methods
from lightning_genseg.data.loaders import from_worker
from lightning_genseg.errors import GenSegError, did_you_mean

_BASES = {
    "model": methods.TrainedModule,
    "data": data.SegmentationDataModule,
    "sparse": data.SparseLabels,
}
_BUILT = (
    r"Does not validate against any of the Union subtypes\n"
    r"Subtypes: .*lightning\.pytorch\.(?:callbacks|loggers)\..*\nErrors:\n\s*- ([^\n]*)"
)
_FULL = (ENOSPC, EDQUOT, EFBIG)
_EXPECTED = "Expected a <class '"
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def say(message: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"genseg: {message}\n")


def fail(message: str) -> NoReturn:
    """Write a line to standard error and exit with code 2."""
    say("error: " + " ".join(message.split()))
    raise SystemExit(2) from None


def user_message(error: BaseException) -> str | None:
    """Return the sentence for the user, or None for an error that needs its traceback."""
    for link in _chain(error):
        if isinstance(link, GenSegError):
            return str(from_worker(link))
    # A logger, callback or precision whose package is an extra: they say how to get it.
    lacking = re.search(r".*\bpip install\b.*", str(error))
    if lacking is not None and isinstance(error, ValueError | ModuleNotFoundError):
        return lacking[0].strip(" -")
    if isinstance(error, ArgumentError):
        return _condense(str(error))
    # What a callback or logger says of its arguments, where jsonargparse builds it.
    built = re.match(_BUILT, str(error)) if isinstance(error, ValueError) else None
    if built:
        return f"an argument of the Trainer cannot be used ({built[1].strip('. ')}): correct it."
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}' cannot be used ({error.strerror}): choose another path."
    if isinstance(error, OSError) and error.errno in _FULL:  # of a log or a configuration
        return f"a file of the run cannot be written ({error.strerror}): make room on the disk."
    if isinstance(error, FileNotFoundError | MisconfigurationException):
        return str(error)
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on"):
        return str(error)  # Lightning's word on a monitor that nothing logs
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _condense(message: str) -> str:
    """Return the sentence inside jsonargparse's report of everything it has tried."""
    path = list(dict.fromkeys(re.findall(r"Parser key \"([\w.]+)\"", message)))
    last = message.rpartition("Parser key")[2]
    number = re.search(rf"{_EXPECTED}(int|float|bool)'>(\s+- {_EXPECTED}NoneType)?", last)
    value = re.search(r"(?:Given value|Got value|import path string): ([^\n]*)", last)
    named = re.search(r"Expected a dot import path string: (\w+)", last)
    if named and number and number[1] == "bool":  # a logger, or whether there is one
        number = None
    choices = ", ".join(re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", last))
    if choices and path and value:
        choices = choices.replace("'", "")
        return f"--{'.'.join(path)} is {value[1]}; it must be one of {choices}."
    lacking = re.search(
        r"class_path '([\w.]+)':\s*the following arguments are required: (\w+)", last
    )
    if lacking and path:
        return f"--{'.'.join(path)}: {lacking[1].rpartition('.')[2]} needs {lacking[2]}: give it."
    if path and number and value and not value[1].startswith("NestedArg"):
        given = value[1].partition(". Got value: ")[0]
        or_null = " or null" if number[2] else ""
        return f"--{'.'.join(path)} is {given}; it must be {_KINDS[number[1]]}{or_null}."
    name = re.search(r"Expected a dot import path string: (\w+)", message)
    keys = re.findall(r"Parser key \"([\w.]+)\"", message[: name.start()]) if name else []
    if name and keys:
        base = _BASES.get(keys[-1], ())
        public = {name: getattr(room, name) for room in (methods, data) for name in room.__all__}
        known = [name for name, x in public.items() if isinstance(x, type) and issubclass(x, base)]
        return f"--{'.'.join(keys)}: there is no class {name[1]}{did_you_mean(name[1], known)}"
    several = re.search(r"Multiple subclasses with name (\w+)\. [^:]*: ([\w., ]+\w)", message)
    if several and path:
        return f"--{'.'.join(path)}: several classes are called {several[1]}: give {several[2]}."
    if path and re.search(r"Expected an instantiatable class, but \S+ is abstract", message):
        return (
            f"--{path[0]}: its class is not known yet: give it, or --config, before its arguments."
        )
    noise = r"\s*(Does not validate|Subtypes:|Errors:|Given value|- Expected a <class 'NoneType'>)"
    lines = [line for line in message.splitlines() if not re.match(noise, line)]
    text = " ".join(line.strip().removeprefix("- ") for line in lines)
    option = re.search(
        r"class_path '([\w.]+)': (?:Option '|unrecognized arguments: --)([\w.]+)", text
    )
    return text + did_you_mean(option[2], _arguments(option[1])) if option else text


def _arguments(class_path: str) -> list[str]:
    """Names of a class's arguments, those of its bases and of groups (`mixture.components`) too."""
    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
    return list(parser.get_defaults().keys())
