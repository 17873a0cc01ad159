"""GSS-FT and GSS-FT-W: the way from the predicted picture back to classes, learned."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import SegmentationModule, expect_frozen_parts
from lightning_genseg.methods.checkpoints import read_checkpoint
from lightning_genseg.methods.gss.maskige import ConvInverse, SwinInverse
from lightning_genseg.methods.gss.module import GSS
from lightning_genseg.methods.gss.options import PriorDecoding
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.networks.weights import load_weights
from lightning_genseg.ops.resize import resize_maps


class GSSInverse(SegmentationModule):
    """A trained `GSS`, its `prior`, whose predicted pictures a small network learns to read.

    Generative Semantic Segmentation, Chen et al., CVPR 2023: GSS-FT with three convolutions
    (`conv`), GSS-FT-W with shifted-window attention (`swin`), by pixel cross-entropy on what the
    frozen prior predicts for training images. The paper suggests a prior from the middle of its
    training, whose pictures are noisier. Give its checkpoint, train, and put the inverse on the
    last one by `inverse_weights`; colours and tokenizer must be the same.

    - As the authors' code: `inverse: swin`, cross-entropy over labelled pixels (the prior's
      `avg_non_ignore` holds here as well), and dropout before the token classifier as noise.
    - As the paper: `inverse: conv`, of which the code has only ancestors, with a width as theirs.
    - Ours: the prior is in evaluation mode but for that dropout; in the code its batch norms go on
      learning.

    A checkpoint of this module holds the prior: its file is no longer needed.

    Args:
        num_classes: K.
        prior: checkpoint of a `GSS` run; one from its middle is kept by ModelCheckpoint's
            `every_n_train_steps` and `save_top_k: -1`.
        inverse: `conv` (FT) or `swin` (FT-W).
        width: channels of the inverse; of `swin` a multiple of 32.
        inverse_depth: Swin blocks of `swin`; the code has 2 on ADE20K and MSeg, 1 on Cityscapes.
        inverse_weights: checkpoint of a `GSSInverse` run whose inverse is taken over: then `genseg
            test` and `predict` need no other.
        noise: dropout of the prior while the inverse is trained.
        decoding: the prior's likeliest token of each cell (`hard`), or the mixture of all (`soft`).
        logits_at_once: most logits of tokens that exist at a time; fewer need less memory.
        prior_arguments: for checkpoints of this module alone: from what the prior is built.

    Raises:
        MissingFileError: the checkpoint of the prior or of the inverse does not exist.
        GenSegError: neither or both of `prior` and `prior_arguments`, a checkpoint of another kind
            or of other classes, or an inverse for other colours or another tokenizer.
    """

    not_kept = (*SegmentationModule.not_kept, "mean", "std")  # the prior's
    sources = (*SegmentationModule.sources, "prior", "inverse_weights")
    chosen_anew = (*SegmentationModule.chosen_anew, "decoding")

    def __init__(
        self,
        num_classes: int,
        prior: Path | None = None,
        inverse: Literal["conv", "swin"] = "conv",
        width: int = 128,
        inverse_depth: int = 1,
        inverse_weights: Path | None = None,
        noise: float = 0.1,
        decoding: PriorDecoding = "hard",
        logits_at_once: int = 2**26,
        prior_arguments: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(
            GSSInverse.__init__,
            locals(),
            width="[1, inf)",
            inverse_depth="[0, inf)",
            noise="[0, 1)",
            logits_at_once="[1, inf)",
        )
        for name in ("mean", "std"):
            if name in kwargs:
                raise GenSegError(f"GSSInverse takes no {name}: the prior's is used. Leave it out.")
        if (prior is None) == (prior_arguments is None):
            raise GenSegError(
                "GSSInverse needs a trained GSS: give prior, the checkpoint of a GSS run "
                "(prior_arguments are what a checkpoint of GSSInverse itself sets)."
            )
        checkpoint = {} if prior is None else _read(prior, "prior", "GSS")
        arguments = checkpoint["hyper_parameters"] if prior_arguments is None else prior_arguments
        super().__init__(num_classes, mean=arguments["mean"], std=arguments["std"], **kwargs)
        if prior is not None:
            _check_classes(prior, checkpoint, num_classes, self.class_names)
        self._prior_arguments = {k: v for k, v in arguments.items() if not k.startswith("_")}
        changes = {"dropout": noise, "logits_at_once": logits_at_once}
        self.prior = _build(
            self._prior_arguments,
            num_classes=num_classes,
            ignore_index=self.ignore_index,
            decoder={**arguments["decoder"], **changes},
            decoding=decoding,
        )
        if prior is not None:
            self.prior.load_state_dict(checkpoint["state_dict"])
        self.prior.requires_grad_(False)
        self.inverse: nn.Module = (
            ConvInverse(num_classes, width)
            if inverse == "conv"
            else SwinInverse(num_classes, width, inverse_depth)
        )
        if inverse_weights is not None:
            saved = _read(inverse_weights, "inverse_weights", "GSSInverse")
            self.prior.refuse_others(f"inverse_weights '{inverse_weights}'", saved["fingerprints"])
            load_weights(self.inverse, inverse_weights, prefix="inverse.")
        self.needs_training = inverse_weights is None
        self.train()

    @property
    def features(self) -> PixelFeatures:  # type: ignore[override]
        """The prior's network."""
        return self.prior.features

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` at the size of the image, rounded up to whole cells, and `features` per cell."""
        features = self.prior.extract(image)[0]
        scores: Tensor = self.inverse(self.prior.paint(features))
        logits = resize_maps(scores.float(), self.prior.covered_size(features))
        return {"logits": logits, "features": features}

    def prediction_options(self) -> dict[str, Any]:
        """And how the prior's tokens are read."""
        return {**super().prediction_options(), "decoding": self.prior.decoding}

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Bring maps that cover all cells to the size of `image`, bilinearly and in float32."""
        return self.prior.to_image(scores, image)

    def cover(self, mask: Tensor, features: Tensor) -> Tensor:
        """Extend a mask by ignored pixels to all that the features see."""
        return self.prior.cover(mask, features)

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, the pixel cross-entropy of the classes read from the predicted pictures."""
        mask = batch["mask"]
        scores, labelled_only = self(batch["image"]), self.prior.avg_non_ignore
        return {"loss": pixel_cross_entropy(scores, mask, self.ignore_index, labelled_only)}

    def train(self, mode: bool = True) -> Self:
        """Set the mode; all of the prior but its noise stays in evaluation mode."""
        super().train(mode)
        self.prior.eval()
        self.prior.head.dropout.train(mode)
        return self

    def on_fit_start(self) -> None:
        """Refuse a prior without weights; others are frozen with good reason."""
        super().on_fit_start()
        expect_frozen_parts()
        self.prior.tokenizer.need_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold everything: neither the prior's checkpoint nor that of the inverse is read again."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fingerprints"] = self.prior.fingerprints()
        checkpoint["tokenizer"] = self.prior.tokenizer.config()
        checkpoint["hyper_parameters"] |= {
            "prior": None,
            "inverse_weights": None,
            "prior_arguments": self._prior_arguments,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one that was trained with other colours or another tokenizer."""
        super().on_load_checkpoint(checkpoint)
        self.prior.refuse_others("the checkpoint", checkpoint.get("fingerprints", {}))


def _build(saved: Mapping[str, Any], **changes: Any) -> GSS:
    # In a function: Lightning would take the arguments of the module around it for the prior's.
    return GSS(**{**saved, **changes})


def _read(path: Path, argument: str, kind: Literal["GSS", "GSSInverse"]) -> dict[str, Any]:
    def fits(content: Mapping[str, Any]) -> bool:
        learned = any(key.startswith("inverse.") for key in content["state_dict"])
        return "fingerprints" in content and learned == (kind == "GSSInverse")

    return read_checkpoint(path, argument, kind, fits)


def _check_classes(
    path: Path, checkpoint: Mapping[str, Any], num_classes: int, class_names: Sequence[str] | None
) -> None:
    """Refuse a prior that was trained on other classes."""
    count, names = checkpoint["num_classes"], checkpoint["hyper_parameters"]["class_names"]
    problem = None
    if count != num_classes:
        problem = f"{count} classes and the data have {num_classes}"
    elif names and class_names and list(names) != list(class_names):
        a, b = next((a, b) for a, b in zip(names, class_names, strict=True) if a != b)
        problem = f"other classes than the data have ('{a}' where these have '{b}')"
    if problem:
        raise GenSegError(
            f"prior '{path}' was trained on {problem}: give the checkpoint of a GSS run on the "
            "same classes."
        )
