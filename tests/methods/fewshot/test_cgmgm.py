from typing import Any, ClassVar

import pytest
import torch

from lightning_genseg import CGMGM, EpisodicMixtureOptions, MatchingOptions, PosteriorOptions
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.fewshot import cgmgm
from lightning_genseg.methods.fewshot.matching import global_similarity, local_similarity, stretch
from lightning_genseg.methods.fewshot.support import support_shares
from lightning_genseg.mixtures import EpisodicMixture, fit_episodes
from lightning_genseg.ops.resize import resize_aligned
from tests.contract import trainer
from tests.methods.fewshot.contract import (
    EpisodeContract,
    batch_of,
    check_gradients,
    episodes,
    train_by_hand,
)

BAM = {
    "guidance": "prior",
    "matching": {"mask_before_last_stage": True},
    "decoder": {"extra_inputs": ["prototype"], "shared_reduction": False},
}


def make(**arguments: Any) -> CGMGM:
    return CGMGM(**{"encoder": "tu-test_resnet", "num_base_classes": 4, **arguments})


class TestCGMGM(EpisodeContract):
    make = staticmethod(make)
    of_two: ClassVar = {"shots": 2}
    learned: ClassVar = {"reduction.0.weight", "ensemble.known.weight"}


class TestBAM(EpisodeContract):
    of_two: ClassVar = {"shots": 2}
    learned: ClassVar = {"support_reduction.0.weight", "shot_weights.layers.0.weight"}

    def make(self, **arguments: Any) -> CGMGM:
        return make(**{"encoder": "resnet18", **BAM, **arguments})

    def test_number_of_inputs(self):
        assert self.make().decoder.merge[0].in_channels == 513
        assert make().decoder.merge[0].in_channels == 257


def test_the_ensemble_answers_with_probabilities():
    """Its start leaves those of the decoder, which as logits would lie in 0.27 to 0.73."""
    model, batch = make().eval(), batch_of(2, 1)
    with torch.no_grad():
        model.decoder.classifier[-1].weight.mul_(1e4)
        outputs = model.episode_outputs(batch)
        probabilities = model.to_logits(outputs["scores"]).softmax(1)
        model.set_support(batch["support_image"][0], batch["support_mask"][0], 65)
        found = model.outputs(batch["image"])["logits"].softmax(1)
    torch.testing.assert_close(probabilities, outputs["meta"].softmax(1), atol=1e-5, rtol=0)
    assert found.max() > 0.8


def test_what_a_learned_merge_answers():
    """Also where its scores are negative, the larger one decides."""
    model, meta = make(), torch.rand(2, 2, 9, 9)
    assert model.ensemble is not None
    with torch.no_grad():
        model.ensemble.style.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))
        model.ensemble.known.weight.copy_(torch.tensor([1.1, 0.1]).view(1, 2, 1, 1))
        scores = model.ensemble(meta, torch.rand(2, 1, 9, 9), torch.full((2,), 0.6))
    assert (scores < 0).all(1).any()
    assert (scores > 0).all(1).any()
    logits = model.to_logits(scores)
    assert logits.isfinite().all()
    assert torch.equal(logits.argmax(1), scores.argmax(1))
    sums = scores.sum(1, keepdim=True)
    positive = (scores > 0).all(1, keepdim=True).expand_as(scores)
    torch.testing.assert_close(logits.softmax(1)[positive], (scores / sums)[positive])


