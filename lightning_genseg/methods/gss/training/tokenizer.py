"""Stage one of GSS: a tokenizer that learns from masks, which need no images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import need_single_precision
from lightning_genseg.methods.gss.colors import Colors, class_colors, is_lasting
from lightning_genseg.methods.gss.maskige import Maskige, NearestColor
from lightning_genseg.methods.gss.tokenizers.reconstruction import reconstruct
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer, pad_to_cells
from lightning_genseg.methods.gss.tokenizers.vq import MaskigeVQ
from lightning_genseg.methods.gss.training.mask_variation import (
    corrupt,
    permute_classes,
    procedural_masks,
)
from lightning_genseg.methods.trained import TrainedModule
from lightning_genseg.networks.losses import pixel_cross_entropy


class MaskModule(TrainedModule):
    """Base of what learns from masks alone; a subclass sets `maskige`, `tokenizer`, `inverse`, `scale`."""

    maskige: Maskige
    tokenizer: Tokenizer
    inverse: nn.Module
    scale: float

    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`scores` B x K x H x W of the masks themselves, by way of tokens."""
        found = reconstruct(batch["mask"], self.maskige, self.tokenizer, self.inverse, self.scale)
        return {"scores": found.scores}

    def setup(self, stage: str) -> None:
        """Refuse to predict photographs, and masks of other classes."""
        super().setup(stage)
        need_single_precision(self)
        if stage == "predict":
            raise GenSegError(
                f"a {type(self).__name__} knows masks only and predicts no images: give what it has "
                "learned to GSS, or run genseg validate or test."
            )
        target = getattr(getattr(self.trainer, "datamodule", None), "target_classes", None)
        if stage == "test" and target is not None:
            raise GenSegError(
                f"a {type(self).__name__} draws masks in the colours of its own classes and the "
                f"test data have others ({', '.join(target.class_names[:3])}, ...): test it on "
                "MixedDataModule."
            )


class MaskigeTokenizer(MaskModule):
    """Trains a `MaskigeVQ` to reproduce maskiges; photographs are not looked at.

    Ours, in place of the DALL-E dVAE that GSS (Chen et al., CVPR 2023) downloads. What stage two
    sees is a mask that a network has predicted: a share of the masks is corrupted, and one is drawn
    at random. Ignored pixels are drawn in their colour and do not count. `val_mIoU` compares each
    mask with its reconstruction, by the nearest colour: what GSS with this tokenizer can reach at
    best. `genseg reconstruct` tells more, and what `majority-4` reaches.

    Args:
        num_classes: K.
        colors: see `networks.colors.class_colors`.
        color_seed: likewise.
        downsample: f, see `MaskigeVQ`, as the next three.
        levels: see there.
        channels: see there.
        blocks: see there.
        objective: `l1` between the colours, `cross_entropy` of the classes by distance to their
            colours, or `both`.
        temperature: of these class scores, in units of squared distance between colours in [0, 1].
        permute_classes: exchange the classes of every training mask at random: all colours become
            equally frequent.
        corrupted_share: probability that a training mask is corrupted.
        procedural_share: probability that it is drawn at random instead; 1 needs no masks at all.
        scale: at which masks are drawn for validation and test, relative to their size.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        optimizer: see there.
        lr_scheduler: see there.
        decay_norms: see there.

    Example:
        >>> model = MaskigeTokenizer(num_classes=3, channels=8)
        >>> batch = {"mask": torch.randint(3, (2, 16, 24))}
        >>> sorted(model.compute_loss(batch))
        ['loss', 'loss_cross_entropy', 'loss_l1']
    """

    tokenizer: MaskigeVQ

    def __init__(
        self,
        num_classes: int,
        colors: Colors = "lattice",
        color_seed: int = 0,
        downsample: int = 4,
        levels: Sequence[int] = (8, 5, 5, 5),
        channels: int = 128,
        blocks: int = 2,
        objective: Literal["l1", "cross_entropy", "both"] = "both",
        temperature: float = 0.05,
        permute_classes: bool = True,
        corrupted_share: float = 0.25,
        procedural_share: float = 0.25,
        scale: float = 1.0,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        decay_norms: bool = True,
    ) -> None:
        super().__init__(
            num_classes,
            ignore_index=ignore_index,
            class_names=class_names,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            decay_norms=decay_norms,
        )
        for name, share in (
            ("corrupted_share", corrupted_share),
            ("procedural_share", procedural_share),
        ):
            if not 0 <= share <= 1:
                raise GenSegError(f"{name} is {share} but must be a probability, 0 to 1.")
        for name, value in (("temperature", temperature), ("scale", scale)):
            if value <= 0:
                raise GenSegError(f"{name} is {value} but must be positive.")
        self.objective, self.temperature, self.scale = objective, temperature, scale
        self.permute_classes = permute_classes
        self.corrupted_share, self.procedural_share = corrupted_share, procedural_share
        self.color_table = class_colors(colors, num_classes, color_seed)
        self.maskige = Maskige(self.color_table, ignore_index)
        self.inverse = NearestColor(self.maskige.colors[:-1])
        self.tokenizer = MaskigeVQ(downsample, levels, channels, blocks)

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` and its parts.

        Args:
            batch: `mask` B x H x W int64.
        """
        mask = self.vary(batch["mask"]) if self.training else batch["mask"]
        target = self.maskige(mask)
        padded = self.tokenizer(pad_to_cells(target, self.tokenizer.downsample))
        picture = padded[..., : mask.shape[-2], : mask.shape[-1]]
        losses = {}
        if self.objective != "cross_entropy":
            labelled = (mask != self.ignore_index)[:, None]
            error = (picture - target).abs() * labelled
            losses["loss_l1"] = error.sum() / (3 * labelled.sum()).clamp_min(1)
        if self.objective != "l1":
            scores = self.inverse(picture) / self.temperature
            losses["loss_cross_entropy"] = pixel_cross_entropy(scores, mask, self.ignore_index)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def vary(self, mask: Tensor) -> Tensor:
        """Training masks of a batch of masks B x H x W, as the arguments ask for."""
        count = len(mask)
        drawn = torch.rand(count, device=mask.device) < self.procedural_share
        if drawn.any():
            mask = mask.clone()
            mask[drawn] = procedural_masks(
                int(drawn.sum()), mask.shape[1:], self.num_classes, mask.device
            )
        corrupted = torch.rand(count, device=mask.device) < self.corrupted_share
        if corrupted.any():
            mask = mask.clone()
            mask[corrupted] = corrupt(mask[corrupted], self.num_classes, self.ignore_index)
        if self.permute_classes:
            mask = permute_classes(mask, self.num_classes, self.ignore_index)
        return mask

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember colours and sizes, from which `make_tokenizer` builds the tokenizer again."""
        super().on_save_checkpoint(checkpoint)
        if not is_lasting(checkpoint["hyper_parameters"]["colors"]):
            checkpoint["hyper_parameters"]["colors"] = self.color_table
        checkpoint["tokenizer"] = self.tokenizer.config()

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
