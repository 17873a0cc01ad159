"""Networks of few-shot segmentation: encoder, pyramid pooling, BAM's decoder and its ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError, first_line
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.networks.features import MODEL_ERRORS, check_encoder_name
from lightning_genseg.networks.weights import load_encoder
from lightning_genseg.ops.resize import resize_aligned

OutputStride = Literal[8, 16, 32]


class StageFeatures(NamedTuple):
    """Features of images from the last three stages of an encoder.

    Attributes:
        low: B x C x h x w of the third stage from the end (ResNet: layer2), of whatever size it
            has.
        mid: the second from the end (layer3); its size h x w is that of the others.
        high: the last (layer4), resized to h x w where it has another.
    """

    low: Tensor
    mid: Tensor
    high: Tensor

    def middle(self) -> Tensor:
        """`mid` and `low` together, B x C x h x w: what CGMGM and BAM call mid-level features."""
        return torch.cat([self.mid, resize_aligned(self.low, self.mid.shape[-2:])], 1)


class EncoderStages(nn.Module):
    """The last three stages of an image encoder, dilated to one resolution.

    BAM's and PFENet's backbone: ResNet's layer3 and layer4 keep the resolution of layer2 (stride
    8), by dilating all their 3 x 3 convolutions. VGG (whose pooling cannot be dilated) loses its
    last pooling and rounds sizes up, stride 16. Images are not padded: 473 x 473 pixels give
    60 x 60. BAM's ResNet-50, with a stem of three convolutions, is ``tu-resnet50s``.

    Args:
        encoder: name of an smp encoder, or ``tu-`` and the name of a timm model.
        encoder_weights: ``"imagenet"`` downloads; a path to a state dict or checkpoint; or None.
        output_stride: of all but VGG; 32 for encoders that cannot be dilated.

    Attributes:
        name: of the encoder.
        output_stride: as given.
        channels: of `low`, `mid` and `high`.

    Raises:
        GenSegError: an unknown name, an encoder that cannot be dilated, or weights that do not fit.
        MissingFileError: the file of the weights is missing.
        DownloadError: the weights cannot be downloaded.
    """

    def __init__(
        self,
        encoder: str,
        encoder_weights: str | Path | None = None,
        output_stride: OutputStride = 8,
    ) -> None:
        super().__init__()
        check_arguments(EncoderStages.__init__, locals())
        check_encoder_name(encoder)
        from segmentation_models_pytorch.encoders import get_encoder

        self.name, self.output_stride = encoder, output_stride
        stride = 32 if encoder.startswith("vgg") else output_stride
        try:
            self.encoder = get_encoder(encoder, weights=None, depth=5, output_stride=stride)
        except MODEL_ERRORS as error:
            raise GenSegError(
                f"encoder {encoder!r} cannot be built with output_stride {stride} "
                f"({first_line(error)}): set output_stride to 32, or choose a ResNet, MobileNet or "
                "VGG."
            ) from error
        if encoder_weights is not None:
            load_encoder(self.encoder, encoder, encoder_weights, {})
        for stage in _timm_resnet_stages(self.encoder) if stride < 32 else ():
            _dilate_first_block(stage)
        vgg = _is_a(self.encoder, "VGGEncoder")
        low, mid, high = self.encoder.out_channels[2:5] if vgg else self.encoder.out_channels[-3:]
        self.channels: tuple[int, int, int] = (low, mid, high)
        if vgg:
            for module in self.encoder.features:
                if isinstance(module, nn.MaxPool2d):
                    module.ceil_mode = True
            return
        with torch.no_grad():  # some encoders accept an output stride and ignore it
            got = 64 // self.encoder.eval()(torch.zeros(1, 3, 64, 64))[-1].shape[-1]
        self.encoder.train()
        if got != stride:
            raise GenSegError(
                f"encoder {encoder!r} has an output stride of {got} where {stride} was asked for: "
                f"set output_stride to {got}, or choose a ResNet, MobileNet or VGG."
            )

    def forward(self, image: Tensor) -> StageFeatures:
        """Features of normalised images B x 3 x H x W."""
        encoder = self.encoder
        if _is_a(encoder, "VGGEncoder"):  # behind the third and fourth pooling, before the fifth
            third, fourth, fifth = _vgg_cuts(encoder)[2:]
            low = encoder.features[:third](image)
            mid = encoder.features[third:fourth](low)
            high = encoder.features[fourth : fifth - 1](mid)
        else:
            low, mid, high = encoder(image)[-3:]
        return StageFeatures(low, mid, resize_aligned(high, mid.shape[-2:]))

    def last(self, mid: Tensor) -> Tensor:
        """`high` from `mid`, for features that were masked in between.

        Raises:
            GenSegError: the encoder's last stage cannot be called on its own.
        """
        encoder = self.encoder
        if _is_a(encoder, "ResNetEncoder"):
            stage: nn.Module = encoder.layer4
        elif _is_a(encoder, "MobileNetV2Encoder"):
            stage = encoder.features[14:]
        elif _is_a(encoder, "VGGEncoder"):
            stage = encoder.features[_vgg_cuts(encoder)[3] : -1]
        elif stages := _timm_resnet_stages(encoder):
            stage = stages[1]
        else:
            raise GenSegError(
                f"the last stage of {type(encoder).__name__} cannot be run apart: choose a ResNet, "
                "MobileNetV2 or VGG encoder, or set mask_before_last_stage to false."
            )
        return resize_aligned(stage(mid), mid.shape[-2:])


def _is_a(module: nn.Module, *names: str) -> bool:
    """Whether it is of a class of smp or timm, which are imported when a network is built."""
    return any(base.__name__ in names for base in type(module).__mro__)


def _timm_resnet_stages(encoder: nn.Module) -> tuple[nn.Sequential, ...]:
    """`layer3` and `layer4` of a ResNet of timm; of other encoders none."""
    named = dict(encoder.named_modules())
    stages = [named.get(f"model.{name}") for name in ("layer3", "layer4")]
    return tuple(
        stage
        for stage in stages
        if isinstance(stage, nn.Sequential) and _is_a(stage[0], "BasicBlock", "Bottleneck")
    )


def _dilate_first_block(stage: nn.Sequential) -> None:
    """As its other blocks: timm leaves it at the dilation of the stage before."""
    for name, conv in stage[0].named_modules():
        if name in ("conv1", "conv2"):
            other = stage[-1].get_submodule(name)
            conv.dilation, conv.padding = other.dilation, other.padding


def _vgg_cuts(encoder: Any) -> list[int]:
    """Index behind each pooling."""
    pools = (isinstance(module, nn.MaxPool2d) for module in encoder.features)
    return [index + 1 for index, pool in enumerate(pools) if pool]


class PyramidPooling(nn.Module):
    """PSPNet's head without its classifier: context of four grids, then a 3x3 convolution.

    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, in BAM's sizes: grids of 1, 2, 3, 6 cells
    per side, of C/4 channels.

    Args:
        in_channels: C of the encoder's last stage.
        out_channels: F of the features.
    """

    def __init__(self, in_channels: int, out_channels: int = 512) -> None:
        super().__init__()
        each = in_channels // 4
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv_bn_relu(in_channels, each, 1))
            for cells in (1, 2, 3, 6)
        )
        self.fuse = conv_bn_relu(in_channels + 4 * each, out_channels, 3)
        self.out_channels = out_channels

    def forward(self, high: Tensor) -> Tensor:
        """B x C x h x w to B x F x h x w.

        Raises:
            GenSegError: one image in training: its pooled pixel has no batch statistics.
        """
        if self.training and len(high) == 1:
            raise GenSegError(
                "the base learner batch-normalises a globally pooled pixel and cannot train on one "
                "image: use a batch size of at least 2."
            )
        levels = [resize_aligned(level(high), high.shape[-2:]) for level in self.levels]
        features: Tensor = self.fuse(torch.cat([high, *levels], 1))
        return features


class GuidedDecoder(nn.Module):
    """The meta learner's decoder: query features and guidance to scores of the two classes.

    BAM's (after PFENet and CANet): 1x1 merge, atrous spatial pyramid pooling, one residual block,
    classifier; no batch normalisation.

    Args:
        in_channels: of features and guidance together.
        channels: of everything inside.
    """

    def __init__(self, in_channels: int, channels: int = 256) -> None:
        super().__init__()

        def conv(inputs: int, size: int = 1, dilation: int = 1, bias: bool = True) -> nn.Sequential:
            padding = dilation * (size // 2)
            layer = nn.Conv2d(inputs, channels, size, 1, padding, dilation, bias=bias)
            if bias:  # only the pyramid's, in BAM
                nn.init.kaiming_normal_(layer.weight)
            return nn.Sequential(layer, nn.ReLU())

        self.merge = conv(in_channels, bias=False)
        self.context = conv(channels)
        pyramid = ((1, 1), (3, 6), (3, 12), (3, 18))
        self.branches = nn.ModuleList(conv(channels, *branch) for branch in pyramid)
        self.fuse = conv(5 * channels, bias=False)
        self.residual = nn.Sequential(*(conv(channels, 3, bias=False) for _ in range(2)))
        self.classifier = nn.Sequential(
            conv(channels, 3, bias=False), nn.Dropout2d(0.1), nn.Conv2d(channels, 2, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """B x C x h x w to B x 2 x h x w."""
        features = self.merge(features)
        context = self.context(features.mean((2, 3), keepdim=True)).expand_as(features)
        features = self.fuse(torch.cat([context, *(b(features) for b in self.branches)], 1))
        scores: Tensor = self.classifier(self.residual(features) + features)
        return scores


class GuidanceResidual(nn.Module):
    """Scores that a decoder adds to: the guidance, scaled and shifted by two learned numbers.

    Not in the papers. Their decoder has to find out which of its inputs the guidance is, which
    takes longer than short schedules last; with this one it starts where the guidance alone would
    end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, guidance: Tensor) -> Tensor:
        """Guidance B x 1 x h x w, cut to [0, 1], to scores of the two classes B x 2 x h x w."""
        score = self.scale * (2 * guidance.clamp(0, 1) - 1) + self.shift
        return torch.cat([-score, score], 1)


