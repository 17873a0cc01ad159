"""Augmentation of an image and its mask: the only room that knows albumentations.

Its names are imported when they are asked for, `transforms.Letterbox`: albumentations is a tenth of
what the command's start costs, and most commands and imports never use it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# albumentations asks a server for its newest version whenever it is imported; training must not
# need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

if TYPE_CHECKING:
    from lightning_genseg.data.transforms.crops import (
        Letterbox,
        RandomCropLimitedClass,
        RandomObjectCrop,
        RandomScaledCrop,
        Transform,
    )
    from lightning_genseg.data.transforms.photometric import PhotometricDistortion
    from lightning_genseg.data.transforms.pipeline import (
        apply,
        as_chain,
        compose,
        default_train_transform,
        episode_train_transform,
        shorter_side,
        single_thread,
    )

__all__ = [
    "Letterbox",
    "PhotometricDistortion",
    "RandomCropLimitedClass",
    "RandomObjectCrop",
    "RandomScaledCrop",
    "Transform",
    "apply",
    "as_chain",
    "compose",
    "default_train_transform",
    "episode_train_transform",
    "shorter_side",
    "single_thread",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        # All of them, so that a command knows every transform by its short name.
        modules = [import_module(f"{__name__}.{m}") for m in ("crops", "photometric", "pipeline")]
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
