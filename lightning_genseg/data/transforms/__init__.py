"""Augmentation of an image and its mask: the only room that knows albumentations."""

import os

# albumentations asks a server for its newest version whenever it is imported; training must not
# need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from lightning_genseg.data.transforms.crops import (
    Letterbox,
    RandomCropLimitedClass,
    RandomObjectCrop,
    RandomScaledCrop,
)
from lightning_genseg.data.transforms.photometric import PhotometricDistortion

__all__ = [
    "Letterbox",
    "PhotometricDistortion",
    "RandomCropLimitedClass",
    "RandomObjectCrop",
    "RandomScaledCrop",
]
