"""Groups of parameters, optimisers and schedules: by formula, by PyTorch's own, from YAML."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    PolynomialLR,
    StepLR,
)
from torch.utils.data import IterableDataset

from lightning_genseg import GMMSeg, SegmentationModule, SoftmaxSegmenter
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.optimisation import WarmupPolynomialLR
from tests.contract import NUM_CLASSES, TINY, PlainFeatures, loader, scenes, trainer


def make(**arguments: Any) -> SoftmaxSegmenter:
    return SoftmaxSegmenter(NUM_CLASSES, features=PlainFeatures(), **arguments)


def groups_of(model: SegmentationModule) -> dict[str, dict[str, Any]]:
    optimizer = model.configure_optimizers()["optimizer"]
    return {group["name"]: group for group in optimizer.param_groups}


def from_yaml(method: type, **arguments: Any) -> SegmentationModule:
    """The tiny network, with arguments as a configuration file holds them."""
    model = {"class_path": f"lightning_genseg.{method.__name__}", "init_args": TINY | arguments}
    return LightningCLI(
        SegmentationModule,
        subclass_mode_model=True,
        seed_everything_default=False,
        run=False,
        save_config_callback=None,
        args={"model": model, "trainer": {"accelerator": "cpu", "logger": False}},
    ).model


class LearningRates(Callback):
    """Rates of all groups before every batch."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


# --- groups ----------------------------------------------------------------------------------


def test_parameters_are_grouped_by_encoder_and_by_dimensions():
    model = SoftmaxSegmenter(**TINY, head_lr_factor=10.0, decay_norms=False)
    groups = groups_of(model)
    assert set(groups) == {"encoder", "encoder_no_decay", "head", "head_no_decay"}
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    encoder = {id(p) for p in model.features.encoder.parameters()}
    for name, group in groups.items():
        assert {id(p) in encoder for p in group["params"]} == {name.startswith("encoder")}
        assert {p.ndim > 1 for p in group["params"]} == {not name.endswith("no_decay")}
        assert group["lr"] == pytest.approx(1e-4 if name.startswith("encoder") else 1e-3)
        assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else 0.01)


class Positions(nn.Module):
    """A transformer's parameters by their usual names, all of them matrices."""

    out_channels = 4

    def __init__(self, **inside: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, value in inside.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("absolute_pos_embed", False), ("pos_embed", False), ("pos_embed_win", False),
        ("position_embeddings", False), ("relative_position_bias_table", False),
        ("rel_pos_h", False), ("attention_biases", False), ("pos_block", False),
        ("weight", True), ("exposure", True), ("compose_embed", True), ("position", True),
    ],
)  # fmt: skip
def test_positions_do_not_decay(name, decayed):
    network = Positions(attention=Positions(**{name: nn.Parameter(torch.ones(2, 3))}))
    model = SoftmaxSegmenter(NUM_CLASSES, features=network, decay_norms=False)
    group = groups_of(model)["encoder" if decayed else "encoder_no_decay"]
    assert group["params"] == [getattr(network.attention, name)]
    assert (group["weight_decay"] == 0) is not decayed


def test_a_swin_transformer_decays_its_matrices_only():
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "img_size": 64}
    model = SoftmaxSegmenter(
        NUM_CLASSES, encoder="tu-swin_tiny_patch4_window7_224", decoder="upernet",
        network_options=small, decay_norms=False, head_lr_factor=10.0,
    )  # fmt: skip
    groups, names = groups_of(model), {id(p): name for name, p in model.named_parameters()}
    for kind, group in groups.items():
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name.startswith("features.encoder.") == kind.startswith("encoder")
            table = name.endswith("relative_position_bias_table")
            assert (parameter.ndim > 1 and not table) == (not kind.endswith("no_decay"))
    tables = [names[id(p)] for p in groups["encoder_no_decay"]["params"] if p.ndim > 1]
    assert len(tables) == 4


def test_by_default_all_parameters_decay_at_one_rate_but_frozen_ones():
    model = SoftmaxSegmenter(**TINY)
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups_of(model).items()}
    assert rates == {"encoder": (1e-4, 0.01), "head": (1e-4, 0.01)}
    model.features.encoder.requires_grad_(False)
    assert list(groups_of(model)) == ["head"]


def test_a_network_without_an_encoder_learns_at_the_base_rate():
    model = make(head_lr_factor=10.0)
    groups = groups_of(model)
    assert groups["encoder"]["lr"] == 1e-4
    assert groups["head"]["lr"] == pytest.approx(1e-3)
    own = {id(p) for p in model.features.parameters()}
    assert {id(p) for p in groups["encoder"]["params"]} == own


