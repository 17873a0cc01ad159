from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_genseg import GSS, GSSInverse
from tests.contract import NUM_CLASSES, ModuleContract, batch_of, loader, train_by_hand, trainer
from tests.methods.gss.test_module import (
    FROZEN,
    SMALL,
    save,
    trained,
    write_colors,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A GSS of 20 steps."""
    return save(trained(), tmp_path_factory.mktemp("prior") / "gss.ckpt")


def make(prior, **arguments):
    return GSSInverse(**{"num_classes": NUM_CLASSES, "prior": prior, "width": 32, **arguments})


@pytest.mark.filterwarnings(FROZEN)
class TestGSSInverse(ModuleContract):
    @pytest.fixture(autouse=True)
    def _prior(self, prior: Path) -> None:
        self.prior = prior

    def make(self, **arguments: Any) -> GSSInverse:
        return make(self.prior, **arguments)

    def test_backward_reaches_every_trainable_parameter(self) -> None:
        """Most of it is frozen."""
        model = self.make()
        model.compute_loss(batch_of())["loss"].backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("inverse."), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name

    def test_inside_a_foreign_module(self, tmp_path: Path) -> None:
        """Only the inverse learns."""
        model = self.make()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trainer(tmp_path).fit(model, loader(), loader(2))
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all(name.startswith("inverse.") for name in changed)

    def test_own_network(self) -> None:  # type: ignore[override]
        """It has that of the prior."""
        with pytest.raises(TypeError):
            self.make(features=torch.nn.Identity())

    def test_number_of_classes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trained on 6 classes and the data have 4: give the"):
            self.make(num_classes=4)
        path = save(self.make(), tmp_path / "inverse.ckpt")
        with pytest.raises(ValueError, match=r"trained on 6 classes and .* 4; "):
            GSSInverse.load_from_checkpoint(path, num_classes=4)

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="class_names has 2 entries and num_classes is 6"):
            self.make(class_names=["road", "sky"])
        for arguments in ({}, {"prior": self.prior, "prior_arguments": {}}):
            with pytest.raises(ValueError, match="needs a trained GSS: give prior"):
                GSSInverse(NUM_CLASSES, **arguments)
        with pytest.raises(ValueError, match="were given 40: choose a multiple of 32"):
            self.make(inverse="swin", width=40)


def test_what_is_trained_and_what_is_not(prior):
    model = make(prior, inverse="swin")
    for parts in (model, model.train(), model.eval().train()):
        on = {name for name, part in parts.named_modules() if part.training}
        assert all(name in ("", "head.dropout") or name.startswith("inverse") for name in on)
        assert {"", "head.dropout", "inverse", "inverse.blocks"} <= on
    assert not any(part.training for part in model.eval().modules())
    groups = model.parameter_groups()
    optimised = {id(p) for group in groups for p in group["params"]}
    assert optimised == {id(p) for p in model.inverse.parameters()}


def test_noise_is_dropout_of_the_prior(prior):
    image = batch_of()["image"]
    quiet, noisy = make(prior, noise=0.0), make(prior, noise=0.9)
    exact = GSS.load_from_checkpoint(prior).eval().picture(image)
    assert torch.equal(quiet.train().picture(image), exact)
    assert not torch.equal(noisy.train().picture(image), exact)
    assert torch.equal(noisy.eval().picture(image), exact)


def test_loss_by_hand(prior):
    model = make(prior, noise=0.0).eval()
    batch = batch_of()
    scores = model.inverse(model.picture(batch["image"]))
    labelled = batch["mask"] != 255
    terms = torch.nn.functional.cross_entropy(
        scores, batch["mask"], ignore_index=255, reduction="none"
    )
    torch.testing.assert_close(model.compute_loss(batch)["loss"], terms.mean())
    model.avg_non_ignore = True
    torch.testing.assert_close(model.compute_loss(batch)["loss"], terms[labelled].mean())


@pytest.mark.parametrize("inverse", ["conv", "swin"])
def test_a_checkpoint_needs_no_other_file(inverse, prior, tmp_path):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path / "vq.ckpt")
    of_vq = save(GSS(**SMALL, tokenizer=tokenizer), tmp_path / "gss.ckpt")
    tokenizer.unlink()
    model = make(of_vq, inverse=inverse)
    train_by_hand(model, 1)
    save(model, tmp_path / "inverse.ckpt")
    of_vq.unlink()
    torch.load(tmp_path / "inverse.ckpt", weights_only=True)
    image = batch_of()["image"]
    for name in ("inverse.ckpt", "again.ckpt"):
        loaded = GSSInverse.load_from_checkpoint(tmp_path / name).eval()
        assert torch.equal(loaded(image), model.eval()(image))
        assert loaded.needs_training
        save(loaded, tmp_path / "again.ckpt")


def test_an_inverse_for_another_prior(prior, tmp_path):
    model = make(prior)
    train_by_hand(model, 3)
    path = save(model, tmp_path / "inverse.ckpt")
    torch.manual_seed(7)
    other = save(GSS(**SMALL), tmp_path / "other.ckpt")
    merged = make(other, inverse_weights=path).eval()
    assert not merged.needs_training
    image = batch_of()["image"]
    picture = GSS.load_from_checkpoint(other).eval().picture(image)
    assert torch.equal(merged.picture(image), picture)
    assert torch.equal(merged(image), model.eval().inverse(picture))
    save(merged, tmp_path / "merged.ckpt")
    path.unlink()
    assert torch.equal(
        GSSInverse.load_from_checkpoint(tmp_path / "merged.ckpt").eval()(image), merged(image)
    )


def test_an_inverse_that_does_not_fit(prior, tmp_path):
    path = save(make(prior), tmp_path / "inverse.ckpt")
    red = save(GSS(**SMALL, colors=write_colors(tmp_path / "c.json")), tmp_path / "red.ckpt")
    with pytest.raises(ValueError, match=r"inverse_weights '.*' was trained with other colors"):
        make(red, inverse_weights=path)
    coarse = save(GSS(**SMALL, tokenizer="majority-8"), tmp_path / "coarse.ckpt")
    with pytest.raises(
        ValueError, match=r"inverse_weights '.*' was trained with another tokenizer"
    ):
        make(coarse, inverse_weights=path)
    with pytest.raises(ValueError, match=r"inverse\.ckpt' does not fit SwinInverse"):
        make(prior, inverse="swin", inverse_weights=path)


def test_wrong_files(prior, tmp_path):
    (tmp_path / "text.ckpt").write_text("no")
    inverse = save(make(prior), tmp_path / "inverse.ckpt")
    for path in (tmp_path / "text.ckpt", inverse):
        with pytest.raises(ValueError, match=rf"prior '.*{path.name}' is no checkpoint of a GSS: "):
            make(path)
    with pytest.raises(ValueError, match=r"inverse_weights '.*' is no checkpoint of a GSSInverse"):
        make(prior, inverse_weights=prior)
    with pytest.raises(FileNotFoundError, match=r"prior '.*' does not exist: give the checkpoint"):
        make(tmp_path / "nothing.ckpt")


def test_a_prior_of_other_classes(tmp_path):
    names = [f"class {c}" for c in range(NUM_CLASSES)]
    path = save(GSS(**SMALL, class_names=names), tmp_path / "gss.ckpt")
    make(path, class_names=names)
    with pytest.raises(
        ValueError, match=r"other classes than .* \('class 0' where these have 'sky'\)"
    ):
        make(path, class_names=["sky", *names[1:]])
