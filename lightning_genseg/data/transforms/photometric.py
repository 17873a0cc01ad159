"""Changes of colour that albumentations does not have as one."""

from typing import Any

import albumentations as A


class PhotometricDistortion(A.Sequential):  # type: ignore[misc]
    """mmsegmentation's `PhotoMetricDistortion`.

    In half of the images each, brightness changes by up to 32 of 255, contrast and saturation by
    factors of 0.5 to 1.5, and hue by up to 36 degrees. mmsegmentation puts contrast last in half of
    the images; here it always comes second.
    """

    def __init__(self) -> None:
        one, off = (1.0, 1.0), (0.0, 0.0)
        super().__init__(
            [
                A.RandomBrightnessContrast((-0.125, 0.125), off, p=0.5),
                A.RandomBrightnessContrast(off, (-0.5, 0.5), p=0.5),
                A.ColorJitter(one, one, (0.5, 1.5), off, p=0.5),
                A.ColorJitter(one, one, one, (-0.1, 0.1), p=0.5),
            ],
            p=1.0,
        )

    def __call__(self, *args: Any, force_apply: bool = True, **data: Any) -> dict[str, Any]:
        """Transform the image; forced, because `Sequential` draws a number even where p is 1."""
        result: dict[str, Any] = super().__call__(*args, force_apply=True, **data)
        return result
