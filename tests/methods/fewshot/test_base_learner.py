from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_genseg import BaseLearner, SoftmaxSegmenter
from lightning_genseg.errors import GenSegError, MissingFileError
from lightning_genseg.methods.fewshot.base_learner import load_base_learner
from lightning_genseg.methods.fewshot.published import our_names
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
        what = "not a checkpoint that can" if name == "text" else "no checkpoint of a BaseLearner"
        with pytest.raises(GenSegError, match=f"{name}.ckpt' is {what}"):
            load_base_learner(tmp_path / f"{name}.ckpt")
    for path, words in ((tmp_path / "nothing.ckpt", "does not exist"), (tmp_path, "is no file")):
        with pytest.raises(MissingFileError, match=f"{words}: give .* of a BaseLearner run"):
            load_base_learner(path)


def norm(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]


def names_of_the_authors(vgg: bool) -> list[str]:
    """What a checkpoint of BAM's base learner holds, by the layers of its networks."""
    names = []
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(0 if vgg else blocks):
            place = f"layer{stage}.{block}"
            for number in (1, 2, 3):
                names += [f"{place}.conv{number}.weight", *norm(f"{place}.bn{number}")]
            if block == 0:
                names += [f"{place}.downsample.0.weight", *norm(f"{place}.downsample.1")]
    # The stem of ResNet, the stages of VGG-16: convolution, normalisation, ReLU.
    for stage, convs in enumerate((2, 2, 3, 3, 3) if vgg else (3,)):
        for place in range(0, 3 * convs, 3):
            names += [f"layer{stage}.{place}.weight", *norm(f"layer{stage}.{place + 1}")]
            names += [f"layer{stage}.{place}.bias"] * vgg
    for level in range(4):
        names += [f"ppm.features.{level}.1.weight", *norm(f"ppm.features.{level}.2")]
    return [*names, "cls.0.weight", *norm("cls.1"), "cls.4.weight", "cls.4.bias"]


@pytest.mark.parametrize("encoder", ["tu-resnet50s", "vgg16_bn"])
def test_checkpoints_of_the_authors(encoder, tmp_path):
    with torch.device("meta"):
        model = BaseLearner(16, encoder=encoder)
    ours = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    theirs = {name: torch.zeros(()) for name in names_of_the_authors("vgg" in encoder)}
    assert set(our_names(theirs, model)) == ours
    save_file({"cls.4.bias": torch.zeros(16)}, tmp_path / "part.safetensors")
    with pytest.raises(GenSegError, match=r"does not fit BaseLearner: .* missing"):
        BaseLearner(16, encoder="tu-test_resnet", published=tmp_path / "part.safetensors")
