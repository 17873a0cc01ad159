"""Colours that suit a tokenizer, learned by gradient: GSS-TF and GSS-TT."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.files import replace_file, run_folder
from lightning_genseg.methods.base import expect_frozen_parts
from lightning_genseg.methods.gss.maskige import Color, ConvInverse, NearestColor
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from lightning_genseg.methods.gss.tokenizers.tokenizer import pad_to_cells
from lightning_genseg.methods.gss.training.mask_module import MaskModule
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.processes import mean_over


class LearnedColors(MaskModule):
    """Learns the colours of a maskige through a frozen tokenizer; photographs are not looked at.

    GSS, Chen et al., CVPR 2023, Sec. 3.2 and supplement A. `tf`: the inverse is in closed form,
    that of the present colours, which take one step of descent at a time. `tt`: a small
    convolutional network is learned along with the colours. There nothing holds tokenizer and
    classes together: the paper's collapses to 36.11 mIoU (84.37 for TF and 84.31 for colours by
    hand), which is why it is here. Tokens pass gradients on as the tokenizer can: DALL-E's by
    Gumbel noise and straight through, as in the paper, `MaskigeVQ`'s straight through.

    There is no code of the authors for this, and the paper gives neither learning rate nor
    temperature. The inverse of `tf` is the nearest colour instead of the printed least squares,
    which cannot tell most classes apart (`LeastSquares`). The loss is the cross-entropy of its
    class scores and the distance of the reconstruction, in place of the squared sum of norms.
    Colours stay in 0..255 by a sigmoid.

    Training leaves `colors.json` in the run's folder, for the argument `colors` of GSS. The
    checkpoint also serves as its `tokenizer`; a `MaskigeTokenizer` of other colours would not.

    Args:
        num_classes: K.
        tokenizer: the .ckpt of a `MaskigeTokenizer` run, or the file of a DALL-E dVAE.
        variant: `tf` or `tt`.
        gumbel_temperature: of the noise.
        temperature: of the class scores of `tf`, in units of squared distance between colours in
            [0, 1].
        distance_weight: of the mean absolute difference between maskige and reconstruction.
        width: of the network of `tt`.

    Raises:
        GenSegError: a wrong argument, a tokenizer without gradient, or, when training begins, one
            without weights.
        MissingFileError: there is no such tokenizer.
    """

    def __init__(
        self,
        num_classes: int,
        tokenizer: str | Path | dict[str, Any],
        variant: Literal["tf", "tt"] = "tf",
        gumbel_temperature: float = 1.0,
        temperature: float = 0.05,
        distance_weight: float = 1.0,
        width: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        check_arguments(
            LearnedColors.__init__,
            locals(),
            gumbel_temperature="(0, inf)",
            temperature="(0, inf)",
            distance_weight="[0, inf)",
            width="[1, inf)",
        )
        self.variant, self.distance_weight = variant, distance_weight
        self.gumbel_temperature, self.temperature = gumbel_temperature, temperature
        start = self.maskige.colors[:-1]
        self.tokenizer = make_tokenizer(tokenizer, start)
        if self.tokenizer.config()["kind"] == "majority":
            raise GenSegError(
                f"tokenizer is {tokenizer}, which lets no gradient through: give one that was "
                "trained."
            )
        # Corners of the cube are within reach but not where the sigmoid is flat.
        self.logits = nn.Parameter(torch.logit(start.clamp(0.05, 0.95)))
        self.inverse = NearestColor(start) if variant == "tf" else ConvInverse(num_classes, width)

    @property
    def color_table(self) -> list[Color]:
        """The present colours of the classes and, last, of unlabelled pixels."""
        learned = (255 * self.logits.detach().sigmoid()).round().int().tolist()
        unlabelled = (255 * self.maskige.colors[-1]).round().int().tolist()
        return [(r, g, b) for r, g, b in [*learned, unlabelled]]

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss` and its parts; of the batch only `mask` B x H x W int64 is needed."""
        mask = batch["mask"]
        ignored = mask == self.ignore_index
        colors = self.logits.sigmoid()
        table = torch.cat([colors, self.maskige.colors[-1:]])
        drawn = F.embedding(mask.masked_fill(ignored, self.num_classes), table).movedim(-1, 1)
        padded = self.tokenizer.straight_through(
            pad_to_cells(drawn, self.tokenizer.downsample), self.gumbel_temperature
        )
        picture = padded[..., : mask.shape[-2], : mask.shape[-1]]
        if self.variant == "tf":  # in closed form, of which the paper's step knows nothing
            scores = NearestColor(colors.detach())(picture) / self.temperature
        else:
            scores = self.inverse(picture)
        entropy = pixel_cross_entropy(scores, mask, self.ignore_index)
        error = (picture - drawn).abs() * ~ignored[:, None]
        distance = mean_over(error.sum(), 3 * (~ignored).sum())
        return {
            "loss": entropy + self.distance_weight * distance,
            "loss_cross_entropy": entropy,
            "loss_distance": distance,
        }

    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`scores` B x K x H x W of the masks, with the colours as they would be written."""
        self._take_colors()
        return super().maps_at_labels(batch)

    def _take_colors(self) -> None:
        self.maskige.colors.copy_(torch.tensor(self.color_table, device=self.device) / 255)
        if self.variant == "tf":
            self.inverse = NearestColor(self.maskige.colors[:-1])

    def on_fit_start(self) -> None:
        """Refuse a tokenizer without weights; others are frozen with good reason."""
        super().on_fit_start()
        expect_frozen_parts()
        self.tokenizer.need_weights()

    def on_train_end(self) -> None:
        """Write the colours."""
        folder = run_folder(self.trainer)
        if folder is not None and self.trainer.is_global_zero:
            text = json.dumps([list(color) for color in self.color_table])
            replace_file(folder / "colors.json", text.encode())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold the tokenizer, and the learned colours in the state alone: they may have met."""
        super().on_save_checkpoint(checkpoint)
        # The state was taken before, perhaps without a validation.
        self._take_colors()
        checkpoint["state_dict"]["maskige.colors"] = self.maskige.colors.clone()
        checkpoint["hyper_parameters"]["tokenizer"] = self.tokenizer.config()
