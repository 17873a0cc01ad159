"""Whatever moment a run is killed at, the run that goes on ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.killed_run import BATCHES, EPOCHS, METHODS
from tests.methods.test_state import flat

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
MOMENTS = {name: 4 if index < 3 else 3 for index, name in enumerate(METHODS)}


def start(*words: Any) -> None:
    command = [sys.executable, "-m", "tests.methods.killed_run", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def assert_same_end(first: Path, second: Path) -> None:
    a, b = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (first, second))
    assert a["global_step"] == b["global_step"] == BATCHES * EPOCHS
    random = [x["callbacks"]["RandomStates"]["processes"] for x in (a, b)]
    assert random[0][0]["python"] == random[1][0]["python"]
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "mixture_memory")
    ends = [
        flat([*(x.get(part) for part in parts), r]) for x, r in zip((a, b), random, strict=True)
    ]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_there_are_thirty_moments():
    assert sum(MOMENTS.values()) == 30


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(tmp_path, method):
    start(tmp_path, "kill", method, 17, MOMENTS[method])
    for number in range(MOMENTS[method]):
        assert_same_end(tmp_path / "whole", tmp_path / str(number))
    kills = [int((tmp_path / str(n) / "kills").read_text()) for n in range(MOMENTS[method])]
    print(method, "killed after the steps", kills)
    assert len(kills) == MOMENTS[method]


@pytest.mark.ddp
def test_resumed_on_two_processes(tmp_path):
    start(tmp_path, "whole")
    start(tmp_path, "rest")
    for method in METHODS:
        assert_same_end(tmp_path / f"whole {method}", tmp_path / f"rest {method}")
