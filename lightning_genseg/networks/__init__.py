"""Networks that more than one method uses."""

from lightning_genseg.networks.features import PixelFeatures, feature_channels, load_weights

__all__ = ["PixelFeatures", "feature_channels", "load_weights"]
