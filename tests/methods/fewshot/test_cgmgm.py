from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_genseg import CGMGM, CosinePrototypes
from tests.contract import trainer
from tests.methods.fewshot.episodes import base_learner, batch_of, episodes

BAM = {
    "guidance": "prior",
    "extra_inputs": ["prototype"],
    "shared_reduction": False,
    "mask_before_last_stage": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_learner(tmp_path_factory.mktemp("base"))


def make(**arguments: Any) -> CGMGM:
    return CGMGM(**{"encoder": "tu-test_resnet", "num_base_classes": 4, **arguments})


VARIANTS: dict[str, dict[str, Any]] = {
    "the paper": {},
    "five shots": {"shots": 3},
    "without base learner": {"ensemble": False},
    "BAM": {**BAM, "encoder": "resnet18"},
    "only support statistics": {"query_statistics": False, "refinement": "none"},
    "mask": {"guidance": "mask"},
    "without refinement": {"refinement": "none"},
    "as printed": {"refinement": "literal", "posterior": "literal"},
    "tempered": {"posterior": "tempered", "posterior_gradient": True},
    "residual": {"guidance_residual": True},
    "support check": {"refinement": "cycle_support", "query_background": "without_dropped"},
    "full covariance": {"covariance": "full", "components": 1},
    "other choices": {
        "mixture_features": "raw", "matching_level": "middle", "patch_similarity": "mean", "binarization": "otsu",
        "query_background": "unlike", "extra_inputs": ["mask", "prototype"],
    },
    "oracle": {"mq_source": "gt"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_all_it_should(name):
    arguments = VARIANTS[name]
    model = make(**arguments)
    batch = batch_of(2, arguments.get("shots", 1))
    losses = model.compute_loss(batch)
    assert losses["loss"].isfinite()
    losses["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        frozen = parameter_name.startswith(("features.", "base_head."))
        assert parameter.requires_grad != frozen, parameter_name
        assert (parameter.grad is None) == frozen, parameter_name
        assert frozen or parameter.grad.isfinite().all()
    outputs = model.episode_outputs(batch)
    assert outputs["logits"].shape == (2, 2, *outputs["guidance"].shape[-2:])
    if name != "as printed":
        assert (outputs["guidance"] >= 0).all()
        assert (outputs["guidance"] <= 1).all()


def test_frozen_parts_stay_as_they_are(base, tmp_path):
    model = CGMGM(base_learner=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path, max_steps=10, max_epochs=-1, limit_val_batches=0)
    run.fit(model, datamodule=episodes(tmp_path))
    assert run.global_step == 10
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("features.", "base_head.")) for name in changed)  # BN as well
    assert {"reduction.0.weight", "ensemble.known.weight"} <= changed
    assert model.training
    assert not model.features.training
    assert model.base_head is not None
    assert not any(part.training for part in model.base_head.modules())
    optimizer = run.optimizers[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_it_learns_episodes():
    model = make(dropout=0.1, ensemble=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model.compute_loss(batch_of(4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_fit_save_load_test_and_predict(base, tmp_path):
    data, run = episodes(tmp_path, shots=2), trainer(tmp_path, limit_train_batches=2)
    model = CGMGM(base_learner=base, shots=2)
    run.fit(model, datamodule=data)
    assert {"train_loss", "train_loss_meta", "val_mIoU", "val_FB_IoU", "val_GmIoU"} <= set(
        run.callback_metrics
    )
    path = tmp_path / "cgmgm.ckpt"
    run.save_checkpoint(path)
    loaded = CGMGM.load_from_checkpoint(path).eval()  # without the base learner's file
    assert loaded.base_classes == ["sky", "ground", "building", "tree"]
    batch = batch_of(1, 2)
    for key, value in model.eval().episode_outputs(batch).items():
        assert torch.equal(value, loaded.episode_outputs(batch)[key]), key
    one, two = (
        trainer(tmp_path).test(m, datamodule=data, verbose=False)[0] for m in (model, loaded)
    )
    assert one == two
    loaded.set_support(batch["support_image"][0], batch["support_mask"][0], size=65)
    assert loaded(torch.rand(1, 3, 30, 44)).shape == (1, 2, 30, 44)
    with pytest.raises(ValueError, match="use the base learner of the same fold"):
        trainer(tmp_path).test(
            loaded, datamodule=episodes(tmp_path, novel_classes=["sky"]), verbose=False
        )


def test_the_true_mask_guides_better():
    batch = batch_of(4)

    def guidance_iou(**arguments: Any) -> float:
        torch.manual_seed(0)
        model = make(ensemble=False, **arguments).eval()
        found = model.to_image(model.episode_outputs(batch)["guidance"], batch["image"])[:, 0] > 0.5
        truth, counted = batch["mask"] == 1, batch["mask"] != 255
        return float((found & truth).sum() / ((found | truth) & counted).sum())

    oracle, alone = guidance_iou(mq_source="gt"), guidance_iou(query_statistics=False)
    assert oracle > 0.6
    assert oracle > guidance_iou()
    assert oracle > alone


def test_posteriors():
    batch = batch_of()
    torch.manual_seed(0)
    model = make().eval()
    bayes = model.episode_outputs(batch)["posterior"]
    model.posterior = "tempered"
    tempered = model.episode_outputs(batch)["posterior"]
    assert torch.equal(bayes > 0.5, tempered > 0.5)  # the same order, less extreme
    assert (tempered - 0.5).abs().mean() < (bayes - 0.5).abs().mean()

    def scaled(factor: float) -> torch.Tensor:
        with torch.no_grad():
            model.reduction[0].weight.mul_(factor)
            result = model.episode_outputs(batch)["posterior"]
            model.reduction[0].weight.div_(factor)
        return result

    model.posterior = "bayes"
    torch.testing.assert_close(scaled(10), bayes, atol=1e-3, rtol=0)
    model.posterior = "literal"
    assert (scaled(10) - scaled(1)).abs().max() > 0.05


def test_no_object_in_sight_falls_back_to_the_similarity():
    batch = batch_of()
    batch = {**batch, "support_mask": torch.zeros_like(batch["support_mask"])}
    batch["support_mask"][..., 10:12, 10:12] = 1  # a fraction of a cell
    outputs = make(query_statistics=False).eval().episode_outputs(batch)
    assert torch.equal(outputs["posterior"], outputs["initial"])
    nothing = {**batch, "support_mask": torch.full_like(batch["support_mask"], 255)}
    for variant in ({}, {"guidance": "mask"}):
        assert make(**variant).eval().episode_outputs(nothing)["logits"].isfinite().all()


def test_the_order_of_the_supports_does_not_matter():
    batch = batch_of(2, 3)
    turned = {k: v[:, [2, 0, 1]] if k.startswith("support") else v for k, v in batch.items()}
    model = make(shots=3).eval()
    one, two = (model.episode_outputs(b) for b in (batch, turned))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)


def test_the_querys_labels_are_not_used():
    batch = batch_of()
    other = {**batch, "mask": 1 - batch["mask"].clamp(0, 1), "base_index": batch["base_index"] * 0}
    model = make().eval()
    one, two = (model.episode_outputs(b) for b in (batch, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_episodes_own_class_is_not_suppressed_in_training():
    model, batch = make(), batch_of()
    high = model.extract_stages(batch["image"]).high
    everything, without = (model.train(mode)._known(high, batch)[:, 0] for mode in (False, True))
    assert model.base_head is not None
    own = model.eval().base_head(high).softmax(1)[:, 1]
    torch.testing.assert_close(everything - without, own, atol=1e-5, rtol=0)
    novel = {**batch, "base_index": batch["base_index"] * 0}
    torch.testing.assert_close(model.train()._known(high, novel)[:, 0], everything)


def test_under_bfloat16():
    model, batch = make(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.compute_loss(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_bam_has_its_number_of_inputs():
    model = make(**BAM, encoder="resnet18")
    assert model.decoder.merge[0].in_channels == 513
    assert make().decoder.merge[0].in_channels == 257


def test_the_mixtures_alone_need_no_training(tmp_path):
    arguments = {"answer": "guidance", "mixture_features": "raw", "num_base_classes": None}
    model, batch = make(**arguments).eval(), batch_of()
    outputs = model.episode_outputs(batch)
    torch.testing.assert_close(
        outputs["logits"].softmax(1)[:, 1:], outputs["posterior"], atol=1e-5, rtol=0
    )
    again = make(**arguments).eval()  # other random weights of what is not used
    again.features.load_state_dict(model.features.state_dict())
    assert torch.equal(again.episode_outputs(batch)["logits"], outputs["logits"])
    with pytest.raises(ValueError, match="this CGMGM has nothing to train"):
        trainer(tmp_path).fit(model, datamodule=episodes(tmp_path))


def test_the_oracle_needs_labels():
    model, batch = make(mq_source="gt").eval(), batch_of(1)
    model.set_support(batch["support_image"][0], batch["support_mask"][0], size=65)
    with pytest.raises(ValueError, match="mq_source gt takes the query's own labels"):
        model(batch["image"])


def test_another_number_of_shots(tmp_path):
    data, run = episodes(tmp_path, shots=2), trainer(tmp_path, fast_dev_run=1)
    model = make(ensemble=False, num_base_classes=None)
    with pytest.warns(UserWarning, match="the data have shots=2 and the model shots=1"):
        run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)  # no warning: they are errors


def test_a_batch_without_labels():
    batch = batch_of()
    batch = {**batch, "mask": torch.full_like(batch["mask"], 255)}
    loss = make().compute_loss(batch)["loss"]
    loss.backward()
    assert loss == 0


def test_wrong_arguments(base):
    for arguments, sentence in (
        ({"num_base_classes": None}, "the ensemble needs base_learner"),
        ({"shared_reduction": False}, "models supports and query in one space"),
        ({**BAM, "matching_level": "middle"}, "set matching_level to high"),
        ({"answer": "guidance"}, "set mixture_features to raw"),
        ({"temperature": 2.0}, "posterior must be tempered"),
        ({"posterior_gradient": True}, "posterior_gradient needs posterior tempered"),
        ({"components": 0}, "components is 0; it must be at least 1"),
        ({"shots": 0}, "shots is 0; it must be at least 1"),
        ({"variance_floor": 0.0}, "variance_floor is 0.0; it must be positive"),
        ({"threshold": 1.0}, "threshold is 1.0; it must be between 0 and 1"),
        ({"base_learner": base}, "not both"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make(**arguments)
    with pytest.raises(ValueError, match="set mask_before_last_stage to false"):
        make(**BAM).compute_loss(batch_of())
    with pytest.raises(FileNotFoundError, match=r"nothing.ckpt' does not exist"):
        CosinePrototypes(base_learner=Path("nothing.ckpt"))
