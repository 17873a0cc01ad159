"""What a user can mend, told in one sentence."""


class GenSegError(ValueError):
    """Wrong input: the message names the file or argument and the remedy.

    `genseg` prints it as one line; every other error is a bug and keeps its traceback.
    """


class MissingFileError(GenSegError, FileNotFoundError):
    """A file or folder that does not exist."""


class DownloadError(GenSegError, ConnectionError):
    """Something that could not be fetched."""
