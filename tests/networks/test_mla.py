import pytest
import torch
import torch.nn.functional as F

from lightning_genseg.networks.mla import MLADecoder, TokenHead

CHANNELS = (3, 0, 6, 8, 10, 12)


def stages(strides=(4, 8, 16, 32), batch=2):
    """Of images of 64 x 96, after the image itself and timm's placeholder."""
    maps = [
        torch.rand(batch, c, 64 // s, 96 // s) for c, s in zip(CHANNELS[2:], strides, strict=True)
    ]
    return [torch.rand(batch, 3, 64, 96), torch.empty(batch, 0, 32, 48), *maps]


@pytest.mark.parametrize("auxiliary", ["separate", "shared", "none"])
@pytest.mark.parametrize("stride", [4, 8])
def test_shapes_and_gradients(auxiliary, stride):
    decoder = MLADecoder(
        CHANNELS, 16, 32, depth=2, stride=stride, auxiliary=auxiliary, num_classes=5
    )
    output = decoder(stages())
    features, scores = output if auxiliary != "none" else (output, None)
    assert features.shape == (2, 32, 64 // stride, 96 // stride)
    loss = features.square().mean()
    if scores is not None:
        assert scores.shape == (2, 5, 64 // stride, 96 // stride)
        loss = loss + scores.square().mean()
    loss.backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_what_the_auxiliary_head_sees():
    shared = MLADecoder(CHANNELS, 16, 32, depth=1, auxiliary="shared", num_classes=5).eval()
    merged = shared.merge(stages()[2:])
    assert merged.shape == (2, 32, 16, 24)
    given = stages()
    _, scores = shared(given)
    torch.testing.assert_close(scores, shared.auxiliary(shared.merge(given[2:])))
    separate = MLADecoder(CHANNELS, 16, 32, depth=1, auxiliary="separate", num_classes=5)
    separate(given)[1].sum().backward()
    assert all(p.grad is None for p in separate.merge.parameters())


def test_a_dilated_encoder():
    """ResNet-101 in the published code: strides 4, 8, 8, 8."""
    decoder = MLADecoder(CHANNELS, 16, 32, depth=0)
    assert decoder(stages((4, 8, 8, 8))).shape == (2, 32, 16, 24)


@pytest.mark.parametrize(
    ("channels", "depth", "millions"),
    [
        ((192, 384, 768, 1536), 2, 23.9),  # Swin-L
        ((256, 512, 1024, 2048), 6, 32.7),  # ResNet-101
        ((48, 96, 192, 384), 6, 31.5),  # HRNet-W48
    ],
)
def test_published_sizes(channels, depth, millions):
    with torch.device("meta"):
        parts = MLADecoder(channels, depth=depth), TokenHead(512, 8192)
    count = sum(p.numel() for part in parts for p in part.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    with torch.device("meta"):
        both = MLADecoder((192, 384, 768, 1536), auxiliary="separate", num_classes=150)
        alone = MLADecoder((192, 384, 768, 1536))
    extra = sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in alone.parameters())
    assert extra / 1e6 == pytest.approx(1.76, abs=0.02)


def test_wrong_encoders():
    with pytest.raises(ValueError, match="MLA merges four stages and the encoder has the channels"):
        MLADecoder((3, 0, 6, 8, 10))
    with pytest.raises(ValueError, match="predicts classes: give it num_classes"):
        MLADecoder(CHANNELS, auxiliary="shared")


# --- tokens ------------------------------------------------------------------------------------


def cells(seed=0, size=(5, 7)):
    torch.manual_seed(seed)
    features = torch.randn(2, 8, *size, requires_grad=True)
    tokens = torch.randint(11, (2, *size))
    return features, tokens, torch.rand(2, *size) < 0.7


@pytest.mark.parametrize("cells_at_once", [1, 3, 10, 49])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_in_parts_it_is_the_plain_cross_entropy(cells_at_once, precision):
    results = []
    for at_once in (None, cells_at_once):
        features, tokens, valid = cells()
        torch.manual_seed(1)
        head = TokenHead(8, 11, width=12, dropout=0.5, logits_at_once=11 * (at_once or 1000))
        assert head.cells_at_once == (at_once or 1000)
        torch.manual_seed(2)  # the same channels are dropped
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            if at_once is None:
                logits = head(features).float()
                target = tokens.masked_fill(~valid, -100)
                loss = F.cross_entropy(logits, target, reduction="sum")
            else:
                loss = head.cross_entropy(features, tokens, valid)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append([loss, features.grad, *(p.grad for p in head.parameters())])
    tolerance = {"rtol": 5e-2, "atol": 0.15} if precision == "bfloat16" else {}
    for plain, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, plain, **tolerance)


def test_no_cell_counts():
    features, tokens, valid = cells()
    head = TokenHead(8, 11, width=12)
    loss = head.cross_entropy(features, tokens, torch.zeros_like(valid))
    loss.backward()
    assert loss == 0
    # Not None: distributed training would wait for them.
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_cells_that_do_not_count_get_no_logits():
    """Whatever token is asked for, also one that does not exist."""
    features, tokens, valid = cells()
    head = TokenHead(8, 11, width=12).eval()
    expected = head.cross_entropy(features, tokens, valid)
    assert head.cross_entropy(features, tokens.masked_fill(~valid, 99), valid) == expected


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_likeliest_tokens(at_once):
    features = cells()[0]
    head = TokenHead(8, 11, width=12, logits_at_once=at_once).eval()
    assert torch.equal(head.predict(features), head(features).argmax(1))


def test_wrong_heads():
    with pytest.raises(ValueError, match="logits_at_once is 0; it must be positive"):
        TokenHead(8, 11, logits_at_once=0)
    with pytest.raises(ValueError, match="the token head has 0 channels"):
        TokenHead(8, 11, width=0)
    with pytest.raises(ValueError, match="dropout of the token head is 2 but must be from 0"):
        TokenHead(8, 11, dropout=2)
