"""What every few-shot method must pass: subclass `EpisodeContract` and write `make`."""

import math
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from lightning_genseg import BaseLearner
from lightning_genseg.data import (
    BaseClassesDataModule,
    EpisodesDataModule,
    SyntheticScenesDataModule,
)
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods import FewShotModule
from tests.contract import ModuleContract, changed, copied, fake_gpu, trainer

SIZE = 65
FROZEN = ("features.", "base_head.")
FOLD = {"novel_classes": ["vehicle", "person"], "num_workers": 0}


def scenes(cache_dir: Path) -> SyntheticScenesDataModule:
    lengths = {"train_length": 12, "val_length": 8, "test_length": 8}
    return SyntheticScenesDataModule(size=(48, 64), **lengths, cache_dir=cache_dir)


def episodes(cache_dir: Path, shots: int = 1, **arguments: Any) -> EpisodesDataModule:
    options = {"novel_setting": "background", "mode": "balanced", "episodes": 6, "val_episodes": 4}
    options |= {"size": SIZE, "shots": shots, "batch_size": 2, "min_area": 20}
    return EpisodesDataModule(scenes(cache_dir), **{**FOLD, **options, **arguments})


def train_base_learner(folder: Path) -> Path:
    """Checkpoint after one epoch of six steps."""
    data = BaseClassesDataModule(scenes(folder), size=SIZE, batch_size=2, **FOLD)
    names = list(data.class_names)
    model = BaseLearner(data.num_classes, encoder="tu-test_resnet", class_names=names)
    run = trainer(folder, limit_val_batches=2)
    run.fit(model, datamodule=data)
    run.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


@cache
def _noise(count: int, shots: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, shots + 1, 3, SIZE, SIZE, generator=generator) / 2
    masks = torch.zeros(count, shots + 1, SIZE, SIZE, dtype=torch.long)
    for episode in range(count):
        for image in range(shots + 1):
            top, left = torch.randint(4, 30, (2,), generator=generator).tolist()
            rows, columns = slice(top, top + 24), slice(left, left + 28)
            masks[episode, image, rows, columns] = 1
            colour = torch.tensor([0.5, 0.1 * episode, 0.3])[:, None, None]
            images[episode, image, :, rows, columns] += colour * 0.9
    valid = torch.ones_like(masks, dtype=torch.bool)
    valid[..., 56:] = False
    masks[..., 56:] = 255
    images[..., 56:] = 0
    return images.clamp(0, 1), masks, valid


def batch_of(count: int = 2, shots: int = 1) -> dict[str, Any]:
    """Episodes of a coloured rectangle on noise, with a strip of padding at the right."""
    images, masks, valid = _noise(count, shots)
    return {
        "image": images[:, 0],
        "mask": masks[:, 0],
        "valid": valid[:, 0],
        "support_image": images[:, 1:],
        "support_mask": masks[:, 1:],
        "support_valid": valid[:, 1:],
        "class_index": torch.arange(count),
        "base_index": torch.ones(count, dtype=torch.long),
        "name": [str(i) for i in range(count)],
    }


