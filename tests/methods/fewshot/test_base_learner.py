from typing import Any

import pytest
import torch

from lightning_genseg import BaseLearner, SoftmaxSegmenter
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.methods.fewshot.base_learner import load_base_learner
from tests.contract import NUM_CLASSES, ModuleContract, batch_of, loader, trainer


class TestBaseLearner(ModuleContract):
    def make(self, **arguments: Any) -> BaseLearner:
        return BaseLearner(**{"num_classes": NUM_CLASSES, "encoder": "tu-test_resnet", **arguments})

    def test_it_learns(self) -> None:
        """With another start: chance is 16 % with that of seed 0."""
        torch.manual_seed(1)
        super().test_it_learns()

    def test_own_network(self) -> None:  # type: ignore[override]
        """It has no argument for one: the episodes need three stages of its encoder."""
        with pytest.raises(TypeError, match="has no argument 'features'"):
            self.make(features=torch.nn.Identity())

    def test_scores_without_background(self, tmp_path) -> None:
        scores = trainer(tmp_path).validate(self.make(), loader(2), verbose=False)[0]
        each = torch.tensor([scores[f"val_IoU_{c}"] for c in range(1, NUM_CLASSES)])
        assert scores["val_mIoU_base"] == pytest.approx(float(each.nanmean()), abs=1e-6)

    def test_one_image_cannot_train(self) -> None:
        with pytest.raises(GenSegError, match="batch size of at least 2"):
            self.make().compute_loss(batch_of(0, 1))


def test_load(tmp_path):
    model = BaseLearner(4, encoder="tu-test_resnet", mean=(0.1, 0.2, 0.3))
    other = SoftmaxSegmenter(4, encoder="tu-test_resnet", decoder="fpn")
    for name, module in (("base", model), ("other", other)):
        run = trainer(tmp_path)
        run.strategy.connect(module)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    loaded = load_base_learner(tmp_path / "base.ckpt")
    assert not loaded.training
    image = torch.rand(1, 3, 65, 65)
    assert torch.equal(loaded(image), model.eval()(image))
    (tmp_path / "text.ckpt").write_text("no")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    for name in ("other", "text", "tensor"):
        with pytest.raises(GenSegError, match=f"{name}.ckpt' is no checkpoint of a BaseLearner"):
            load_base_learner(tmp_path / f"{name}.ckpt")
    for path, words in ((tmp_path / "nothing.ckpt", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(MissingFileError, match=f"{words}: give .* of a BaseLearner run"):
            load_base_learner(path)