# --- from YAML -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
        ("torch.optim.SGD", {"lr": 0.1}),
        ("torch.optim.AdamW", {"lr": 6e-5, "betas": (0.8, 0.99), "weight_decay": 0.02}),
        ("torch.optim.Adam", {"lr": 0.003}),
    ],
)
@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_the_optimiser_is_the_one_in_the_yaml(monkeypatch, method, path, arguments):
    """Nothing leaks in from a default: SGD without a weight decay has none."""
    monkeypatch.setattr("sys.argv", ["genseg"])
    polynomial = {"total_iters": 7, "power": 0.9}
    model = from_yaml(
        method,
        head_lr_factor=2.0,
        optimizer={"class_path": path, "init_args": arguments},
        lr_scheduler={
            "class_path": "torch.optim.lr_scheduler.PolynomialLR",
            "init_args": polynomial,
        },
    )
    configured = model.configure_optimizers()
    kind = getattr(torch.optim, path.rsplit(".", 1)[1])
    expected = kind([nn.Parameter(torch.ones(1))], **arguments)
    for group in configured["optimizer"].param_groups:
        factor = 2.0 if group["name"] == "head" else 1.0
        for key, value in expected.param_groups[0].items():
            if key not in ("params", "lr"):
                assert group[key] == value, key
        assert group["lr"] == pytest.approx(arguments["lr"] * factor)
    schedule = configured["lr_scheduler"]
    assert isinstance(schedule["scheduler"], PolynomialLR)
    assert schedule["scheduler"].total_iters == 7
    assert schedule["interval"] == "step"
    assert "optimizer" not in model.hparams


def test_our_schedule_from_yaml(monkeypatch):
    monkeypatch.setattr("sys.argv", ["genseg"])
    arguments = {"total_iters": 80_000, "power": 1.0, "warmup_iters": 1500, "min_lr": 0.0}
    path = f"{WarmupPolynomialLR.__module__}.WarmupPolynomialLR"
    model = from_yaml(SoftmaxSegmenter, lr_scheduler={"class_path": path, "init_args": arguments})
    built = model.configure_optimizers()["lr_scheduler"]
    assert isinstance(built["scheduler"], WarmupPolynomialLR)
    assert {name: getattr(built["scheduler"], name) for name in arguments} == arguments
    assert built["interval"] == "step"


# --- schedules of a run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps", "batches"),
    [
        ({"max_epochs": 2}, 4, 1),
        ({"max_epochs": -1, "max_steps": 5}, 5, 1),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 2, 2),
    ],
    ids=str,
)
def test_by_default_the_rate_decays_polynomially_to_the_end(tmp_path, arguments, steps, batches):
    recorder = LearningRates()
    run = trainer(tmp_path, callbacks=[recorder], **arguments)
    run.fit(make(head_lr_factor=10.0), loader(), loader(2))
    expected = [1e-4 * (1 - step / steps) ** 0.9 for step in range(steps) for _ in range(batches)]
    assert [rate[0] for rate in recorder.rates] == pytest.approx(expected)
    assert [rate[1] for rate in recorder.rates] == pytest.approx([10 * rate for rate in expected])
    assert run.optimizers[0].param_groups[0]["lr"] == 0


def test_a_run_without_an_end_needs_a_schedule(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield scenes()[0]

    forever = torch.utils.data.DataLoader(Endless(), batch_size=2)
    for arguments, data in (({"max_epochs": -1}, loader()), ({"max_epochs": 1}, forever)):
        with pytest.raises(GenSegError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
            trainer(tmp_path, limit_val_batches=0, **arguments).fit(make(), data, loader(2))
    constant = make(lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(constant, forever, loader(2))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("schedule", "monitor"),
    [
        (lambda o: ReduceLROnPlateau(o, monitor="train_loss", patience=0), "train_loss"),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode="max"), "val_mIoU"),
    ],
    ids=["Lightning's", "PyTorch's"],
)
def test_a_plateau_is_one_of_what_is_asked_for(tmp_path, schedule, monitor):
    model = make(lr_scheduler=schedule)
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == monitor
    trainer(tmp_path, max_epochs=2).fit(model, loader(), loader(2))


