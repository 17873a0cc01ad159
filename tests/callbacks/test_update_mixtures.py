"""EM in modules that know nothing of it."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_genseg import EMOptions, GMMHead, GMMSeg, MixtureOptions
from lightning_genseg.callbacks import UpdateMixtures
from lightning_genseg.errors import GenSegError
from tests.contract import TINY, changed, copied, loader, scenes, trainer

EM = EMOptions(memory_size=50, interval=1)


class Plain(LightningModule):
    """Somebody's module: logits, a cross-entropy, tuples."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.head = head or GMMHead(8, 6, MixtureOptions(2, 4), EM)

    def training_step(self, batch, batch_idx):
        image, mask = batch
        scores = F.interpolate(self.head(self.stem(image)), mask.shape[-2:])
        return F.cross_entropy(scores, mask, ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Around(Plain):
    """The same around a whole GMMSeg, whose features cover more than the image."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.model = GMMSeg(**TINY, em=EM)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1], ignore_index=255)


def pairs(count=8):
    samples = [(x["image"][:, :46], x["mask"][:46]) for x in scenes()[:count]]
    return DataLoader(samples, batch_size=2)


@pytest.mark.parametrize(("kind", "name"), [(Plain, "head"), (Around, "model.head")])
def test_the_mixture_learns(kind, name, tmp_path):
    module = kind()
    before = copied(module)
    trainer(tmp_path).fit(module, pairs())
    assert f"{name}.mixture.means" not in changed(before, copied(module))
    trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(module, pairs())
    assert f"{name}.mixture.means" in changed(before, copied(module))
    assert not module.get_submodule(name).projection._forward_hooks


def test_it_is_what_update_mixture_does(tmp_path):
    """The same as by hand: with what the head saw before the optimiser changed it."""
    torch.manual_seed(0)
    modules = [Plain(GMMHead(8, 6, MixtureOptions(2, 4), EM, dropout=0.0)) for _ in range(2)]
    mine, theirs = modules
    theirs.load_state_dict(mine.state_dict())
    for module in modules:  # at a rate that would change what the normalisation gives
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.5)
    optimizer = theirs.configure_optimizers()
    for image, mask in pairs():
        embedding = theirs.head.embed(theirs.stem(image)).detach()
        theirs.training_step((image, mask), 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.head.update_mixture(embedding, mask)
    trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(mine, pairs())
    for key, value in theirs.head.mixture.state_dict().items():
        torch.testing.assert_close(mine.head.mixture.state_dict()[key], value)


def test_once_a_step(tmp_path, monkeypatch):
    steps = []
    real = GMMHead.update_mixture

    def counted(self, *args, remember_only, accumulating):
        steps.append((remember_only, accumulating))
        return real(self, *args, remember_only=remember_only, accumulating=accumulating)

    monkeypatch.setattr(GMMHead, "update_mixture", counted)
    callback = UpdateMixtures(labels=1)
    trainer(tmp_path, callbacks=[callback], accumulate_grad_batches=2).fit(Plain(), pairs())
    assert steps == [(True, True), (False, False)] * 2


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
def test_a_post_hoc_mixture_inside_leaves_no_batch_over(tmp_path):
    """Whatever em.interval: each class comes in one of the three batches alone."""

    class Frozen(Around):
        def __init__(self):
            super().__init__()
            em = EMOptions(train="posthoc", interval=5)
            self.model = GMMSeg(**TINY, mixture=MixtureOptions(embedding_dim=None), em=em)

        def training_step(self, batch, batch_idx):
            self.model.head.embed(self.model.extract(batch[0])[0])
            return 0 * self.model.nothing

    samples = [(x["image"], torch.full_like(x["mask"], c)) for c, x in enumerate(scenes()[:3])]
    module = Frozen()
    trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(module, DataLoader(samples))
    assert module.model.head.mixture.fitted.any(1).tolist() == [True] * 3 + [False] * 3


def test_with_two_optimisers(tmp_path):
    """Each of their steps counts, so that none of every second one is missed."""

    class Two(Plain):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.stem, self.head)]

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    em = EMOptions(memory_size=50, interval=2)
    module = Two(GMMHead(8, 6, MixtureOptions(2, 4), em))
    trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(module, pairs())
    assert module.head.mixture.fitted.any()


def test_a_resumed_run_has_the_memory(tmp_path):
    run = trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)])
    run.fit(first := Plain(), pairs())
    run.save_checkpoint(tmp_path / "a.ckpt")
    second, more = Plain(), trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)])
    more.fit(second, pairs(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)  # no step is left
    ours, theirs = first.head.memory.state_dict(), second.head.memory.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_labels_of_images_that_the_step_changes(tmp_path):
    """As the step returns them."""

    class Mirrored(Plain):
        def training_step(self, batch, batch_idx):
            image, mask = (part.flip(-1) for part in batch)
            return {"loss": super().training_step((image, mask), batch_idx), "mask": mask}

    torch.manual_seed(0)
    heads = [GMMHead(8, 6, MixtureOptions(2, 4), EM, dropout=0.0) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    mirrored, plain = Mirrored(heads[0]), Plain(heads[1])
    plain.stem.load_state_dict(mirrored.stem.state_dict())
    flipped = DataLoader([(i.flip(-1), m.flip(-1)) for i, m in pairs()], batch_size=None)
    callback = UpdateMixtures(labels=lambda outputs, batch: outputs["mask"])
    trainer(tmp_path, callbacks=[callback]).fit(mirrored, pairs())
    trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(plain, flipped)
    for mine, theirs in zip(mirrored.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(heads[0].mixture.means, heads[1].mixture.means)


def test_a_head_that_nobody_calls_is_told_of(tmp_path):
    class Idle(Plain):
        def training_step(self, batch, batch_idx):
            return self.stem(batch[0]).mean()

    run = trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)])
    with pytest.warns(UserWarning, match="projection of the head 'head', so that its mixture did"):
        run.fit(Idle(), pairs())


def test_an_interrupted_run_looks_no_longer(tmp_path):
    class Broken(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("interrupted")

    module = Broken()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, callbacks=[UpdateMixtures(labels=1)]).fit(module, pairs())
    assert not module.head.projection._forward_hooks


@pytest.mark.parametrize(
    ("module", "labels", "sentence"),
    [
        (Plain, "mask", "looks for the masks at 'mask' of the batch, which has 0, 1"),
        (lambda: Plain(nn.Conv2d(8, 6, 1)), 1, "Plain has no GMMHead"),
    ],
)
def test_what_cannot_be(module, labels, sentence, tmp_path):
    with pytest.raises(GenSegError, match=sentence):
        trainer(tmp_path, callbacks=[UpdateMixtures(labels=labels)]).fit(module(), pairs())


def test_a_gmmseg_runs_em_itself(tmp_path):
    run = trainer(tmp_path, callbacks=[UpdateMixtures()])
    with pytest.raises(GenSegError, match="GMMSeg runs EM itself"):
        run.validate(GMMSeg(**TINY, em=EM), loader(2))
