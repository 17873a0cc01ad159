from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lightning_genseg import GSS, GSSInverse
from lightning_genseg.errors import GenSegError
from tests.contract import (
    NUM_CLASSES,
    ModuleContract,
    batch_of,
    changed,
    copied,
    loader,
    save,
    train_by_hand,
    trainer,
)
from tests.methods.gss.parts import SMALL, trained, write_colors, write_tokenizer


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A GSS of 40 steps."""
    return save(trained(), tmp_path_factory.mktemp("prior") / "gss.ckpt")


def make(prior, **arguments):
    return GSSInverse(**{"num_classes": NUM_CLASSES, "prior": prior, "width": 32, **arguments})


class TestGSSInverse(ModuleContract):
    fixed: ClassVar = {"mean", "std"}
    steps = 40

    @pytest.fixture(autouse=True)
    def _prior(self, prior: Path) -> None:
        self.prior = prior

    def make(self, **arguments: Any) -> GSSInverse:
        return make(**{"prior": self.prior, **arguments})

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
        before = copied(model)
        trainer(tmp_path).fit(model, loader(), loader(2))
        moved = changed(before, model.state_dict())
        assert moved
        assert all(name.startswith("inverse.") for name in moved)

    def test_own_network(self) -> None:  # type: ignore[override]
        """It has that of the prior, and its preprocessing."""
        with pytest.raises(TypeError, match="GSSInverse has no argument 'features'"):
            self.make(features=torch.nn.Identity())
        with pytest.raises(GenSegError, match="GSSInverse takes no mean: the prior's is used"):
            self.make(mean=(0, 0, 0))

    def test_number_of_classes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trained on 6 classes and the data have 4: give the"):
            self.make(num_classes=4)
        path = save(self.make(), tmp_path / "inverse.ckpt")
        with pytest.raises(ValueError, match=r"trained on 6 classes and .* 4; "):
            GSSInverse.load_from_checkpoint(path, num_classes=4)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"class_names": ["road", "sky"]}, "class_names has 2 entries and num_classes is 6"),
            ({"inverse": "swin", "width": 40}, "were given 40: choose a multiple of 32"),
            ({"noise": 1.0}, "noise is 1.0; it must be at least 0 and less than 1"),
            ({"prior": None}, "needs a trained GSS: give prior"),
            ({"prior_arguments": {}}, "needs a trained GSS: give prior"),
        ],
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], sentence: str) -> None:
        with pytest.raises(GenSegError, match=sentence):
            self.make(**arguments)


def test_what_is_trained_and_what_is_not(prior):
    model = make(prior, inverse="swin")
    for parts in (model, model.train(), model.eval().train()):
        on = {name for name, part in parts.named_modules() if part.training}
        assert {name for name in on if name.startswith("prior")} == {"prior.head.dropout"}
        assert {"", "inverse", "inverse.blocks"} <= on
    assert not any(part.training for part in model.eval().modules())
    groups = model.parameter_groups()
    optimised = {id(p) for group in groups for p in group["params"]}
    assert optimised == {id(p) for p in model.inverse.parameters()}
    assert [group["name"] for group in groups] == ["head"]


def test_noise_is_dropout_of_the_prior(prior):
    image = batch_of()["image"]
    quiet, noisy = make(prior, noise=0.0), make(prior, noise=0.9)
    exact = GSS.load_from_checkpoint(prior).picture(image)

    def drawn(model):
        return model.prior.paint(model.prior.extract(image)[0])

    assert torch.equal(drawn(quiet.train()), exact)
    assert not torch.equal(drawn(noisy.train()), exact)
    assert torch.equal(drawn(noisy.eval()), exact)


def test_loss_by_hand(prior):
    model = make(prior, noise=0.0).eval()
    batch = batch_of()
    scores = model.inverse(model.prior.picture(batch["image"]))
    labelled = batch["mask"] != 255
    terms = torch.nn.functional.cross_entropy(
        scores, batch["mask"], ignore_index=255, reduction="none"
    )
    torch.testing.assert_close(model.compute_loss(batch)["loss"], terms[labelled].mean())
    model.prior.avg_non_ignore = False
    torch.testing.assert_close(model.compute_loss(batch)["loss"], terms.mean())


@pytest.mark.parametrize("inverse", ["conv", "swin"])
def test_a_checkpoint_needs_no_other_file(inverse, tmp_path):
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
    other = save(GSS(**SMALL), tmp_path / "other.ckpt")
    merged = make(other, inverse_weights=path).eval()
    assert not merged.needs_training
    image = batch_of()["image"]
    picture = GSS.load_from_checkpoint(other).eval().picture(image)
    assert torch.equal(merged.prior.picture(image), picture)
    assert torch.equal(merged(image), model.eval().inverse(picture))
    save(merged, tmp_path / "merged.ckpt")
    path.unlink()
    loaded = GSSInverse.load_from_checkpoint(tmp_path / "merged.ckpt").eval()
    assert torch.equal(loaded(image), merged(image))


def test_files_that_do_not_fit(prior, tmp_path):
    inverse = save(make(prior), tmp_path / "inverse.ckpt")
    red = save(GSS(**SMALL, colors=write_colors(tmp_path / "c.json")), tmp_path / "red.ckpt")
    coarse = save(GSS(**SMALL, tokenizer="majority-8"), tmp_path / "coarse.ckpt")
    (tmp_path / "text.ckpt").write_text("no")
    for wrong, arguments, message in (
        (red, {"inverse_weights": inverse}, "inverse_weights '.*' was trained with other colors"),
        (coarse, {"inverse_weights": inverse}, "inverse_weights '.*' .* with another tokenizer"),
        (prior, {"inverse_weights": inverse, "inverse": "swin"}, "does not fit SwinInverse"),
        (prior, {"inverse_weights": prior}, "inverse_weights '.*' is no checkpoint of a GSSInv"),
        (inverse, {}, r"prior '.*inverse.ckpt' is no checkpoint of a GSS: "),
        (tmp_path / "text.ckpt", {}, r"prior '.*text.ckpt' is not a checkpoint that can"),
        (tmp_path / "none.ckpt", {}, r"prior '.*' does not exist: give the checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            make(wrong, **arguments)
    of_red = save(make(red), tmp_path / "of_red.ckpt")
    with pytest.raises(ValueError, match="the checkpoint was trained with other colors"):
        trainer(tmp_path).validate(make(prior), loader(2), ckpt_path=of_red)


def test_a_prior_of_other_classes(tmp_path):
    names = [f"class {c}" for c in range(NUM_CLASSES)]
    path = save(GSS(**SMALL, class_names=names), tmp_path / "gss.ckpt")
    make(path, class_names=names)
    with pytest.raises(ValueError, match=r"other classes .* \('class 0' where these have 'sky'\)"):
        make(path, class_names=["sky", *names[1:]])
