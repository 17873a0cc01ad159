"""Settings for the notebooks under pytest: one runs by default, the others with `-m slow`."""

import os

import pytest

# Kernels of notebooks that are tested side by side would wait for each other's threads, and run
# past their time.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out by `-m` what is marked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each takes 15 to 60 seconds, for the sake of its pictures."""
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.stem != "01_quickstart":
            item.add_marker(pytest.mark.slow)