VARIANTS: dict[str, dict[str, Any]] = {
    "five shots": {"shots": 3},
    "without base learner": {"ensemble": False},
    "two shots without base learner": {"ensemble": False, "shots": 2},
    "prior without prototype": {"guidance": "prior", "decoder": {"shared_reduction": False}},
    "mask without prototype": {"guidance": "mask", "decoder": {"shared_reduction": False}},
    "no refinement": {"matching": MatchingOptions(refinement="none")},
    "only supports": {"mixture": {"query_statistics": False}},
    "mask": {"guidance": "mask"},
    "as printed": {"matching": {"refinement": "literal"}, "posterior": {"form": "literal"}},
    "tempered": {"posterior": PosteriorOptions("tempered", gradient=True)},
    "standardized": {"posterior": PosteriorOptions("standardized", gradient=True)},
    "residual": {"decoder": {"residual": True}},
    "support check": {"matching": {"refinement": "cycle_support"}},
    "without dropped": {"mixture": {"query_background": "without_dropped"}},
    "full covariance": {"mixture": EpisodicMixtureOptions(1, "full")},
    "other choices": {
        "mixture": {"features": "raw", "query_background": "unlike"},
        "matching": {"level": "middle", "patch_similarity": "mean", "binarization": "otsu"},
        "decoder": {"extra_inputs": ["mask", "prototype"]},
    },
    "oracle": {"matching": {"source": "gt"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_all_it_should(name):
    arguments = VARIANTS[name]
    model, batch = make(**arguments), batch_of(2, arguments.get("shots", 1))
    check_gradients(model, batch)
    outputs = model.episode_outputs(batch)
    assert outputs["scores"].shape == (2, 2, *outputs["guidance"].shape[-2:])
    if name != "as printed":
        assert ((outputs["guidance"] >= 0) & (outputs["guidance"] <= 1)).all()


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("guidance", ["posterior", "mask", "prior"])
@pytest.mark.parametrize("inputs", [[], ["prototype"], ["mask"]], ids=str)
def test_nothing_is_left_without_gradient(ensemble, guidance, inputs):
    """Plain DDP waits for each; without a prototype nothing reads a reduction of the supports."""
    decoder = {"extra_inputs": inputs, "shared_reduction": False, "width": 8}
    model = make(
        shots=2,
        ensemble=ensemble,
        guidance=guidance,
        mixture={"features": "raw"},
        decoder=decoder,
    )
    check_gradients(model, batch_of(2, 2))


@pytest.mark.parametrize("arguments", [{}, BAM], ids=["CGMGM", "BAM"])
def test_several_shots_in_bfloat16(arguments):
    check_gradients(make(shots=2, **arguments), batch_of(2, 2), bfloat16=True)


def test_the_ensemble_answers_in_float32():
    model = make().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.episode_outputs(batch_of())["scores"].dtype == torch.float32


@pytest.mark.parametrize("answer", ["guidance", "decoder"])
def test_what_nothing_trains_weighs_no_support(answer):
    """All supports count alike, whatever the seed, where no gradient reaches their weights."""
    batch, mixture = batch_of(2, 2), {"features": "raw"}
    found = []
    for seed in range(2):
        torch.manual_seed(0)  # the encoder
        model = make(shots=2, answer=answer, ensemble=False, mixture=mixture).eval()
        torch.manual_seed(seed)
        for name, part in model.named_modules():
            if name.startswith("shot_weights") and hasattr(part, "reset_parameters"):
                part.reset_parameters()
        found.append(model.episode_outputs(batch)["guidance"])
    assert torch.equal(*found)
    # Checkpoints of before, which hold them, are still read.
    old = dict(model.state_dict())
    old["shot_weights.layers.0.weight"] = old["support_reduction.0.weight"] = torch.zeros(2, 2)
    model.load_state_dict(old)


def test_what_cannot_be_trained():
    with pytest.raises(GenSegError, match="answer is guidance, which trains nothing"):
        make(answer="guidance", mixture={"features": "raw"}).compute_loss(batch_of())
    batch = {name: value for name, value in batch_of().items() if name != "base_index"}
    with pytest.raises(GenSegError, match="a batch has no base_index"):
        make().compute_loss(batch)
    assert make().eval().compute_loss(batch)["loss"].isfinite()  # nothing is left out of it
    with pytest.raises(GenSegError, match="have a base class 5 and the base learner knows 4"):
        make().compute_loss({**batch, "base_index": torch.tensor([0, 5])})


def test_another_number_of_classes_than_the_base_learner(base):
    with pytest.raises(GenSegError, match="num_base_classes is 7 beside a base learner of 4"):
        make(base_learner=base, encoder=None, num_base_classes=7)


def test_data_with_more_base_classes_than_the_base_learner(tmp_path):
    run = trainer(tmp_path, fast_dev_run=1)
    with pytest.raises(GenSegError, match="have a base class 4 and the base learner knows 3"):
        run.fit(make(num_base_classes=3), datamodule=episodes(tmp_path))


def test_the_weight_of_a_loss_that_there_is_not(tmp_path):
    """It is refused in training alone: checkpoints of before may hold it."""
    model = make(ensemble=False, meta_loss_weight=0.5)
    with pytest.raises(GenSegError, match=r"meta_loss_weight weighs .* set ensemble to true"):
        trainer(tmp_path, fast_dev_run=1).fit(model, datamodule=episodes(tmp_path))


def test_going_on_from_layers_that_are_gone(tmp_path):
    data, run = episodes(tmp_path), trainer(tmp_path, limit_train_batches=1)
    path, arguments = tmp_path / "old.ckpt", {"ensemble": False, "num_base_classes": None}
    run.fit(make(**arguments), datamodule=data)
    run.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["shot_weights.layers.0.bias"] = torch.zeros(2)
    torch.save(content, path)
    CGMGM.load_from_checkpoint(path)
    with pytest.raises(GenSegError, match=r"training cannot go on from it\. Train anew"):
        trainer(tmp_path).fit(make(**arguments), datamodule=data, ckpt_path=path)


def test_it_learns_episodes():
    losses = train_by_hand(make(decoder={"dropout": 0.1}, ensemble=False), 12, count=4)
    assert losses[-1] < 0.6 * losses[0]


def test_the_true_mask_guides_better():
    batch = batch_of(4)

    def guidance_iou(**arguments: Any) -> float:
        torch.manual_seed(0)
        model = make(ensemble=False, **arguments).eval()
        found = model.to_image(model.episode_outputs(batch)["guidance"], batch["image"])[:, 0] > 0.5
        truth, counted = batch["mask"] == 1, batch["mask"] != 255
        return float((found & truth).sum() / ((found | truth) & counted).sum())

    oracle = guidance_iou(matching={"source": "gt"})
    assert oracle > 0.6
    assert oracle > guidance_iou()
    assert oracle > guidance_iou(mixture={"query_statistics": False})


def test_posteriors():
    batch = batch_of()
    torch.manual_seed(0)
    model = make().eval()

    def posterior(form: str, factor: float = 1.0) -> torch.Tensor:
        model.posterior = PosteriorOptions(form)  # type: ignore[arg-type]
        with torch.no_grad():
            model.reduction[0].weight.mul_(factor)
            result = model.episode_outputs(batch)["posterior"]
            model.reduction[0].weight.div_(factor)
        return result

    bayes = posterior("bayes")
    for form in ("tempered", "standardized"):
        softer = posterior(form)
        assert torch.equal(bayes > 0.5, softer > 0.5)  # the same order, less extreme
        assert (softer - 0.5).abs().mean() < (bayes - 0.5).abs().mean()
        torch.testing.assert_close(posterior(form, 10), softer, atol=1e-3, rtol=0)
    inside = (softer > 0) & (softer < 1)  # cells of the image
    for ratio in (one[cells].logit() for one, cells in zip(softer, inside, strict=True)):
        assert ratio.std(correction=0) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(posterior("bayes", 10), bayes, atol=1e-3, rtol=0)
    assert (posterior("literal", 10) - posterior("literal")).abs().max() > 0.05


def test_the_temperature_divides_the_ratio():
    torch.manual_seed(0)
    model, found = make().eval(), []
    for temperature in (2000.0, 4000.0):
        model.posterior = PosteriorOptions("tempered", temperature)
        posterior = model.episode_outputs(batch_of())["posterior"]
        found.append(posterior.double().logit()[posterior > 0])  # cells of the image
    torch.testing.assert_close(found[0], 2 * found[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["complement", "without_dropped", "unlike"])
def test_which_pixels_of_the_query_take_part_in_the_mixtures(kind, monkeypatch):
    seen: list[torch.Tensor] = []

    def spy(x: torch.Tensor, weights: torch.Tensor, **options: Any) -> EpisodicMixture:
        seen.append(weights)
        assert options["prior_strength"] == 3
        return fit_episodes(x, weights, **options)

    monkeypatch.setattr(cgmgm, "fit_episodes", spy)
    torch.manual_seed(0)
    mixture = {"query_background": kind, "prior_strength": 3.0}
    model = make(mixture=mixture, matching={"refinement": "cycle_support"}).eval()
    batch = batch_of()
    outputs = model.episode_outputs(batch)
    names = ("initial", "coarse", "refined", "posterior")
    initial, coarse, refined, posterior = (outputs[name].flatten(1) for name in names)
    assert (coarse > refined).any()  # something was dropped
    cells = outputs["initial"].shape[-2:]
    valid = resize_aligned(batch["valid"][:, None].float(), cells).flatten(1) > 0.5
    background = {
        "complement": 1 - refined,
        "without_dropped": (1 - refined) * (1 - coarse),
        "unlike": (1 - refined) * (initial < 0.25),
    }
    expected = torch.stack([refined, background[kind]], 1) * valid[:, None]
    torch.testing.assert_close(seen[0][..., -valid.shape[1] :], expected)
    assert not posterior[~valid].any()


def test_cells_of_which_less_than_half_is_the_object_are_not_compared():
    model, batch = make(guidance="mask", ensemble=False).eval(), batch_of()
    for name in ("image", "mask", "valid"):  # to a size at which cells are cut
        for key in (name, f"support_{name}"):
            batch[key] = batch[key][..., :61, :61]
    found = model.episode_outputs(batch)["initial"]
    query, support = (
        model.extract_stages(batch[name].flatten(0, -4)).high for name in ("image", "support_image")
    )
    share = support_shares(batch, found.shape[-2:])[:, 0, :1]
    assert ((share > 0) & (share < 0.5)).any()
    valid = resize_aligned(batch["valid"][:, None].float(), found.shape[-2:]) > 0.5
    given = query, support * (share > 0.5), valid
    expected = stretch((global_similarity(*given) + local_similarity(*given)) / 2, valid)
    torch.testing.assert_close(found, expected)


def test_a_support_without_weight_does_not_count(monkeypatch):
    model, batch = make(guidance="mask", ensemble=False).eval(), batch_of(2, 2)
    first = {k: x[:, :1] if k.startswith("support") else x for k, x in batch.items()}
    alone = model.episode_outputs(first)["initial"]
    weights = torch.tensor([[1.0, 0.0]] * 2)
    monkeypatch.setattr(model.shot_weights, "forward", lambda distances: weights)
    torch.testing.assert_close(model.episode_outputs(batch)["initial"], alone)


def test_no_object_in_sight_falls_back_to_the_similarity():
    batch = batch_of()
    batch = {**batch, "support_mask": torch.zeros_like(batch["support_mask"])}
    batch["support_mask"][..., 10:12, 10:12] = 1  # a fraction of a cell
    outputs = make(mixture={"query_statistics": False}).eval().episode_outputs(batch)
    assert torch.equal(outputs["posterior"], outputs["initial"])
    nothing = {**batch, "support_mask": torch.full_like(batch["support_mask"], 255)}
    assert make(guidance="mask").eval().episode_outputs(nothing)["scores"].isfinite().all()


def test_the_episodes_own_class_is_not_suppressed_in_training():
    model, batch = make(), batch_of()
    high = model.extract_stages(batch["image"]).high
    everything, without = (model.train(mode)._known(high, batch)[:, 0] for mode in (False, True))
    assert model.base_head is not None
    own = model.eval().base_head(high).softmax(1)[:, 1]
    torch.testing.assert_close(everything - without, own, atol=1e-5, rtol=0)
    novel = {**batch, "base_index": batch["base_index"] * 0}
    torch.testing.assert_close(model.train()._known(high, novel)[:, 0], everything)


def test_the_mixtures_alone_need_no_training(tmp_path):
    arguments = {"answer": "guidance", "mixture": {"features": "raw"}, "num_base_classes": None}
    model, batch = make(**arguments).eval(), batch_of()
    outputs = model.episode_outputs(batch)
    torch.testing.assert_close(
        outputs["scores"].softmax(1)[:, 1:], outputs["posterior"], atol=1e-5, rtol=0
    )
    again = make(**arguments).eval()  # other random weights of what is not used
    again.features.load_state_dict(model.features.state_dict())
    assert torch.equal(again.episode_outputs(batch)["scores"], outputs["scores"])
    with pytest.raises(GenSegError, match="this CGMGM has nothing to train"):
        trainer(tmp_path).fit(model, datamodule=episodes(tmp_path))


def test_another_number_of_shots(tmp_path):
    data, run = episodes(tmp_path, shots=2), trainer(tmp_path, fast_dev_run=1)
    plain = {"ensemble": False, "num_base_classes": None}
    run.fit(make(**plain), datamodule=data)  # nothing could be learned about them
    model = make(**plain, decoder={"extra_inputs": ["prototype"]})
    with pytest.warns(UserWarning, match="the data have shots=2 and the model shots=1"):
        run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)  # no warning: they are errors


def test_what_cannot_be_used():
    model, batch = make(matching={"source": "gt"}).eval(), batch_of(1)
    model.set_support(batch["support_image"][0], batch["support_mask"][0], size=65)
    with pytest.raises(GenSegError, match=r"matching.source gt takes the query's own labels"):
        model(batch["image"])
    with pytest.raises(GenSegError, match="set mask_before_last_stage to false"):
        make(encoder="tu-test_efficientnet", output_stride=32, **BAM).compute_loss(batch_of())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_base_classes": None}, "the ensemble needs base_learner"),
        ({"decoder": {"shared_reduction": False}}, "models supports and query in one space"),
        ({"answer": "guidance"}, "set mixture.features to raw"),
        ({"matching": {"prior_cells": "valid"}}, "prior_cells is an option of the prior"),
        ({"matching": {"mask_before_last_stage": True}}, "guidance is posterior: set guidance"),
        ({"shots": 0}, "shots is 0; it must be at least 1"),
        ({"mixture": {"components": 0}}, "components is 0; it must be at least 1"),
        ({"mixture": {"variance_floor": 0.0}}, "variance_floor is 0.0; it must be positive"),
        ({"mixture": {"em_iterations": 3}}, "no argument 'em_iterations'; did you mean iterations"),
        (
            {"posterior": {"form": "bayes", "temperature": 2.0}},
            "temperature needs posterior.form tempered",
        ),
        (
            {"posterior": {"form": "bayes", "gradient": True}},
            "posterior.gradient needs posterior.form standard",
        ),
        ({"matching": {"threshold": 1.0}}, "threshold is 1.0; .* positive and less than 1"),
        ({"matching": {"level": "middle", **BAM["matching"]}}, "set matching.level to high"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(GenSegError, match=words):
        make(**arguments)
