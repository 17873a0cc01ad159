from typing import Any

from lightning_genseg.modules import SoftmaxSegmenter
from tests.contract import TINY, WARNINGS, ModuleContract

pytestmark = WARNINGS


class TestSoftmaxSegmenter(ModuleContract):
    def make(self, **arguments: Any) -> SoftmaxSegmenter:
        return SoftmaxSegmenter(**{**TINY, **arguments})
