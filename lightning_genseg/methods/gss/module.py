"""GSS: segmentation as generating the mask's picture, token by token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_genseg.arguments import as_options, check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.methods.base import expect_frozen_parts
from lightning_genseg.methods.gss.colors import Colors, class_colors, is_lasting
from lightning_genseg.methods.gss.head import TokenHead
from lightning_genseg.methods.gss.maskige import (
    LeastSquares,
    Maskige,
    NearestColor,
    class_votes,
)
from lightning_genseg.methods.gss.options import Decoding, TokenDecoderOptions
from lightning_genseg.methods.gss.tokenizers.load import lasting_source, make_tokenizer
from lightning_genseg.methods.pixel import PixelModule
from lightning_genseg.networks.features import PixelFeatures
from lightning_genseg.networks.losses import pixel_cross_entropy
from lightning_genseg.ops.inference_options import has_several_views
from lightning_genseg.ops.processes import mean_over
from lightning_genseg.ops.resize import crop, resize_labels, resize_maps
from lightning_genseg.ops.views import evaluation_mode

_LEAST_VOTE = 1e-6  # log 0 is no score


class GSS(PixelModule):
    """Draws from an image its mask's picture, the maskige, and reads the classes off that.

    Generative Semantic Segmentation, Chen et al., CVPR 2023: stage two, colours and tokenizer
    frozen. This is GSS-FF; with `colors="random"` FF-R; with colours of a `LearnedColors` run TF.
    `GSSInverse` makes FT and FT-W of it.

    Per cell of s x s pixels, a classifier over V tokens: no sampling, one pass. The encoder must
    have four stages. The mask is enlarged by f/s, so that a cell of the tokenizer (f x f pixels) is
    a cell of the network. A cell counts as soon as one of its pixels is labelled; its others are
    drawn as the auxiliary head predicts them. Each pixel of the picture votes for one class; scores
    are the logarithm of the share of votes, so that their softmax is that share.

    - As the authors' code: the defaults, with DALL-E's dVAE as `tokenizer` and the data set's own
      `colors`; below 2 048 `head_channels` also `decoder.initial_deviation` 0.01. Cells without any
      label are not learned, means are over labelled cells and pixels, classes are read by the
      nearest colour, and windows are merged as shares of votes.
    - As the paper: `inverse: lstsq`, which finds only colours at the corners of the cube: 14 of 150
      on ADE20K. Eq. 7, by which the auxiliary head's predictions also supervise cells without
      label, and its condition on tokens are in no code, nor here.
    - Ours: tokenizers `majority` and `vq`; colours `lattice` and `repulsion`; `decoding: soft`; an
      initial deviation that goes by the width. The dVAE runs in float32 on a GPU. Images that are
      no multiple of s are predicted on whole cells and cropped, not stretched. Swin blocks do not
      shift where one window covers the map, and their MLPs start by Xavier's rule.

    Args:
        num_classes: K.
        decoder: from the encoder's stages to tokens.
        colors: of the classes and of unlabelled pixels: a name such as `lattice`, a .json file or a
            list; see `class_colors`.
        color_seed: of the colours that are drawn at random.
        tokenizer: `majority-4` or `majority-8`; the .ckpt of a `MaskigeTokenizer` run; the file of
            a DALL-E dVAE; or, in a checkpoint of this module, kind and sizes.
        token_loss_weight: of the cross-entropy of tokens.
        auxiliary_loss_weight: of the cross-entropy of the auxiliary head.
        avg_non_ignore: mean over labelled cells and pixels (code); false: over everything, as by
            mmsegmentation's default, so that images with few labels have a small loss.
        decoding: the likeliest token of each cell (`hard`), the picture of their mixture (`soft`;
            ours), or for each pixel the probability of all tokens that draw a class there, each
            on its own (`marginal`; ours): then scores are probabilities, not votes.
        inverse: `nearest` or `lstsq`.
        network_options: further arguments of the encoder, such as `img_size` or
            `encoder_output_stride`.

    Raises:
        GenSegError: a wrong argument, or colours or a tokenizer that do not fit.
        MissingFileError: the file of the colours or of the tokenizer does not exist.

    Example:
        >>> small = TokenDecoderOptions(level_channels=16, fused_channels=32, head_channels=32)
        >>> model = GSS(num_classes=3, encoder="tu-test_resnet", decoder=small).eval()
        >>> model(torch.rand(1, 3, 50, 70)).shape, model.picture(torch.rand(1, 3, 50, 70)).shape
        (torch.Size([1, 3, 50, 70]), torch.Size([1, 3, 52, 72]))
    """

    features: PixelFeatures
    chosen_anew = (*PixelModule.chosen_anew, "decoding")
    view_activation = None  # shares are averaged as they are
    constant_scores = ("energy",)  # the shares sum to one

    def __init__(
        self,
        num_classes: int,
        decoder: TokenDecoderOptions = TokenDecoderOptions(),
        colors: Colors = "lattice",
        color_seed: int = 0,
        tokenizer: str | Path | dict[str, Any] = "majority-4",
        token_loss_weight: float = 0.8,
        auxiliary_loss_weight: float = 0.2,
        avg_non_ignore: bool = True,
        decoding: Decoding = "hard",
        inverse: Literal["nearest", "lstsq"] = "nearest",
        network_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(
            GSS.__init__,
            locals(),
            num_classes="[2, inf)",
            color_seed="[0, inf)",
            token_loss_weight="[0, inf)",
            auxiliary_loss_weight="[0, inf)",
        )
        decoder = as_options(TokenDecoderOptions, decoder)
        if "features" in kwargs:
            raise GenSegError(
                "GSS takes no features: its tokens are read from its own decoder. Leave it out."
            )
        own_options = {
            "level_channels": decoder.level_channels,
            "decoder_channels": decoder.fused_channels,
            "depth": decoder.depth,
            "stride": decoder.stride,
            "auxiliary": decoder.auxiliary,
        }
        for name in own_options.keys() & (network_options or {}).keys():
            raise GenSegError(
                f"GSS takes no network_options.{name}: its decoder has options of its own, named "
                "decoder.*."
            )
        table = class_colors(colors, num_classes, color_seed)
        codes = make_tokenizer(tokenizer, torch.tensor(table[:-1]) / 255)
        super().__init__(
            num_classes,
            decoder="mla",
            network_options={**(network_options or {}), **own_options},
            features=None,
            **kwargs,
        )
        self.maskige, self.tokenizer = Maskige(table, self.ignore_index), codes
        # What a checkpoint says of them: it holds what their files hold.
        self._without_files: dict[str, Any] = {
            "colors": colors if is_lasting(colors) else table,
            "tokenizer": lasting_source(codes),
        }
        self.inverse: nn.Module = {"nearest": NearestColor, "lstsq": LeastSquares}[inverse](
            self.maskige.colors[:-1]
        )
        self.decoding = decoding
        stride, downsample = self.features.stride, self.tokenizer.downsample
        if stride != decoder.stride:
            raise GenSegError(
                f"decoder.stride is {decoder.stride} and the stages of {self.features.name} lead "
                f"to {stride}: set decoder.stride to that, or leave encoder_depth and "
                "encoder_output_stride of network_options as they are."
            )
        if downsample < stride and stride % downsample:
            raise GenSegError(
                f"the tokens of {tokenizer} are {downsample} pixels wide, no whole part of "
                f"decoder.stride {stride}: choose another tokenizer."
            )
        drawn = None
        if decoder.classes == "shared":
            drawn = torch.zeros(self.tokenizer.codebook_size, self.tokenizer.downsample**2).long()
            if not self.tokenizer.lacks_weights:  # otherwise a checkpoint is about to bring it
                drawn = self.inverse(self.tokenizer.token_pictures()).argmax(1)
        self.head = TokenHead(self.tokenizer.codebook_size, decoder, drawn, num_classes)
        self._is_full = False  # its vocabulary, as far as was told
        self.token_loss_weight = token_loss_weight
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.avg_non_ignore = avg_non_ignore

    # --- prediction --------------------------------------------------------------------------

    def outputs(self, image: Tensor) -> dict[str, Tensor]:
        """`logits` at the size of the image, rounded up to whole cells, and `features` per cell."""
        features = self.extract(image)[0]
        size = self.covered_size(features)
        if self.decoding == "marginal":
            logits = _log_shares(self.expected_votes(features), size)
        else:
            logits = self.class_scores(self.paint(features), size)
        return {"logits": logits, "features": features}

    def expected_votes(self, features: Tensor) -> Tensor:
        """Probability that a pixel's token draws each class there, B x K x f h x f w.

        Every token is drawn among its own kind, so that the cells around it do not matter.
        """
        probabilities = self.head(features).float().softmax(1)
        drawn = class_votes(self.inverse(self.tokenizer.token_pictures()))  # V x K x f x f
        kernel = rearrange(drawn, "v k i j -> (k i j) v 1 1")
        with torch.autocast(features.device.type, enabled=False):  # else they sum to 0.998
            votes = F.conv2d(probabilities, kernel)
        return F.pixel_shuffle(votes, self.tokenizer.downsample)

    @torch.no_grad()
    def picture(self, image: Tensor) -> Tensor:
        """The predicted maskige, B x 3 x f h x f w in [0, 1]; h x w cells cover the image."""
        with evaluation_mode(self):
            return self.paint(self.extract(image)[0])

    def paint(self, features: Tensor) -> Tensor:
        """The predicted maskige, B x 3 x f h x f w in [0, 1], of features B x F x h x w."""
        if self.decoding == "soft":
            return self.tokenizer.decode_soft(self.head(features).float().softmax(1))
        return self.tokenizer.decode(self.head.predict(features))

    def covered_size(self, features: Tensor) -> list[int]:
        """Height and width in pixels of the image that the cells of `features` cover."""
        return [side * self.features.stride for side in features.shape[-2:]]

    def class_scores(self, picture: Tensor, size: Sequence[int]) -> Tensor:
        """Scores B x K x H x W of a maskige, at another size.

        Args:
            picture: B x 3 x H' x W' in [0, 1].
            size: H and W.
        """
        return _log_shares(class_votes(self.inverse(picture)), size)

    def prediction_options(self) -> dict[str, Any]:
        """And how tokens are read."""
        return {**super().prediction_options(), "decoding": self.decoding}

    def maps_to_average(self, image: Tensor) -> dict[str, Tensor]:
        """As in the base, but shares of votes.

        The mean of their logarithms could be won by a class that no window has chosen.
        """
        maps = self.maps(image)
        return {**maps, "scores": maps["scores"].exp()}

    def from_average(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logarithms of shares again; those of several views stay, as in other methods."""
        if has_several_views(self.inference):
            return maps
        return {**maps, "scores": maps["scores"].log()}

    def to_image(self, scores: Tensor, image: Tensor) -> Tensor:
        """Bring maps that cover all cells to the size of `image`, bilinearly and in float32."""
        (height, width), stride = image.shape[-2:], self.features.stride
        covered = [(side + stride - 1) // stride * stride for side in (height, width)]
        return crop(resize_maps(scores.float(), covered), height, width)

    # --- training ----------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def compute_loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`loss`, `loss_token` and, with an auxiliary head, `loss_auxiliary`."""
        features, auxiliary = self.extract(batch["image"])
        size = [side * self.tokenizer.downsample for side in features.shape[-2:]]
        # By whole numbers this is what the code does: one-hot, bilinear, argmax.
        mask = resize_labels(self.cover(batch["mask"], features), size)
        labelled = mask != self.ignore_index
        losses, drawn = {}, mask
        if auxiliary is not None:
            scores = resize_maps(auxiliary.float(), size)
            losses["loss_auxiliary"] = pixel_cross_entropy(
                scores, mask, self.ignore_index, self.avg_non_ignore
            )
            drawn = torch.where(labelled, mask, scores.argmax(1))
        tokens = self.tokenizer.encode(self.maskige(drawn))
        counts = torch.ones_like(tokens, dtype=torch.bool)
        if auxiliary is not None:
            counts = F.max_pool2d(labelled[:, None].float(), self.tokenizer.downsample)[:, 0] > 0
        total, learned = self.head.cross_entropy(features, tokens, counts)
        cells = learned if self.avg_non_ignore else counts.numel()
        losses["loss_token"] = mean_over(total, cells)
        loss = self.token_loss_weight * losses["loss_token"]
        if auxiliary is not None:
            loss = loss + self.auxiliary_loss_weight * losses["loss_auxiliary"]
        return {"loss": loss, **losses}

    def on_fit_start(self) -> None:
        """Refuse a tokenizer that was never trained; others are frozen with good reason."""
        super().on_fit_start()
        expect_frozen_parts()
        self.tokenizer.need_weights()

    def on_train_epoch_end(self) -> None:
        """Warn once `decoder.vocabulary` holds no more tokens."""
        super().on_train_epoch_end()
        if self.head.has_vocabulary and not self._is_full and self.head.is_full():
            self._is_full = True
            rank_zero_warn(
                f"all {self.head.places} places of decoder.vocabulary are taken: tokens that come "
                "from now on are not learned; give a larger number if there are many."
            )

    # --- checkpoints -------------------------------------------------------------------------

    def fingerprints(self) -> dict[str, str]:
        """Digests of colours and tokenizer."""
        return {"colors": self.maskige.fingerprint(), "tokenizer": self.tokenizer.fingerprint()}

    def refuse_others(self, what: str, theirs: Mapping[str, str]) -> None:
        """Refuse what was trained with other colours or another tokenizer: it does not fit.

        Args:
            what: for the message.
            theirs: `fingerprints` of it; one that is missing passes.
        """
        for name, ours in self.fingerprints().items():
            # The weights of one that lacks them are about to be loaded.
            known = name == "colors" or not self.tokenizer.lacks_weights
            if known and theirs.get(name, ours) != ours:
                other = "other colors" if name == "colors" else "another tokenizer"
                raise GenSegError(
                    f"{what} was trained with {other} ({theirs[name]}, not {ours}): use the same, "
                    "or train again."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the files of colours and tokenizer: the checkpoint holds both."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["fingerprints"] = self.fingerprints()
        checkpoint["tokenizer"] = self.tokenizer.config()
        checkpoint["hyper_parameters"] |= self._without_files

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one that was trained with other colours or another tokenizer."""
        super().on_load_checkpoint(checkpoint)
        self.refuse_others("the checkpoint", checkpoint.get("fingerprints", {}))


def _log_shares(votes: Tensor, size: Sequence[int]) -> Tensor:
    return resize_maps(votes, size).clamp_min(_LEAST_VOTE).log()
