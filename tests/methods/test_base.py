"""What the base gives to every method: optimisers, schedules, scores, sentences."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, ReduceLROnPlateau
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import IterableDataset

from lightning_genseg import GMMSeg, SegmentationModule, SoftmaxSegmenter
from tests.contract import NUM_CLASSES, TINY, PlainFeatures, batch_of, loader, scenes, trainer


def make(**arguments: Any) -> SoftmaxSegmenter:
    return SoftmaxSegmenter(num_classes=NUM_CLASSES, features=PlainFeatures(), **arguments)


def groups_of(model: SegmentationModule) -> dict[str, dict[str, Any]]:
    optimizer = model.configure_optimizers()["optimizer"]
    return {group["name"]: group for group in optimizer.param_groups}


# --- optimisers ------------------------------------------------------------------------------


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

    def __init__(self, inside: dict[str, nn.Module | nn.Parameter]) -> None:
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
    network = Positions({"attention": Positions({name: nn.Parameter(torch.ones(2, 3))})})
    model = SoftmaxSegmenter(NUM_CLASSES, features=network, decay_norms=False)
    group = groups_of(model)["encoder" if decayed else "encoder_no_decay"]
    assert group["params"] == [getattr(network.attention, name)]
    assert (group["weight_decay"] == 0) is not decayed


def test_a_swin_transformer_decays_its_matrices_only():
    small = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "img_size": 64}
    model = SoftmaxSegmenter(
        NUM_CLASSES, "tu-swin_tiny_patch4_window7_224", "upernet", network_options=small,
        decay_norms=False, head_lr_factor=10.0,
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


def test_by_default_all_parameters_decay_at_one_rate():
    groups = groups_of(SoftmaxSegmenter(**TINY))
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "encoder": (1e-4, 0.01),
        "head": (1e-4, 0.01),
    }


def test_frozen_parameters_are_left_alone():
    model = SoftmaxSegmenter(**TINY)
    model.features.encoder.requires_grad_(False)
    assert list(groups_of(model)) == ["head"]


def test_a_network_without_an_encoder_learns_at_the_base_rate():
    model = make(head_lr_factor=10.0)
    groups = groups_of(model)
    assert groups["encoder"]["lr"] == 1e-4
    assert groups["head"]["lr"] == pytest.approx(1e-3)
    own = {id(p) for p in model.features.parameters()}
    assert {id(p) for p in groups["encoder"]["params"]} == own


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("torch.optim.SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
        ("torch.optim.SGD", {"lr": 0.1}),
        ("torch.optim.AdamW", {"lr": 6e-5, "betas": [0.8, 0.99], "weight_decay": 0.02}),
        ("torch.optim.Adam", {"lr": 0.003}),
    ],
)
@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_the_optimiser_is_the_one_in_the_yaml(monkeypatch, method, path, arguments):
    """Nothing leaks in from a default: SGD without a weight decay has none."""
    monkeypatch.setattr("sys.argv", ["genseg"])
    network = {k: v for k, v in TINY.items() if k != "num_classes"}
    config = {
        "class_path": f"lightning_genseg.modules.{method.__name__}",
        "init_args": {
            "num_classes": 6,
            **network,
            "head_lr_factor": 2.0,
            "optimizer": {"class_path": path, "init_args": arguments},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.PolynomialLR",
                "init_args": {"total_iters": 7, "power": 0.9},
            },
        },
    }
    model = LightningCLI(
        SegmentationModule,
        subclass_mode_model=True,
        seed_everything_default=False,
        run=False,
        save_config_callback=None,
        args={"model": config, "trainer": {"accelerator": "cpu", "logger": False}},
    ).model
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    expected = getattr(torch.optim, path.rsplit(".", 1)[1])(
        [nn.Parameter(torch.ones(1))], **arguments
    )
    for group in optimizer.param_groups:
        factor = 2.0 if group["name"] == "head" else 1.0
        for key, value in expected.param_groups[0].items():
            if key not in ("params", "lr"):
                assert group[key] == value, key
        assert group["lr"] == pytest.approx(arguments["lr"] * factor)
    assert isinstance(schedule["scheduler"], PolynomialLR)
    assert schedule["scheduler"].total_iters == 7
    assert schedule["interval"] == "step"
    assert "optimizer" not in model.hparams


# --- schedules -------------------------------------------------------------------------------


class LearningRates(Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


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
        with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
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


# --- scores and pictures ---------------------------------------------------------------------


def test_logged_scores_are_those_of_the_whole_set(tmp_path):
    names = ["sky", "the ground", "building", "tree", "vehicle", "person"]
    model = make(class_names=names)
    run = trainer(tmp_path)
    result = run.test(model, loader(6), verbose=False)[0]
    prediction = torch.cat([p["mask"] for p in run.predict(model, loader(6))])
    mask = torch.stack([sample["mask"] for sample in scenes()[:6]])
    labelled = mask != 255
    expected = {}
    for index, name in enumerate(names):
        both = ((prediction == index) & (mask == index)).sum()
        either = (((prediction == index) | (mask == index)) & labelled).sum()
        expected[name] = (both / either).item()
    present = [value for value in expected.values() if value == value]
    assert result["test_mIoU"] == pytest.approx(sum(present) / len(present))
    assert result["test_IoU_the_ground"] == pytest.approx(expected["the ground"], nan_ok=True)
    accuracy = (prediction == mask)[labelled].float().mean().item()
    assert result["test_pixel_accuracy"] == pytest.approx(accuracy)


def test_labels_may_be_larger_than_the_image(tmp_path):
    """Scores are those at the size of the mask, where the images were made smaller."""
    samples = [{**sample, "image": sample["image"][:, ::2, ::2]} for sample in scenes()[:2]]
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    result = trainer(tmp_path).validate(make(), data, verbose=False)[0]
    assert 0 <= result["val_mIoU"] <= 1
    assert make().validation_step(next(iter(data)), 0)["mask"].shape == (2, 48, 64)


def test_the_module_normalises(tmp_path):
    model = make(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    image = torch.rand(2, 3, 8, 8)
    expected = torch.stack(
        [(image[:, i] - m) / s for i, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)])], 1
    )
    torch.testing.assert_close(model.normalize(image), expected)
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    loaded = SoftmaxSegmenter.load_from_checkpoint(tmp_path / "x.ckpt", features=PlainFeatures())
    torch.testing.assert_close(loaded.normalize(image), expected)


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_a_checkpoint_needs_no_other_file(tmp_path, method):
    network = {**TINY, "memory_size": 10} if method is GMMSeg else TINY
    source = method(**network)
    torch.save(source.features.encoder.state_dict(), tmp_path / "encoder.pt")
    model = method(**network, encoder_weights=tmp_path / "encoder.pt")
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "x.ckpt")
    (tmp_path / "encoder.pt").unlink()
    loaded = method.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    image = batch_of()["image"]
    assert loaded(image).equal(model.eval()(image))


@pytest.mark.parametrize("method", [SoftmaxSegmenter, GMMSeg])
def test_the_coarse_scores_of_ocrnet_join_the_loss(method):
    model = method(NUM_CLASSES, "tu-test_resnet", "ocrnet").eval()  # without dropout
    losses = model.compute_loss(batch_of())
    parts = {"loss_ce", "loss_component"} if method is GMMSeg else set()
    assert parts | {"loss", "loss_auxiliary"} <= set(losses)
    model.features.auxiliary_weight = 0.0
    without = model.compute_loss(batch_of())["loss"]
    torch.testing.assert_close(losses["loss"], without + 0.4 * losses["loss_auxiliary"])
    losses["loss_auxiliary"].backward()
    assert any(p.grad is not None for p in model.features.decoder.parameters())


# --- sentences -------------------------------------------------------------------------------


def test_a_nan_image_is_named(tmp_path):
    samples = [dict(sample) for sample in scenes()[:4]]
    samples[3]["image"] = torch.full_like(samples[3]["image"], torch.nan)
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    sentence = (
        rf"The loss is nan at step 1 \(images {samples[2]['name']}, {samples[3]['name']}\); lower"
    )
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path).fit(make(), data, loader(2))


def test_an_explosion_is_noticed_with_or_without_names(tmp_path):
    model = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e30))
    samples = [{"image": s["image"], "mask": s["mask"]} for s in scenes()[:8]]
    data = torch.utils.data.DataLoader(samples, batch_size=2)
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step [123] \(images without"):
        trainer(tmp_path).fit(model, data, loader(2))


def test_an_incomplete_method_cannot_be_built():
    class Half(SegmentationModule):
        def forward(self, image):
            return image

    with pytest.raises(TypeError, match="compute_loss"):
        Half(num_classes=2)
