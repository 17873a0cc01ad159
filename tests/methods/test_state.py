"""A run that is interrupted and resumed is the same run; inference carries no training state."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_genseg import GMMSeg
from tests.contract import TINY, batch_of, in_groups, loader, trainer
from tests.methods.training_run import BATCHES, read_losses, run

ROOT = Path(__file__).resolve().parents[2]


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        return {name: torch.tensor(value)} if isinstance(value, int | float) else {}
    return {k: v for key, item in items for k, v in flat(item, f"{name}/{key}").items()}


def assert_same_state(first: Path, second: Path) -> None:
    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "mixture_memory"):
        mine, theirs = flat(a.get(part)), flat(b.get(part))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), (part, name)


def assert_same_losses(first: Path, second: Path, since: int = 0) -> None:
    a, b = (read_losses(folder / "losses.jsonl") for folder in (first, second))
    assert list(a) == list(range(3 * BATCHES))
    assert {k: v for k, v in a.items() if k >= since} == {k: v for k, v in b.items() if k >= since}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_killed_and_resumed(whole, tmp_path):
    # Twelve of fifteen batches are done: two epochs, and two batches of the third.
    command = [sys.executable, "-m", "tests.methods.training_run", str(tmp_path), "13"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(read_losses(tmp_path / "losses.jsonl")) == 12
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    run(tmp_path, resume=tmp_path / "last.ckpt", seed=1)
    assert_same_losses(whole, tmp_path)
    assert_same_state(whole / "step=14.ckpt", tmp_path / "step=14.ckpt")


# Middle of an epoch before and after EM (every third batch), its last batch, after its end.
@pytest.mark.parametrize(
    ("start", "since"),
    [("step=2.ckpt", 2), ("step=6.ckpt", 6), ("step=10.ckpt", 10), ("epochs/epoch=0.ckpt", 5)],
)
def test_resumed(whole, tmp_path, start, since):
    run(tmp_path, resume=whole / start, seed=1)
    assert min(read_losses(tmp_path / "losses.jsonl")) == since
    assert_same_losses(whole, tmp_path, since)
    assert_same_state(whole / "step=14.ckpt", tmp_path / "step=14.ckpt")


def slow(arguments: dict[str, Any]) -> Any:
    return pytest.param(arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": "ring"},
        slow({"memory": "ring", "memory_dtype": "bfloat16", "covariance": "full"}),
        slow({"assignment": "em", "loops": 2, "memory_filter": "correct"}),
        slow({"train": "gradient"}),
        slow({"lr_scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 15)}),
        slow({"trainer_arguments": {"accumulate_grad_batches": 2}}),
        slow({"trainer_arguments": {"precision": "bf16-mixed"}}),
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_resumed_with_other_settings(tmp_path, arguments):
    run(tmp_path / "whole", **arguments)
    checkpoints = sorted((tmp_path / "whole").glob("step=*.ckpt"), key=lambda p: int(p.stem[5:]))
    start, end = checkpoints[1], checkpoints[-1].name
    run(tmp_path / "again", resume=start, seed=1, **arguments)
    since = min(read_losses(tmp_path / "again" / "losses.jsonl"))
    assert 0 < since < 3 * BATCHES - 1
    assert_same_losses(tmp_path / "whole", tmp_path / "again", since)
    assert_same_state(tmp_path / "whole" / end, tmp_path / "again" / end)


# --- what inference does not need ------------------------------------------------------------


FILLED = {**TINY, "embedding_dim": 16, "components": 2, "memory": "ring", "memory_size": 8000}


@pytest.fixture
def filled() -> GMMSeg:
    """A model with 1.6 MB of weights and a memory of 6 MB."""
    model = GMMSeg(**in_groups(**FILLED))
    model.head.memory.push(torch.randn(96_000, 16), torch.arange(96_000) % 12)
    return model


def size_of(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in flat(value).values())


def test_weights_carry_no_memory(filled, tmp_path):
    weights = size_of(dict(filled.state_dict()))
    ring = 96_000 * 16 * 4
    assert weights < 2e6 < ring
    full = ModelCheckpoint(tmp_path, "full")
    light = ModelCheckpoint(tmp_path, "light", save_weights_only=True, every_n_train_steps=2)
    run = trainer(tmp_path, callbacks=[full, light], enable_checkpointing=True)
    run.fit(filled, loader(), loader(2))
    assert (tmp_path / "full.ckpt").stat().st_size > ring
    assert (tmp_path / "light.ckpt").stat().st_size < 1.2 * weights
    assert "mixture_memory" not in torch.load(tmp_path / "light.ckpt", weights_only=True)

    image = batch_of()["image"]
    expected = filled.eval().maps(image)
    for name in ("full", "light"):
        loaded = GMMSeg.load_from_checkpoint(tmp_path / f"{name}.ckpt").eval()
        for key, value in loaded.maps(image).items():
            assert torch.equal(value, expected[key])
        # The memory comes back where there is one, and starts anew where there is none.
        counts = loaded.head.memory.moments().counts
        assert (counts.sum() > 90_000) == (name == "full")
    assert trainer(tmp_path).test(filled, loader(2), tmp_path / "light.ckpt", verbose=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"memory_size": 100}, "set memory_size as in the checkpoint"),
        ({"components": 3}, "set components, embedding_dim and covariance as in the checkpoint"),
    ],
)
def test_another_memory_is_refused(filled, tmp_path, options, sentence):
    full = ModelCheckpoint(tmp_path, "full")
    run = trainer(tmp_path, callbacks=[full], enable_checkpointing=True)
    run.fit(filled, loader(), loader(2))
    other = GMMSeg(**in_groups(**{**FILLED, **options}))
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path).fit(other, loader(), loader(2), ckpt_path=tmp_path / "full.ckpt")
