"""Options of AGMM: which pixels count, and how much, in the Gaussian maps."""

from dataclasses import dataclass
from typing import Literal

from lightning_genseg.arguments import check_arguments


@dataclass(frozen=True)
class GaussianOptions:
    """Details in which we differ from the authors' code; the other value of each is theirs.

    Args:
        probability: where the probabilities that weight a `predicted` variance are computed: from
            the small logits of the `features`, or from logits at the size of the `image` and then
            brought down bilinearly (code). G differs by up to 2 %.
        padding: `exact` leaves padding out; `blurred` multiplies distances by the image's mask,
            brought down bilinearly (code): they shrink next to padding, and G grows.
        empty_images: images without a label in the crop are `left_out` of the self-supervision's
            mean, and those without any label of the image-class term; or `counted` (code).
    """

    probability: Literal["features", "image"] = "features"
    padding: Literal["exact", "blurred"] = "exact"
    empty_images: Literal["left_out", "counted"] = "left_out"

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        check_arguments(type(self), vars(self))
