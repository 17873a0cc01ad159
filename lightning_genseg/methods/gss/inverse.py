"""GSS-FT and GSS-FT-W: the way from the predicted picture back to classes, learned."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.checkpoints import read_checkpoint
from lightning_genseg.methods.gss.inverse_networks import ConvInverse, SwinInverse
from lightning_genseg.methods.gss.module import GSS, Decoding, check_fingerprints
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.networks.weights import load_weights
from lightning_genseg.ops.resize import resize_maps
from lightning_genseg.ops.views import InferenceOptions
from lightning_genseg.uncertainty.scores import AnomalyName

# What a trained GSS says of itself; all else is this module's own or only of use in training.
_OF_PRIOR = (
    "encoder",
    "network_options",
    "colors",
    "color_seed",
    "tokenizer",
    "token_stride",
    "depth",
    "level_channels",
    "fused_channels",
    "head_channels",
    "auxiliary",
    "avg_non_ignore",
    "mean",
    "std",
)


class GSSInverse(GSS):
    """A trained `GSS` whose predicted pictures a small network reads: only that network is trained.

    Generative Semantic Segmentation, Chen et al., CVPR 2023: GSS-FT with three convolutions
    (`conv`), GSS-FT-W with shifted-window attention (`swin`), by pixel cross-entropy on what the
    frozen prior predicts for training images. The paper suggests a prior from the middle of its
    training, whose pictures are noisier: give its checkpoint, train, and put the inverse on the
    last one by `inverse_weights`; colours and tokenizer have to be the same.

    The published code leaves the prior in training mode, so that its batch norms go on learning;
    here it is in evaluation mode, but for the dropout before its token classifier, the code's only
    noise.

    What the prior says of `avg_non_ignore` holds for the inverse's cross-entropy as well.

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
        decoding: see `GSS`.
        logits_at_once: see `TokenHead`.
        prior_arguments: what to build the prior from without its file: what a checkpoint of this
            module sets.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        inference: see there.
        optimizer: see there.
        lr_scheduler: see there.
        decay_norms: see there.
        anomaly_score: see there.

    Raises:
        FileNotFoundError: the checkpoint of the prior or of the inverse does not exist.
        ValueError: neither or both of `prior` and `prior_arguments`, a checkpoint of another kind
            or of other classes, or an inverse for other colours or another tokenizer.
    """

    def __init__(
        self,
        num_classes: int,
        prior: Path | None = None,
        inverse: Literal["conv", "swin"] = "conv",
        width: int = 128,
        inverse_depth: int = 1,
        inverse_weights: Path | None = None,
        noise: float = 0.1,
        decoding: Decoding = "hard",
        logits_at_once: int = 2**26,
        prior_arguments: dict[str, Any] | None = None,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        inference: InferenceOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        decay_norms: bool = True,
        anomaly_score: AnomalyName | None = None,
    ) -> None:
        if (prior is None) == (prior_arguments is None):
            raise GenSegError(
                "GSSInverse needs a trained GSS: give prior, the checkpoint of a GSS run "
                "(prior_arguments are what a checkpoint of GSSInverse itself sets)."
            )
        if prior is not None:
            prior_arguments = _read_prior(prior, num_classes, class_names)
        assert prior_arguments is not None
        super().__init__(
            num_classes,
            **prior_arguments,
            decoding=decoding,
            dropout=noise,
            logits_at_once=logits_at_once,
            ignore_index=ignore_index,
            class_names=class_names,
            inference=inference,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            decay_norms=decay_norms,
            anomaly_score=anomaly_score,
        )
        self._prior_arguments = {**prior_arguments, **self._without_files}
        if prior is not None:
            load_weights(self, prior, prefix="")
            self._tokenizer_has_weights = True
        self.requires_grad_(False)
        self.inverse = (
            ConvInverse(num_classes, width)
            if inverse == "conv"
            else SwinInverse(num_classes, width, inverse_depth)
        )
        if inverse_weights is not None:
            saved = _read(inverse_weights, "inverse_weights", "GSSInverse")
            check_fingerprints(
                f"inverse_weights '{inverse_weights}'", saved["fingerprints"], self.fingerprints()
            )
            load_weights(self.inverse, inverse_weights, prefix="inverse.")
        self.needs_training = inverse_weights is None
        self.train()

    def class_scores(self, picture: Tensor, size: Sequence[int]) -> Tensor:
        """See `GSS`."""
        scores: Tensor = self.inverse(picture)
        return resize_maps(scores.float(), size)

    def train(self, mode: bool = True) -> GSSInverse:
        """Set the mode; all but the inverse and the noise stay in evaluation mode."""
        super().train(mode)
        for part in self.children():
            part.eval()
        self.inverse.train(mode)
        self.head.dropout.train(mode)
        return self

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, the pixel cross-entropy of the classes read from the predicted pictures."""
        mask = batch["mask"]
        with torch.no_grad():
            picture = self.picture(batch["image"])
        cells = [side // self.tokenizer.downsample for side in picture.shape[-2:]]
        size = [side * self.features.stride for side in cells]
        scores = self.to_image(self.class_scores(picture, size), mask)
        loss = pixel_cross_entropy(scores, mask, self.ignore_index)
        return {"loss": self._mean(loss, mask != self.ignore_index)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Hold everything: neither the prior's checkpoint nor that of the inverse is read again."""
        super().on_save_checkpoint(checkpoint)
        saved = checkpoint["hyper_parameters"]
        own = inspect.signature(type(self)).parameters
        checkpoint["hyper_parameters"] = {
            **{key: value for key, value in saved.items() if key in own or key.startswith("_")},
            "prior": None,
            "inverse_weights": None,
            "prior_arguments": self._prior_arguments,
        }


def _read(path: Path, argument: str, kind: Literal["GSS", "GSSInverse"]) -> dict[str, Any]:
    """A checkpoint of GSS or of GSSInverse."""

    def fits(content: Mapping[str, Any]) -> bool:
        learned = any(key.startswith("inverse.") for key in content["state_dict"])
        return "fingerprints" in content and learned == (kind == "GSSInverse")

    return read_checkpoint(path, argument, kind, fits)


def _read_prior(path: Path, num_classes: int, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of the GSS that a checkpoint holds."""
    checkpoint = _read(path, "prior", "GSS")
    if checkpoint["num_classes"] != num_classes:
        raise GenSegError(
            f"prior '{path}' was trained on {checkpoint['num_classes']} classes and the data have "
            f"{num_classes}: give the checkpoint of a GSS run on the same classes."
        )
    saved = checkpoint["hyper_parameters"]
    names = saved["class_names"]
    if names and class_names and list(names) != list(class_names):
        other = next(pair for pair in zip(names, class_names, strict=True) if pair[0] != pair[1])
        raise GenSegError(
            f"prior '{path}' was trained on other classes than the data have ('{other[0]}' where "
            f"these have '{other[1]}'): give the checkpoint of a GSS run on the same classes."
        )
    return {key: saved[key] for key in _OF_PRIOR}
