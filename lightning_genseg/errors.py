"""What a user can mend, told in one sentence."""

from collections.abc import Iterable
from difflib import get_close_matches


class GenSegError(ValueError):
    """Wrong input: the message names the file or argument and the remedy.

    `genseg` prints it as one line; every other error is a bug and keeps its traceback.
    """


class MissingFileError(GenSegError, FileNotFoundError):
    """A file or folder that does not exist."""


class DownloadError(GenSegError, ConnectionError):
    """Something that could not be fetched."""


class UnwritableError(GenSegError, OSError):
    """A file that cannot be written: a full disk, a folder that may only be read."""


def reason(error: OSError) -> str | None:
    """Why the system refused, also where an `UnwritableError` tells of it."""
    cause = error.__cause__ if isinstance(error, UnwritableError) else error
    return cause.strerror if isinstance(cause, OSError) else str(error)


def first_line(error: BaseException) -> str:
    """Type and first line of an error, to be put into a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a sentence on an unknown word: the known one that is nearest, or all if they are few.

    Example:
        >>> "there is no decoder ufn" + did_you_mean("ufn", ["fpn", "unet"])
        'there is no decoder ufn; did you mean fpn?'
    """
    known = list(known)
    near = get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(known)}." if 0 < len(known) <= 40 else "."


def listed(values: Iterable[object], most: int = 5) -> str:
    """Some of many values for a message: `a, b, c`, with ` ...` where there are more."""
    words = list(map(str, values))
    return ", ".join(words[:most]) + (" ..." if len(words) > most else "")
