"""The schedule against its formula, against PyTorch's own schedules, in a resumed run and from YAML."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, PolynomialLR

from lightning_genseg import SegmentationModule, SoftmaxSegmenter
from lightning_genseg.methods.optimisation import WarmupPolynomialLR
from tests.contract import NUM_CLASSES, TINY, PlainFeatures, loader, trainer


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": r} for r in rates])


def rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def test_the_papers_transformer_schedule_by_hand():
    sgd = optimizer(6e-5, 6e-4)
    schedule = WarmupPolynomialLR(sgd, total_iters=160_000, warmup_iters=1500)
    seen = rates(schedule, sgd, 160_001)
    assert seen[0] == pytest.approx([6e-11, 6e-10])
    # Halfway through the warm-up: 6e-5 * (1 - 750 / 160000) * 0.5000005
    assert seen[750] == pytest.approx([2.9859405e-5, 2.9859405e-4], rel=1e-7)
    assert seen[1500] == pytest.approx([5.94375e-5, 5.94375e-4])
    assert seen[80_000] == pytest.approx([3e-5, 3e-4])
    assert seen[160_000] == [0, 0]


def test_the_papers_cnn_schedule_by_hand():
    sgd = optimizer(0.01)
    schedule = WarmupPolynomialLR(sgd, total_iters=80_000, power=0.9, min_lr=1e-4)
    seen = rates(schedule, sgd, 80_003)
    assert seen[0] == [0.01]
    assert seen[40_000] == pytest.approx([1e-4 + 0.0099 * 0.5**0.9])
    assert seen[80_000] == seen[80_002] == pytest.approx([1e-4])


def test_it_is_the_product_of_pytorchs_own():
    ours, theirs = optimizer(0.1, 2.0), optimizer(0.1, 2.0)
    schedule = WarmupPolynomialLR(ours, 50, 0.9, 12, 0.01)
    chain = ChainedScheduler(
        [LinearLR(theirs, start_factor=0.01, total_iters=12), PolynomialLR(theirs, 50, 0.9)]
    )
    torch.testing.assert_close(
        torch.tensor(rates(schedule, ours, 50)), torch.tensor(rates(chain, theirs, 50))
    )


@pytest.mark.parametrize("at", [3, 4, 9])
def test_its_state_goes_on_where_it_was_saved(at):
    whole = optimizer(0.1, 2.0)
    expected = rates(WarmupPolynomialLR(whole, 12, warmup_iters=4), whole, 12)
    first = optimizer(0.1, 2.0)
    schedule = WarmupPolynomialLR(first, 12, warmup_iters=4)
    assert rates(schedule, first, at) == expected[:at]
    second = optimizer(0.1, 2.0)
    resumed = WarmupPolynomialLR(second, 12, warmup_iters=4)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert rates(resumed, second, 12 - at) == expected[at:]


class LearningRates(Callback):
    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_a_resumed_run_has_the_rates_of_the_whole_run(tmp_path):
    def fit(steps: int, **arguments: Any) -> tuple[Any, list[list[float]]]:
        recorder = LearningRates()
        run = trainer(tmp_path, max_steps=steps, max_epochs=-1, callbacks=[recorder])
        model = SoftmaxSegmenter(
            NUM_CLASSES,
            features=PlainFeatures(),
            head_lr_factor=10.0,
            lr_scheduler=lambda o: WarmupPolynomialLR(o, 6, warmup_iters=3),
        )
        run.fit(model, loader(), loader(2), **arguments)
        return run, recorder.seen

    _, whole = fit(6)
    run, first = fit(4)
    run.save_checkpoint(tmp_path / "four.ckpt")
    _, rest = fit(6, ckpt_path=tmp_path / "four.ckpt")
    assert first + rest == whole
    factors = [1e-6, (1 + 2e-6) / 3 * 5 / 6, (2 + 1e-6) / 3 * 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [group[0] for group in whole] == pytest.approx([1e-4 * f for f in factors])
    assert [group[1] for group in whole] == pytest.approx([1e-3 * f for f in factors])


def test_it_is_built_from_yaml(monkeypatch):
    monkeypatch.setattr("sys.argv", ["genseg"])
    network = {k: v for k, v in TINY.items() if k != "num_classes"}
    schedule = {"total_iters": 80_000, "power": 1.0, "warmup_iters": 1500, "min_lr": 0.0}
    model = LightningCLI(
        SegmentationModule,
        subclass_mode_model=True,
        seed_everything_default=False,
        run=False,
        save_config_callback=None,
        args={
            "model": {
                "class_path": "lightning_genseg.methods.softmax.SoftmaxSegmenter",
                "init_args": {
                    "num_classes": 6,
                    **network,
                    "lr_scheduler": {
                        "class_path": "lightning_genseg.methods.optimisation.WarmupPolynomialLR",
                        "init_args": schedule,
                    },
                },
            },
            "trainer": {"accelerator": "cpu", "logger": False},
        },
    ).model
    built = model.configure_optimizers()["lr_scheduler"]
    assert isinstance(built["scheduler"], WarmupPolynomialLR)
    assert {name: getattr(built["scheduler"], name) for name in schedule} == schedule
    assert built["interval"] == "step"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_iters": 0}, "total_iters is 0; it must be at least 1"),
        ({"power": -0.1}, "power is -0.1; it must not be negative"),
        ({"warmup_iters": -1}, "warmup_iters is -1; it must not be"),
        ({"min_lr": -1e-4}, "min_lr is -0.0001; it must not be"),
        ({"warmup_start_factor": 1.5}, "warmup_start_factor is 1.5; it must be between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupPolynomialLR(optimizer(0.1), **{"total_iters": 10, **arguments})
