"""GSS: segmentation as generating the mask's picture, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    expect_frozen_parts,
    need_single_precision,
)
from lightning_genseg.methods.gss.colors import Colors, class_colors, is_lasting
from lightning_genseg.methods.gss.maskige import LeastSquares, Maskige, NearestColor, class_votes
from lightning_genseg.methods.gss.tokenizers.load import make_tokenizer
from lightning_genseg.methods.gss.tokenizers.tokenizer import TokenizerConfig
from lightning_genseg.methods.pixel import PixelModule
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.networks.mla import Auxiliary, TokenHead
from lightning_genseg.ops.resize import resize_labels, resize_maps
from lightning_genseg.ops.views import InferenceOptions
from lightning_genseg.uncertainty.scores import AnomalyName

Decoding = Literal["hard", "soft"]

_LEAST_VOTE = 1e-6  # log 0 is no score


class GSS(PixelModule):
    """Predicts from an image the tokens of its maskige, its mask drawn as a picture, and reads the classes off that.

    Generative Semantic Segmentation, Chen et al., CVPR 2023: stage two, with colours and tokenizer
    frozen: GSS-FF and, with `colors="random"`, FF-R; with those of a `LearnedColors` run TF.
        `GSSInverse` makes FT and FT-W of it.

    Per cell of s x s pixels, a classifier over V tokens: no sampling, one pass (`networks.mla`).
    The mask is enlarged by f/s, so that a cell of the tokenizer (f x f pixels) is a cell of the
    network. A cell counts as soon as one of its pixels is labelled; the unlabelled ones in it are
    drawn as the auxiliary head predicts them. As in the published code, and not as in Eq. 7, cells
    without any label are not learned.

    From the picture, classes are read by the nearest colour, in the code as here; the paper prints
    a least-squares inverse (`lstsq`), which finds only colours at the corners of the cube: 14 of
    150 on ADE20K. Each pixel of the picture votes for one class, and scores are the logarithm of
    the share of votes, so that their softmax is that share, but where sliding windows overlap or
    `inference` resizes: there the code averages shares, and this their logarithms, which makes the
    same class win, and more surely.

    Args:
        num_classes: K.
        encoder: any encoder of segmentation_models_pytorch with four stages; `tu-<name>` for one of
            timm.
        encoder_weights: `imagenet` (downloads), the path of a state dict, or `None`.
        network_options: further arguments of the encoder, such as `img_size` or
            `encoder_output_stride`.
        colors: of the classes and of unlabelled pixels: see `class_colors`.
        color_seed: see there.
        tokenizer: `majority-4` or `majority-8`; the .ckpt of a `MaskigeTokenizer` run; the file of
            a DALL-E dVAE; or, in a checkpoint of this module, kind and sizes: see `make_tokenizer`.
        token_stride: s, 4 or 8 (d = 1/4 or 1/8 in the paper).
        depth: of Swin blocks; the code has 2 on Swin-L, 6 on ResNet-101 and HRNet-W48; 0 is Table 3
            without MLA.
        level_channels: see `MLADecoder`.
        fused_channels: of the map that the Swin blocks see; a multiple of 32.
        head_channels: before the classifier of tokens.
        auxiliary: head that predicts classes pixel by pixel while training: with a branch of its
            own (`separate`), from the fused map (`shared`; MSeg), or `none` (Table 3): unlabelled
            pixels are then drawn in their own colour, and cells without any label are learned as
            well.
        token_loss_weight: of the cross-entropy of tokens.
        auxiliary_loss_weight: of the cross-entropy of the auxiliary head.
        avg_non_ignore: mean over what is labelled; the code takes it over everything, and images
            with little labels have a small loss.
        decoding: the likeliest token of each cell (`hard`), or the mixture of all by their
            probability (`soft`; ours).
        inverse: `nearest` or `lstsq`.
        dropout: of whole channels before the classifier.
        logits_at_once: see `TokenHead`.
        ignore_index: see `SegmentationModule`, also for the arguments that follow.
        class_names: see there.
        mean: see there.
        std: see there.
        inference: see there.
        optimizer: see there.
        lr_scheduler: see there.
        head_lr_factor: see there.
        decay_norms: see there.
        anomaly_score: see there.

    Raises:
        ValueError: a wrong argument, or colours or a tokenizer that do not fit.
        FileNotFoundError: the file of the colours or of the tokenizer does not exist.

    Example:
        >>> small = {"level_channels": 16, "fused_channels": 32, "head_channels": 32}
        >>> model = GSS(num_classes=3, encoder="tu-test_resnet", **small).eval()
        >>> model(torch.rand(1, 3, 50, 70)).shape, model.picture(torch.rand(1, 3, 50, 70)).shape
        (torch.Size([1, 3, 50, 70]), torch.Size([1, 3, 52, 72]))
    """

    features: PixelFeatures
    not_kept = (*PixelModule.not_kept, "decoder")

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet50",
        encoder_weights: str | Path | None = None,
        network_options: dict[str, Any] | None = None,
        colors: Colors = "lattice",
        color_seed: int = 0,
        tokenizer: str | Path | TokenizerConfig = "majority-4",
        token_stride: Literal[4, 8] = 4,
        depth: int = 2,
        level_channels: int = 384,
        fused_channels: int = 512,
        head_channels: int = 2048,
        auxiliary: Auxiliary = "separate",
        token_loss_weight: float = 0.8,
        auxiliary_loss_weight: float = 0.2,
        avg_non_ignore: bool = False,
        decoding: Decoding = "hard",
        inverse: Literal["nearest", "lstsq"] = "nearest",
        dropout: float = 0.1,
        logits_at_once: int = 2**26,
        ignore_index: int = 255,
        class_names: list[str] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        inference: InferenceOptions | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        head_lr_factor: float = 1.0,
        decay_norms: bool = True,
        anomaly_score: AnomalyName | None = None,
    ) -> None:
        for name, weight in (
            ("token_loss_weight", token_loss_weight),
            ("auxiliary_loss_weight", auxiliary_loss_weight),
        ):
            if weight < 0:
                raise GenSegError(f"{name} is {weight}; it must be 0 (without the term) or more.")
        maskige = Maskige(class_colors(colors, num_classes, color_seed), ignore_index)
        class_table = maskige.colors[:-1]
        codes = make_tokenizer(tokenizer, class_table)
        super().__init__(
            num_classes,
            encoder=encoder,
            decoder="mla",
            encoder_weights=encoder_weights,
            network_options={
                **(network_options or {}),
                "level_channels": level_channels,
                "decoder_channels": fused_channels,
                "depth": depth,
                "stride": token_stride,
                "auxiliary": auxiliary,
            },
            ignore_index=ignore_index,
            class_names=class_names,
            mean=mean,
            std=std,
            inference=inference,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            head_lr_factor=head_lr_factor,
            decay_norms=decay_norms,
            anomaly_score=anomaly_score,
        )
        self.maskige, self.tokenizer = maskige, codes
        # What a checkpoint says of them: it holds what the files hold.
        named = (
            is_lasting(colors),
            not isinstance(tokenizer, Mapping | Path) and not Path(tokenizer).is_file(),
        )
        self._without_files: dict[str, Any] = {
            "colors": colors if named[0] else (self.maskige.colors * 255).round().long().tolist(),
            "tokenizer": tokenizer if named[1] else self.tokenizer.config(),
        }
        # Of a mere description the weights are in a checkpoint of this module, or nowhere.
        self._tokenizer_has_weights = (
            not isinstance(tokenizer, Mapping) or tokenizer["kind"] == "majority"
        )
        self.inverse: nn.Module = {"nearest": NearestColor, "lstsq": LeastSquares}[inverse](
            class_table
        )
        self.decoding = decoding
        stride, downsample = self.features.stride, self.tokenizer.downsample
        if stride != token_stride:
            raise GenSegError(
                f"token_stride is {token_stride} and the stages of {encoder} lead to {stride}: set "
                "token_stride to that, or leave encoder_depth and encoder_output_stride of "
                "network_options as they are."
            )
        if downsample < stride and stride % downsample:
            raise GenSegError(
                f"the tokens of {tokenizer} are {downsample} pixels wide, no whole part of "
                f"token_stride {stride}: choose another tokenizer."
            )
        self.head = TokenHead(
            fused_channels, self.tokenizer.codebook_size, head_channels, dropout, logits_at_once
        )
        self.token_loss_weight = token_loss_weight
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.avg_non_ignore = avg_non_ignore

    # --- prediction --------------------------------------------------------------------------

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` at the size of the image, rounded up to whole cells, and `features`, one a cell: see the base."""
        features = self.extract(image)[0]
        size = [side * self.features.stride for side in features.shape[-2:]]
        return {"logits": self.class_scores(self._paint(features), size), "features": features}

    def picture(self, image: Tensor) -> Tensor:
        """The maskige that is predicted: B x 3 x f h x f w in [0, 1], h x w being the cells that cover the image."""
        return self._paint(self.extract(image)[0])

    def _paint(self, features: Tensor) -> Tensor:
        if self.decoding == "soft":
            return self.tokenizer.decode_soft(self.head(features).float().softmax(1))
        return self.tokenizer.decode(self.head.predict(features))

    def class_scores(self, picture: Tensor, size: Sequence[int]) -> Tensor:
        """Scores B x K x H x W of a maskige, at another size.

        Args:
            picture: B x 3 x H' x W' in [0, 1].
            size: H and W.
        """
        votes = resize_maps(class_votes(self.inverse(picture)), size)
        return votes.clamp_min(_LEAST_VOTE).log()

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Bring maps that cover all cells to the size of `image`, bilinearly and in float32."""
        height, width = image.shape[-2:]
        cells = [-(-side // self.features.stride) for side in (height, width)]
        covered = [side * self.features.stride for side in cells]
        return resize_maps(scores.float(), covered)[..., :height, :width]

    # --- training ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> GSS:
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, `loss_token` and, with an auxiliary head, `loss_auxiliary`: see the base."""
        features, auxiliary = self.extract(batch["image"])
        size = [side * self.tokenizer.downsample for side in features.shape[-2:]]
        # By whole numbers this is what the code does: one-hot, bilinear, argmax.
        mask = resize_labels(self.cover(batch["mask"], features), size)
        labelled = mask != self.ignore_index
        losses, drawn = {}, mask
        if auxiliary is not None:
            scores = resize_maps(auxiliary.float(), size)
            losses["loss_auxiliary"] = self._mean(
                pixel_cross_entropy(scores, mask, self.ignore_index), labelled
            )
            drawn = torch.where(labelled, mask, scores.argmax(1))
        tokens = self.tokenizer.encode(self.maskige(drawn))
        counts = torch.ones_like(tokens, dtype=torch.bool)
        if auxiliary is not None:
            counts = F.max_pool2d(labelled[:, None].float(), self.tokenizer.downsample)[:, 0] > 0
        total = self.head.cross_entropy(features, tokens, counts)
        losses["loss_token"] = self._mean(total / counts.sum().clamp_min(1), counts)
        loss = self.token_loss_weight * losses["loss_token"]
        if auxiliary is not None:
            loss = loss + self.auxiliary_loss_weight * losses["loss_auxiliary"]
        return {"loss": loss, **losses}

    def _mean(self, loss: Tensor, counts: Tensor) -> Tensor:
        """A mean over what counts, or, by `avg_non_ignore`, over everything."""
        return loss if self.avg_non_ignore else loss * counts.float().mean()

    def setup(self, stage: str) -> None:
        """Refuse numbers in which colours cannot be told apart."""
        super().setup(stage)
        need_single_precision(self)

    def on_fit_start(self) -> None:
        """Colours and tokenizer are frozen, and more in a `GSSInverse`."""
        expect_frozen_parts()

    def on_train_start(self) -> None:
        """Refuse a tokenizer that was never trained: its weights come with a file or a checkpoint."""
        super().on_train_start()
        if not self._tokenizer_has_weights:
            raise GenSegError(
                "tokenizer is a mere description, without weights: give the .ckpt of a "
                "MaskigeTokenizer run, the file of a DALL-E dVAE, or majority-4."
            )

    # --- checkpoints -------------------------------------------------------------------------

    def fingerprints(self) -> dict[str, str]:
        """Digests of colours and tokenizer: what was learned with others does not fit."""
        return {"colors": self.maskige.fingerprint(), "tokenizer": self.tokenizer.fingerprint()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the files of colours and tokenizer: the checkpoint holds both."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fingerprints"] = self.fingerprints()
        checkpoint["tokenizer"] = self.tokenizer.config()
        checkpoint["hyper_parameters"] |= self._without_files

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one that was trained with other colours or another tokenizer."""
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint.get("fingerprints", {})
        ours = self.fingerprints()
        if not self._tokenizer_has_weights:
            ours.pop("tokenizer")  # they are about to be loaded
        check_fingerprints("the checkpoint", theirs, ours)
        self._tokenizer_has_weights = True


def check_fingerprints(what: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """ValueError if `what` was trained with other colours or another tokenizer; what has no fingerprint passes."""
    for name, remedy in (("colors", "these colors"), ("tokenizer", "this tokenizer")):
        if name in ours and theirs.get(name, ours[name]) != ours[name]:
            raise GenSegError(
                f"{what} was trained with "
                f"{'other colors' if name == 'colors' else 'another tokenizer'} ({theirs[name]}, "
                f"not {ours[name]}): use the same, or train with {remedy}."
            )
