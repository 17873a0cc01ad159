from typing import Any

from lightning_genseg.modules import GMMSeg
from tests.contract import TINY, WARNINGS, ModuleContract

pytestmark = WARNINGS

SMALL = {**TINY, "embedding_dim": 16, "components": 2, "memory_size": 500, "em_interval": 1}


class TestGMMSeg(ModuleContract):
    learning = {"mean_momentum": 0.9}

    def make(self, **arguments: Any) -> GMMSeg:
        return GMMSeg(**{**SMALL, **arguments})
