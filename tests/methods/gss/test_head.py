import pytest
import torch
import torch.nn.functional as F

from lightning_genseg import TokenDecoderOptions
from lightning_genseg.methods.gss.head import TokenHead


def make(logits_at_once=2**26, dropout=0.1):
    options = {"fused_channels": 8, "head_channels": 12, "dropout": dropout}
    return TokenHead(11, TokenDecoderOptions(**options, logits_at_once=logits_at_once))


def cells(size=(5, 7)):
    torch.manual_seed(0)
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
        head = make(11 * (at_once or 1000), dropout=0.5)
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
    head = make()
    loss = head.cross_entropy(features, tokens, torch.zeros_like(valid))
    loss.backward()
    assert loss == 0
    # Not None: distributed training would wait for them.
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_cells_that_do_not_count_get_no_logits():
    """Whatever token is asked for, also one that does not exist."""
    features, tokens, valid = cells()
    head = make().eval()
    expected = head.cross_entropy(features, tokens, valid)
    assert head.cross_entropy(features, tokens.masked_fill(~valid, 99), valid) == expected


@pytest.mark.parametrize("at_once", [1, 100, 10_000])
def test_likeliest_tokens(at_once):
    features = cells()[0]
    head = make(at_once).eval()
    assert torch.equal(head.predict(features), head(features).argmax(1))


@pytest.mark.parametrize(
    ("width", "given", "expected"), [(2048, None, 0.01), (128, None, 0.04), (128, 0.01, 0.01)]
)
def test_initial_deviation_goes_by_the_width(width, given, expected):
    options = {"fused_channels": 8, "head_channels": width, "initial_deviation": given}
    classifier = TokenHead(500, TokenDecoderOptions(**options)).classifier
    assert classifier.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert not classifier.bias.any()
