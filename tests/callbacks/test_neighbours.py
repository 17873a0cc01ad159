"""Callbacks, tuners and routines of others around a mixture: what `docs/neighbours.md` says."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import StepLR

from lightning_genseg import EMOptions, GMMHead, GMMSeg
from lightning_genseg.callbacks import UpdateMixtures
from tests.callbacks.test_update_mixtures import pairs
from tests.contract import TINY, changed, copied, loader, trainer

EM = EMOptions(memory_size=50, interval=1, mean_momentum=0.5)


class Before(Callback):
    """The weights before the last batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.state = copied(pl_module)


def test_averaged_weights_have_the_newest_mixture(tmp_path):
    """The average is taken before EM, and has the mixture that the step saw."""
    module, before = GMMSeg(**TINY, em=EM), Before()
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    run = trainer(tmp_path, callbacks=[before, average], max_epochs=2)
    run.fit(module, loader(8), loader(2))
    run.save_checkpoint(tmp_path / "a.ckpt")
    differing = changed(before.state, copied(module))
    assert "head.projection.0.weight" in differing
    assert not {name for name in differing if ".mixture." in name}
    loaded = copied(GMMSeg.load_from_checkpoint(tmp_path / "a.ckpt"))
    assert not changed(copied(module), loaded)


class Groups(Callback):
    """The optimiser's parameters, each once, and the rates of its groups, epoch by epoch."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        groups = trainer.optimizers[0].param_groups
        ids = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(ids) == len(set(ids))
        self.weights.append(copied(pl_module.backbone))
        self.rates.append([group["lr"] for group in groups])


@pytest.mark.parametrize(
    ("schedule", "train_bn"), [(None, True), (partial(StepLR, step_size=1, gamma=0.5), False)]
)
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_an_encoder_that_is_thawed_later(tmp_path, schedule, train_bn):
    """The schedule moves the groups that it began with; the callback that of the encoder."""

    def fit(epochs, **options):
        module, groups = GMMSeg(**TINY, em=EM, lr_scheduler=schedule), Groups()
        thaw = BackboneFinetuning(2, lambda epoch: 1.5, should_align=False, train_bn=train_bn)
        run = trainer(tmp_path, callbacks=[thaw, groups], max_epochs=epochs, limit_val_batches=0)
        run.fit(module, loader(4), loader(2), **options)
        return run, module, groups

    run, module, groups = fit(3)
    first, second, third = groups.weights
    parameters = dict(module.backbone.named_parameters())
    norms = {name for name, parameter in parameters.items() if parameter.ndim == 1}
    assert changed(first, second) & parameters.keys() == norms
    assert changed(second, third) >= parameters.keys()
    assert [len(rates) for rates in groups.rates] == [2, 2, 3]
    assert groups.rates[2][-1] == pytest.approx(0.1 * groups.rates[1][0])

    run.save_checkpoint(tmp_path / "thawed.ckpt")
    _, _, again = fit(5, ckpt_path=tmp_path / "thawed.ckpt")
    expected = [groups.rates[2][-1] * factor for factor in (1.5, 1.5**2)]
    assert [rates[-1] for rates in again.rates] == pytest.approx(expected)
    assert changed(third, again.weights[0]) >= parameters.keys()


def test_em_once_a_step(tmp_path, monkeypatch):
    steps, real = [], GMMHead.update_mixture

    def counted(self, embedding, mask, assignment, processes, remember_only, accumulating):
        steps.append("more" if accumulating else not remember_only)
        return real(self, embedding, mask, assignment, processes, remember_only, accumulating)

    monkeypatch.setattr(GMMHead, "update_mixture", counted)
    em = EMOptions(memory_size=50, interval=2)
    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(GMMSeg(**TINY, em=em), loader(12), loader(2))
    assert steps == ["more", True, "more", False, "more", True]


@pytest.mark.filterwarnings("ignore:The `LightningModule.validation_step`")
def test_learning_rate_finder_leaves_the_mixture(tmp_path):
    module = GMMSeg(**TINY, em=EM)
    before = copied(module)
    loaders = {"train_dataloaders": loader(8), "val_dataloaders": loader(2)}
    tuner = Tuner(trainer(tmp_path))
    finder = tuner.lr_find(module, **loaders, num_training=4, update_attr=False)
    assert len(finder.results["loss"]) == 4
    assert not changed(before, copied(module))
    assert module.head.memory.moments().counts.sum() == 0


@pytest.mark.filterwarnings("ignore:::torch_uncertainty")
def test_torch_uncertainty(tmp_path):
    routines = pytest.importorskip("torch_uncertainty.routines")
    model = GMMSeg(**TINY, em=EM)
    routine = routines.SegmentationRoutine(
        model,
        num_classes=6,
        loss=torch.nn.CrossEntropyLoss(),
        optim_recipe=torch.optim.SGD(model.parameters(), lr=0.01),
    )
    before = copied(model)
    callbacks, logger = [UpdateMixtures(labels=1)], CSVLogger(tmp_path)
    run = trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    run.fit(routine, pairs(), pairs(2))
    assert {"head.projection.0.weight", "head.mixture.means"} <= changed(before, copied(model))
    assert run.callback_metrics