def train_by_hand(model: FewShotModule, steps: int, count: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = model.compute_loss(batch_of(count))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_gradients(model: FewShotModule, batch: dict[str, Any], bfloat16: bool = False) -> None:
    """They reach all but what is frozen."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model.compute_loss(batch)["loss"]
    assert loss.isfinite()
    if model.needs_training:
        loss.backward()
    for name, parameter in model.named_parameters():
        free = not name.startswith(FROZEN)
        assert parameter.requires_grad == free, name
        assert (parameter.grad is not None) == (free and model.needs_training), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


class EpisodeContract:
    """The tests. `of_two` are arguments for two supports, `learned` some of what is trained."""

    of_two: ClassVar[dict[str, Any]] = {}
    learned: ClassVar[set[str]] = set()
    least_miou: ClassVar[float] = 0.0
    signed = ModuleContract.signed
    fixed: ClassVar[set[str]] = {"num_classes", "inference", "anomaly_score"}
    test_choices_and_numbers = ModuleContract.test_choices_and_numbers

    def make(self, **arguments: Any) -> FewShotModule:
        raise NotImplementedError

    def test_outputs(self):
        """Whatever the order of the supports and the query's labels."""
        batch, model = batch_of(2, 2), self.make(**self.of_two).eval()
        outputs = model.episode_outputs(batch)
        guidance = outputs["guidance"]
        assert outputs["scores"].shape == (2, 2, *guidance.shape[-2:])
        assert guidance.shape[:2] == (2, 1)
        assert ((guidance >= 0) & (guidance <= 1)).all()
        labels = {"mask": 1 - batch["mask"].clamp(0, 1), "base_index": 0 * batch["base_index"]}
        for name, value in model.episode_outputs({**batch, **labels}).items():
            assert torch.equal(value, outputs[name]), name
        turned = {k: v[:, [1, 0]] if k.startswith("support") else v for k, v in batch.items()}
        for name, value in model.episode_outputs(turned).items():
            torch.testing.assert_close(value, outputs[name], atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_padding_holds_does_not_matter(self, value):
        batch, model = batch_of(), self.make().eval()
        other = dict(batch)
        for image, valid in (("image", "valid"), ("support_image", "support_valid")):
            padding = ~batch[valid].unsqueeze(-3)
            other[image] = batch[image].masked_fill(padding, value)
        for name, expected in model.episode_outputs(batch).items():
            assert torch.equal(model.episode_outputs(other)[name], expected), name

    def test_no_step_waits_for_a_gpu(self):
        model = self.make()
        with fake_gpu(model, batch_of()) as batch:
            losses = model.compute_loss(batch)
            outputs = model.eval().episode_outputs(batch)
        assert all(x.device.type == "cuda" for x in (losses["loss"], *outputs.values()))

    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_gradients(self, bfloat16):
        check_gradients(self.make(), batch_of(), bfloat16)

    def test_without_a_single_label(self):
        batch, model = batch_of(), self.make()
        nothing = {**batch, "mask": torch.full_like(batch["mask"], 255)}
        loss = model.compute_loss(nothing)["loss"]
        assert loss == 0
        if model.needs_training:
            loss.backward()
        nothing = {**batch, "support_mask": torch.full_like(batch["support_mask"], 255)}
        assert model.eval().episode_outputs(nothing)["scores"].isfinite().all()

    def test_plain_images(self):
        model, batch = self.make(), batch_of(1)
        picture = (batch["image"][0, :, :, :56] * 255).byte().permute(1, 2, 0).numpy()
        with pytest.raises(GenSegError, match="call set_support"):
            model.predict_image(picture)
        support, mask = batch["support_image"][0, :, :, :, :56], batch["support_mask"][0, :, :, :56]
        model.set_support(support, mask, size=SIZE)
        assert model.predict_image(picture)["mask"].shape == (65, 56)
        assert model.predict_image(np.zeros((3, 200, 3), np.uint8))["mask"].shape == (3, 200)
        assert model.training
        assert not any(part.training for part in model.features.modules())
        assert model.eval()(torch.rand(2, 3, 20, 90)).shape == (2, 2, 20, 90)
        predicted = model.predict_step({**batch_of(1, 2), "image": torch.rand(1, 3, 40, 70)}, 0)
        assert predicted["mask"].shape == (1, 40, 70)
        assert predicted["name"] == ["0"]

    def test_fit_save_load_and_test(self, base, tmp_path):
        data, run = episodes(tmp_path, shots=2), trainer(tmp_path, limit_train_batches=2)
        model = self.make(base_learner=base, encoder=None, **self.of_two)
        before = copied(model)
        if model.needs_training:
            run.fit(model, datamodule=data)
            logged = {"train_loss", "train_loss_meta", "val_mIoU", "val_FB_IoU", "val_GmIoU"}
            assert logged <= set(run.callback_metrics)
            moved = changed(before, copied(model))
            assert moved >= self.learned
            assert not any(name.startswith(FROZEN) for name in moved)  # BN as well
            training = [name for name, part in model.named_modules() if part.training]
            assert not any(name.startswith(FROZEN) for name in training)
            assert model.training
            held = {p for group in run.optimizers[0].param_groups for p in group["params"]}
            assert held == {p for p in model.parameters() if p.requires_grad}
        else:
            with pytest.raises(GenSegError, match="nothing to train: run `genseg test`"):
                run.fit(model, datamodule=data)
            run.strategy.connect(model)
        run.save_checkpoint(tmp_path / "model.ckpt")
        torch.load(tmp_path / "model.ckpt", weights_only=True)
        loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt")  # without base learner
        assert loaded.base_classes == ["sky", "ground", "building", "tree"]
        quiet = {"datamodule": data, "verbose": False}
        (scores,), (again,) = (trainer(tmp_path).test(m, **quiet) for m in (model, loaded))
        assert scores == again
        classes = [scores.pop(f"test_IoU_{name}") for name in ("vehicle", "person")]
        assert set(scores) == {"test_mIoU", "test_FB_IoU", "test_GmIoU", "test_ECE"}
        calibration = MulticlassCalibrationError(num_classes=2, ignore_index=255)
        for batch in data.test_dataloader():
            square = loaded.to_image(loaded.eval().episode_outputs(batch)["scores"], batch["image"])
            whole = loaded._to_query(square, batch["full_mask"].shape[-2:], loaded.scoring)
            calibration.update(loaded.to_logits(whole).softmax(1), batch["full_mask"])
        assert scores["test_ECE"] == pytest.approx(float(calibration.compute()), abs=1e-5)
        assert scores["test_mIoU"] == pytest.approx(sum(classes) / 2, abs=1e-6)
        assert self.least_miou <= scores["test_mIoU"] < 1
        known, fewer = (episodes(tmp_path, novel_classes=[name]) for name in ("sky", "person"))
        with pytest.raises(GenSegError, match=r"trained on sky, which .* of the same fold"):
            trainer(tmp_path).test(loaded, datamodule=known, verbose=False)
        # Its novel classes are new to the base learner, though its base classes are others.
        assert trainer(tmp_path).test(loaded, datamodule=fewer, verbose=False)
        with pytest.raises(GenSegError, match="base classes of the data are"):
            trainer(tmp_path).validate(loaded, datamodule=fewer, verbose=False)
