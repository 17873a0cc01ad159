"""The token head of GSS: a classifier over thousands of tokens for every cell."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_genseg.methods.gss.options import TokenDecoderOptions
from lightning_genseg.networks.fcn import conv_bn_relu
from lightning_genseg.ops.processes import true_anywhere
from lightning_genseg.ops.resize import is_exporting

_IGNORED = -100  # target of cells that do not count
# Logit of tokens that are not in the vocabulary. Finite: before the first one is, all have it.
_ABSENT = -1e4


class TokenHead(nn.Module):
    """Which of V tokens each cell holds.

    GSS' code: a 1x1 convolution, dropout of whole channels, a 1x1 convolution to V, whose weights
    begin as N(0, 0.01). That is meant for 2 048 channels: at fewer all logits would begin nearly
    alike, and rare classes were not found in a short training. Here it grows with their number F as
    (2048 / F)^0.5.

    The logits of 8 192 tokens at a quarter of 512 x 512 are 512 MB an image. Where there are many
    they are made in parts, and in the backward pass once more.

    With a `vocabulary` (ours) there are logits for the tokens only that have come in training so
    far: each gets a place once it comes, and the state keeps who has which. The cross-entropy is
    exact over these. Once no place is left, cells with other tokens are not learned.

    With `classes: shared` (ours) the weights of a token are its own and the mean of those of the
    classes that it draws, pixel by pixel. Tokens of a rare class are each too rare to be learned
    alone: of 1 000 tokens, 800 steps on IDD-Lite found no living thing.

    Args:
        codebook_size: V.
        options: F, the channels before the classifier, dropout, how many logits there may be, the
            size of the vocabulary, and whether tokens share the weights of classes.
        drawn: V x f x f classes that each token draws, for `classes: shared`.
        num_classes: K.
    """

    drawn: Tensor  # V x f^2: class k of pixel p as p K + k
    place_of: Tensor  # V: of each token, -1 without one
    token_of: Tensor  # of each place, and one more that nobody reads
    taken: Tensor  # number of places

    def __init__(
        self,
        codebook_size: int,
        options: TokenDecoderOptions,
        drawn: Tensor | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        width = options.head_channels
        self.expand = conv_bn_relu(options.fused_channels, width, 1)
        self.dropout = nn.Dropout2d(options.dropout)
        places = options.vocabulary
        self.has_vocabulary = places is not None and places < codebook_size
        self.places = places if places is not None and self.has_vocabulary else codebook_size
        self.classifier = nn.Conv2d(width, self.places, 1)
        if self.has_vocabulary:
            self.register_buffer("place_of", torch.full((codebook_size,), -1))
            self.register_buffer("token_of", torch.zeros(self.places + 1, dtype=torch.long))
            self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        deviation = options.initial_deviation
        if deviation is None:
            deviation = 0.01 * (2048 / width) ** 0.5
        nn.init.normal_(self.classifier.weight, std=deviation)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)
        self.class_weight: nn.Parameter | None = None
        if options.classes == "shared" and drawn is not None:
            drawn = drawn.flatten(1)
            pixels = drawn.shape[1]
            self.register_buffer("drawn", torch.arange(pixels) * num_classes + drawn)
            self.class_weight = nn.Parameter(torch.empty(pixels * num_classes, width))
            # The mean of a pure token then deviates as its own weights do.
            nn.init.normal_(self.class_weight, std=deviation * pixels**0.5)
        self.cells_at_once = max(1, options.logits_at_once // self.places)

    def forward(self, features: Tensor) -> Tensor:
        """Logits B x V x h x w, all at once."""
        weight, bias = self._classifier()
        logits = F.conv2d(self.dropout(self.expand(features)), weight[..., None, None], bias)
        if not self.has_vocabulary:
            return logits
        others = logits.new_full((), _ABSENT).expand_as(logits[:, :1])
        index = torch.where(self.place_of < 0, self.places, self.place_of)
        return torch.cat([logits, others], 1).index_select(1, index)

    def predict(self, features: Tensor) -> Tensor:
        """Likeliest tokens B x h x w."""
        if is_exporting():  # how many parts there are depends on the image
            logits: Tensor = self(features)
            return logits.argmax(1)
        cells = self.dropout(self.expand(features)).movedim(1, -1)
        parts = cells.flatten(0, 2).split(self.cells_at_once)
        with torch.no_grad():
            classifier = self._classifier()
            tokens = torch.cat([F.linear(part, *classifier).argmax(1) for part in parts])
        if self.has_vocabulary:
            tokens = self.token_of[tokens]
        return tokens.view(cells.shape[:3])

    def cross_entropy(
        self, features: Tensor, tokens: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy, in float32, and the number of cells that it is over.

        These are the cells that count, without those whose token has no place in the vocabulary.

        Args:
            features: B x F x h x w.
            tokens: B x h x w int64.
            valid: B x h x w bool, cells that count.
        """
        cells = self.dropout(self.expand(features)).movedim(1, -1).flatten(0, 2)
        # Cells that do not count stay: to leave them out the CPU would wait for the GPU.
        if self.has_vocabulary:
            if self.training:
                self._remember(tokens, valid)
            tokens = self.place_of[tokens]
            valid = valid & (tokens >= 0)
        targets = torch.where(valid, tokens, _IGNORED).flatten()
        weight, bias = self._classifier()
        if len(cells) <= self.cells_at_once:
            return _cross_entropy(cells, weight, bias, targets), valid.sum()
        total: Tensor = cells.new_zeros((), dtype=torch.float32)
        for part, target in zip(
            cells.split(self.cells_at_once), targets.split(self.cells_at_once), strict=True
        ):
            loss: Tensor = checkpoint(
                _cross_entropy, part, weight, bias, target, use_reentrant=False
            )
            total = total + loss
        return total, valid.sum()

    def is_full(self) -> bool:
        """Whether no place of the vocabulary is left; waits for a GPU."""
        return self.has_vocabulary and int(self.taken) == self.places

    @torch.no_grad()
    def _remember(self, tokens: Tensor, valid: Tensor) -> None:
        """Give places to tokens that come for the first time, in all processes the same ones."""
        size = len(self.place_of)
        come = torch.zeros(size + 1, dtype=torch.bool, device=tokens.device)
        come.index_fill_(0, torch.where(valid, tokens, size).flatten(), True)
        new = true_anywhere(come[:-1]) & (self.place_of < 0)
        place = self.taken + new.cumsum(0) - 1
        new &= place < self.places
        self.place_of.copy_(torch.where(new, place, self.place_of))
        every = torch.arange(size, device=tokens.device)
        self.token_of.scatter_(0, torch.where(new, place, self.places), every)
        self.taken += new.sum()

    def _classifier(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.classifier.weight.flatten(1), self.classifier.bias
        assert bias is not None
        if self.class_weight is not None:
            drawn = self.drawn[self.token_of[:-1]] if self.has_vocabulary else self.drawn
            weight = weight + F.embedding_bag(drawn, self.class_weight, mode="mean")
        if self.has_vocabulary:
            free = torch.arange(self.places, device=bias.device) >= self.taken
            bias = bias.masked_fill(free, _ABSENT)
        return weight, bias


def _cross_entropy(cells: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(cells, weight, bias).float()
    loss: Tensor = F.cross_entropy(logits, target, reduction="sum", ignore_index=_IGNORED)
    return loss
