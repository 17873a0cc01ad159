"""Encoders, decoders and losses that several methods share."""

from lightning_genseg.networks.features import DECODERS, PixelFeatures

__all__ = ["DECODERS", "PixelFeatures"]
