"""Stage one of GSS: a tokenizer that learns from masks, which need no images."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_genseg.arguments import as_options, check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.maskige import NearestColor
from lightning_genseg.methods.gss.options import VariationOptions, VQOptions
from lightning_genseg.methods.gss.tokenizers.tokenizer import pad_to_cells
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from lightning_genseg.methods.gss.training.mask_module import MaskModule
from lightning_genseg.methods.gss.training.mask_variation import (
    corrupt,
    permute_classes,
    procedural_masks,
)
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.processes import mean_over


class MaskigeTokenizer(MaskModule):
    """Trains a `MaskigeVQ` to reproduce maskiges; photographs are not looked at.

    Ours, in place of the DALL-E dVAE that GSS (Chen et al., CVPR 2023) downloads. What stage two
    sees is a mask that a network has predicted: a share of the masks is corrupted, and one is drawn
    at random. Ignored pixels are drawn in their colour and do not count. `val_mIoU` compares each
    mask with its reconstruction, by the nearest colour: what GSS with this tokenizer can reach at
    best. `genseg reconstruct` tells more, and what `majority-4` reaches.

    Args:
        num_classes: K.
        network: sizes of the tokenizer.
        variation: of the training masks.
        objective: `l1` between the colours, `cross_entropy` of the classes by distance to their
            colours, or `both`.
        temperature: of these class scores, in units of squared distance between colours in [0, 1].

    Example:
        >>> model = MaskigeTokenizer(num_classes=3, network=VQOptions(channels=8))
        >>> batch = {"mask": torch.randint(3, (2, 16, 24))}
        >>> sorted(model.compute_loss(batch))
        ['loss', 'loss_cross_entropy', 'loss_l1']
    """

    tokenizer: MaskigeVQ

    def __init__(
        self,
        num_classes: int,
        network: VQOptions = VQOptions(),
        variation: VariationOptions = VariationOptions(),
        objective: Literal["l1", "cross_entropy", "both"] = "both",
        temperature: float = 0.05,
        **kwargs: Any,
    ) -> None:
        network = as_options(VQOptions, network)
        variation = as_options(VariationOptions, variation)
        super().__init__(num_classes, **kwargs)
        check_arguments(MaskigeTokenizer.__init__, locals(), temperature="(0, inf)")
        self.objective, self.temperature, self.variation = objective, temperature, variation
        self.inverse = NearestColor(self.maskige.colors[:-1])
        self.tokenizer = MaskigeVQ(network)

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` and its parts; of the batch only `mask` B x H x W int64 is needed."""
        mask = self.vary(batch["mask"]) if self.training else batch["mask"]
        target = self.maskige(mask)
        padded = self.tokenizer(pad_to_cells(target, self.tokenizer.downsample))
        picture = padded[..., : mask.shape[-2], : mask.shape[-1]]
        losses = {}
        if self.objective != "cross_entropy":
            labelled = (mask != self.ignore_index)[:, None]
            error = (picture - target).abs() * labelled
            losses["loss_l1"] = mean_over(error.sum(), 3 * labelled.sum())
        if self.objective != "l1":
            scores = self.inverse(picture) / self.temperature
            losses["loss_cross_entropy"] = pixel_cross_entropy(scores, mask, self.ignore_index)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def vary(self, mask: Tensor) -> Tensor:
        """Training masks of a batch of masks B x H x W, as `variation` asks for."""
        count = len(mask)
        drawn = torch.rand(count, device=mask.device) < self.variation.procedural_share
        if drawn.any():
            mask = mask.clone()
            mask[drawn] = procedural_masks(
                int(drawn.sum()), mask.shape[1:], self.num_classes, mask.device
            )
        corrupted = torch.rand(count, device=mask.device) < self.variation.corrupted_share
        if corrupted.any():
            mask = mask.clone()
            mask[corrupted] = corrupt(mask[corrupted], self.num_classes, self.ignore_index)
        if self.variation.permute_classes:
            mask = permute_classes(mask, self.num_classes, self.ignore_index)
        return mask

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one that was trained on other colours."""
        super().on_load_checkpoint(checkpoint)
        if not torch.equal(
            checkpoint["state_dict"]["maskige.colors"].cpu(), self.maskige.colors.cpu()
        ):
            raise GenSegError(
                "the checkpoint was trained with other colors: use the same, or train a tokenizer "
                "on these."
            )
