"""GMMSeg as a LightningModule: when EM runs, who trains the mixture, what a checkpoint holds."""

import copy
import shutil
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_genseg import GMMSeg, SoftmaxSegmenter
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gmmseg import head
from lightning_genseg.mixtures import DecayedMoments, FeatureRing
from tests.contract import (
    TINY,
    ModuleContract,
    PlainFeatures,
    batch_of,
    changed,
    copied,
    in_groups,
    loader,
    mean_iou,
    save,
    scenes,
    train_by_hand,
    trainer,
)

SMALL = {**TINY, "embedding_dim": 16, "components": 2, "memory_size": 500, "interval": 1}
POSTHOC = {"train": "posthoc", "embedding_dim": None}


def make(**arguments: Any) -> GMMSeg:
    """A small GMMSeg; the fields of its groups are given by their own names."""
    return GMMSeg(**in_groups(**{**SMALL, **arguments}))


class TestGMMSeg(ModuleContract):
    learning: ClassVar[dict[str, Any]] = {"mean_momentum": 0.9}
    updated: ClassVar[set[str]] = {"head.mixture.means", "head.mixture.log_variances"}

    def make(self, **arguments: Any) -> GMMSeg:
        return make(**arguments)


def mixture_of(model: GMMSeg) -> dict[str, Tensor]:
    return copied(model.head.mixture)


class Watch(Callback):
    """After each batch: has the mixture moved, and how much has ever entered the memory?"""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.entered: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # At its end the mixture may not have been updated yet: callbacks run in some order.
        self.look(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.look(pl_module)

    def look(self, model: Any) -> None:
        now = mixture_of(model)
        if hasattr(self, "last"):
            self.moved.append(bool(changed(self.last, now)))
            self.entered.append(float(model.head.memory.moments().counts.sum()))
        self.last = now


# --- when EM runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "moved"), [(1, [True] * 6), (4, [True, False, False, False, True, False])]
)
def test_em_every_few_batches_however_short_the_epochs(tmp_path, interval, moved):
    watch = Watch()
    model = make(interval=interval, memory_size=10**5)
    trainer(tmp_path, max_epochs=3, callbacks=[watch]).fit(model, loader(), loader(2))
    assert watch.moved == moved
    assert all(b > a for a, b in zip([0, *watch.entered], watch.entered, strict=False))


def test_a_checkpoint_holds_the_mixture_of_its_own_step(tmp_path):
    model = make()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(tmp_path, callbacks=[checkpoint], enable_checkpointing=True)
    run.fit(model, loader(), loader(2))
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    for name, value in model.head.mixture.state_dict().items():
        assert torch.equal(saved["state_dict"][f"head.mixture.{name}"], value)
    assert model.head.memory is not None
    counts = model.head.memory.moments().counts
    assert torch.equal(saved["mixture_memory"]["counts"][: len(counts)], counts)


@pytest.mark.parametrize(
    "options", [{}, {"component_loss_weight": 0.0}, {"assignment": "em", "interval": 2}], ids=str
)
def test_labels_and_e_step_once_a_batch(tmp_path, options):
    labels = mock.patch.object(
        head.GMMHead, "labels", autospec=True, side_effect=head.GMMHead.labels
    )
    e_step = mock.patch.object(head, "e_step", wraps=head.e_step)
    with labels as labels_calls, e_step as e_step_calls:
        trainer(tmp_path).fit(make(**options), loader(6), loader(2))
    assert labels_calls.call_count == e_step_calls.call_count == 3


def test_validation_and_test_leave_the_mixture_alone(tmp_path):
    model = make()
    before = mixture_of(model)
    trainer(tmp_path).validate(model, loader(2), verbose=False)
    assert not changed(before, mixture_of(model))
    assert model.head.memory is not None
    assert not model.head.memory.moments().counts.any()


# --- who trains the mixture ------------------------------------------------------------------


def optimised(model: GMMSeg) -> set[str]:
    inside = {id(p) for group in model.parameter_groups() for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in inside}


