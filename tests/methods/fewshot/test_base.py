"""What all few-shot methods share, with the training-free one; and that one itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_genseg import BaseLearner, CosinePrototypes
from lightning_genseg.cli.calibrate import calibrate
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods import FewShotModule
from lightning_genseg.methods.base import IMAGENET_MEAN, IMAGENET_STD
from lightning_genseg.methods.fewshot import prototypes
from lightning_genseg.methods.fewshot.support import support_shares
from lightning_genseg.ops.letterbox import letterbox
from tests.contract import trainer
from tests.methods.fewshot.contract import SIZE, EpisodeContract, batch_of, episodes


def make(**arguments: object) -> CosinePrototypes:
    return CosinePrototypes(**{"encoder": "tu-test_resnet", **arguments})  # type: ignore[arg-type]


class TestCosinePrototypes(EpisodeContract):
    make = staticmethod(make)
    least_miou = 0.02


def test_scores_by_hand():
    model, batch = make(level="high").eval(), batch_of()
    outputs = model.episode_outputs(batch)
    query = model.extract_stages(batch["image"]).high[0]
    support = model.extract_stages(batch["support_image"][:, 0]).high[0]
    share = support_shares(batch, support.shape[-2:])[0, 0]  # 2 x h x w
    prototypes = [(support * side).sum((1, 2)) / side.sum() for side in share]
    expected = [20 * F.cosine_similarity(query, p[:, None, None], dim=0) for p in prototypes[::-1]]
    torch.testing.assert_close(outputs["scores"][0], torch.stack(expected), atol=1e-4, rtol=0)
    agree = (outputs["guidance"] > 0.5)[:, 0] == (outputs["scores"].argmax(1) == 1)
    assert agree.all()


def test_plain_images_are_found():
    model, batch = make().eval(), batch_of(1)
    model.set_support(batch["support_image"][0], batch["support_mask"][0], size=SIZE)
    found = model(batch["image"]).argmax(1) == 1
    truth = batch["mask"] == 1
    assert (found & truth)[..., :56].sum() / (found | truth)[..., :56].sum() > 0.3


def test_void_and_padding_are_neither_foreground_nor_background():
    batch = batch_of()
    masks, valid = batch["support_mask"], batch["support_valid"]
    masks = batch["support_mask"] = masks.masked_fill(~valid, 0)  # whatever padding holds
    masks[..., :2] = 255
    share = support_shares(batch, (SIZE, SIZE))
    for side, label in enumerate((1, 0)):
        assert torch.equal(share[:, :, side] == 1, (masks == label) & valid)
    assert (support_shares(batch, (9, 9)).sum(2) <= 1 + 1e-6).all()


class Fixed(FewShotModule):
    """Answers what it is told to."""

    def __init__(self, scores: Tensor, scoring: str = "compat") -> None:
        super().__init__(encoder="tu-test_resnet", scoring=scoring)  # type: ignore[arg-type]
        self.scores = scores

    def episode_outputs(self, batch):  # type: ignore[no-untyped-def]
        return {"scores": self.scores}


@pytest.mark.parametrize("scoring", ["compat", "exact"])
def test_scoring_at_the_size_of_the_query(scoring):
    """A query of 30 x 50 in a square of 65: 38 x 65 pixels, cut to 32 x 64."""
    truth = torch.zeros(1, 30, 50, dtype=torch.long)
    truth[:, 10:, 20:] = 1
    told = torch.zeros(1, 2, 65, 65)
    rows, columns = (11, 26) if scoring == "exact" else (13, 26)
    told[:, 1, rows:, columns:] = 1
    told[:, 0, :rows] = told[:, 0, :, :columns] = 1
    batch = {
        **batch_of(),
        "image": torch.zeros(1, 3, 65, 65),
        "mask": torch.full((1, 65, 65), 255),
        "full_mask": truth,
        "class_index": torch.tensor([3]),
        "candidates": torch.tensor([[3, 7]]),
    }
    model = Fixed(told, scoring)
    model.validation_step(batch, 0)
    scores = model.val_metrics.compute()
    assert scores["IoU"][3] > 0.93
    assert scores["IoU"][7] == 0  # a candidate that never came
    assert scores["mIoU"] == pytest.approx(float(scores["IoU"][3]) / 2, abs=1e-6)


def test_letterbox():
    images, valid = letterbox(torch.ones(2, 3, 30, 50), 65)
    assert images.shape == (2, 3, 65, 65)
    assert torch.equal(images[:, 0] == 1, valid)
    assert valid[0].any(1).sum() == 32
    assert valid[0].any(0).sum() == 64


def test_guidance_above_a_half_is_the_object(monkeypatch):
    batch = {**batch_of(1), "class_index": torch.tensor([3])}
    guidance = torch.where(batch["mask"] == 1, 0.7, 0.3)[:, None]
    outputs = {"scores": torch.zeros(1, 2, SIZE, SIZE), "guidance": guidance}
    model = make()
    monkeypatch.setattr(model, "episode_outputs", lambda batch: outputs)
    model.validation_step(batch, 0)
    assert model.val_guidance.compute()["mIoU"] == 1


def test_a_letterbox_smooths_what_it_shrinks():
    stripes = (torch.arange(64) % 4 == 0).float().expand(1, 3, 64, 64)
    images, _ = letterbox(stripes, 16)
    torch.testing.assert_close(
        images[..., 2:-2], torch.full((1, 3, 16, 12), 0.25), rtol=0, atol=0.02
    )


IMAGE, MASK, TINY = torch.rand(3, 20, 30), torch.zeros(20, 30), torch.zeros(200, 300)
MASK[5:9, 5:9] = TINY[1, 1] = 1


@pytest.mark.parametrize(
    ("images", "masks", "words"),
    [
        ([IMAGE, IMAGE], [MASK], "2 images and 1 masks"),
        ([IMAGE], [MASK.T], r"\(3, 20, 30\) and its mask \(30, 20\)"),
        ([IMAGE], [MASK * 128], r"holds the values \[128.0\]: mark the object with 1"),
        ([IMAGE], [MASK * 0], "holds no object: mark the object with 1"),
        ([IMAGE], [MASK * 0 + 1], "no support shows what is not the object"),
        ([IMAGE, torch.rand(3, 200, 300)], [MASK, TINY], "support 2 is too small .* at size 65"),
        ([IMAGE * 255], [MASK], "support image 1 has values .*: divide"),
        ([IMAGE.numpy()], [MASK], r"is a NumPy array \(3, 20, 30\) of float32: give H x W"),
    ],
)
def test_wrong_supports(images, masks, words):
    with pytest.raises(GenSegError, match=words):
        make().set_support(images, masks, size=SIZE)


def test_supports_as_numpy_arrays():
    model = make()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image, mask = torch.from_numpy(pixels).permute(2, 0, 1), MASK.bool()
    supports = []
    for given in (
        (pixels, mask.numpy()),
        (image / 255, mask),
        (image, MASK.numpy().astype("uint16")),
    ):
        model.set_support(*([part] for part in given), size=SIZE)
        supports.append(model.support)
    for other in supports[1:]:
        assert all(map(torch.equal, supports[0], other))


def test_modules_without_supports_are_refused(tmp_path):
    data, model = episodes(tmp_path), BaseLearner(2, encoder="tu-test_resnet")
    for run in (trainer(tmp_path).fit, trainer(tmp_path).test):
        with pytest.raises(
            GenSegError, match=r"BaseLearner makes no use of the supports of EpisodesData"
        ):
            run(model, datamodule=data)


def test_bytes_are_images_too():
    batch, model = batch_of(), make()
    as_bytes = dict(batch)
    for key in ("image", "support_image"):
        as_bytes[key] = (255 * batch[key]).round().to(torch.uint8)
        batch[key] = as_bytes[key].float() / 255
    mine, theirs = (model.episode_outputs(one)["scores"] for one in (as_bytes, batch))
    assert torch.equal(mine, theirs)


def test_batches_without_supports_are_refused(tmp_path):
    plain = {name: value for name, value in batch_of().items() if "support" not in name}
    sentence = "a batch has no support_image, support_mask, support_valid, and CosinePrototypes"
    with pytest.raises(GenSegError, match=sentence):
        trainer(tmp_path).test(make(), DataLoader([plain], batch_size=None))


def test_predictions_are_of_the_supports_in_the_batch():
    batch, model = batch_of(), make().eval()
    model.set_support(batch["support_image"][1], batch["support_mask"][1], size=SIZE)
    mine = model.support
    with pytest.raises(GenSegError, match=r"have different supports.*set batch_size to 1"):
        model.predict_step(batch, 0)
    one = {name: value[:1] for name, value in batch.items()}
    model.predict_step(one, 0)
    assert model.support is mine


def test_there_is_no_score_to_calibrate():
    model = make()
    assert model.computable_scores() == []
    with pytest.raises(GenSegError, match="CosinePrototypes has no anomaly scores to calibrate"):
        calibrate(model, [], [], level="pixel")
    with pytest.raises(GenSegError, match="CosinePrototypes takes no anomaly_score"):
        model.set_anomaly_score("msp")


@pytest.mark.parametrize("size", [-5, 473.5, "a"])
def test_a_size_that_is_none(size):
    with pytest.raises(GenSegError, match="size is"):
        make().set_support([IMAGE], [MASK], size=size)


def test_the_command_offers_only_what_is_taken():
    parser = ArgumentParser()
    parser.add_class_arguments(CosinePrototypes, "model")
    told = parser.format_help()
    assert all(f"--model.{name} " in told for name in ("encoder", "output_stride", "mean"))
    assert not any(f"--model.{name}" in told for name in ("inference", "anomaly_score"))


def test_another_label_to_ignore():
    with pytest.raises(GenSegError, match="ignore_index is -1, but masks of a few-shot method"):
        make(ignore_index=-1)


def test_wrong_arguments(base):
    for arguments, words in (
        ({"encoder": None}, "needs an encoder: give base_learner"),
        ({"base_learner": base}, "needs an encoder: give base_learner, .* not both"),
        ({"inference": {"scales": [0.5]}}, "CosinePrototypes takes no inference: queries and "),
        ({"anomaly_score": "msp"}, "CosinePrototypes takes no anomaly_score: it knows back"),
        ({"num_classes": 5}, "num_classes is 5, but a few-shot method"),
        ({"base_learner": base / "nothing.ckpt"}, r"nothing.ckpt' does not exist"),
        ({"base_learner": f"{base}/nothing.ckpt"}, r"nothing.ckpt' does not exist"),
        (
            {"base_learner": base, "encoder": None, "encoder_weights": "imagenet"},
            "encoder_weights is given beside a base learner",
        ),
    ):
        with pytest.raises(GenSegError, match=words):
            make(**arguments)


def test_arguments_beside_a_base_learner(monkeypatch):
    """Its own are used, and others refused; defaults are let through: LightningCLI gives all."""
    base = BaseLearner(3, encoder="tu-test_resnet", output_stride=16, mean=(0.4, 0.5, 0.6))
    monkeypatch.setattr(prototypes, "load_base_learner", lambda path: base)
    default = {"output_stride": 8, "mean": IMAGENET_MEAN, "std": list(IMAGENET_STD)}
    for arguments in ({}, default, {"output_stride": 16, "mean": [0.4, 0.5, 0.6]}):
        model = make(encoder=None, base_learner="base.ckpt", **arguments)
        torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    for arguments, words in (
        ({"output_stride": 32}, "output_stride is given beside a base learner"),
        ({"mean": [0.5] * 3, "std": [0.5] * 3}, "mean and std is given beside a base learner"),
        ({"mean": "a"}, "mean is 'a'"),
    ):
        with pytest.raises(GenSegError, match=words):
            make(encoder=None, base_learner="base.ckpt", **arguments)
