"""What every method must pass: subclass `ModuleContract` as `Test<Method>` and write `make`."""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_genseg import EMOptions, MixtureOptions, SegmentationModule
from lightning_genseg.arguments import arguments_of, as_options
from lightning_genseg.data import SyntheticScenes
from lightning_genseg.data.loaders import collate
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods import TrainedModule
from lightning_genseg.methods.deploy import Deployable

NUM_CLASSES = len(SyntheticScenes.CLASS_NAMES)
# A real network of half a million parameters that needs no download.
TINY = {
    "num_classes": NUM_CLASSES,
    "encoder": "tu-test_resnet",
    "decoder": "segformer",
    "network_options": {"decoder_segmentation_channels": 32},
}


@cache
def scenes(count: int = 32) -> list[dict[str, Any]]:
    """Toy street scenes of 48 x 64 pixels, with what sparse labels say beside the mask."""
    dataset = SyntheticScenes(count, (48, 64), seed=0)
    return [with_sparse_keys(dataset[i]) for i in range(count)]


def with_sparse_keys(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample whose ignored pixels are outside the image, and whose others are all labelled."""
    mask = sample["mask"]
    classes = torch.bincount(mask[mask != 255], minlength=NUM_CLASSES) > 0
    return {
        **sample,
        "unlabelled": torch.zeros_like(mask, dtype=torch.bool),
        "image_classes": classes,
    }


def batch_of(start: int = 0, count: int = 2) -> dict[str, Any]:
    return collate(scenes()[start : start + count])


def loader(count: int = 4, batch_size: int = 2) -> DataLoader[Any]:
    return DataLoader(scenes()[:count], batch_size=batch_size, collate_fn=collate)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    """A Trainer that does what it is told and nothing else."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **arguments})


def finish_step(model: nn.Module, losses: dict[str, Tensor], batch: dict[str, Any]) -> None:
    """What a plain loop does after the optimiser's step: here goes an update of your method's."""
    if hasattr(model, "update_mixture") and model.em.train != "gradient":
        model.update_mixture(losses["embedding"], batch["mask"], losses["assignment"])


def in_groups(**options: Any) -> dict[str, Any]:
    """GMMSeg's arguments, where the fields of its two groups may be given by their own names."""
    groups = {"mixture": MixtureOptions, "em": EMOptions}
    arguments: dict[str, Any] = {group: {} for group in groups}
    for name, value in options.items():
        owner = [group for group, kind in groups.items() if name in arguments_of(kind)]
        (arguments[owner[0]] if owner else arguments)[name] = value
    return arguments


def save(model: SegmentationModule, path: Path) -> Path:
    """A checkpoint of a module that has not been trained."""
    run = trainer(path.parent)
    run.strategy.connect(model)
    run.save_checkpoint(path)
    return path


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def types_of(method: type) -> dict[str, Any]:
    """Types of a method's arguments, those that it passes on included."""
    hints: dict[str, Any] = {}
    for cls in reversed(method.__mro__):
        if "__init__" in vars(cls):
            hints |= get_type_hints(vars(cls)["__init__"])
    return {name: hints[name] for name in arguments_of(method)}


def wrong_values(hint: Any, signed: bool) -> Iterator[Any]:
    """What an argument of this type must refuse; `signed` numbers may be negative."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) in (Union, types.UnionType) and len(parts) == 1:
        yield from wrong_values(parts[0], signed)
    elif get_origin(hint) is Literal:
        yield "no such choice"
    elif get_origin(hint) in (Sequence, list, tuple):
        yield from ([wrong] * 3 for wrong in wrong_values(parts[0], signed))
    elif hint in (int, float):
        yield from (float("nan"), "many", *([] if signed else [hint(-(10**9))]))
    elif hint is bool:
        yield "no"


def train_by_hand(
    model: SegmentationModule, steps: int, lr: float = 5e-3, batch_size: int = 4
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        batch = batch_of(step * batch_size % len(scenes()), batch_size)
        result = model.compute_loss(batch)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        finish_step(model, result, batch)
        losses.append(result["loss"].item())
    return losses


@torch.no_grad()
def mean_iou(model: SegmentationModule) -> float:
    everything = collate(scenes())
    metrics = model.val_metrics.clone()
    metrics.update(model.eval()(everything["image"]).argmax(1), everything["mask"])
    model.train()
    return float(metrics.compute()["mIoU"])


class Operations(TorchDispatchMode):
    """Counts the operations that run and keeps the size of the largest tensor that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


class PlainFeatures(nn.Module):
    """Somebody's own network: no `out_channels`, no `encoder`, stride 8."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


class Foreign(LightningModule):
    """A LightningModule that knows nothing of ours and has one of our methods inside."""

    def __init__(self, inner: SegmentationModule) -> None:
        super().__init__()
        self.inner = inner

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses = self.inner.compute_loss(batch)
        self.log("my_loss", losses["loss"])
        return losses

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        finish_step(self.inner, outputs, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.inner.parameters(), lr=1e-2)


@contextmanager
def fake_gpu(model: nn.Module, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The batch on a GPU that need not be there, and the module likewise, in place.

    Tensors have shapes and a device but no values: mixed devices are an error, and so is whatever
    needs a value, for which the CPU would wait. There is no backward, which wants a real GPU.
    """

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    new = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = new
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved(buffer)
        yield {key: moved(x) if isinstance(x, Tensor) else x for key, x in batch.items()}


class ModuleContract:
    """The tests. `learning` are arguments under which `steps` are enough to learn something."""

    learning: ClassVar[dict[str, Any]] = {}
    steps: ClassVar[int] = 20
    signed: ClassVar[set[str]] = {"ignore_index"}  # numbers that may be negative
    fixed: ClassVar[set[str]] = set()  # arguments of its bases that the method does not take
    updated: ClassVar[set[str]] = set()  # buffers that a step changes, in any LightningModule

    def make(self, **arguments: Any) -> SegmentationModule:
        raise NotImplementedError

    @pytest.mark.parametrize("size", [(48, 64), (33, 47), (20, 90)])
    def test_scores_have_the_size_of_the_image(self, size):
        model = self.make().eval()
        image = torch.rand(2, 3, *size)
        assert model(image).shape == (2, NUM_CLASSES, *size)
        for name, value in model.maps(image).items():
            assert value.shape == (2, NUM_CLASSES if name == "scores" else 1, *size)
            assert value.isfinite().all()

    def test_backward_reaches_every_trainable_parameter(self):
        model = self.make()
        losses = model.compute_loss(batch_of())
        losses["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert any(p.grad.abs().sum() > 0 for p in model.features.parameters())

    def test_no_step_waits_for_a_gpu(self):
        model = self.make()
        with fake_gpu(model, batch_of()) as batch:
            losses = model.compute_loss(batch)
            for _ in range(2):
                finish_step(model, losses, batch)
            model.eval()
            found = {**losses, **model.predict_maps(batch["image"])}
        assert all(x.device.type == "cuda" for x in found.values() if isinstance(x, Tensor))

    def test_odd_sizes_train(self):
        model = self.make()
        masks = torch.randint(NUM_CLASSES, (2, 37, 51))
        batch = collate(
            [with_sparse_keys({"image": torch.rand(3, 37, 51), "mask": m}) for m in masks]
        )
        losses = model.compute_loss(batch)
        losses["loss"].backward()
        finish_step(model, losses, batch)
        assert losses["loss"].isfinite()

    def test_a_batch_without_a_single_label(self):
        model = self.make()
        batch = {**batch_of(), "mask": torch.full((2, 48, 64), 255)}
        losses = model.compute_loss(batch)
        losses["loss"].backward()
        finish_step(model, losses, batch)
        assert losses["loss"] == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model(batch["image"]).isfinite().all()

    def test_ignored_pixels_do_not_count(self):
        model = self.make().eval()
        batch = batch_of()
        half = {**batch, "mask": batch["mask"].clone()}
        half["mask"][:, :, 32:] = 255
        other = {**half, "mask": half["mask"].clone()}
        assert model.compute_loss(half)["loss"] != model.compute_loss(batch)["loss"]
        other["mask"][half["mask"] == 255] = model.ignore_index
        assert torch.equal(model.compute_loss(half)["loss"], model.compute_loss(other)["loss"])

    def test_training_is_the_same_under_the_same_seed(self):
        runs = []
        for seed in (3, 3, 4):
            seed_everything(seed, verbose=False)
            runs.append(train_by_hand(self.make(), 3))
        assert runs[0] == runs[1] != runs[2]

    def test_fit_log_save_and_load(self, tmp_path):
        model = self.make(class_names=[f"class {i}" for i in range(NUM_CLASSES)])
        run = trainer(tmp_path)
        run.fit(model, loader(), loader(2))
        assert run.global_step == 2
        logged = run.callback_metrics
        assert {"train_loss", "val_mIoU", "val_pixel_accuracy", "val_IoU_class_0"} <= set(logged)
        assert 0 <= logged["val_mIoU"] <= 1
        path = tmp_path / "model.ckpt"
        run.save_checkpoint(path)

        saved = torch.load(path, weights_only=True)["hyper_parameters"]
        arguments = types_of(type(model))
        assert set(saved) == set(arguments) - set(model.not_kept)
        loaded = type(model).load_from_checkpoint(path).eval()
        for name in saved:
            if is_dataclass(arguments[name]):  # a group, kept as plain values
                assert saved[name] == asdict(as_options(arguments[name], saved[name]))
                assert saved[name] == model.hparams[name] == loaded.hparams[name]
        image = torch.rand(1, 3, 40, 50)
        before, after = model.eval().maps(image), loaded.maps(image)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert loaded.class_names == model.class_names

        fresh = self.make(class_names=model.class_names)
        trainer(tmp_path).validate(fresh, loader(2), ckpt_path=path, verbose=False)
        assert torch.equal(fresh.eval()(image), before["scores"])

    def test_pretrained(self, tmp_path):
        """Weights and arguments in a folder, and back, without naming the method."""
        model = self.make()
        model.save_pretrained(tmp_path)
        files = {path.name for path in tmp_path.iterdir()}
        assert files == {"README.md", "config.json", "model.safetensors"}
        loaded = TrainedModule.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert not loaded.training
        mine, theirs = model.state_dict(), loaded.state_dict()
        assert mine.keys() == theirs.keys()
        assert not changed(mine, theirs)
        if not model.takes_supports:
            image = torch.rand(1, 3, 40, 50)
            assert torch.equal(model.eval()(image), loaded(image))

    def test_test_and_predict(self, tmp_path):
        model, run = self.make(), trainer(tmp_path)
        result = run.test(model, loader(2), verbose=False)[0]
        assert {"test_mIoU", "test_pixel_accuracy", "test_IoU_0"} <= set(result)
        predictions = run.predict(model, loader(2))
        assert predictions is not None
        prediction = predictions[0]
        assert prediction["mask"].shape == (2, 48, 64)
        assert prediction["mask"].dtype == torch.int64
        assert prediction["name"] == batch_of()["name"]
        if "anomaly" in prediction:
            assert prediction["anomaly"].shape == (2, 48, 64)

    def test_predict_image(self):
        model = self.make()
        model.features.eval()  # frozen, and so it stays
        picture = np.random.default_rng(0).integers(256, size=(30, 41, 3), dtype=np.uint8)
        result = model.predict_image(picture)
        assert model.training
        assert not model.features.training
        assert result["mask"].shape == (30, 41)
        assert result["mask"].dtype == np.int64
        assert result["scores"].shape == (NUM_CLASSES, 30, 41)
        if "anomaly" in result:
            assert result["anomaly"].shape == (30, 41)
            assert result["anomaly"].dtype == np.float32
        image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(result["scores"]), model.eval()(image)[0], rtol=1e-4, atol=1e-4
            )
        for wrong in (picture[..., 0], picture.astype(np.float32)):
            with pytest.raises(GenSegError, match=r"H x W x 3 of uint8; got"):
                model.predict_image(wrong)

    def test_inference_options(self):
        image = torch.rand(1, 3, 48, 80)
        model = self.make().eval()
        with torch.no_grad():
            plain = model.predict_maps(image)
            model.inference = {"window": (32, 32), "stride": (16, 16)}
            windows = model.predict_maps(image)
            model.inference = {"scales": [0.5, 1.0, 1.5], "flip": True}
            scales = model.predict_maps(image)
        assert set(plain) == set(windows) == set(scales)
        for name in plain:
            assert plain[name].shape == windows[name].shape == scales[name].shape
            assert not torch.equal(plain[name], windows[name])
        total = scales["scores"].sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))

    def test_all_ways_to_a_mask_agree(self):
        """Of test, prediction, Python and the exported graph, whatever maps are averaged."""
        model = self.make().eval()
        picture = np.random.default_rng(1).integers(256, size=(48, 64, 3), dtype=np.uint8)
        image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        batch = {"image": image, "mask": torch.zeros(1, 48, 64).long(), "name": ["a"]}
        for inference in (
            {"window": (32, 32), "stride": (12, 12)},
            {"short_side": 60},
            {"scales": [0.5, 1.0]},
        ):
            model.inference = inference
            with torch.no_grad():
                masks = [
                    torch.from_numpy(model.predict_image(picture)["mask"]),
                    model.predict_step(batch, 0)["mask"][0],
                    model.maps_at_labels(batch)["scores"].argmax(1)[0],
                ]
                if "short_side" in inference and model.undeployable() is None:
                    masks.append(Deployable(model)(image)["mask"][0])
            for mask in masks[1:]:  # but for ties, by rounding
                assert (mask != masks[0]).float().mean() < 0.002, inference

    def test_inside_a_foreign_module(self, tmp_path):
        inner = self.make()
        before = copied(inner)
        run = trainer(tmp_path)
        run.fit(Foreign(inner), loader())
        assert run.callback_metrics["my_loss"].isfinite()
        moved = changed(before, inner.state_dict())
        assert any(name.startswith("features.") for name in moved)
        assert self.updated <= moved

    def test_own_network(self, tmp_path):
        model = self.make(features=PlainFeatures(), network_options=None)
        run = trainer(tmp_path)
        run.fit(model, loader(), loader(2))
        run.save_checkpoint(tmp_path / "own.ckpt")
        assert "features" not in torch.load(tmp_path / "own.ckpt", weights_only=True)
        loaded = type(model).load_from_checkpoint(tmp_path / "own.ckpt", features=PlainFeatures())
        image = torch.rand(1, 3, 33, 41)
        assert torch.equal(loaded.eval()(image), model.eval()(image))

    def test_number_of_classes(self, tmp_path):
        path = save(model := self.make(), tmp_path / "six.ckpt")
        sentence = "trained on 6 classes and .* 4; "
        with pytest.raises(GenSegError, match=sentence):
            trainer(tmp_path).validate(self.make(num_classes=4), loader(2), ckpt_path=path)
        with pytest.raises(GenSegError, match=sentence):
            type(model).load_from_checkpoint(path, num_classes=4)

    def test_choices_and_numbers(self):
        """Each argument and each field of a group refuses what is no choice, no number or NaN."""
        tried = 0
        hints = types_of(type(self.make()))
        for name in hints.keys() - self.fixed:
            hint = hints[name]
            group = hint if is_dataclass(hint) else None
            inside = {field.name for field in fields(group)} if group else {name}
            for field in inside:
                own = get_type_hints(group)[field] if group else hint
                for wrong in wrong_values(own, field in self.signed):
                    with pytest.raises(GenSegError, match=rf"^{field} is .*; it must be "):
                        (group or self.make)(**{field: wrong})
                    tried += 1
        assert tried > 10

    def test_groups_may_be_mappings(self):
        arguments, image = dict(self.make().hparams), torch.rand(1, 3, 40, 50)
        method = type(self.make())
        for name, kind in types_of(method).items():
            if is_dataclass(kind):
                scores = []
                for group in (as_options(kind, arguments[name]), arguments[name]):
                    torch.manual_seed(0)
                    model = method(**{**arguments, name: group})
                    assert model.hparams == arguments
                    scores.append(model.eval()(image))
                assert torch.equal(*scores)
                with pytest.raises(GenSegError, match=f"{kind.__name__} has no argument 'colour'"):
                    method(**{**arguments, name: {"colour": 1}})

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"num_classes": 1}, "num_classes is 1; it must be at least 2"),
            ({"class_names": ["road", "sky"]}, "class_names has 2 entries and num_classes is 6"),
            ({"inference": {"windows": (32, 32)}}, "did you mean window?"),
            ({"std": [0.2, 0.2]}, "give 3 numbers each"),
        ],
    )
    def test_wrong_arguments(self, arguments, sentence):
        with pytest.raises(GenSegError, match=sentence):
            self.make(**arguments)
        with pytest.raises(TypeError, match="has no argument 'clas_names'; did you mean class_na"):
            self.make(clas_names=["road"])

    def test_it_learns(self):
        model = self.make(**self.learning)
        chance = mean_iou(model)
        losses = train_by_hand(model, self.steps)
        assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
        assert chance < 0.15
        assert mean_iou(model) > 0.3