@pytest.mark.parametrize("train", ["em", "gradient"])
def test_who_trains_the_mixture(tmp_path, train):
    """EM, or the optimiser: the discriminative GMM, without memory."""
    model, names = make(train=train), {"means", "log_variances"}
    expected = {f"head.mixture.{name}" for name in names} if train == "gradient" else set()
    assert {name for name in optimised(model) if "mixture" in name} == expected
    before = mixture_of(model)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, loader(), loader(2))
    assert changed(before, mixture_of(model)) == names
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert ("mixture_memory" in saved) == (model.head.memory is not None) == (train == "em")


# --- post-hoc --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory):
    """Checkpoint of a softmax run."""
    torch.manual_seed(0)
    model = SoftmaxSegmenter(**TINY)
    train_by_hand(model, 20)
    return save(model, tmp_path_factory.mktemp("softmax") / "softmax.ckpt")


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_posthoc(tmp_path, extractor):
    model = make(**POSTHOC, extractor=extractor, mean_momentum=0.5)
    softmax = torch.load(extractor, weights_only=True)["state_dict"]
    before = copied(model)
    for name in before:
        if name.startswith("features."):
            assert torch.equal(before[name], softmax[name])
    untrained = mean_iou(model)
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    run = trainer(tmp_path, max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    run.fit(model, loader(8), loader(2))
    assert run.global_step == 12
    names = changed(before, model.state_dict())  # running statistics of the norms included
    assert names == {"head.mixture.means", "head.mixture.log_variances"}
    assert mean_iou(model) > max(0.3, untrained + 0.1)

    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    assert saved["mixture_memory"]["counts"].sum() > 0
    assert saved["hyper_parameters"]["extractor"] is None
    loaded = GMMSeg.load_from_checkpoint(tmp_path / "step=12.ckpt")
    image = batch_of()["image"]
    assert torch.equal(loaded.eval()(image), model.eval()(image))
    # What was loaded can be trained on, and the run can be resumed.
    trainer(tmp_path, max_epochs=1).fit(loaded, loader(), loader(2))
    resumed = trainer(tmp_path, max_epochs=4)
    resumed.fit(make(**POSTHOC), loader(8), loader(2), ckpt_path=tmp_path / "step=12.ckpt")
    assert resumed.global_step == 16


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("length", [{"max_epochs": 1}, {"max_steps": 3}], ids=str)
def test_posthoc_leaves_no_batch_over(length, tmp_path, extractor):
    """Whatever em.interval: each class comes in one of the three batches alone."""
    samples = [
        {**sample, "mask": torch.full_like(sample["mask"], number)}
        for number, sample in enumerate(scenes()[:3])
    ]
    data = torch.utils.data.DataLoader(samples, batch_size=1)
    model = make(**POSTHOC, extractor=extractor, interval=5)
    trainer(tmp_path, **{"max_epochs": -1, **length}).fit(model, data, loader(2))
    assert model.head.mixture.fitted.any(1).tolist() == [True] * 3 + [False] * 3


def test_the_features_to_start_from(tmp_path, extractor):
    make(**POSTHOC, features=PlainFeatures(), network_options=None).on_fit_start()
    start = torch.load(extractor, weights_only=True)["state_dict"]
    source = make(extractor=extractor)  # trained on by EM
    assert all(parameter.requires_grad for parameter in source.features.parameters())
    for name, value in source.features.state_dict(prefix="features.").items():
        assert torch.equal(value, start[name])
    model = make(**POSTHOC, extractor=save(source, tmp_path / "gmmseg.ckpt"))
    for mine, theirs in zip(model.features.parameters(), source.features.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad


def test_posthoc_keeps_the_network_in_evaluation_mode(extractor):
    model = make(**POSTHOC, extractor=extractor)
    for _ in range(2):
        assert model.training
        assert not any(module.training for module in model.features.modules())
        model.eval()
        model.train()
        model.predict_image(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
@pytest.mark.parametrize("own", [{}, {"shrinkage": 1.0, "class_prior": "frequency"}])
def test_a_frozen_encoder_and_em_alone(own, tmp_path):
    weights = tmp_path / "encoder.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    options = {**POSTHOC, **own, "decoder": "hypercolumns", "mean_momentum": 0.0}
    options["network_options"] = {"levels": 6}  # down to the image: the encoder is random
    model = make(**options, encoder_weights=weights)
    before, untrained = copied(model), mean_iou(model)
    trainer(tmp_path, max_epochs=1).fit(model, loader(8), loader(2))
    names = changed(before, model.state_dict())
    counted = {"head.class_counts"} if own else set()
    assert names == {"head.mixture.means", "head.mixture.log_variances", *counted}
    assert mean_iou(model) > untrained + 0.15
    with pytest.raises(GenSegError, match="or encoder_weights with decoder 'hypercolumns'"):
        trainer(tmp_path).fit(make(**options), loader(), loader(2))


def test_posthoc_sentences(tmp_path):
    with pytest.raises(GenSegError, match=r"give the checkpoint .* as model\.extractor"):
        trainer(tmp_path).fit(make(**POSTHOC), loader(), loader(2))
    with pytest.raises(GenSegError, match=r"set mixture\.embedding_dim to null"):
        make(train="posthoc")
    torch.save({"state_dict": {"classifier.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(GenSegError, match=r"no key that begins with 'features\.'"):
        make(extractor=tmp_path / "other.ckpt")


# --- every switch ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"assignment": "em", "density": "logsumexp"},
        {"assignment": "em", "loops": 10},
        {"components": 1},
        {"components": 10, "sinkhorn_epsilon": 0.5, "sinkhorn_iterations": 1},
        {"interval": 2},
        {"mean_momentum": 0.0, "variance_momentum": 0.999},
        {"mean_momentum": 1.0},
        {"density": "logsumexp"},
        {"logit_norm": "none"},
        {"logit_scale": 3.0},
        {"component_loss_weight": 0.0},
        {"component_loss_weight": 1.0},
        {"covariance": "full"},
        {"covariance": "full", "memory": "ring", "assignment": "em"},
        {"memory": "ring"},
        {"memory_start": "random"},
        {"label_reduction": "corner", "avg_non_ignore": False, "dropout": 0.5},
        {"memory": "ring", "memory_dtype": "bfloat16"},
        {"memory": "ring", "memory_dtype": "float16"},
        {"memory_filter": "correct", "samples_per_component": 20},
        {"memory_size": 1, "samples_per_component": 1},
        {"normalize_features": False},
        {"embedding_dim": None},
        {"variance_floor": 0.3},
        {"train": "gradient", "density": "logsumexp"},
    ],
    ids=str,
)
def test_every_switch_trains(tmp_path, options):
    model = make(**options)
    before = copied(model)
    run = trainer(tmp_path)
    run.fit(model, loader(), loader(2))
    assert run.global_step == 2
    names = changed(before, model.state_dict())
    assert any(name.startswith("features.") for name in names)
    turned = (model.head.mixture.means - before["head.mixture.means"]).abs().max() > 1e-6
    assert turned == (options.get("mean_momentum") != 1.0)
    assert ("head.mixture.log_weights" in names) == (options.get("assignment") == "em")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert run.callback_metrics["train_loss"].isfinite()
    parts = {"train_loss", "train_loss_ce"}
    if options.get("component_loss_weight") != 0.0:
        parts.add("train_loss_component")
    assert parts == {name for name in run.callback_metrics if name.startswith("train")}
    memory = {"decay": DecayedMoments, "ring": FeatureRing}[options.get("memory", "decay")]
    if options.get("train") != "gradient":
        assert isinstance(model.head.memory, memory)
        assert model.head.memory.moments().counts.sum() > 0
    maps = model.eval().maps(batch_of()["image"])
    assert all(value.isfinite().all() for value in maps.values())


# --- anomaly ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"density": "logsumexp"}, {"logit_norm": "none"}], ids=str)
def test_the_anomaly_score_is_the_density_and_not_the_logits(options):
    model = make(**options)
    train_by_hand(model, 2)
    model.eval()
    image = batch_of()["image"]
    with torch.no_grad():
        embedding = model.head.embed(model.features(model.normalize(image)))
        rows = embedding.permute(0, 2, 3, 1).flatten(0, 2)
        density = model.head.mixture.log_density(rows, options.get("density", "max"))
        expected = -density.amax(1).view(2, 1, *embedding.shape[-2:])
        expected = torch.nn.functional.interpolate(expected, (48, 64), mode="bilinear")
        torch.testing.assert_close(model.maps(image)["anomaly"], expected)
        prediction = model.predict_step(batch_of(), 0)
    torch.testing.assert_close(prediction["anomaly"], expected[:, 0])


def test_noise_is_stranger_than_what_was_seen():
    model = make(mean_momentum=0.9)
    train_by_hand(model, 20)
    model.eval()
    with torch.no_grad():
        seen = model.maps(batch_of()["image"])["anomaly"].mean()
        noise = model.maps(torch.rand(2, 3, 48, 64))["anomaly"].mean()
    assert noise > seen


# --- precision and compilation ---------------------------------------------------------------


def test_bfloat16(tmp_path):
    model = make()
    dtypes = set()
    head = type(model.head).component_log_density
    model.head.component_log_density = lambda x: (
        dtypes.add((x.dtype, (density := head(model.head, x)).dtype)) or density
    )
    run = trainer(tmp_path, precision="bf16-mixed", max_epochs=2)
    run.fit(model, loader(), loader(2))
    assert dtypes == {(torch.float32, torch.float32)}
    assert run.callback_metrics["train_loss"].isfinite()
    assert run.callback_metrics["train_loss"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_the_compiled_module_trains(tmp_path):
    options = {
        "features": PlainFeatures(),
        "network_options": None,
        "dropout": 0.0,  # its random numbers are others where it is compiled
        "embedding_dim": None,
        "mean_momentum": 0.5,
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01),
    }
    plain = make(**options)
    module = copy.deepcopy(plain)
    trainer(tmp_path, limit_val_batches=0).fit(plain, loader())
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(torch.compile(module), loader())
    assert run.global_step == 2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert module.head.memory is not None
    assert module.head.memory.moments().counts.sum() > 0


def test_trains_on_the_logits_that_it_predicts_whatever_the_size():
    model = make().eval()
    batch = {"image": torch.rand(2, 3, 42, 54), "mask": torch.randint(3, (2, 42, 54))}
    losses = model.compute_loss(batch)
    expected = torch.nn.functional.cross_entropy(model(batch["image"]), batch["mask"])
    torch.testing.assert_close(losses["loss_ce"], expected)
    model.update_mixture(losses["embedding"], batch["mask"])


def test_memory_of_another_kind_hinders_a_fit_only(tmp_path):
    trained, run = make(memory="ring"), trainer(tmp_path, max_epochs=1)
    run.fit(trained, loader(), loader(2))
    path = tmp_path / "ring.ckpt"
    run.save_checkpoint(path)
    model = make(memory="decay")
    quiet = {"ckpt_path": path, "weights_only": True, "verbose": False}
    trainer(tmp_path).test(model, loader(2), **quiet)
    image = batch_of()["image"]
    assert torch.equal(model.eval()(image), trained.eval()(image))
    with pytest.raises(GenSegError, match=r"set em\.memory to ring"):
        trainer(tmp_path).fit(make(memory="decay"), loader(), loader(2), ckpt_path=path)


def test_a_run_does_not_wait_for_the_classes_of_another(tmp_path):
    model = make(interval=5)
    trainer(tmp_path, limit_train_batches=2).fit(model, loader(8), loader(4))  # one M-step
    assert "waiting" in model.head.memory_state()
    trainer(tmp_path, max_epochs=0).fit(model, loader(8), loader(4))
    assert "waiting" not in model.head.memory_state()
