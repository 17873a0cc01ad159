"""Pixel features: a segmentation network without its classifier."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError, did_you_mean, first_line
from lightning_genseg.networks.deeplab import DeepLabDecoder
from lightning_genseg.networks.fcn import FCNDecoder
from lightning_genseg.networks.hypercolumns import HypercolumnDecoder, PlainTransformer
from lightning_genseg.networks.mla import MLADecoder
from lightning_genseg.networks.ocrnet import OCRDecoder
from lightning_genseg.networks.weights import load_encoder
from lightning_genseg.ops.resize import crop
from lightning_genseg.ops.views import evaluation_mode, pad_to_multiple

# smp and timm are imported when a network is built: they take a third of this package's start.
_SMP_DECODERS = {
    name.lower(): name
    for name in (
        *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN"),
        *("DeepLabV3", "DeepLabV3Plus", "UPerNet", "Segformer"),
    )
}
_OWN_DECODERS: dict[str, Any] = {
    "deeplabv3plus_full": DeepLabDecoder, "fcn": FCNDecoder, "ocrnet": OCRDecoder,
    "mla": MLADecoder, "hypercolumns": HypercolumnDecoder,
}  # fmt: skip
DECODERS = (*_SMP_DECODERS, *_OWN_DECODERS)

# What this class decides itself, so that `options` may not.
_FIXED_OPTIONS = {
    "self", "kwargs", "encoder_name", "encoder_weights", "in_channels", "classes", "activation",
    "upsampling", "aux_params", "encoder_channels", "num_classes",
}  # fmt: skip

_AUXILIARY_WEIGHTS = {"ocrnet": 0.4, "mla": 0.25}
# These pool the image to one pixel and batch-normalise it: one image has no batch statistics.
_NEEDS_TWO_IMAGES = {"deeplabv3", "deeplabv3plus", "deeplabv3plus_full", "upernet", "pan"}

_TO_STRIDE_8 = {"deeplabv3plus_full", "fcn"}  # of our own
_DILATES_ENCODER = {"deeplabv3", "deeplabv3plus", "pan", *_TO_STRIDE_8}

# What networks raise where sizes and options do not go together.
MODEL_ERRORS = (AssertionError, LookupError, RuntimeError, TypeError, ValueError)


class PixelFeatures(nn.Module):
    """Encoder and decoder of a segmentation network, without the classifier on top.

    Built from segmentation-models-pytorch (smp) and the decoders of this package. Images of any
    size are padded at the right and the bottom with zeros, which is the mean colour of a normalised
    image, and the features are cropped back.

    Args:
        encoder: name of an smp encoder, or ``tu-`` and the name of a timm model.
        decoder: one of `DECODERS`.
        encoder_weights: ``"imagenet"`` downloads; a path to a state dict or checkpoint; or None.
        num_classes: C of the auxiliary scores of ``ocrnet`` and ``mla``.
        options: further arguments of the smp model or of the decoder, and for ``tu-`` encoders of
            timm, such as ``{"decoder_channels": 128}`` or ``{"img_size": 512}``.

    Attributes:
        out_channels: channels F of the features.
        stride: image pixels per feature pixel, 4, or more for decoders that stay coarser
            (``deeplabv3``, ``pspnet``, ``fcn`` and ``hypercolumns``: 8). Decoders finer than 4 are
            average-pooled to 4, so that a mixture never runs at image resolution.
        predicts_classes: whether there are auxiliary scores.
        auxiliary_weight: loss weight of the auxiliary scores: 0.4 for ``ocrnet``, 0.25 for ``mla``
            (GSS' 0.2 to 0.8), 0 for the others, which have none.

    Raises:
        GenSegError: a name, an option or a combination that does not work, or weights that do not
            fit.
        MissingFileError: the file of the weights is missing.
        DownloadError: the weights cannot be downloaded.
    """

    def __init__(
        self,
        encoder: str,
        decoder: str,
        encoder_weights: str | Path | None = None,
        num_classes: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_arguments(PixelFeatures.__init__, locals(), num_classes="[1, inf)")
        check_encoder_name(encoder)
        if decoder not in DECODERS:
            raise GenSegError(f"decoder {decoder!r} is unknown{did_you_mean(decoder, DECODERS)}")
        if decoder == "ocrnet" and num_classes is None:
            raise GenSegError("decoder 'ocrnet' predicts coarse classes: give it num_classes.")
        options = dict(options or {})
        self.name = f"{decoder} on {encoder}"
        self.encoder, self.decoder = _build(encoder, decoder, num_classes, options)
        self.auxiliary_weight = _AUXILIARY_WEIGHTS.get(decoder, 0.0)
        self._multiple = int(self.encoder.output_stride)  # type: ignore[arg-type]
        # PAN halves its coarsest map three times.
        self._minimum = 8 * self._multiple if decoder == "pan" else self._multiple
        self._batch_pools = decoder in _NEEDS_TWO_IMAGES
        self._image_size = _fixed_image_size(self.encoder)
        self._pool = 1
        self.out_channels, self.stride, self.predicts_classes = self._measure()
        if self.stride < 4:
            self._pool, self.stride = 4 // self.stride, 4
        if encoder_weights is not None:
            accepted = _accepted_options(decoder)
            timm_options = {k: v for k, v in options.items() if k not in accepted}
            load_encoder(self.encoder, encoder, encoder_weights, timm_options)

    def forward(self, image: Tensor) -> Tensor:
        """Features B x F x ceil(H/stride) x ceil(W/stride) of normalised images B x 3 x H x W."""
        return self.extract(image)[0]

    def extract(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and the auxiliary class scores B x C x h x w of ``ocrnet`` and ``mla``."""
        height, width = image.shape[-2:]
        if self._batch_pools and _trains_norms(self.decoder) and len(image) == 1:
            raise GenSegError(
                f"{self.name} batch-normalises a globally pooled pixel and cannot train on one "
                "image: use a batch size of at least 2 and drop the last incomplete batch."
            )
        padded = pad_to_multiple(image, self._multiple, self._minimum)
        if self._image_size is not None and tuple(padded.shape[-2:]) != self._image_size:
            raise GenSegError(
                f"{self.name} takes images of exactly {self._image_size[0]} x "
                f"{self._image_size[1]} pixels and got {height} x {width}: set the option img_size "
                "to the size you train on, or strict_img_size to false for any size."
            )
        output = self.decoder(self.encoder(padded))
        features, auxiliary = output if isinstance(output, tuple) else (output, None)
        if self._pool > 1:
            features = F.avg_pool2d(features, self._pool)
            auxiliary = None if auxiliary is None else F.avg_pool2d(auxiliary, self._pool)
        rows, columns = ((side + self.stride - 1) // self.stride for side in (height, width))
        auxiliary = None if auxiliary is None else crop(auxiliary, rows, columns)
        return crop(features, rows, columns), auxiliary

    @torch.no_grad()
    def _measure(self) -> tuple[int, int, bool]:
        """Channels, stride and whether there are auxiliary scores, from one small blank image."""
        size = self._image_size or (max(64, self._minimum),) * 2
        image = torch.zeros(1, 3, *size, device=next(self.parameters()).device)
        try:
            with evaluation_mode(self):
                output = self.decoder(self.encoder(image))
        except MODEL_ERRORS as error:
            raise GenSegError(f"{self.name} does not work: {first_line(error)}.") from error
        auxiliary = isinstance(output, tuple)
        features = output[0] if auxiliary else output
        return features.shape[1], size[0] // features.shape[2], auxiliary


def feature_channels(features: nn.Module) -> int:
    """Number of channels F that a feature extractor gives: B x 3 x H x W -> B x F x h x w.

    Reads the integer attribute ``out_channels``; without it, runs one blank image of 64 x 64.

    Raises:
        GenSegError: the module does not take such an image, or does not return such features.
    """
    channels = getattr(features, "out_channels", None)
    if isinstance(channels, int):
        return channels
    name = type(features).__name__
    parameter = next(features.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, 64, 64, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad(), evaluation_mode(features):
            output = features(image)
    except MODEL_ERRORS as error:
        raise GenSegError(
            f"features {name} failed on a 1 x 3 x 64 x 64 image ({first_line(error)}): make it "
            "accept one, or give the module an integer attribute out_channels."
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[0] != 1:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise GenSegError(
            f"features {name} must map B x 3 x H x W to one tensor B x F x h x w, but a "
            f"1 x 3 x 64 x 64 image gave {got}."
        )
    return int(output.shape[1])


def check_encoder_name(encoder: str) -> None:
    """Refuse an encoder that neither smp nor timm has."""
    import timm
    from segmentation_models_pytorch.encoders import encoders as smp_encoders

    name = encoder.removeprefix("tu-")
    if encoder in smp_encoders or (encoder != name and timm.is_model(name)):
        return
    if timm.is_model(encoder):
        raise GenSegError(f"encoder {encoder!r} is a timm model: write 'tu-{encoder}'.")
    known = [*smp_encoders, *(f"tu-{name}" for name in timm.list_models())]
    raise GenSegError(
        f"encoder {encoder!r} is no encoder of smp, nor 'tu-' and the name of a timm model"
        f"{did_you_mean(encoder, known)}"
    )


def _decoder_class(decoder: str) -> Any:
    """Of smp a whole network, of ours the decoder alone."""
    if decoder in _OWN_DECODERS:
        return _OWN_DECODERS[decoder]
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, _SMP_DECODERS[decoder])


def _accepted_options(decoder: str) -> list[str]:
    names = set(inspect.signature(_decoder_class(decoder)).parameters)
    if decoder in _OWN_DECODERS:
        names |= {"encoder_depth", "encoder_output_stride"}
    return sorted(names - _FIXED_OPTIONS)


def _build(
    encoder: str, decoder: str, num_classes: int | None, options: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    accepted = _accepted_options(decoder)

    def unknown(option: str) -> GenSegError:
        hint = did_you_mean(option, accepted)
        return GenSegError(f"option {option!r} is not one of {decoder} on {encoder}{hint}")

    for key in options:
        # timm models have options of their own; a wrong one is caught when they are built.
        if key in _FIXED_OPTIONS or (key not in accepted and not encoder.startswith("tu-")):
            raise unknown(key)
    try:
        if decoder in _SMP_DECODERS:
            model = _decoder_class(decoder)(encoder, encoder_weights=None, **options)
            return model.encoder, model.decoder
        from segmentation_models_pytorch.encoders import get_encoder

        own = inspect.signature(_OWN_DECODERS[decoder]).parameters
        arguments = {key: value for key, value in options.items() if key in own}
        if "num_classes" in own:
            arguments["num_classes"] = num_classes
        backbone = {key: value for key, value in options.items() if key not in own}
        to_8 = decoder in _TO_STRIDE_8
        timm = encoder.removeprefix("tu-")
        if decoder == "hypercolumns" and encoder != timm and PlainTransformer.is_one(timm):
            plain = PlainTransformer(timm, backbone.pop("encoder_depth", 5), **backbone)
            return plain, HypercolumnDecoder(plain.out_channels, **arguments)
        network = get_encoder(
            encoder,
            weights=None,
            depth=backbone.pop("encoder_depth", 5),
            output_stride=backbone.pop("encoder_output_stride", 8 if to_8 else 32),
            **backbone,
        )
        return network, _OWN_DECODERS[decoder](network.out_channels, **arguments)
    except GenSegError:
        raise
    except MODEL_ERRORS as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if named and named[1] in options:
            raise unknown(named[1]) from error
        reason = first_line(error)
        if decoder in _DILATES_ENCODER and re.search("dilat|output.?stride", reason, re.IGNORECASE):
            other = (
                ", or set the option encoder_output_stride to 32" if decoder in _TO_STRIDE_8 else ""
            )
            raise GenSegError(
                f"decoder {decoder!r} needs an encoder whose strides can be replaced by dilation, "
                f"and {encoder!r} cannot ({reason}): choose a ResNet or MobileNet, or another "
                f"decoder{other}."
            ) from error
        raise GenSegError(
            f"{decoder} on {encoder} cannot be built ({reason}): choose another encoder, decoder "
            "or options."
        ) from error


def _trains_norms(module: nn.Module) -> bool:
    return any(m.training for m in module.modules() if isinstance(m, nn.BatchNorm2d))


def _fixed_image_size(encoder: nn.Module) -> tuple[int, int] | None:
    """The only image size a timm transformer accepts, if it is strict about one."""
    for module in encoder.modules():
        if getattr(module, "strict_img_size", False) and getattr(module, "img_size", None):
            height, width = cast(tuple[int, int], module.img_size)
            return height, width
    return None