class ShotWeights(nn.Module):
    """How much each support image counts, from how unlike the query its style is: BAM's, Sec. 3.5.

    Two layers with biases between K and 2 numbers, as in BAM's code, and a softmax.

    Args:
        shots: K of training. With another number of supports, or with 1, all count alike.
    """

    def __init__(self, shots: int) -> None:
        super().__init__()
        self.shots = shots
        if shots > 1:
            self.layers = nn.Sequential(nn.Linear(shots, 2), nn.ReLU(), nn.Linear(2, shots))

    def forward(self, distances: Tensor) -> Tensor:
        """Distances B x K of `gram_distance` to weights B x K that sum to one."""
        if self.shots == 1 or distances.shape[1] != self.shots:
            return torch.full_like(distances, 1 / distances.shape[1])
        with torch.autocast(distances.device.type, enabled=False):
            ordered, order = distances.float().sort(1)
            scores = torch.zeros_like(ordered).scatter(1, order, self.layers(ordered))
            return scores.softmax(1)


def gram_distance(query: Tensor, support: Tensor) -> Tensor:
    """Difference in style of two images, from 0 to 1: BAM's adjustment factor psi.

    Frobenius distance of the matrices of cosines between channel maps, over C. Of features
    B x C x h x w each, of any size, to B.
    """

    def gram(features: Tensor) -> Tensor:
        maps = features.float().flatten(2)
        norms = maps.norm(dim=2)
        cosines: Tensor = maps @ maps.mT / (norms[:, :, None] * norms[:, None] + 1e-7)
        return cosines

    with torch.autocast(query.device.type, enabled=False):
        distance: Tensor = (gram(query) - gram(support)).norm(dim=(1, 2))
        return distance / query.shape[1]


