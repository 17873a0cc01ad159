"""The encoder's own features, side by side, without anything to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments


class HypercolumnDecoder(nn.Module):
    """The last encoder stages at the size of the finest of them, each of unit length, concatenated.

    B. Hariharan et al., Hypercolumns for Object Segmentation and Fine-grained Localization, CVPR
    2015. It has no parameters, so that a mixture fitted to it (`em.train: posthoc`) makes a
    segmenter of any pretrained encoder without gradients. The unit length of each stage is ours: it
    lets stages of different scales count alike.

    Args:
        encoder_channels: channels of the encoder's stages, finest first.
        levels: how many stages, from the last.
    """

    def __init__(self, encoder_channels: Sequence[int], levels: int = 3) -> None:
        super().__init__()
        check_arguments(
            HypercolumnDecoder.__init__, locals(), levels=f"[1, {len(encoder_channels)}]"
        )
        self.levels = levels

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Encoder stages, finest first, to features B x F x h x w of the size of the finest."""
        chosen = [F.normalize(stage.float(), dim=1) for stage in stages[-self.levels :]]
        size = chosen[0].shape[-2:]
        return torch.cat([F.interpolate(stage, size, mode="bilinear") for stage in chosen], 1)


class PlainTransformer(nn.Module):
    """A vision transformer of timm as an encoder: stages of one size, which smp does not take.

    Args:
        name: of the timm model, such as `vit_small_patch14_dinov2`.
        depth: how many of the last blocks are stages.
        pretrained: download its published weights.
        options: of timm, such as `img_size`. Images of other sizes are taken as well.
    """

    def __init__(self, name: str, depth: int = 5, pretrained: bool = False, **options: Any) -> None:
        import timm

        super().__init__()
        self.described: dict[str, Any] = {"name": name, "depth": depth, **options}
        self.model = timm.create_model(
            name,
            features_only=True,
            pretrained=pretrained,
            out_indices=depth,
            **{"dynamic_img_size": True, **options},
        )
        stages: Any = self.model.feature_info
        self.out_channels: list[int] = stages.channels()
        self.output_stride: int = stages.reduction()[-1]

    @staticmethod
    def is_one(name: str) -> bool:
        """Whether all stages of a timm model have one size."""
        import timm

        try:
            with torch.device("meta"):
                stages: Any = timm.create_model(name, features_only=True).feature_info
        except (RuntimeError, TypeError, AttributeError):  # it has no stages
            return False
        strides = stages.reduction()
        return len(strides) > 1 and len(set(strides)) == 1

    def forward(self, image: Tensor) -> list[Tensor]:
        """Stages B x F x h x w."""
        stages: list[Tensor] = self.model(image)
        return stages
