"""Two real processes hold the mixture of one, and exchange no more than EM needs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.ddp_run import BATCH, CASES, STEPS, run

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # post-hoc
]
ROOT = Path(__file__).resolve().parents[2]
FEATURE_MAP = BATCH // 2 * 16 * 16 * 16  # of one process: B x D x h x w
GROUPS, DIM, CLASSES, COMPONENTS = 12, 16, 6, 2
OTHERS = sorted(CASES.keys() - {"ring"})


def both_processes(folder: Path, *cases: str) -> Path:
    """Where both processes have written down their runs."""
    command = [sys.executable, "-m", "tests.methods.ddp_run", str(folder), *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "sync_dist" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return both_processes(tmp_path_factory.mktemp("ring"), "ring")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return both_processes(tmp_path_factory.mktemp("others"), *OTHERS)


def load(folder: Path, case: str, processes: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{case}_{processes}_{rank}.pt", weights_only=True)


@pytest.mark.parametrize(
    "case", ["ring", *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_two_processes_equal_one(request, tmp_path, case):
    folder = request.getfixturevalue("ring" if case == "ring" else "others")
    first, second = (load(folder, case, 2, rank) for rank in range(2))
    run(case, tmp_path, 1)
    alone = load(tmp_path, case, 1)
    assert len(first["mixtures"]) == len(second["mixtures"]) == len(alone["mixtures"]) == STEPS
    for mine, theirs, expected in zip(
        first["mixtures"], second["mixtures"], alone["mixtures"], strict=True
    ):
        for name, value in mine.items():
            assert torch.equal(value, theirs[name])
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone["mixtures"][0]["means"], alone["mixtures"][-1]["means"])
    for mine, theirs, expected in zip(
        first["moments"], second["moments"], alone["moments"], strict=True
    ):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    assert first["moments"][0].sum() > 0
    for name, value in first["parameters"].items():
        torch.testing.assert_close(value, second["parameters"][name], rtol=0, atol=0)
        torch.testing.assert_close(value, alone["parameters"][name], rtol=1e-4, atol=1e-5)
    assert first["val_mIoU"] == second["val_mIoU"] == alone["val_mIoU"]


@pytest.mark.slow
def test_what_crosses_the_wire(ring, others):
    """Per process and update, in numbers; the feature map has 8192 of them."""
    # Label counts, then three rounds of a maximum and a sum per component, and the scale.
    sinkhorn = CLASSES + (CLASSES + 1) * (1 + 3 * 2 * COMPONENTS)
    spread = GROUPS + 1
    moments = GROUPS * (1 + 2 * DIM)
    assert load(others, "decay", 2)["exchanged"] == [sinkhorn + spread + moments] * STEPS
    most = 7 * GROUPS * (DIM + 1)  # samples_per_component features, with their groups
    for numbers in load(ring, "ring", 2)["exchanged"]:
        assert sinkhorn + spread < numbers <= sinkhorn + spread + 1 + most < FEATURE_MAP
    for numbers in load(others, "loops", 2)["exchanged"]:
        assert numbers < FEATURE_MAP


def test_the_ring_is_not_broadcast(ring):
    stored = GROUPS * 40 * DIM
    assert 0 < load(ring, "ring", 2)["broadcast"] < GROUPS * (2 * DIM + 1) + 100 < stored


def test_the_checkpoint_of_two_processes_is_that_of_one(ring, tmp_path):
    run("ring", tmp_path, 1)
    two = torch.load(ring / "ring" / "2.ckpt", weights_only=True)
    one = torch.load(tmp_path / "ring" / "1.ckpt", weights_only=True)
    assert two["mixture_memory"].keys() == one["mixture_memory"].keys()
    for name, value in two["mixture_memory"].items():
        expected = one["mixture_memory"][name]  # the last row, if there is one, is nobody's
        torch.testing.assert_close(value[:GROUPS], expected[:GROUPS], rtol=1e-4, atol=1e-4)
