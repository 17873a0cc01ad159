"""Callbacks, tuners and routines of others around a mixture: what `docs/neighbours.md` says."""

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_genseg import EMOptions, GMMHead, GMMSeg
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


def test_em_once_a_step(tmp_path, monkeypatch):
    steps, real = [], GMMHead.update_mixture

    def counted(self, embedding, mask, assignment, processes, remember_only):
        steps.append(not remember_only)
        return real(self, embedding, mask, assignment, processes, remember_only)

    monkeypatch.setattr(GMMHead, "update_mixture", counted)
    em = EMOptions(memory_size=50, interval=2)
    run = trainer(tmp_path, accumulate_grad_batches=2)
    run.fit(GMMSeg(**TINY, em=em), loader(12), loader(2))
    assert steps == [False, True, False, False, False, True]