class Ensemble(nn.Module):
    """Suppresses what the base learner knows: BAM's merge of meta and base learner, Sec. 3.4.

    Mixes probabilities, which then serve as scores, as in BAM's code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Conv2d(2, 1, 1, bias=False)
        self.known = nn.Conv2d(2, 1, 1, bias=False)
        for conv in (self.style, self.known):
            nn.init.zeros_(conv.weight)
            nn.init.ones_(conv.weight[:, :1])

    def forward(self, meta: Tensor, known: Tensor, distance: Tensor) -> Tensor:
        """Final scores B x 2 x h x w.

        Args:
            meta: probabilities of background and foreground, B x 2 x h x w.
            known: probability of any base class, B x 1 x h x w.
            distance: psi, B.
        """
        with torch.autocast(meta.device.type, enabled=False):  # else many pixels tie
            meta, known = meta.float(), known.float()
            psi = distance.float()[:, None, None, None].expand_as(known)
            background, foreground = (
                self.style(torch.cat([meta[:, side : side + 1], psi], 1)) for side in (0, 1)
            )
            background = self.known(torch.cat([background, known], 1))
            return torch.cat([background, foreground], 1)

    def to_logits(self, scores: Tensor) -> Tensor:
        """Logits of final scores, which are probabilities but for their sum.

        With a learned merge they may be negative; then the lower one counts as 0.
        """
        return (scores - scores.amin(1, keepdim=True).clamp_max(0)).clamp_min(1e-6).log()
