"""What a tokenizer keeps of masks."""

from typing import NamedTuple

from torch import Tensor, nn

from lightning_genseg.methods.gss.maskige import Maskige, class_votes
from lightning_genseg.methods.gss.tokenizers.tokenizer import Tokenizer
from lightning_genseg.ops.resize import resize_labels, resize_maps


class Reconstruction(NamedTuple):
    """What becomes of a mask."""

    tokens: Tensor  # B x h x w
    picture: Tensor  # B x 3 x H' x W'
    scores: Tensor  # B x K x H x W


def reconstruct(
    mask: Tensor, maskige: Maskige, tokenizer: Tokenizer, inverse: nn.Module, scale: float = 1.0
) -> Reconstruction:
    """Mask to maskige to tokens and back to class scores: the best that stage two could reach.

    Args:
        mask: B x H x W int64.
        maskige: draws it.
        tokenizer: encodes and decodes it.
        inverse: picture in [0, 1] to class scores.
        scale: size H' x W' at which the mask is drawn, relative to its own: f / s in stage two,
            which predicts a token for every s x s pixels. Other scales than 1 make votes of the
            scores, so that mixtures of two colours are not taken for a third.
    """
    size = mask.shape[-2:]
    drawn = mask
    if scale != 1:
        drawn = resize_labels(mask, [max(1, round(side * scale)) for side in size])
    tokens = tokenizer.encode(maskige(drawn))
    picture = tokenizer.decode(tokens)[..., : drawn.shape[-2], : drawn.shape[-1]]
    scores = inverse(picture)
    if drawn.shape != mask.shape:
        scores = resize_maps(class_votes(scores), size)
    return Reconstruction(tokens, picture, scores)
