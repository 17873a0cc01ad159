"""Options of GSS: the network that predicts tokens, and the tokenizer that learns from masks."""

from dataclasses import dataclass
from typing import Literal

from lightning_genseg.arguments import check_arguments
from lightning_genseg.errors import GenSegError
from lightning_genseg.networks.mla import Auxiliary

PriorDecoding = Literal["hard", "soft"]
Decoding = Literal["hard", "soft", "marginal"]


@dataclass(frozen=True)
class TokenDecoderOptions:
    """The way from the encoder's stages to tokens: `MLADecoder`, then `TokenHead`.

    Args:
        stride: s, image pixels per token: 4 or 8 (d = 1/4 or 1/8 in the paper).
        depth: Swin blocks; the code has 2 on Swin-L, 6 on ResNet-101 and HRNet-W48; 0 is Table 3
            without MLA.
        level_channels: of each stage once reduced.
        fused_channels: of the map that the Swin blocks see; a multiple of 32.
        head_channels: before the classifier of tokens.
        auxiliary: head that predicts classes pixel by pixel while training: with a branch of its
            own (`separate`: Cityscapes, ADE20K), from the fused map (`shared`: MSeg), or `none`
            (Table 3): unlabelled pixels are then drawn in their own colour, and cells without any
            label are learned as well.
        initial_deviation: of the weights of the classifier of tokens; None: 0.01 (the code's) at
            2 048 channels, and more at fewer, so that logits begin equally far apart.
        dropout: of whole channels before the classifier.
        logits_at_once: most logits of tokens that exist at a time; fewer need less memory.
        classes: how the classifier's weights of a token come about: `free` of all others (paper and
            code), or `shared`: to them is added the mean, over the pixels that the token draws, of
            weights of the class there. What is learned of a rare class then serves all its tokens.
        vocabulary: how many different tokens are learned at most: those that come first in training
            masks, and no other is predicted. None: all of the tokenizer's, as in paper and code.
    """

    stride: Literal[4, 8] = 4
    depth: int = 2
    level_channels: int = 384
    fused_channels: int = 512
    head_channels: int = 2048
    auxiliary: Auxiliary = "separate"
    initial_deviation: float | None = None
    dropout: float = 0.1
    logits_at_once: int = 2**26
    classes: Literal["free", "shared"] = "free"
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_arguments(
            type(self),
            vars(self),
            depth="[0, inf)",
            level_channels="[1, inf)",
            fused_channels="[1, inf)",
            head_channels="[1, inf)",
            initial_deviation="[0, inf)",
            dropout="[0, 1)",
            logits_at_once="[1, inf)",
            vocabulary="[1, inf)",
        )


@dataclass(frozen=True)
class VQOptions:
    """Sizes of a `MaskigeVQ`; all of them are ours.

    Args:
        downsample: f, side of a cell in pixels.
        levels: values of each of the d numbers that make a token; V is their product.
        channels: of the residual blocks.
        blocks: on either side, each of which sees one more ring of cells.
    """

    downsample: int = 4
    levels: tuple[int, ...] = (8, 5, 5, 5)
    channels: int = 128
    blocks: int = 2

    def __post_init__(self) -> None:
        """Refuse what makes no network."""
        check_arguments(
            type(self),
            vars(self),
            downsample="[1, inf)",
            levels="[2, inf)",
            channels="[1, inf)",
            blocks="[0, inf)",
        )
        if not self.levels:
            raise GenSegError("levels is empty; give numbers from 2, such as 8, 5, 5, 5.")


@dataclass(frozen=True)
class VariationOptions:
    """How the masks that a tokenizer learns from are varied.

    Args:
        permute_classes: exchange the classes of every mask at random, so that all colours become
            equally frequent.
        corrupted_share: probability that a mask is corrupted, as a network's predictions are.
        procedural_share: probability that a mask is drawn at random instead; 1 needs no masks.
    """

    permute_classes: bool = True
    corrupted_share: float = 0.25
    procedural_share: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        check_arguments(type(self), vars(self), corrupted_share="[0, 1]", procedural_share="[0, 1]")