@pytest.mark.parametrize("plateau", [ReduceLROnPlateau, torch.optim.lr_scheduler.ReduceLROnPlateau])
@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val_mIoU", "max"), ("val_IoU_1", "max"), ("train_loss", "min"), ("my_score", "min")],
)
def test_a_plateau_follows_its_score(plateau, monitor, mode):
    words = {"monitor": monitor} if plateau is ReduceLROnPlateau else {}
    mode = mode if words else "max"  # PyTorch's has no monitor: val_mIoU
    found = make(lr_scheduler=lambda o: plateau(o, **words, patience=0, factor=0.5))
    schedule = found.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for value in (0.1, 0.2, 0.3):
        schedule.step(value)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    assert rates == ([1e-4] * 3 if mode == "max" else [1e-4, 5e-5, 2.5e-5])


@pytest.mark.parametrize(
    "callback", [ModelCheckpoint(monitor="val_mIoU"), EarlyStopping("val_IoU_0", mode="min")]
)
def test_the_worst_is_not_kept_for_the_best(tmp_path, callback):
    name = type(callback).__name__
    run = trainer(tmp_path, callbacks=[callback], enable_checkpointing=True)
    with pytest.raises(GenSegError, match=f"{name} monitors val_.* with mode min.*mode to max"):
        run.fit(make(), loader(), loader(2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"optimizer": lambda g: torch.optim.AdamW(g, lr=-1)},
            r"optimizer .*Invalid learning rate",
        ),
        ({"optimizer": lambda g: torch.optim.SGD(g, momentum=-1)}, r"optimizer .*momentum"),
        ({"lr_scheduler": lambda o: StepLR(o, 0)}, r"lr_scheduler cannot be used"),
        ({"lr_scheduler": lambda o: OneCycleLR(o, 0.1)}, r"lr_scheduler .*total_steps"),
        ({"lr_scheduler": lambda o: OneCycleLR(o, 0.1, 1)}, r"lr_scheduler .*Tried to step 2 "),
    ],
)
def test_what_an_optimiser_refuses_is_a_sentence(tmp_path, arguments, sentence):
    with pytest.raises(GenSegError, match=sentence):
        trainer(tmp_path, limit_val_batches=0).fit(make(**arguments), loader(), loader(2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0; it must be at least 1"),
        ({"accumulate_grad_batches": -1}, "accumulate_grad_batches is -1"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val is -1"),
        ({"val_check_interval": 0}, "val_check_interval is 0; it must be positive"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch is 0"),
        ({"precision": "bf16-true"}, "precision is bf16-true, .*take 32-true, bf16-mixed or"),
        ({"precision": "16-true"}, "precision is 16-true"),
        ({"precision": "64-true"}, "precision is 64-true"),
    ],
)
def test_what_a_trainer_would_stumble_over(tmp_path, arguments, sentence):
    with pytest.raises(GenSegError, match=sentence):
        trainer(tmp_path, **arguments).fit(make(), loader(), loader(2))


# --- going on -------------------------------------------------------------------------------


def finished(folder: Path, **arguments: Any) -> Path:
    """Checkpoint of a run of two steps."""
    run = trainer(folder, limit_val_batches=0)
    run.fit(make(**arguments), loader(), loader(2))
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


SCHEDULES: dict[str, Any] = {
    "default": lambda n: {},
    "poly": lambda n: {"lr_scheduler": lambda o: PolynomialLR(o, n)},
    "warmup": lambda n: {"lr_scheduler": lambda o: WarmupPolynomialLR(o, n)},
    "cosine": lambda n: {"lr_scheduler": lambda o: CosineAnnealingLR(o, n)},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_finished_run_goes_on_with_the_rates_of_its_steps(tmp_path, schedule):
    make_schedule = SCHEDULES[schedule]
    end = finished(tmp_path, **make_schedule(2))
    recorders = []
    for start in (None, end):
        recorders.append(LearningRates())
        run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[recorders[-1]])
        run.fit(make(**make_schedule(4)), loader(), loader(2), ckpt_path=start)
    whole, rest = (recorder.rates for recorder in recorders)
    assert min(rates[0] for rates in rest) > 1e-5
    for mine, expected in zip(rest, whole[2:], strict=True):
        assert mine == pytest.approx(expected)


def test_a_schedule_that_has_ended_is_told(tmp_path):
    end, again = finished(tmp_path, **SCHEDULES["poly"](2)), make(**SCHEDULES["poly"](2))
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="at step 2 with a learning rate of 0"):
        run.fit(again, loader(), loader(2), ckpt_path=end)


def test_another_optimiser_is_refused(tmp_path):
    end = finished(tmp_path)
    sgd, adam = (partial(kind, lr=0.1) for kind in (torch.optim.SGD, torch.optim.Adam))
    for optimiser in (sgd, adam):
        name = optimiser.func.__name__
        with pytest.raises(GenSegError, match=f"trained with AdamW and this run has {name}: give"):
            trainer(tmp_path).fit(make(optimizer=optimiser), loader(), loader(2), ckpt_path=end)
    older = torch.load(end, weights_only=True)
    del older["optimizer"]
    torch.save(older, tmp_path / "older.ckpt")
    again = make(optimizer=sgd)
    with pytest.raises(GenSegError, match="trained with another optimizer and this run has SGD"):
        trainer(tmp_path).fit(again, loader(), loader(2), ckpt_path=tmp_path / "older.ckpt")
    again = make(decay_norms=False)
    with pytest.raises(GenSegError, match=r"has groups of \[\d+, \d+\] parameters.*decay_norms"):
        trainer(tmp_path).fit(again, loader(), loader(2), ckpt_path=end)
    again = make(optimizer=partial(torch.optim.AdamW, lr=0.5))
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"initial_lr 0.0001 .* checkpoint, not with 0\.5"):
        run.fit(again, loader(), loader(2), ckpt_path=end)
    # Weights alone are another matter.
    model = SoftmaxSegmenter.load_from_checkpoint(end, features=PlainFeatures(), optimizer=sgd)
    trainer(tmp_path, limit_val_batches=0).fit(model, loader(), loader(2))


