from typing import Any

import torch

from lightning_genseg import SoftmaxSegmenter
from tests.contract import TINY, ModuleContract, batch_of


class TestSoftmaxSegmenter(ModuleContract):
    def make(self, **arguments: Any) -> SoftmaxSegmenter:
        return SoftmaxSegmenter(**{**TINY, **arguments})


def test_dropout_is_of_whole_channels_and_only_in_training():
    model = SoftmaxSegmenter(**TINY, dropout=0.5)
    image = batch_of()["image"]
    dropped = (model.classifier[0](model.extract(image)[0] + 1e3) == 0).flatten(2)
    assert dropped.any()
    assert torch.equal(dropped.all(2), dropped.any(2))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_aligned_corners():
    """The corners of the logits are those of the image, also where the stride does not fit."""
    model = SoftmaxSegmenter(**TINY, align_corners=True).eval()
    image = torch.rand(1, 3, 45, 61)
    logits, scores = model.outputs(image)["logits"], model(image)
    assert scores.shape[2:] == image.shape[2:]
    torch.testing.assert_close(scores[..., ::44, ::60], logits[..., ::11, ::15])
    plain = SoftmaxSegmenter(**TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(image), scores, atol=1e-3)
