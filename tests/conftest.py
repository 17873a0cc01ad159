"""Fixtures and settings that every test shares."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when the libraries are imported, therefore set before: no test talks to the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"
os.environ["OMP_NUM_THREADS"] = "1"  # as _one_thread, for the processes that tests start

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real images, weights and specs; tests that need it are skipped without it."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("GENSEG_SHARED", default))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder} (set GENSEG_SHARED)")
    return folder


@pytest.fixture(scope="session", params=["part", "whole"])
def golden_of(request: pytest.FixtureRequest) -> Callable[[str], dict[str, torch.Tensor]]:
    """The numbers of a method's authors: the repository's part, and all where they are shared."""
    folder = Path(__file__).parent / "golden"
    if request.param == "whole":
        folder = request.getfixturevalue("shared_dir") / "golden"
    return lambda name: load_file(folder / f"{name}.safetensors")


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Let files of this process grow to so many bytes and no further; the kernel refuses more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors run faster on one thread, and sums come out in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _empty_hubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is cached in the home folder must not make a test pass here and fail elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch_home")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # class indices
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    seed_everything(0, workers=True, verbose=False)


@pytest.fixture
def genseg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The command line as a user types it, run in `tmp_path`: `genseg("check --data ...")`."""
    from lightning_genseg.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genseg"])
    return lambda line: main(shlex.split(line))
