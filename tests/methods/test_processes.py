"""Scores and weights are the same under any number of processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_genseg import EMOptions, GMMHead
from lightning_genseg.data.loaders import CheckedLoader, EvaluationSampler, collate
from lightning_genseg.mixtures.memory import DecayedMoments, FeatureRing
from lightning_genseg.ops import processes as ops_processes
from lightning_genseg.ops.processes import over_processes
from tests.methods.processes_run import IMAGES, SPARSE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one, two and three processes have found, and two that `ddp_spawn` has started."""
    folder = tmp_path_factory.mktemp("processes")
    for task in ("1", "2", "3", "spawn"):
        done = subprocess.run(
            [sys.executable, "-m", "tests.methods.processes_run", str(folder), task],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
    return folder


def load(folder: Path, processes: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{processes}_{rank}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("processes", [2, 3])
def test_every_image_counts_once(folder, processes):
    one, several = (json.loads((folder / f"{n}_0.json").read_text()) for n in (1, processes))
    for case, scores in one.items():
        assert several[case].keys() == scores.keys()
        for name, value in scores.items():
            assert several[case][name] == pytest.approx(value, rel=1e-5), (case, name)
    assert {"fit val_mIoU", "validate val_mIoU", "test test_FPR95", "test test_ECE"} <= one[
        "batches of 1"
    ].keys()
    assert one["batches of 1"] == pytest.approx(one["batches of 2"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("method", SPARSE)
def test_every_labelled_pixel_counts_alike(folder, method):
    one, first, second = (load(folder, n, rank)[method] for n, rank in ((1, 0), (2, 0), (2, 1)))
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ddp
def test_processes_that_share_memory_share_none_of_the_mixture(folder):
    spawned = torch.load(folder / "spawn.pt", weights_only=True)
    for name, value in load(folder, 2)["gmmseg"].items():
        torch.testing.assert_close(spawned[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.ddp
def test_one_mixture_in_your_own_project(folder):
    first, second = (load(folder, 2, rank)["own project"] for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@pytest.mark.ddp
def test_what_any_process_has_seen_is_known_to_all(folder):
    """A token that one process has met has a place in the vocabulary of every one."""
    for rank in (0, 1):
        assert load(folder, 2, rank)["flags"]["anywhere"].tolist() == [True, True, False]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_an_evaluation_sampler_splits(processes, batch_size):
    dataset = [
        {
            "image": torch.zeros(3, 2, 2),
            "mask": torch.full((2, 2), i),
            "anomaly": torch.zeros(2, 2, dtype=torch.long),
            "name": str(i),
        }
        for i in range(IMAGES)
    ]
    seen, lengths = [], set()
    for rank in range(processes):
        plain = torch.utils.data.DistributedSampler(dataset, processes, rank, shuffle=False)
        loader = CheckedLoader(dataset, batch_size=batch_size, sampler=plain, collate_fn=collate)
        assert isinstance(loader.sampler, EvaluationSampler)
        batches = list(loader)
        lengths.add(len(batches))
        for batch in batches:
            repeated = bool((batch["mask"] == 255).all())
            assert batch.get("repeated", False) == repeated
            assert bool((batch["anomaly"] == 255).all()) == repeated
            seen += [] if repeated else batch["name"]
    assert sorted(seen) == [str(i) for i in range(IMAGES)]
    assert len(lengths) == 1


@pytest.mark.parametrize("kind", [FeatureRing, DecayedMoments])
def test_a_memory_leaves_what_processes_share(kind):
    memory = kind(2, 3, size=4)
    for value in vars(memory).values():
        for tensor in value if isinstance(value, tuple) else [value]:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
    shared = memory.moments()
    memory.push(torch.ones(3, 3), torch.tensor([0, 0, 1]))
    assert memory.moments().counts.tolist() == [2, 1]
    assert shared.counts.tolist() == [0, 0]
    memory.load_state_dict(kind(2, 3, size=4).state_dict())


def test_over_processes_may_be_nested(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with over_processes():
        with over_processes():
            pass
        assert ops_processes._together
    assert not ops_processes._together


def test_a_random_ring_is_the_same_everywhere():
    rings = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        head = GMMHead(8, 2, em=EMOptions(memory="ring", memory_size=5, memory_start="random"))
        assert not head.memory.entered.any()  # what only predicts does without
        head.memory_state()
        rings.append(head.memory.features)
    assert torch.equal(*rings)
    assert len(rings[0].unique(dim=0)) == 2 * 5 * 5 + 1
