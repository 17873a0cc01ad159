"""Segmentation by mean features: a baseline that needs no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_genseg.arguments import check_arguments
from lightning_genseg.methods.fewshot.base import FewShotModule
from lightning_genseg.methods.fewshot.base_learner import load_base_learner
from lightning_genseg.methods.fewshot.support import support_shares


class CosinePrototypes(FewShotModule):
    """Foreground is what is more like the object's mean feature than the background's: no training.

    PANet (Wang et al., ICCV 2019) on frozen features: cosine with the mean of the supports'
    foreground pixels and with the mean of their background pixels.

    Args:
        level: `high`, the encoder's last stage, or `middle`, the two before, which CGMGM models and
            which tell more with an encoder that has only seen ImageNet.
        scale: by which the cosines are multiplied to be scores (PANet: 20); it changes no
            prediction.
        base_learner: checkpoint of a `BaseLearner`, whose encoder is used; or give `encoder`.

    Example:
        >>> model = CosinePrototypes(encoder="tu-test_resnet")
        >>> mask = torch.zeros(40, 50)
        >>> mask[10:30, 10:40] = 1
        >>> model.set_support(torch.rand(1, 3, 40, 50), [mask], size=65)
        >>> model(torch.rand(2, 3, 30, 60)).shape
        torch.Size([2, 2, 30, 60])
    """

    needs_training = False

    def __init__(
        self,
        level: Literal["high", "middle"] = "middle",
        scale: float = 20.0,
        base_learner: Path | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(CosinePrototypes.__init__, locals(), scale="(0, inf)")
        base = None if base_learner is None else load_base_learner(base_learner)
        super().__init__(base=base, **kwargs)
        self.level, self.scale = level, scale

    def episode_outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`scores`, and `guidance`, which decides alike: the posterior of the scores."""
        query, supports = (
            stages.high if self.level == "high" else stages.middle()
            for stages in (
                self.extract_stages(batch["image"], batch["valid"]),
                self.extract_stages(
                    batch["support_image"].flatten(0, 1), batch["support_valid"].flatten(0, 1)
                ),
            )
        )
        episodes, shots = batch["support_image"].shape[:2]
        share = support_shares(batch, supports.shape[-2:])  # B x K x 2 x h x w
        pixels = supports.float().unflatten(0, (episodes, shots))
        with torch.autocast(pixels.device.type, enabled=False):
            means = torch.einsum("bkchw,bkshw->bsc", pixels, share.float())
            cosine = torch.einsum(
                "bchw,bsc->bshw", F.normalize(query.float(), dim=1), F.normalize(means, dim=2)
            )
        scores = self.scale * cosine[:, [1, 0]]
        return {"scores": scores, "guidance": scores.softmax(1)[:, 1:]}