# --- WarmupPolynomialLR ----------------------------------------------------------------------


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": r} for r in rates])


@pytest.mark.parametrize(
    ("first", "arguments", "expected"),
    [
        # For transformers; halfway up 6e-5 * (1 - 750 / 160000) * 0.5000005
        (
            6e-5,
            {"total_iters": 160_000, "warmup_iters": 1500},
            {0: 6e-11, 750: 2.9859405e-5, 1500: 5.94375e-5, 80_000: 3e-5, 160_000: 0},
        ),
        # For convolutions
        (
            0.01,
            {"total_iters": 80_000, "power": 0.9, "min_lr": 1e-4},
            {0: 0.01, 40_000: 1e-4 + 0.0099 * 0.5**0.9, 80_000: 1e-4, 80_002: 1e-4},
        ),
    ],
)
def test_the_papers_schedules_by_hand(first, arguments, expected):
    schedule = WarmupPolynomialLR(optimizer(first), **arguments)
    for step, rate in expected.items():
        schedule.last_epoch = step
        assert schedule.get_lr() == pytest.approx([rate], rel=1e-7)


def test_it_is_the_product_of_pytorchs_own():
    ours, theirs = optimizer(0.1, 2.0), optimizer(0.1, 2.0)
    schedules = [
        WarmupPolynomialLR(ours, 50, 0.9, 12, 0.01),
        LinearLR(theirs, start_factor=0.01, total_iters=12),
        PolynomialLR(theirs, 50, 0.9),
    ]
    for _ in range(50):
        for mine, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(expected["lr"])
        for step in (ours, theirs, *schedules):
            step.step()


def test_a_resumed_run_has_the_rates_of_the_whole_run(tmp_path):
    def fit(steps: int, **arguments: Any) -> tuple[Any, list[list[float]]]:
        recorder = LearningRates()
        run = trainer(tmp_path, max_steps=steps, max_epochs=-1, callbacks=[recorder])
        schedule = {"lr_scheduler": lambda o: WarmupPolynomialLR(o, 6, warmup_iters=3)}
        run.fit(make(head_lr_factor=10.0, **schedule), loader(), loader(2), **arguments)
        return run, recorder.rates

    _, whole = fit(6)
    run, first = fit(4)
    run.save_checkpoint(tmp_path / "four.ckpt")
    _, rest = fit(6, ckpt_path=tmp_path / "four.ckpt")
    assert first + rest == whole
    factors = [1e-6, (1 + 2e-6) / 3 * 5 / 6, (2 + 1e-6) / 3 * 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [group[0] for group in whole] == pytest.approx([1e-4 * f for f in factors])
    assert [group[1] for group in whole] == pytest.approx([1e-3 * f for f in factors])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_iters": 0}, "total_iters is 0; it must be at least 1"),
        ({"power": -0.1}, "power is -0.1; it must be at least 0"),
        ({"warmup_iters": -1}, "warmup_iters is -1; it must be at least 0"),
        ({"min_lr": -1e-4}, "min_lr is -0.0001; it must be at least 0"),
        ({"warmup_start_factor": 1.5}, "warmup_start_factor is 1.5; it must be between 0 and 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(GenSegError, match=message):
        WarmupPolynomialLR(optimizer(0.1), **{"total_iters": 10, **arguments})
