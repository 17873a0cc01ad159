"""What all few-shot methods share, with the training-free one; and that one itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg import BaseLearner, CosinePrototypes
from lightning_genseg.methods.fewshot.base import FewShotModule, support_shares
from lightning_genseg.ops.letterbox import letterbox
from tests.contract import trainer
from tests.methods.fewshot.episodes import SIZE, base_learner, batch_of, episodes


def make(**arguments: object) -> CosinePrototypes:
    return CosinePrototypes(**{"encoder": "tu-test_resnet", **arguments})  # type: ignore[arg-type]


def test_scores_by_hand():
    model, batch = make(level="high").eval(), batch_of()
    outputs = model.episode_outputs(batch)
    query = model.extract_stages(batch["image"]).high[0]
    support = model.extract_stages(batch["support_image"][:, 0]).high[0]
    share = support_shares(batch, support.shape[-2:])[0, 0]  # 2 x h x w
    prototypes = [(support * side).sum((1, 2)) / side.sum() for side in share]
    foreground, background = (
        F.cosine_similarity(query, p[:, None, None], dim=0) for p in prototypes
    )
    torch.testing.assert_close(
        outputs["logits"][0], 20 * torch.stack([background, foreground]), atol=1e-4, rtol=0
    )
    agree = (outputs["guidance"] > 0.5)[:, 0] == (outputs["logits"].argmax(1) == 1)
    assert agree.all()


def test_void_and_padding_are_neither_foreground_nor_background():
    batch = batch_of()
    share = support_shares(batch, (SIZE, SIZE))
    masks, valid = batch["support_mask"], batch["support_valid"]
    assert torch.equal(share[:, :, 0] == 1, (masks == 1) & valid)
    assert torch.equal(share[:, :, 1] == 1, (masks == 0) & valid)
    small = support_shares(batch, (9, 9))
    assert (small.sum(2) <= 1 + 1e-6).all()


class Fixed(FewShotModule):
    """Says what it is told to."""

    def __init__(self, logits: Tensor, scoring: str = "compat") -> None:
        super().__init__(encoder="tu-test_resnet", scoring=scoring)  # type: ignore[arg-type]
        self.logits = logits

    def episode_outputs(self, batch):  # type: ignore[no-untyped-def]
        return {"logits": self.logits}


@pytest.mark.parametrize("scoring", ["compat", "exact"])
def test_scoring_at_the_size_of_the_query(scoring):
    """A query of 30 x 50 in a square of 65: 38 x 65 pixels, cut to 32 x 64."""
    truth = torch.zeros(1, 30, 50, dtype=torch.long)
    truth[:, 10:, 20:] = 1
    logits = torch.zeros(1, 2, 65, 65)
    rows, columns = (11, 26) if scoring == "exact" else (13, 26)
    logits[:, 1, rows:, columns:] = 1
    logits[:, 0, :rows] = logits[:, 0, :, :columns] = 1
    batch = {
        "image": torch.zeros(1, 3, 65, 65),
        "mask": torch.full((1, 65, 65), 255),
        "full_mask": truth,
        "class_index": torch.tensor([3]),
        "candidates": torch.tensor([[3, 7]]),
    }
    model = Fixed(logits, scoring)
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


def test_plain_images_after_set_support():
    model, batch = make().eval(), batch_of(1)
    picture = (batch["image"][0, :, :, :56] * 255).byte().permute(1, 2, 0).numpy()
    with pytest.raises(ValueError, match="nothing says what to look for: call set_support"):
        model.predict_image(picture)
    support, mask = batch["support_image"][0, :, :, :, :56], batch["support_mask"][0, :, :, :56]
    model.set_support(support, mask, size=SIZE)
    result = model.predict_image(picture)
    assert result["mask"].shape == (65, 56)
    truth = batch["mask"][0, :, :56].numpy() == 1
    found = result["mask"] == 1
    assert (found & truth).sum() / (found | truth).sum() > 0.3
    assert model(torch.rand(2, 3, 20, 90)).shape == (2, 2, 20, 90)
    assert model.predict_image(np.zeros((3, 200, 3), np.uint8))["mask"].shape == (3, 200)


def test_wrong_supports():
    model, image = make(), torch.rand(3, 20, 30)
    mask = torch.zeros(20, 30)
    mask[5:9, 5:9] = 1
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        model.set_support([image, image], [mask])
    with pytest.raises(ValueError, match=r"\(3, 20, 30\) and its mask \(30, 20\)"):
        model.set_support([image], [mask.T])
    with pytest.raises(ValueError, match=r"holds the values \[128.0\]: mark the object with 1"):
        model.set_support([image], [mask * 128])
    with pytest.raises(ValueError, match="holds no object: mark the object with 1"):
        model.set_support([image], [mask * 0])
    tiny = torch.zeros(200, 300)
    tiny[1, 1] = 1
    with pytest.raises(ValueError, match="object of support 2 is too small to be left at size 16"):
        model.set_support([image, torch.rand(3, 200, 300)], [mask, tiny], size=16)
    with pytest.raises(ValueError, match="support image 1 has values from 0 to 255: divide"):
        model.set_support([torch.linspace(0, 255, 1800).view(3, 20, 30)], [mask])
    with pytest.raises(ValueError, match=r"is a NumPy array \(3, 20, 30\) of float32: give H x W"):
        model.set_support([image.numpy()], [mask])


def test_supports_as_numpy_arrays():
    model = make()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:9, 5:9] = True
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    supports = []
    for images, masks in (
        ([pixels], [mask]),
        ([image / 255], [torch.from_numpy(mask)]),
        ([image], [mask.astype(np.uint16)]),
    ):
        model.set_support(images, masks, size=SIZE)
        supports.append(model.support)
    for other in supports[1:]:
        assert all(map(torch.equal, supports[0], other))


def test_test_and_predict_on_episodes(tmp_path):
    data, run, model = episodes(tmp_path), trainer(tmp_path), make()
    scores = run.test(model, datamodule=data, verbose=False)[0]
    assert set(scores) == {
        "test_mIoU", "test_FB_IoU", "test_GmIoU", "test_IoU_vehicle", "test_IoU_person"
    }  # fmt: skip
    mean = (scores["test_IoU_vehicle"] + scores["test_IoU_person"]) / 2
    assert scores["test_mIoU"] == pytest.approx(mean, abs=1e-6)
    assert 0.02 < scores["test_mIoU"] < 1
    # A predict batch: the query at its own size, supports in the square.
    batch = batch_of(1, 2)
    batch["image"] = torch.rand(1, 3, 40, 70)
    prediction = model.predict_step(batch, 0)
    assert prediction["mask"].shape == (1, 40, 70)
    assert prediction["name"] == ["0"]


def test_modules_without_supports_are_refused(tmp_path):
    data, model = episodes(tmp_path), BaseLearner(2, encoder="tu-test_resnet")
    for run in (trainer(tmp_path).fit, trainer(tmp_path).test):
        with pytest.raises(ValueError, match=r"BaseLearner makes no use of supports.*EpisodesData"):
            run(model, datamodule=data)


def test_nothing_to_fit(tmp_path):
    with pytest.raises(ValueError, match="nothing to train: run `genseg test`"):
        trainer(tmp_path).fit(make(), datamodule=episodes(tmp_path))


def test_base_learner_of_another_fold(tmp_path):
    path = base_learner(tmp_path)
    model = CosinePrototypes(base_learner=path)
    assert model.base_classes == ["sky", "ground", "building", "tree"]
    other = episodes(tmp_path, novel_classes=["tree", "person"])
    with pytest.raises(ValueError, match="use the base learner of the same fold"):
        trainer(tmp_path).test(model, datamodule=other, verbose=False)
    # Its novel classes are new to the base learner, though its base classes are others.
    fewer = episodes(tmp_path, novel_classes=["person"])
    assert trainer(tmp_path).test(model, datamodule=fewer, verbose=False)
    with pytest.raises(ValueError, match="base classes of the data are"):
        trainer(tmp_path).validate(model, datamodule=fewer, verbose=False)


def test_wrong_arguments(tmp_path):
    for arguments in ({"encoder": None}, {"base_learner": base_learner(tmp_path)}):
        with pytest.raises(ValueError, match="needs an encoder: give base_learner"):
            make(**arguments)
    with pytest.raises(ValueError, match="num_classes is 5, but a few-shot method"):
        make(num_classes=5)
