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
