"""The command `genseg`."""
