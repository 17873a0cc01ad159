"""What learns from masks alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.gss.colors import Colors, class_colors, is_lasting
from lightning_genseg.methods.gss.maskige import Color, Maskige
from lightning_genseg.methods.gss.tokenizers.reconstruction import reconstruct
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.methods.trained import TrainedModule


class MaskModule(TrainedModule):
    """Base of what learns from masks alone; a subclass sets `tokenizer` and `inverse`.

    Args:
        num_classes: K.
        colors: of the classes and of unlabelled pixels: a name such as `lattice`, a .json file or a
            list; see `class_colors`.
        color_seed: of the colours that are drawn at random.
        scale: at which masks are drawn for validation and test, relative to their size.
    """

    tokenizer: Tokenizer
    inverse: nn.Module

    def __init__(
        self,
        num_classes: int,
        colors: Colors = "lattice",
        color_seed: int = 0,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, **kwargs)
        check_arguments(MaskModule.__init__, locals(), color_seed="[0, inf)", scale="(0, inf)")
        self.scale = scale
        self.given_colors: list[Color] = class_colors(colors, num_classes, color_seed)
        self.maskige = Maskige(self.given_colors, self.ignore_index)

    def maps_at_labels(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`scores` B x K x H x W of the masks themselves, by way of tokens."""
        found = reconstruct(batch["mask"], self.maskige, self.tokenizer, self.inverse, self.scale)
        return {"scores": found.scores}

    def forward(self, *images: Tensor) -> Tensor:
        """Refuse images; without this method the Trainer would refuse in its own words."""
        raise GenSegError(
            f"a {type(self).__name__} knows masks only and predicts no images: give what it has "
            "learned to GSS, or run genseg validate or test."
        )

    def setup(self, stage: str) -> None:
        """Refuse to predict photographs, and masks of other classes."""
        super().setup(stage)
        if stage == "predict":
            self()
        target = getattr(getattr(self.trainer, "datamodule", None), "target_classes", None)
        if stage == "test" and target is not None:
            raise GenSegError(
                f"a {type(self).__name__} draws masks in the colours of its own classes and the "
                f"test data have others ({', '.join(target.class_names[:3])}, ...): test it on "
                "MixedDataModule."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold the colours that it began with, and kind and sizes of the tokenizer."""
        super().on_save_checkpoint(checkpoint)
        if not is_lasting(checkpoint["hyper_parameters"]["colors"]):
            checkpoint["hyper_parameters"]["colors"] = self.given_colors
        checkpoint["tokenizer"] = self.tokenizer.config()
