"""A base learner that has hardly been trained."""

from pathlib import Path

import pytest

from tests.methods.fewshot.contract import train_base_learner


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_base_learner(tmp_path_factory.mktemp("base"))
